"""Beam search and beam sampling: the likeliest texts of a prompt, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.arrays import largest
from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.options import Options, Processor
from fmodels.generation.running import (
    ENOUGH,
    LOW,
    Running,
    Trail,
    advance,
    begin,
    beside,
    best_by_length,
    by_length,
    extend,
    of_prompt,
    processed,
    record,
    result,
    rows_of,
    take,
)
from fmodels.generation.sample import NOTHING, Ask, Predicate, is_end, stopped
from fmodels.generation.sampling import row_keys
from fmodels.generation.strategy import Model, Next, Result, Start, Strategy, by_choices
from fmodels.types import Array, Key


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        running: the beams.
        found: `(b k …)`, the texts that have ended.
        scores: `(b k)` float32, their scores by length, in descending order.
        ended: `(b k)` bool, which of them there are.
        hopeful: `(b)` bool, whether a beam could still become better than what was found.
        more: `()` bool.
        keys: `(b)` random keys.
    """

    running: Running
    found: Trail
    scores: Array
    ended: Array
    hopeful: Array
    more: Array
    keys: Key


def beam_search(
    model: Model,
    options: Options,
    *,
    room: int,
    beams: int,
    ends: int,
    length_penalty: Array,
    early_stopping: Array,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
) -> Strategy:
    """Keeps the `beams` best texts of each prompt; draws the candidates in the rows that sample.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        beams: how many texts of a prompt go on; static.
        ends: how many end tokens there are; static.
        length_penalty: `()` float32, exponent of the length by which a score is divided.
        early_stopping: `()` int32, when to stop: with `beams` texts that have ended (`ENOUGH`), where none of those that go
            on is better by its present length (`NOT_BETTER`), where none of them can become better (`NEVER_BETTER`).
        sequences: how many texts of a prompt are returned; static.
        processors: logits functions of the user's; they see log-probabilities.
        stops: stopping criteria of the user's; they see the candidates.
        ask: what to keep of each step.

    Source: matches transformers 5's `_beam_search`. Sampling draws without replacement, by the Gumbel trick.
    """
    k, candidates = beams, max(2, 1 + ends) * beams
    rows, options = options.rows, options.repeat(k)

    def prompt(start: Start) -> tuple[State, Next]:
        running = begin(start, k, room)
        batch = running.scores.shape[0]
        state = State(
            running=running._replace(scores=running.scores.at[:, 1:].set(LOW)),
            found=running.trail,
            scores=jnp.full((batch, k), LOW),
            ended=jnp.zeros((batch, k), bool),
            hopeful=jnp.ones(batch, bool),
            more=jnp.ones((), bool),
            keys=start.key if start.key.ndim else row_keys(start.key, batch),
        )
        return state, of_prompt(start, k)

    def read(state: State) -> tuple[State, Next]:
        running, says = advance(model, state.running, ask)
        return state._replace(running=running), says

    def choose(state: State, says: Next) -> State:
        running = state.running
        logprobs = jax.nn.log_softmax(says.logits, axis=-1)
        logprobs = processed(logprobs, running.history, options, processors, keep=max(2, 1 + ends))
        running = record(running, ask, says, logprobs, room)
        scores, index = pick(state, logprobs)
        parent, token = jnp.divmod(index, logprobs.shape[1])
        row = rows_of(parent, k)
        history, hits = follow(running.history, row, token)
        trail = extend(running.trail, parent, token, logprobs[row, token], row)

        state = settle(state, trail, scores, hits & (jnp.arange(candidates) < k)[None])
        scores, place = largest(jnp.where(hits, scores + LOW, scores), k)
        running = running._replace(
            history=said.take_rows(history, rows_of(place, candidates).reshape(-1)),
            parents=take(row, place).reshape(-1),
            trail=take(trail, place),
            scores=scores,
            steps=running.steps + 1,
        )
        hopeful = state.hopeful & could_improve(state, running)
        more = hopeful.any() & ~hits.all() & ~(state.ended.all() & (early_stopping == ENOUGH))
        return state._replace(running=running, hopeful=hopeful, more=more)

    def pick(state: State, logprobs: Array) -> tuple[Array, Array]:
        """Scores and places of the candidates `(b candidates)` among the tokens of all beams of a prompt."""
        batch = state.scores.shape[0]
        everything = (logprobs + state.running.scores.reshape(-1, 1)).reshape(batch, -1)

        def likeliest() -> tuple[Array, Array]:
            scores, index = largest(everything, candidates)
            return scores, index.astype(jnp.int32)

        def drawn() -> tuple[Array, Array]:
            keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.running.steps)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, everything.shape[1:]))(keys)
            order = largest(jnp.where(rows.sample[:, None], everything + noise, everything), candidates)[1]
            return jnp.take_along_axis(everything, order, axis=1), order.astype(jnp.int32)

        return jax.lax.cond(rows.sample.any(), drawn, likeliest)

    def follow(history: History, row: Array, token: Array) -> tuple[History, Array]:
        """The histories of the candidates, and `(b candidates)` which of them end."""
        history = said.take_rows(history, row.reshape(-1))
        history = said.append(history, token.reshape(-1), jnp.ones(token.size, bool), options.automata)
        hits = is_end(token.reshape(-1), options.eos) | stopped(history, options, stops)
        return history, (hits | (history.new >= options.max_new_tokens)).reshape(token.shape)

    def settle(state: State, trail: Trail, scores: Array, ended: Array) -> State:
        """With the best of what was found and of the texts that have `ended` `(b m)`."""
        full = state.ended.all(-1) & (early_stopping == ENOUGH)
        allowed = ended & (state.hopeful & ~full)[:, None]
        scores = jnp.where(allowed, by_length(scores, trail.length, length_penalty), -jnp.inf)
        scores, place = largest(jnp.concatenate([state.scores, scores], axis=1), k)
        found, ended = take(beside((state.found, state.ended), (trail, allowed)), place)
        return state._replace(found=found, scores=scores, ended=ended)

    def could_improve(state: State, running: Running) -> Array:
        best = best_by_length(running.scores[:, :1], running.steps, options, length_penalty, early_stopping)
        worst = jnp.where(state.ended, state.scores.min(-1, keepdims=True), LOW)
        return (best > worst).any(-1)

    def more(state: State) -> Array:
        return state.more

    def finish(state: State) -> Result:
        # Where the steps were cut off, what goes on counts as ended, as in transformers under `max_time`.
        running = state.running
        state = settle(state, running.trail, running.scores, jnp.broadcast_to(state.more, state.ended.shape))
        return result(state.found, state.scores, sequences, running, options.pad)

    def newest(state: State) -> Array:
        return state.running.history.last[::k]

    return by_choices(prompt, read, choose, more, finish, newest, keeps=ask != NOTHING)
