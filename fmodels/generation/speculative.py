"""Speculative decoding: a proposer guesses the next tokens of each row, and the model reads all of them at once.

The token of each place is taken as `sample` takes it: the likeliest, or the one that the noise of the row's key and of the
place makes win. A guess holds where it is that token, and the first that fails is replaced by it. So what comes out is what
`sample` makes with the same key, whatever the guesses are: speculation changes how often the model is called, and nothing
else. A draft model guesses with the same noise, and so agrees as often as its distribution resembles the model's. Watermarks
are no exception: the text bears the mark that it would bear without guesses. (So does transformers' with lists of green
tokens; its SynthID also remembers the contexts of guesses that did not hold, and makes another text.)

Source: Leviathan et al. 2023 and Chen et al. 2023, with the coupling of Daliri et al. 2025 ("Coupling without
communication and drafter-invariant speculative decoding") in the place of rejection sampling: where two distributions have
the distance `d`, it agrees with probability `(1 - d) / (1 + d)` or more, rejection sampling with `1 - d`; but that needs the
whole vocabulary of both distributions at each place, sorted where there are cuts, and makes the tokens depend on the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor, process
from fmodels.generation.sample import NOTHING, Ask, Predicate, is_end, pick, put, put_column, stopped, wanted
from fmodels.generation.sampling import row_keys
from fmodels.generation.strategy import Model, Next, Result, Start, Strategy, by_steps, by_token, last
from fmodels.nn.cache import grow, repeat_rows
from fmodels.types import Array, Cache, Key


class Proposer(NamedTuple):
    """What guesses the next tokens.

    Attributes:
        widths: how many it may guess at a time, ascending; the model is compiled for each.
        init: the history of the prompts, a row for each, to a state with a row for each.
        repeat: `(state, times)`: a state with each row so many times.
        propose: `(state, history, options, keys (b)) -> (tokens (b n) int32, state)`, `n` the largest of `widths`; -1 is no
            guess, and none comes after it.
    """

    widths: tuple[int, ...]
    init: Callable[[History], Any]
    repeat: Callable[[Any, int], Any]
    propose: Callable[[Any, History, Options, Key], tuple[Array, Any]]


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        history: with the newest tokens.
        cache: keys and values of all tokens but each row's last, with a `length` for each row.
        done: `(b)` bool, rows that have ended.
        logprobs: `(b room)` float32 of the new tokens.
        calls: `(b room)` int32, the call of the model that each new token comes from.
        step: `()` int32, calls so far.
        keys: `(b)` random keys.
        proposer: its state.
        kept: what `Ask` asks for, by name, `(b room …)`.
    """

    history: History
    cache: Cache
    done: Array
    logprobs: Array
    calls: Array
    step: Array
    keys: Key
    proposer: Any
    kept: dict[str, Array]


def speculative(
    model: Model,
    options: Options,
    *,
    room: int,
    proposer: Proposer,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
) -> Strategy:
    """What `sample` makes, with fewer calls of the model.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        proposer: guesses the next tokens.
        sequences: how many rows are made of each prompt; static.
        processors: logits functions of the user's.
        stops: stopping criteria of the user's.
        ask: what to keep of each token.
    """
    options = options.repeat(sequences)
    ahead = proposer.widths[-1]

    def init(start: Start) -> State:
        out = start.out
        assert out.logits is not None and out.cache is not None
        guesses = proposer.repeat(proposer.init(start.history), sequences)
        history = said.repeat_rows(start.history, sequences)
        batch = history.end.shape[0]
        state = State(
            history=history,
            cache=of_rows(repeat_rows(out.cache, sequences), batch, ahead),
            done=jnp.zeros(batch, bool),
            logprobs=jnp.zeros((batch, room), jnp.float32),
            calls=jnp.zeros((batch, room), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            keys=start.key if start.key.ndim else row_keys(start.key, batch),
            proposer=guesses,
            kept={},
        )
        state, _ = take(state, ~state.done, last(out, state.cache.mask.shape[1]).repeat(sequences))
        return state._replace(step=state.step + 1)

    def step(state: State) -> State:
        history = state.history
        guesses, proposed = proposer.propose(state.proposer, history, options, state.keys)
        says, cache = read(history, jnp.where(state.done[:, None], -1, guesses), state.cache)
        guesses = jnp.pad(guesses, ((0, 0), (0, 1)), constant_values=-1)

        def check(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
            place, holds, state = carry
            here, guess = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, place, axis=1, keepdims=False), (says, guesses)
            )
            state, token = take(state, holds, here)
            return place + 1, holds & ~state.done & (token == guess), state

        begin = (jnp.zeros((), jnp.int32), ~state.done, state._replace(cache=cache, proposer=proposed))
        _, _, new = jax.lax.while_loop(lambda carry: carry[1].any(), check, begin)
        cache = keep_first(new.cache, state.cache, new.history.end - history.end)
        return new._replace(cache=cache, step=state.step + 1)

    def read(history: History, guesses: Array, cache: Cache) -> tuple[Next, Cache]:
        """What the model says `(b n …)` after the newest token and each guess, with no more of them than there are."""
        tokens = jnp.concatenate([history.last[:, None], jnp.maximum(guesses, 0)], axis=1)
        places = (history.length - 1)[:, None] + jnp.arange(ahead + 1, dtype=jnp.int32)[None]
        places = within(places, model.max_positions)

        def first(width: int) -> Callable[[Cache], tuple[Next, Cache]]:
            def decode(cache: Cache) -> tuple[Next, Cache]:
                out = model.decode(tokens[:, : width + 1], places[:, : width + 1], cache, keep=ask.keep)
                assert out.logits is not None and out.cache is not None
                says = Next(out.logits, by_token(out, out.cache.mask.shape[1]))
                more = (0, ahead - width)
                return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), more, *[(0, 0)] * (x.ndim - 2)]), says), out.cache

            return decode

        if len(proposer.widths) == 1:
            return first(ahead)(cache)
        count = (guesses >= 0).sum(-1, dtype=jnp.int32).max()
        which = (jnp.asarray(proposer.widths[:-1]) < count).sum(dtype=jnp.int32)
        shapes, _ = jax.eval_shape(first(ahead), cache)
        found = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), cache)
        # Loops that run once or not at all: XLA's CPU backend copies a whole cache for each branch of a switch.
        for place, width in enumerate(proposer.widths):
            decode = first(width)
            _, found = jax.lax.while_loop(
                lambda carry, place=place: carry[0] == place,
                lambda carry, decode=decode: (jnp.full((), -1, jnp.int32), decode(carry[1][1])),
                (which, found),
            )
        return found

    def take(state: State, alive: Array, says: Next) -> tuple[State, Array]:
        """The state with another token in the rows that are `alive`, and that token."""
        logits = process(says.logits, state.history, options, processors)
        token, logprob = pick(logits, state.history, options, state.keys)
        column = jnp.where(alive, state.history.new, room)
        history = said.append(state.history, token, alive, options.automata)
        ended = is_end(token, options.eos) | stopped(history, options, stops) | (history.new >= options.max_new_tokens)
        new = wanted(ask, options, says, logits, state.history)
        state = state._replace(
            history=history,
            done=state.done | (alive & ended),
            logprobs=put_column(state.logprobs, logprob, column),
            calls=put_column(state.calls, jnp.broadcast_to(state.step, column.shape), column),
            kept=put(state.kept, new, column, room),
        )
        return state, token

    def more(state: State) -> Array:
        return ~state.done.all()

    def finish(state: State) -> Result:
        history = state.history
        columns = history.prompt[:, None] + jnp.arange(room, dtype=jnp.int32)[None]
        return Result(
            tokens=jnp.take_along_axis(history.tokens, columns, axis=1),
            lengths=history.new,
            logprobs=state.logprobs,
            cache=state.cache,
            outputs={**state.kept, "calls": state.calls},
            slots=state.cache.mask,
        )

    return by_steps(init, step, more, finish, lambda state: state.history.last)


NARROW = (0, 3, 7)
"""Numbers of guesses for which there is a program besides the largest: on the embedded checkpoint and two cores one token
takes 0.3 to 0.4 ms, a block of 4 takes 1.2 to 2.1, one of 8 takes 1.6 to 2.6, one of 16 takes 2.5 to 3.4."""


def ngrams(*, count: int, size: int | None = None) -> Proposer:
    """Guesses that the text goes on as it did where its end occurred before.

    No more tokens are guessed than have matched, rounded up to a width for which there is a program; a text without a match
    costs what it does without guesses.

    Args:
        count: how many tokens at a time at most.
        size: how many tokens at the end count; all of them if None.

    Source: Saxena 2023 (prompt lookup); matches transformers' `PromptLookupCandidateGenerator` in the place that it takes:
    after the longest end, and after the first of several; but where the text stops there, it goes on in circles. How many:
    Oliaro et al. 2024 (SuffixDecoding).
    """
    widths = (*(width for width in NARROW if width < count), count)

    def propose(state: Any, history: History, options: Options, keys: Key) -> tuple[Array, Any]:
        assert history.match is not None
        column = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]
        inside = (column > history.start[:, None]) & (column < history.end[:, None])
        match = jnp.where(inside, history.match, 0)
        place = jnp.argmax(match if size is None else jnp.minimum(match, size), axis=-1).astype(jnp.int32)[:, None]
        matched = jnp.take_along_axis(match, place, axis=1)
        wanted = jnp.asarray(widths)[(jnp.asarray(widths[:-1])[None] < matched).sum(-1)]
        period = jnp.maximum(history.end[:, None] - place, 1)
        ahead = jnp.arange(count, dtype=jnp.int32)[None]
        guesses = jnp.take_along_axis(history.tokens, place + ahead % period, axis=1)
        return jnp.where(ahead < wanted[:, None], guesses, -1), state

    return Proposer(widths, lambda history: (), lambda state, times: state, propose)


def drafts(model: Model, *, count: int, room: int, processors: Sequence[Processor] = ()) -> Proposer:
    """Guesses what a smaller model with the same vocabulary would say, with the same logits functions and noise.

    Args:
        model: bound.
        count: how many tokens at a time.
        room: columns for new tokens.
        processors: logits functions of the user's.
    """

    def init(history: History) -> Cache:
        batch, columns = history.tokens.shape
        width = columns - room
        column = jnp.arange(width, dtype=jnp.int32)[None]
        out = model.prefill(history.tokens[:, :width], column >= history.start[:, None], columns)
        assert out.cache is not None
        return of_rows(out.cache, batch, count)

    def propose(state: Cache, history: History, options: Options, keys: Key) -> tuple[Array, Cache]:
        # The last two tokens are read, though the first of them mostly was before: not where all guesses held.
        columns = (history.end - 2)[:, None] + jnp.arange(2, dtype=jnp.int32)[None]
        cache = state._replace(length=jnp.zeros_like(history.end))
        cache = keep_first(state, cache, history.end - 2)
        tokens = jnp.take_along_axis(history.tokens, columns, axis=1)
        out = model.decode(tokens, within(columns - history.start[:, None], model.max_positions), cache)
        assert out.logits is not None and out.cache is not None

        def guess(history: History, raw: Array) -> tuple[History, Array]:
            token, _ = pick(process(raw, history, options, processors), history, options, keys)
            return said.append(history, token, jnp.ones(token.shape, bool), options.automata), token

        def read(carry: tuple[Cache, History, Array], _: None) -> tuple[tuple[Cache, History, Array], Array]:
            cache, history, raw = carry
            history, token = guess(history, raw)
            out = model.decode(token[:, None], within((history.length - 1)[:, None], model.max_positions), cache)
            assert out.logits is not None and out.cache is not None
            return (out.cache, history, out.logits[:, -1]), token

        carry, guesses = jax.lax.scan(read, (out.cache, history, out.logits[:, -1]), None, length=count - 1)
        _, last = guess(*carry[1:])
        return jnp.concatenate([guesses.swapaxes(0, 1), last[:, None]], axis=1), carry[0]

    return Proposer((count,), init, repeat_rows, propose)


def by_ngrams(model: Model, options: Options, *, tokens: int, size: int | None = None, **rest: Any) -> Strategy:
    """`speculative` with `ngrams`; the history must have `match`."""
    return speculative(model, options, proposer=ngrams(count=tokens, size=size), **rest)


def by_draft(model: Model, options: Options, *, tokens: int, draft: Model, **rest: Any) -> Strategy:
    """`speculative` with `drafts`."""
    proposer = drafts(draft, count=tokens, room=rest["room"], processors=rest.get("processors", ()))
    return speculative(model, options, proposer=proposer, **rest)


def of_rows(cache: Cache, batch: int, ahead: int) -> Cache:
    """The cache with a `length` for each row, and with room for `ahead` tokens that may not stay."""
    other = None if cache.other is None else of_rows(cache.other, batch, ahead)
    cache = grow(cache, cache.mask.shape[1] + ahead)
    return cache._replace(length=jnp.broadcast_to(cache.length, (batch,)), other=other)


def keep_first(cache: Cache, before: Cache, count: Array) -> Cache:
    """The cache with only the first `count` `(b)` tokens of those that were written after `before`."""
    length = before.length + count
    mask = cache.mask & (jnp.arange(cache.mask.shape[1], dtype=jnp.int32)[None] < length[:, None])
    other = cache.other
    if other is not None and before.other is not None:
        other = keep_first(other, before.other, count)
    return cache._replace(mask=mask, length=length, other=other)


def within(positions: Array, table: int | None) -> Array:
    """Positions that the model has: those beyond are of guesses that do not count."""
    return positions if table is None else jnp.minimum(positions, table - 1)
