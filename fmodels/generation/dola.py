"""DoLa: decoding by the contrast of the last layer with an earlier one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fmodels.generation.options import Options
from fmodels.generation.sample import sample
from fmodels.generation.strategy import Model, Next, Result, Strategy
from fmodels.types import Array, Cache, Output

RELATIVE_TOP = 0.1
"""Tokens less likely than the likeliest by more than this factor are dropped."""


def dola(model: Model, options: Options, *, layers: tuple[int, ...], **rest: Any) -> Strategy:
    """`sample` with logits `log p - log q`, where `q` is what an earlier layer would say, through the final head.

    Of several layers the one whose distribution is farthest from the last layer's is taken, by the mean of the divergence
    over the rows of the batch. So rows depend on each other; those that have ended go on to read their end token and pads
    after it, and to count.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        layers: candidates: the hidden state before layer `i` is read; static.
        rest: what `sample` takes.

    Source: Chuang et al. 2023; matches transformers 4.55's `_dola_decoding`.
    """

    def read(says: Next) -> Array:
        early = says.layers["hidden_states"][:, jnp.asarray(layers)].swapaxes(0, 1)
        return contrast(says.logits, model.head(early))

    def decode(tokens: Array, positions: Array, cache: Cache, mask: Array | None = None, **want: Any) -> Output:
        there = cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
        return model.decode(jnp.where(there == positions, tokens, options.pad), there, cache, **want)

    def finish(state: Any) -> Result:
        result, cache = strategy.finish(state), state.cache
        said = jnp.cumsum(cache.mask, axis=-1) < state.history.length[:, None]
        return result._replace(cache=cache._replace(mask=cache.mask & said))

    strategy = sample(model._replace(decode=decode), options, read=read, **rest)
    return strategy._replace(finish=finish)


def contrast(last: Array, early: Array) -> Array:
    """The contrasted logits.

    Args:
        last: `(b v)`, the logits.
        early: `(n b v)`, the logits of the candidates.

    Returns:
        `(b v)` float32, `-inf` where a token is dropped.
    """
    mature = jax.nn.log_softmax(last, axis=-1)
    chosen = early[0] if early.shape[0] == 1 else early[jnp.argmax(_divergence(mature, early).mean(-1))]
    base = jax.nn.log_softmax(chosen, axis=-1)
    limit = mature.max(-1, keepdims=True) + math.log(RELATIVE_TOP)
    return jnp.where(mature < limit, -jnp.inf, mature - base)


def _divergence(mature: Array, early: Array) -> Array:
    """`(n b)`: the mean over the vocabulary of the Jensen-Shannon divergence, of `(b v)` from `(n b v)`."""
    premature = jax.nn.log_softmax(early, axis=-1)
    mean = 0.5 * (jnp.exp(mature)[None] + jnp.exp(premature))
    entropy = jnp.where(mean > 0, mean * jnp.log(jnp.where(mean > 0, mean, 1.0)), 0.0)
    return 0.5 * ((entropy - mean * mature[None]).mean(-1) + (entropy - mean * premature).mean(-1))
