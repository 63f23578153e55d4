"""DoLa: decoding by the contrast of the last layer with an earlier one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fmodels.generation.options import Options
from fmodels.generation.sample import sample
from fmodels.generation.strategy import Model, Strategy
from fmodels.types import Array, Output

RELATIVE_TOP = 0.1
"""Tokens less likely than the likeliest by more than this factor are dropped."""


def dola(model: Model, options: Options, *, layers: tuple[int, ...], **rest: Any) -> Strategy:
    """`sample` with logits `log p - log q`, where `q` is what an earlier layer would say, through the final head.

    Of several layers the one whose distribution is farthest from the last layer's is taken, by the mean of the divergence
    over the rows of the batch.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        layers: candidates: the hidden state before layer `i` is read; static.
        rest: what `sample` takes.

    Source: Chuang et al. 2023; matches transformers 4.55's `_dola_decoding`, in whose mean rows that have ended go on to
    count.
    """

    def read(out: Output, alive: Array) -> Array:
        assert out.logits is not None and out.hidden_states is not None
        early = out.hidden_states[jnp.asarray(layers), :, -1]
        return contrast(out.logits[:, -1], model.head(early), alive)

    return sample(model, options, read=read, **rest)


def contrast(last: Array, early: Array, alive: Array) -> Array:
    """The contrasted logits.

    Args:
        last: `(b v)`, the logits.
        early: `(n b v)`, the logits of the candidates.
        alive: `(b)` bool, rows that have a say in which candidate is taken.

    Returns:
        `(b v)` float32, `-inf` where a token is dropped.
    """
    mature = jax.nn.log_softmax(last, axis=-1)
    chosen = early[0]
    if early.shape[0] > 1:
        chosen = early[jnp.argmax(jnp.where(alive[None], _divergence(mature, early), 0.0).sum(-1))]
    base = jax.nn.log_softmax(chosen, axis=-1)
    limit = mature.max(-1, keepdims=True) + math.log(RELATIVE_TOP)
    return jnp.where(mature < limit, -jnp.inf, mature - base)


def _divergence(mature: Array, early: Array) -> Array:
    """`(n b)`: the mean over the vocabulary of the Jensen-Shannon divergence, of `(b v)` from `(n b v)`."""
    premature = jax.nn.log_softmax(early, axis=-1)
    mean = 0.5 * (jnp.exp(mature)[None] + jnp.exp(premature))
    entropy = jnp.where(mean > 0, mean * jnp.log(jnp.where(mean > 0, mean, 1.0)), 0.0)
    return 0.5 * ((entropy - mean * mature[None]).mean(-1) + (entropy - mean * premature).mean(-1))
