"""Contrastive search: of the likeliest tokens the one that is likely and unlike all that was said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor, process
from fmodels.generation.sample import NOTHING, Ask, Predicate, is_end, put, put_column, stopped, wanted
from fmodels.generation.strategy import Model, Next, Result, Start, Strategy, by_steps, last
from fmodels.nn.cache import repeat_rows, take_rows
from fmodels.types import Array, Cache


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        history: with the newest token.
        cache: keys and values of all tokens, of `b k` rows: the `k` of a prompt are the same.
        says: what the model says of the token to come.
        hidden: `(b s d)`, the last hidden states of the tokens, scaled to length 1.
        token: `(b)` int32, the newest tokens, pad in rows that had ended before.
        done: `(b)` bool, rows that have ended.
        logprobs: `(b room)` float32 of the new tokens.
        kept: what `Ask` asks for, by name, `(b room …)`.
    """

    history: History
    cache: Cache
    says: Next
    hidden: Array
    token: Array
    done: Array
    logprobs: Array
    kept: dict[str, Array]


def contrastive(
    model: Model,
    options: Options,
    *,
    room: int,
    top_k: int,
    alpha: Array,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
) -> Strategy:
    """Takes, of the `top_k` likeliest tokens, the one with the largest `(1 - alpha) p - alpha c`.

    `c` is the largest cosine of the hidden state that the token would have with those of all tokens before it. The
    candidates are read as rows beside each other, and the cache of the one that is taken is kept.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        top_k: how many candidates; static.
        alpha: `()` float32.
        sequences: 1.
        processors: logits functions of the user's.
        stops: stopping criteria of the user's.
        ask: what to keep of each step.

    Raises:
        ValueError: the hidden states of a part of the text are not there, after a `prefix`.

    Source: Su et al. 2022; matches transformers 4.55's `_contrastive_search`.
    """
    assert sequences == 1

    def init(start: Start) -> State:
        out, history = start.out, start.history
        assert out.cache is not None and out.hidden is not None
        batch, width = out.hidden.shape[:2]
        if width + room != history.tokens.shape[1]:
            raise ValueError(
                "generate: penalty_alpha compares with the hidden states of the whole text; leave prefix out and pass all of it"
            )
        return step(
            State(
                history=history,
                cache=repeat_rows(out.cache, top_k),
                says=last(out, out.cache.mask.shape[1]),
                hidden=jnp.pad(_unit(out.hidden), ((0, 0), (0, room), (0, 0))),
                token=jnp.zeros(batch, jnp.int32),
                done=jnp.zeros(batch, bool),
                logprobs=jnp.zeros((batch, room), jnp.float32),
                kept={},
            )
        )

    def step(state: State) -> State:
        history, alive = state.history, ~state.done
        batch = history.end.shape[0]
        logits = process(state.says.logits, history, options, processors)
        probabilities, tokens = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
        out = model.decode(
            tokens.astype(jnp.int32).reshape(-1, 1),
            jnp.repeat(history.length, top_k)[:, None],
            state.cache,
            mask=jnp.repeat(alive, top_k)[:, None],
            keep=ask.keep,
        )
        assert out.cache is not None and out.hidden is not None
        hidden = _unit(out.hidden[:, 0]).reshape(batch, top_k, -1)
        cosines = jnp.einsum("bkd,bsd->bks", hidden, state.hidden, precision="highest")
        columns = jnp.arange(state.hidden.shape[1], dtype=jnp.int32)[None]
        real = (columns >= history.start[:, None]) & (columns < history.end[:, None])
        nearest = jnp.where(real[:, None], cosines, jnp.finfo(jnp.float32).min).max(-1)
        best = jnp.argmax((1.0 - alpha) * probabilities - alpha * nearest, axis=-1).astype(jnp.int32)

        row = jnp.arange(batch, dtype=jnp.int32) * top_k + best
        token, probability = (said.at(x, best) for x in (tokens.astype(jnp.int32), probabilities))
        column = jnp.where(alive, history.new, room)
        new = wanted(ask, options, state.says, logits, history)
        after = said.append(history, token, alive, options.automata)
        ended = is_end(token, options.eos) | stopped(after, options, stops) | (after.new >= options.max_new_tokens)
        rows = jnp.arange(batch)
        return State(
            history=after,
            cache=take_rows(out.cache, jnp.repeat(row, top_k)),
            says=jax.tree.map(lambda x: x[row], last(out, out.cache.mask.shape[1])),
            hidden=state.hidden.at[rows, history.end].set(hidden[rows, best], mode="drop"),
            token=jnp.where(alive, token, options.pad),
            done=state.done | ended,
            logprobs=put_column(state.logprobs, jnp.log(probability), column),
            kept=put(state.kept, new, column, room),
        )

    def more(state: State) -> Array:
        return ~state.done.all()

    def finish(state: State) -> Result:
        history = state.history
        batch = history.end.shape[0]
        columns = history.prompt[:, None] + jnp.arange(room, dtype=jnp.int32)[None]
        cache = take_rows(state.cache, jnp.arange(batch, dtype=jnp.int32) * top_k)
        # Each row's last token was read as well, and others keep its keys and values for the next call to read.
        cache = cache._replace(mask=cache.mask.at[jnp.arange(batch), history.end - 1].set(False, mode="drop"))
        return Result(
            tokens=jnp.take_along_axis(history.tokens, columns, axis=1),
            lengths=history.new,
            logprobs=state.logprobs,
            cache=cache,
            outputs=state.kept,
            slots=cache.mask,
        )

    return by_steps(init, step, more, finish, lambda state: state.token)


def _unit(x: Array) -> Array:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
