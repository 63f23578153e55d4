"""What all searches with beams share: the beams that go on, their next log-probabilities, the texts they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor, marked, process, renormalize
from fmodels.generation.sample import Ask
from fmodels.generation.sampling import warp_logits
from fmodels.generation.strategy import Model, Next, Result, Start, last
from fmodels.nn.cache import repeat_rows, take_rows
from fmodels.types import Array, Cache

LOW = -1.0e9
"""transformers' score of what shall not be chosen."""

NOT_BETTER, ENOUGH, NEVER_BETTER = range(3)
"""Of `early_stopping`: False, True, "never"."""
STOPPING: dict[bool | str, int] = {False: NOT_BETTER, True: ENOUGH, "never": NEVER_BETTER}

T = TypeVar("T")


class Trail(NamedTuple):
    """New tokens of texts, `n` columns for each.

    Attributes:
        tokens: `(b m n)` int32.
        logprobs: `(b m n)` float32, what each token has added to the score.
        indices: `(b m n)` int32, the row of the logits that each token comes from; -1 after the end.
        length: `(b m)` int32.
    """

    tokens: Array
    logprobs: Array
    indices: Array
    length: Array


class Running(NamedTuple):
    """The beams that go on, `k` of each prompt.

    Attributes:
        history: of `b·k` rows.
        cache: keys and values, in the order of the step before.
        parents: `(b·k)` int32, which of its rows each beam goes on from.
        trail: `(b k …)`.
        scores: `(b k)` float32, sums of log-probabilities.
        steps: `()` int32, new tokens of every beam.
        kept: what `Ask` asks for, `(b·k room …)`.
    """

    history: History
    cache: Cache
    parents: Array
    trail: Trail
    scores: Array
    steps: Array
    kept: dict[str, Array]


def begin(start: Start, beams: int, room: int) -> Running:
    """`beams` beams of each prompt, all the same."""
    assert start.out.cache is not None
    history = said.repeat_rows(start.history, beams)
    shape = (start.history.end.shape[0], beams)
    return Running(
        history=history,
        cache=repeat_rows(start.out.cache, beams),
        parents=jnp.arange(shape[0] * beams, dtype=jnp.int32),
        trail=Trail(
            tokens=jnp.zeros((*shape, room), jnp.int32),
            logprobs=jnp.zeros((*shape, room), jnp.float32),
            indices=jnp.full((*shape, room), -1, jnp.int32),
            length=jnp.zeros(shape, jnp.int32),
        ),
        scores=jnp.zeros(shape, jnp.float32),
        steps=jnp.zeros((), jnp.int32),
        kept={},
    )


def of_prompt(start: Start, beams: int) -> Next:
    """What the model says after the prompts, for each of their beams."""
    assert start.out.cache is not None
    return last(start.out, start.out.cache.mask.shape[1]).repeat(beams)


def advance(model: Model, running: Running, ask: Ask) -> tuple[Running, Next]:
    """One decode step of all beams, with the cache in their order."""
    cache = running.cache  # what the encoder has read is the same for all beams of a prompt
    cache = take_rows(cache._replace(cross=None), running.parents)._replace(cross=cache.cross)
    history = running.history
    out = model.decode(
        history.last[:, None],
        (history.length - 1)[:, None],
        cache,
        keep=ask.keep,
    )
    assert out.cache is not None
    return running._replace(cache=out.cache), last(out, out.cache.mask.shape[1])


def processed(
    logprobs: Array, history: History, options: Options, processors: Sequence[Processor], *, keep: int
) -> Array:
    """Log-probabilities `(r v)` after all logits functions and the watermark, in rows that sample after the cuts too.

    Args:
        logprobs: of the model.
        history: of the same rows.
        options: a row for each.
        processors: logits functions of the user's.
        keep: how many tokens the cuts leave at least.
    """
    rows = options.rows
    logprobs = process(logprobs, history, options, processors)

    def warped() -> Array:
        return jnp.where(rows.sample[:, None], warp_logits(logprobs, rows.warp, keep=keep), logprobs)

    logprobs = jax.lax.cond(rows.sample.any(), warped, lambda: logprobs)
    return renormalize(marked(logprobs, history, options), options)


def record(running: Running, ask: Ask, says: Next, logprobs: Array, room: int) -> Running:
    """The beams with what is to be kept of a step; `logprobs` `(b·k v)` are processed."""
    new = dict(says.layers)
    if ask.logits:
        new["logits"] = says.logits
    if ask.scores:
        new["scores"] = logprobs
    if ask.top_logprobs:
        values, tokens = jax.lax.top_k(jax.nn.log_softmax(logprobs, axis=-1), ask.top_logprobs)
        new.update(top_logprobs=values, top_tokens=tokens.astype(jnp.int32))
    kept = {}
    for name, x in new.items():
        buffer = running.kept.get(name)
        buffer = jnp.zeros((x.shape[0], room, *x.shape[1:]), x.dtype) if buffer is None else buffer
        kept[name] = jax.lax.dynamic_update_index_in_dim(buffer, x, running.steps, axis=1)
    return running._replace(kept=kept)


def extend(trail: Trail, parent: Array, token: Array, logprob: Array, row: Array) -> Trail:
    """The texts of candidates, `(b m)` each.

    Args:
        trail: of the beams, all of one length.
        parent: place of the beam that each goes on from.
        token: that it goes on with.
        logprob: what this adds to the score.
        row: of the logits.
    """
    old = take(trail, parent)
    last = jnp.arange(old.tokens.shape[-1])[None, None] == old.length[..., None]
    return Trail(
        tokens=jnp.where(last, token[..., None], old.tokens),
        logprobs=jnp.where(last, logprob[..., None], old.logprobs),
        indices=jnp.where(last, row[..., None], old.indices),
        length=old.length + 1,
    )


def rows_of(place: Array, width: int) -> Array:
    """`(b m)` places among the `width` rows of each prompt, as numbers of rows."""
    return place.astype(jnp.int32) + jnp.arange(place.shape[0], dtype=jnp.int32)[:, None] * width


def take(tree: T, place: Array) -> T:
    """Of arrays `(b m …)`, those at `place` `(b n)`."""

    def one(x: Array) -> Array:
        return jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, tree)


def beside(first: T, second: T) -> T:
    """Arrays `(b m …)` and `(b n …)` as `(b m+n …)`."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)


def by_length(scores: Array, length: Array, penalty: Array) -> Array:
    """`scores / length^penalty`; `length` has the shape of `scores`, or `()`."""
    return scores / jnp.power(length.astype(jnp.float32), penalty)


def best_by_length(scores: Array, length: Array, options: Options, penalty: Array, early_stopping: Array) -> Array:
    """The best that texts of these scores can come to, by the reckoning that `early_stopping` asks for.

    Args:
        scores: any shape.
        length: `()` int32, their present length.
        options: for the largest length.
        penalty: `()` float32.
        early_stopping: `()` int32.
    """
    longest = (early_stopping == NEVER_BETTER) & (penalty > 0)
    return by_length(scores, jnp.where(longest, options.max_new_tokens, length), penalty)


def result(best: Trail, scores: Array, sequences: int, running: Running, pad: Array) -> Result:
    """The first `sequences` of the texts `(b m …)` as rows."""
    n = best.tokens.shape[-1]
    best, scores = jax.tree.map(lambda x: x[:, :sequences], (best, scores))
    inside = jnp.arange(n)[None, None] < best.length[..., None]
    tokens, logprobs, indices = (
        jnp.where(inside, x, other).reshape(-1, n)
        for x, other in ((best.tokens, pad), (best.logprobs, 0.0), (best.indices, -1))
    )
    return Result(
        tokens=tokens,
        lengths=best.length.reshape(-1),
        logprobs=logprobs,
        sequence_scores=scores.reshape(-1),
        beam_indices=indices,
        outputs=running.kept,
        slots=running.cache.mask,
    )
