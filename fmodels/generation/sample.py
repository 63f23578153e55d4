"""Greedy decoding and sampling: one token a step for each row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor, marked, process, renormalize
from fmodels.generation.sampling import draw, row_keys, warp_logits
from fmodels.generation.strategy import Model, Next, Result, Start, Strategy, by_choices, last
from fmodels.nn.cache import repeat_rows
from fmodels.types import Array, Cache, Keep, Key

Predicate = Callable[[History], Array]
"""A stopping criterion of the user's: the `History` to `(b)` bool, True where a row shall end."""

Read = Callable[[Next], Array]
"""The logits `(b v)` that stand for what the model says, with `hidden_states`."""


class Ask(NamedTuple):
    """What to keep of each step beside the tokens; static.

    Attributes:
        scores: the processed logits, `(b n v)`.
        logits: the logits as they come, `(b n v)`.
        top_logprobs: how many of the likeliest tokens, with their log-probabilities `(b n k)`.
        hidden_states: the input of every layer and the last hidden state, of the newest token: `(b n l+1 d)`.
        attentions: the weights of every layer, of the newest token over the slots of the cache: `(b n l h s)`; and
            `cross_attentions` over the encoder's tokens.
    """

    scores: bool = False
    logits: bool = False
    top_logprobs: int = 0
    hidden_states: bool = False
    attentions: bool = False

    @property
    def keep(self) -> Keep:
        """What the model has to return for it."""
        return Keep(self.hidden_states, self.attentions)


NOTHING = Ask()


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        history: with the newest token.
        cache: keys and values of all tokens before it.
        token: `(b)` int32, the newest tokens, pad in rows that had ended before.
        done: `(b)` bool, rows that have ended.
        logprobs: `(b room)` float32 of the new tokens.
        keys: `(b)` random keys; a row's token is drawn with its key and its number of new tokens.
        kept: what `Ask` asks for, by name, `(b room …)`.
    """

    history: History
    cache: Cache
    token: Array
    done: Array
    logprobs: Array
    keys: Key
    kept: dict[str, Array]


def sample(
    model: Model,
    options: Options,
    *,
    room: int,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
    read: Read | None = None,
) -> Strategy:
    """Takes the likeliest token of each row, or draws one in the rows that sample.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        sequences: how many rows are made of each prompt; static.
        processors: logits functions of the user's.
        stops: stopping criteria of the user's.
        ask: what to keep of each step.
        read: what is made of the model's output before all else; its last logits if None.
    """
    options = options.repeat(sequences)
    keep = ask.keep if read is None else ask.keep._replace(hidden_states=True)

    def begin(start: Start) -> tuple[State, Next]:
        assert start.out.cache is not None
        history = said.repeat_rows(start.history, sequences)
        batch = history.end.shape[0]
        state = State(
            history=history,
            cache=repeat_rows(start.out.cache, sequences),
            token=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            logprobs=jnp.zeros((batch, room), jnp.float32),
            keys=start.key if start.key.ndim else row_keys(start.key, batch),
            kept={},
        )
        return state, last(start.out, start.out.cache.mask.shape[1]).repeat(sequences)

    def advance(state: State) -> tuple[State, Next]:
        history = state.history
        alive = ~state.done
        out = model.decode(
            history.last[:, None],
            (history.length - 1)[:, None],
            state.cache,
            mask=alive[:, None],
            keep=keep,
        )
        assert out.cache is not None
        return state._replace(cache=out.cache), last(out, out.cache.mask.shape[1])

    def choose(state: State, says: Next) -> State:
        logits = process(says.logits if read is None else read(says), state.history, options, processors)
        alive = ~state.done
        token, logprob = pick(logits, state.history, options, state.keys)
        history = said.append(state.history, token, alive, options.automata)
        ended = is_end(token, options.eos) | stopped(history, options, stops) | (history.new >= options.max_new_tokens)
        new = wanted(ask, options, says, logits, state.history)
        return state._replace(
            history=history,
            token=jnp.where(alive, token, options.pad),
            done=state.done | ended,
            logprobs=put_column(state.logprobs, logprob, jnp.where(alive, state.history.new, room)),
            kept=put(state.kept, new, jnp.where(alive, state.history.new, room), room),
        )

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
            outputs=state.kept,
            slots=state.cache.mask,
        )

    def newest(state: State) -> Array:
        return state.token

    return by_choices(begin, advance, choose, more, finish, newest, keeps=ask != NOTHING)


def pick(logits: Array, history: History, options: Options, keys: Key) -> tuple[Array, Array]:
    """The likeliest token of each row, or one that is drawn in the rows that sample, with its log-probability.

    Args:
        logits: `(b v)`, processed.
        history: of the rows; a row's number of new tokens is folded into its key.
        options: arrays.
        keys: `(b)` random keys.
    """
    mark = None if options.watermark is None else functools.partial(options.watermark.mark, history=history)

    def likeliest() -> tuple[Array, Array]:
        final = marked(logits, history, options)
        token = jnp.argmax(final, axis=-1)[:, None].astype(jnp.int32)
        top = jnp.take_along_axis(final, token, axis=-1)[:, 0]
        return token[:, 0], top - jax.nn.logsumexp(final, axis=-1)

    def drawn() -> tuple[Array, Array]:
        return draw(logits, options.rows.warp, jax.vmap(jax.random.fold_in)(keys, history.new), mark)

    def both() -> tuple[Array, Array]:
        return jax.tree.map(lambda r, g: jnp.where(options.rows.sample, r, g), drawn(), likeliest())

    def some() -> tuple[Array, Array]:
        return jax.lax.cond(options.rows.sample.all(), drawn, both)

    return jax.lax.cond(options.rows.sample.any(), some, likeliest)


def wanted(ask: Ask, options: Options, says: Next, logits: Array, history: History) -> dict[str, Array]:
    """What `ask` asks for of one token of each row, by name.

    Args:
        ask: what is asked for.
        options: arrays.
        says: what the model says.
        logits: `(b v)`, processed.
        history: of the rows, without the token.
    """
    new = {name: x for name, x in says.layers.items() if name != "hidden_states" or ask.hidden_states}
    if ask.logits:
        new["logits"] = says.logits
    if ask.scores or ask.top_logprobs:
        warped = jnp.where(options.rows.sample[:, None], warp_logits(logits, options.rows.warp), logits)
        warped = renormalize(marked(warped, history, options), options)
        if ask.scores:
            new["scores"] = warped
        if ask.top_logprobs:
            values, tokens = jax.lax.top_k(jax.nn.log_softmax(warped, axis=-1), ask.top_logprobs)
            new.update(top_logprobs=values, top_tokens=tokens.astype(jnp.int32))
    return new


def is_end(token: Array, eos: Array) -> Array:
    """`(b)` bool, whether a token is one of the end tokens."""
    return (token[:, None] == eos[None]).any(-1)


def stopped(history: History, options: Options, stops: Sequence[Predicate]) -> Array:
    """`(b)` bool, whether a stop string is there or a criterion of the user's says so."""
    ended = jnp.zeros(history.end.shape, bool)
    if options.automata.stop is not None and history.stop is not None:
        ended = ended | options.automata.stop.accepts(history.stop)
    for stop in stops:
        ended = ended | stop(history)
    return ended


def put(kept: dict[str, Array], new: dict[str, Array], column: Array, room: int) -> dict[str, Array]:
    """What is kept `(b room …)`, with a token's values `(b …)` in each row's column; made at the first token."""
    for name, value in new.items():
        if name not in kept:
            kept = {**kept, name: jnp.zeros((value.shape[0], room, *value.shape[1:]), value.dtype)}
    return {**kept, **{name: put_column(kept[name], value, column) for name, value in new.items()}}


def put_column(buffer: Array, value: Array, column: Array) -> Array:
    """`(b n …)` with `(b …)` in each row's column; nothing where it is `n`."""
    return buffer.at[jnp.arange(value.shape[0]), column].set(value, mode="drop")
