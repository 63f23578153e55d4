"""Sampling: the functions that cut the tail of a distribution, and the draw.

The cuts work on logits in descending order, where most of them keep a prefix. A step sorts only the `CANDIDATES`
likeliest tokens, and the whole vocabulary just when the cuts leave more than those: sorting 32000 numbers takes XLA's
CPU backend as long as a 50 M model takes for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.arrays import largest
from fmodels.types import Array, Key

CANDIDATES = 256
"""How many of the likeliest tokens are looked at first; at least the 100 of top-h."""
TOP_H = 100
"""The number of tokens of which top-h takes the entropy, as in transformers."""


class Warp(NamedTuple):
    """The parameters of the cuts, `(b)` each, in the order in which they are applied; each has a value that does nothing.

    Attributes:
        temperature: divides the logits; 1.
        top_h: share of the entropy that is kept, in (0, 1]; 2 does nothing.
        top_k: how many are kept; 0.
        top_p: probability that is kept; 1.
        min_p: least share of the likeliest one's probability; 0.
        typical_p: probability of the typical tokens that are kept; 1.
        epsilon_cutoff: least probability; 0.
        eta_cutoff: least probability, lower where the entropy is high; 0.
    """

    temperature: Array
    top_h: Array
    top_k: Array
    top_p: Array
    min_p: Array
    typical_p: Array
    epsilon_cutoff: Array
    eta_cutoff: Array


class _Ordered(NamedTuple):
    """Logits in descending order `(b c)`, and the log of the mass `(b)` of those that come after them."""

    values: Array
    tail: Array

    def log_probabilities(self) -> Array:
        """Of `values`; the tail counts in the normaliser."""
        return self.values - jnp.logaddexp(jax.nn.logsumexp(self.values, axis=-1), self.tail)[:, None]

    def dropping(self, drop: Array, keep: int = 1) -> _Ordered:
        """Without those where `drop`, but with the first `keep`; the tail goes with the last of them."""
        drop = drop & (jnp.arange(drop.shape[1]) >= keep)[None]
        return _Ordered(jnp.where(drop, -jnp.inf, self.values), jnp.where(drop[:, -1], -jnp.inf, self.tail))


Mark = Callable[[Array, Array], Array]
"""`mark(values (b c), tokens (b c)) -> (b c)`: other logits for tokens; `-inf` stays."""
_Cut = Callable[[_Ordered, Array, int], _Ordered]


def _top_h(ordered: _Ordered, share: Array, keep: int) -> _Ordered:
    first = (jnp.arange(ordered.values.shape[1]) < TOP_H)[None]
    logs = jax.nn.log_softmax(jnp.where(first, ordered.values, -jnp.inf), axis=-1)
    terms = jnp.where(jnp.isneginf(logs), 0.0, -jnp.exp(logs) * logs)
    over = jnp.cumsum(terms, axis=-1) > (terms.sum(-1) * share)[:, None]
    cut = ordered.dropping(over | ~first)
    on = share <= 1.0
    tail = jnp.where(on, -jnp.inf, ordered.tail)
    return _Ordered(jnp.where(on[:, None], cut.values, ordered.values), tail)


def _top_k(ordered: _Ordered, k: Array, keep: int) -> _Ordered:
    k = jnp.where(k > 0, jnp.maximum(k, keep), k)
    size = ordered.values.shape[1]
    last = jnp.clip(k, 1, size) - 1
    threshold = jnp.take_along_axis(ordered.values, last[:, None], axis=-1)
    inside = (k > 0) & (k <= size)
    cut = ordered.dropping((ordered.values < threshold) & inside[:, None])
    return cut


def _top_p(ordered: _Ordered, p: Array, keep: int) -> _Ordered:
    probabilities = jnp.exp(ordered.log_probabilities())
    after = jnp.cumsum(probabilities[:, ::-1], axis=-1)[:, ::-1] + _tail_probability(ordered)[:, None]
    return ordered.dropping((after <= 1.0 - p[:, None]) & (p < 1.0)[:, None], keep)


def _tail_probability(ordered: _Ordered) -> Array:
    total = jnp.logaddexp(jax.nn.logsumexp(ordered.values, axis=-1), ordered.tail)
    return jnp.exp(ordered.tail - total)


def _min_p(ordered: _Ordered, p: Array, keep: int) -> _Ordered:
    probabilities = jnp.exp(ordered.log_probabilities())
    return ordered.dropping(probabilities < p[:, None] * probabilities[:, :1], keep)


def _typical_p(ordered: _Ordered, mass: Array, keep: int) -> _Ordered:
    logs = ordered.log_probabilities()
    probabilities = jnp.exp(logs)
    away = jnp.abs(-logs - _entropy(logs)[:, None])
    order = jnp.argsort(away, axis=-1)
    reached = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1) < mass[:, None]
    last = jnp.clip(reached.sum(-1), keep - 1, away.shape[1] - 1)
    limit = jnp.take_along_axis(away, jnp.take_along_axis(order, last[:, None], axis=-1), axis=-1)
    return ordered._replace(values=jnp.where((away > limit) & (mass < 1.0)[:, None], -jnp.inf, ordered.values))


def _epsilon_cutoff(ordered: _Ordered, epsilon: Array, keep: int) -> _Ordered:
    return _below(ordered, ordered.log_probabilities(), epsilon, keep)


def _eta_cutoff(ordered: _Ordered, epsilon: Array, keep: int) -> _Ordered:
    logs = ordered.log_probabilities()
    return _below(ordered, logs, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(logs))), keep)


def _below(ordered: _Ordered, logs: Array, least: Array, keep: int) -> _Ordered:
    # After typical_p the kept ones need not come first: what is never dropped is found by value.
    floor = largest(ordered.values, min(keep, ordered.values.shape[1]))[0][:, -1:]
    drop = (jnp.exp(logs) < least[:, None]) & (ordered.values < floor)
    return ordered._replace(values=jnp.where(drop, -jnp.inf, ordered.values))


def _entropy(logs: Array) -> Array:
    return -jnp.where(jnp.isneginf(logs), 0.0, jnp.exp(logs) * logs).sum(-1)


PREFIXES: dict[str, _Cut] = {"top_h": _top_h, "top_k": _top_k, "top_p": _top_p, "min_p": _min_p}
"""Cuts that keep the likeliest tokens."""
OTHERS: dict[str, _Cut] = {"typical_p": _typical_p, "epsilon_cutoff": _epsilon_cutoff, "eta_cutoff": _eta_cutoff}
"""Cuts that need to know all that the others have left."""


def _cut(ordered: _Ordered, warp: Warp, keep: int) -> tuple[_Ordered, Array]:
    """The logits after all cuts, and `(b)` whether nothing is left in the tail."""
    for name, function in PREFIXES.items():
        ordered = function(ordered, getattr(warp, name), keep)
    complete = jnp.isneginf(ordered.tail)
    for name, function in OTHERS.items():
        ordered = function(ordered, getattr(warp, name), keep)
    return ordered, complete


def _cuts(warp: Warp) -> Array:
    """`(b)` whether the row has any cut at all."""
    return (
        (warp.top_h <= 1.0)
        | (warp.top_k > 0)
        | (warp.top_p < 1.0)
        | (warp.min_p > 0.0)
        | (warp.typical_p < 1.0)
        | (warp.epsilon_cutoff > 0.0)
        | (warp.eta_cutoff > 0.0)
    )


def warp_logits(logits: Array, warp: Warp, *, keep: int = 1) -> Array:
    """All cuts, over the whole vocabulary.

    Args:
        logits: `(b v)` float32.
        warp: the parameters.
        keep: how many tokens are left at least.

    Returns:
        `(b v)`, `-inf` where a token is dropped.

    Source: matches transformers 5's warpers (temperature; Potraghloo et al. 2025 for top-h; Fan et al. 2018 for top-k;
    Holtzman et al. 2019 for top-p; Nguyen et al. 2024 for min-p; Meister et al. 2022 for typical; Hewitt et al. 2022 for
    epsilon and eta).
    """
    logits = logits / warp.temperature[:, None]
    return jax.lax.cond(_cuts(warp).any(), lambda x: _whole(x, lambda o: _cut(o, warp, keep)[0]), lambda x: x, logits)


def _whole(logits: Array, cut: Callable[[_Ordered], _Ordered]) -> Array:
    order = jnp.argsort(-logits, axis=-1)
    ordered = _Ordered(jnp.take_along_axis(logits, order, axis=-1), jnp.full(logits.shape[0], -jnp.inf))
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(cut(ordered).values, unique_indices=True)


def cut(name: str, logits: Array, value: Array, *, keep: int = 1) -> Array:
    """One of the cuts, by its name in `Warp`, over the whole vocabulary.

    Example:
        >>> import jax.numpy as jnp
        >>> cut("top_k", jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2]))
        Array([[-inf,   3.,   2.]], dtype=float32)
    """
    return _whole(logits, lambda ordered: {**PREFIXES, **OTHERS}[name](ordered, value, keep))


def draw(logits: Array, warp: Warp, key: Key, mark: Mark | None = None) -> tuple[Array, Array]:
    """A token of each row from its warped distribution.

    The noise of a token depends on the row's key and the token alone (the Gumbel trick), so that it is the same whether
    the whole vocabulary is looked at or not, and whatever the other rows are.

    Args:
        logits: `(b v)` float32, not warped.
        warp: the parameters.
        key: random key, `()` for all rows or `(b)`, one for each.
        mark: what is done to the logits after the cuts.

    Returns:
        `(b)` int32 tokens and `(b)` float32, the log of their probability in that distribution.
    """
    batch, vocabulary = logits.shape
    size = min(CANDIDATES, vocabulary)
    logits = logits / warp.temperature[:, None]
    keys = key if key.ndim else row_keys(key, batch)
    unheated = warp._replace(temperature=jnp.ones_like(warp.temperature))

    def likeliest(values: Array, tokens: Array) -> tuple[Array, Array]:
        values = values if mark is None else mark(values, tokens)
        # Not argmax: XLA's CPU backend would make the noise within the loop that looks for the largest, number by number.
        place = largest(values + gumbel(keys, tokens), 1)[1]
        token, value = (jnp.take_along_axis(x, place, axis=-1)[:, 0] for x in (tokens, values))
        return token, value - jax.nn.logsumexp(values, axis=-1)

    def of_all() -> tuple[Array, Array]:
        return likeliest(warp_logits(logits, unheated), everyone(logits))

    def of_few() -> tuple[Array, Array]:
        # Without barriers XLA takes the last value out of a sort of the whole vocabulary; with one of both, its partitioner
        # for several devices ends the process (jaxlib 0.10.2).
        values, tokens = map(jax.lax.optimization_barrier, largest(logits, size))
        tokens = tokens.astype(jnp.int32)
        last = values[:, -1:]
        ties = (logits >= last).sum(-1) - size  # equal to the last candidate, and not among them
        tail = jnp.logaddexp(
            jax.nn.logsumexp(jnp.where(logits < last, logits, -jnp.inf), axis=-1),
            last[:, 0] + jnp.log(ties.astype(jnp.float32)),
        )
        few, complete = _cut(_Ordered(values, tail), unheated, 1)
        complete = complete & (warp.top_k <= size)  # a larger k would have cut the tail before the other cuts saw it

        def of_candidates() -> tuple[Array, Array]:
            return likeliest(few.values, tokens)

        return of_candidates() if size == vocabulary else jax.lax.cond(complete.all(), of_candidates, of_all)

    return jax.lax.cond(_cuts(warp).all(), of_few, of_all)


def everyone(logits: Array) -> Array:
    """The numbers of all tokens, `(b v)` int32."""
    return jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[None], logits.shape)


def row_keys(key: Key, count: int) -> Key:
    """A key for each row: what a row draws does not depend on the others."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def gumbel(keys: Key, tokens: Array) -> Array:
    """Standard Gumbel noise of each token in each row.

    Args:
        keys: random keys `(b)`.
        tokens: `(b c)`; the noise of a token depends on its row's key and its number, not on its place.

    Returns:
        `(b c)` float32.
    """

    def of_row(key: Key, tokens: Array) -> Array:
        # The key that the token's number makes of the row's is its random bits: one hash a token.
        bits = jax.vmap(lambda token: jax.random.key_data(jax.random.fold_in(key, token))[0])(tokens)
        uniform = (bits >> 9).astype(jnp.float32) * jnp.float32(2**-23) + jnp.float32(2**-24)
        return -jnp.log(-jnp.log(uniform))

    return jax.vmap(of_row)(keys, tokens)
