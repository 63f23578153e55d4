"""Greedy decoding and sampling: one token a step for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor, process, renormalize
from fmodels.generation.sampling import draw, warp_logits
from fmodels.generation.strategy import Model, Result, Start, Strategy
from fmodels.nn.cache import repeat_rows
from fmodels.types import Array, Cache, Key, Output

Predicate = Callable[[History], Array]
"""A stopping criterion of the user's: the `History` to `(b)` bool, True where a row shall end."""


class Ask(NamedTuple):
    """What to keep of each step beside the tokens; static.

    Attributes:
        scores: the processed logits, `(b n v)`.
        logits: the logits as they come, `(b n v)`.
        top_logprobs: how many of the likeliest tokens, with their log-probabilities `(b n k)`.
        hidden_states: the input of every layer and the last hidden state, of the newest token: `(b n l+1 d)`.
        attentions: the weights of every layer, of the newest token over the slots of the cache: `(b n l h s)`.
    """

    scores: bool = False
    logits: bool = False
    top_logprobs: int = 0
    hidden_states: bool = False
    attentions: bool = False


NOTHING = Ask()


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        history: with the newest token.
        cache: keys and values of all tokens before it.
        done: `(b)` bool, rows that have ended.
        logprobs: `(b room)` float32 of the new tokens.
        steps: `()` int32.
        key: random key of the next step.
        kept: what `Ask` asks for, by name, `(b room …)`.
    """

    history: History
    cache: Cache
    done: Array
    logprobs: Array
    steps: Array
    key: Key
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
    """
    options = options.repeat(sequences)

    def init(start: Start) -> State:
        assert start.out.logits is not None and start.out.cache is not None
        history = said.repeat_rows(start.history, sequences)
        batch = history.end.shape[0]
        state = State(
            history=history,
            cache=repeat_rows(start.out.cache, sequences),
            done=jnp.zeros(batch, bool),
            logprobs=jnp.zeros((batch, room), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
            key=start.key,
            kept={},
        )
        states = start.out.hidden_states
        return choose(
            state,
            Output(
                logits=jnp.repeat(start.out.logits, sequences, axis=0),
                hidden_states=None if states is None else jnp.repeat(states, sequences, axis=1),
            ),
        )

    def step(state: State) -> State:
        history = state.history
        alive = ~state.done
        out = model.decode(
            history.last[:, None],
            (history.length - 1)[:, None],
            state.cache,
            mask=alive[:, None],
            **({"hidden_states": True} if ask.hidden_states else {}),
        )
        assert out.cache is not None
        return choose(state._replace(cache=out.cache), out)

    def choose(state: State, out: Output) -> State:
        assert out.logits is not None
        raw = out.logits[:, -1]
        logits = process(raw, state.history, options, processors)
        key, now = jax.random.split(state.key)

        def likeliest() -> tuple[Array, Array]:
            token = jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
            top = jnp.take_along_axis(logits, token, axis=-1)[:, 0]
            return token[:, 0], top - jax.nn.logsumexp(logits, axis=-1)

        def drawn() -> tuple[Array, Array]:
            greedy, random = likeliest(), draw(logits, options.rows.warp, now)
            token, logprob = (jnp.where(options.rows.sample, r, g) for r, g in zip(random, greedy, strict=True))
            return token, logprob

        token, logprob = jax.lax.cond(options.rows.sample.any(), drawn, likeliest)
        alive = ~state.done
        history = said.append(state.history, token, alive, options.automata)
        ended = is_end(token, options.eos) | stopped(history, options, stops)
        return state._replace(
            history=history,
            done=state.done | ended,
            logprobs=_put(state.logprobs, jnp.where(alive, logprob, 0.0), state.steps),
            steps=state.steps + 1,
            key=key,
            kept=keep(state, out, raw, logits),
        )

    def keep(state: State, out: Output, raw: Array, logits: Array) -> dict[str, Array]:
        new: dict[str, Array] = {}
        if ask.logits:
            new["logits"] = raw
        if ask.scores or ask.top_logprobs:
            warped = jnp.where(options.rows.sample[:, None], warp_logits(logits, options.rows.warp), logits)
            warped = renormalize(warped, options)
            if ask.scores:
                new["scores"] = warped
            if ask.top_logprobs:
                values, tokens = jax.lax.top_k(jax.nn.log_softmax(warped, axis=-1), ask.top_logprobs)
                new.update(top_logprobs=values, top_tokens=tokens.astype(jnp.int32))
        if ask.hidden_states and out.hidden_states is not None:
            new["hidden_states"] = out.hidden_states[:, :, -1].swapaxes(0, 1)
        buffers = state.kept
        for name, value in new.items():
            if name not in buffers:
                buffers = {**buffers, name: jnp.zeros((value.shape[0], room, *value.shape[1:]), value.dtype)}
        return {**buffers, **{name: _put(buffers[name], value, state.steps) for name, value in new.items()}}

    def more(state: State) -> Array:
        return (state.steps < options.max_new_tokens) & ~state.done.all()

    def finish(state: State) -> Result:
        history = state.history
        width = history.tokens.shape[1] - room
        return Result(
            tokens=history.tokens[:, width:],
            lengths=history.new,
            logprobs=state.logprobs,
            cache=state.cache,
            outputs=state.kept,
        )

    def newest(state: State) -> Array:
        column = state.history.tokens.shape[1] - room + state.steps - 1
        return jax.lax.dynamic_index_in_dim(state.history.tokens, column, axis=1, keepdims=False)

    return Strategy(init, step, more, finish, newest)


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


def _put(buffer: Array, value: Array, column: Array) -> Array:
    zero = jnp.zeros((), jnp.int32)
    return jax.lax.dynamic_update_slice(buffer, value[:, None], (zero, column, *[zero] * (buffer.ndim - 2)))
