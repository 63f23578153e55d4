"""The texts that a search has found, as transformers 4 kept them: a short list for each prompt, or each group of beams."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation.options import Options
from fmodels.generation.running import ENOUGH, Trail, beside, best_by_length, take
from fmodels.types import Array


class Hypotheses(NamedTuple):
    """At most `k` texts of each prompt, in the order in which they came.

    Attributes:
        trail: `(b k …)`; the first `size` of them are there.
        scores: `(b k)` float32, by length.
        size: `(b)` int32, how many there are.
    """

    trail: Trail
    scores: Array
    size: Array

    @property
    def there(self) -> Array:
        """`(b k)` bool."""
        return jnp.arange(self.scores.shape[1])[None] < self.size[:, None]

    @property
    def worst(self) -> Array:
        """`(b)`, the lowest score; infinite where there is none."""
        return jnp.where(self.there, self.scores, jnp.inf).min(-1)


def nothing(trail: Trail) -> Hypotheses:
    """Room for as many texts as `trail` has."""
    shape = trail.length.shape
    return Hypotheses(trail, jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32))


def add(found: Hypotheses, trail: Trail, scores: Array, wanted: Array) -> Hypotheses:
    """Adds texts `(b m …)` one after the other: where `k` are there, the worst one goes, if the new one is better.

    Args:
        found: the list.
        trail: the texts.
        scores: `(b m)` float32, by length.
        wanted: `(b m)` bool, which of them to add.

    Source: matches transformers 4.55's `BeamHypotheses.add`, ties included; its scores have 64 bits.
    """
    k = found.scores.shape[1]
    places = jnp.arange(k, dtype=jnp.int32)[None]

    def one(carry: tuple[Hypotheses, Array], new: tuple[Array, Array, Array]) -> tuple[tuple[Hypotheses, Array], None]:
        (found, source), (number, score, wanted) = carry, new
        full = found.size == k
        wanted = wanted & (~full | (score > found.worst))
        first_worst = jnp.argmin(jnp.where(found.there, found.scores, jnp.inf), axis=-1)
        behind = full[:, None] & (places >= first_worst[:, None])
        free = ~full[:, None] & (places == found.size[:, None])
        place = jnp.where(wanted[:, None], jnp.where(free, k, places + behind.astype(jnp.int32)), places)
        number = jnp.broadcast_to(number, score.shape)
        scores, source = take(beside((found.scores, source), (score[:, None], number[:, None])), place)
        return (found._replace(scores=scores, size=found.size + (wanted & ~full).astype(jnp.int32)), source), None

    batch, m = scores.shape
    source = jnp.broadcast_to(places, (batch, k))
    numbers = k + jnp.arange(m, dtype=jnp.int32)
    (new, source), _ = jax.lax.scan(one, (found, source), (numbers, scores.T, wanted.T))
    return new._replace(trail=take(beside(found.trail, trail), source))


def is_done(
    found: Hypotheses, best: Array, length: Array, options: Options, penalty: Array, early_stopping: Array
) -> Array:
    """`(b)` bool, whether the list is full and nothing better is expected of those that go on.

    Args:
        found: the list.
        best: `(b)` float32, the highest sum of log-probabilities of the step's candidates.
        length: `()` int32, their number of new tokens.
        options: for the largest length.
        penalty: `()` float32, of the length.
        early_stopping: `()` int32.

    Source: matches transformers 4.55's `BeamHypotheses.is_done`.
    """
    expected = best_by_length(best, length, options, penalty, early_stopping)
    full = found.size == found.scores.shape[1]
    return full & ((early_stopping == ENOUGH) | (found.worst >= expected))


def in_order(trail: Trail, scores: Array, there: Array) -> tuple[Trail, Array]:
    """Texts and scores `(b m …)`, best first; of equals the last one, as in transformers 4.55's `finalize`.

    Args:
        trail: the texts.
        scores: `(b m)` float32, by length.
        there: `(b m)` bool, which of them there are.
    """
    backwards = jnp.argsort(jnp.where(there, -scores, jnp.inf)[:, ::-1], axis=-1, stable=True)
    return take((trail, scores), scores.shape[1] - 1 - backwards)


class Candidates(NamedTuple):
    """The best continuations of a prompt's beams, best first.

    Attributes:
        scores: `(b m)` float32, sums of log-probabilities.
        parent: `(b m)` int32, place of the beam.
        token: `(b m)` int32.
        end: `(b m)` bool, whether the token is an end token.
    """

    scores: Array
    parent: Array
    token: Array
    end: Array


def candidates(scores: Array, count: int, eos: Array) -> Candidates:
    """The `count` best of `(b k v)`."""
    batch, _, vocabulary = scores.shape
    best, index = jax.lax.top_k(scores.reshape(batch, -1), count)
    parent, token = jnp.divmod(index.astype(jnp.int32), vocabulary)
    return Candidates(best, parent, token, (token[..., None] == eos[None, None]).any(-1))


def going_on(best: Candidates, count: int) -> Array:
    """`(b count)` places of the first candidates that do not end."""
    return jnp.argsort(best.end, axis=-1, stable=True)[:, :count]
