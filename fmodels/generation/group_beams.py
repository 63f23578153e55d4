"""Diverse beam search: groups of beams, each of which is kept from the tokens that the groups before it have chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.history import History
from fmodels.generation.hypotheses import Hypotheses, add, candidates, going_on, in_order, is_done, nothing
from fmodels.generation.options import Options, Processor
from fmodels.generation.running import (
    LOW,
    Running,
    Trail,
    advance,
    begin,
    by_length,
    extend,
    of_prompt,
    processed,
    record,
    result,
    rows_of,
    take,
)
from fmodels.generation.sample import NOTHING, Ask, Predicate, stopped
from fmodels.generation.strategy import Model, Next, Result, Start, Strategy, by_choices
from fmodels.types import Array

T = TypeVar("T")


class State(NamedTuple):
    """What a step needs and returns; `s` beams in each of `g` groups.

    Attributes:
        running: `g·s` beams of each prompt, those of a group side by side.
        found: `(g b s …)`, the texts of each group that have ended.
        done: `(g b)` bool, groups that want no more.
        more: `()` bool.
    """

    running: Running
    found: Hypotheses
    done: Array
    more: Array


class Group(NamedTuple):
    """What a step knows of one group.

    Attributes:
        number: `()` int32.
        logprobs: `(b·s v)`, of the model.
        history: of `b·s` rows.
        trail: `(b s …)`.
        scores: `(b s)`.
        found: `(b s …)`.
        done: `(b)` bool.
    """

    number: Array
    logprobs: Array
    history: History
    trail: Trail
    scores: Array
    found: Hypotheses
    done: Array


def group_beam_search(
    model: Model,
    options: Options,
    *,
    room: int,
    beams: int,
    groups: int,
    ends: int,
    length_penalty: Array,
    early_stopping: Array,
    diversity_penalty: Array,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
) -> Strategy:
    """A beam search in each group; a token costs `diversity_penalty` for each beam of an earlier group that has it now.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        beams: in all groups; static.
        groups: how many; a divisor of `beams`; static.
        ends: how many end tokens there are; static.
        length_penalty: as in `beam_search`.
        early_stopping: as in `beam_search`.
        diversity_penalty: `()` float32.
        sequences: how many texts of a prompt are returned, the best of all groups; static.
        processors: logits functions of the user's; they see log-probabilities.
        stops: stopping criteria of the user's; the search ends where all beams of all prompts meet one.
        ask: what to keep of each step.

    Source: Vijayakumar et al. 2018; matches transformers 4.55's `_group_beam_search` with its `BeamSearchScorer`, which
    writes the first end token whichever ends a text; except that `beam_indices` are rows of the logits (there they mix
    groups up).
    """
    s, wide = beams // groups, max(2, 1 + ends) * (beams // groups)
    options = options.repeat(s)

    def prompt(start: Start) -> tuple[State, Next]:
        running = begin(start, beams, room)
        first = jnp.arange(beams) % s == 0
        trails = beams_by_group(running.trail)
        state = State(
            running=running._replace(scores=jnp.where(first[None], running.scores, LOW)),
            found=jax.vmap(nothing)(trails),
            done=jnp.zeros(trails.length.shape[:2], bool),
            more=jnp.ones((), bool),
        )
        return state, of_prompt(start, beams)

    def read(state: State) -> tuple[State, Next]:
        running, says = advance(model, state.running, ask)
        return state._replace(running=running), says

    def choose(state: State, says: Next) -> State:
        running = state.running
        logprobs = jax.nn.log_softmax(says.logits, axis=-1)
        everyone = Group(
            number=jnp.arange(groups, dtype=jnp.int32),
            logprobs=by_group(logprobs),
            history=by_group(running.history),
            trail=beams_by_group(running.trail),
            scores=beams_by_group(running.scores),
            found=state.found,
            done=state.done,
        )
        taken = jnp.zeros((running.scores.shape[0], logprobs.shape[1]), jnp.float32)
        _, (everyone, rows) = jax.lax.scan(functools.partial(in_group, steps=running.steps + 1), taken, everyone)
        running = record(running, ask, says, by_prompt(everyone.logprobs), room)
        history, done = by_prompt(everyone.history), everyone.done
        enough = stopped(history, options, stops) | jnp.repeat(done.T.reshape(-1), s)
        more = ~done.all() & (running.steps + 1 < options.max_new_tokens) & ~enough.all()
        running = running._replace(
            history=history,
            parents=beams_by_prompt(rows).reshape(-1),
            trail=beams_by_prompt(everyone.trail),
            scores=beams_by_prompt(everyone.scores),
            steps=running.steps + 1,
        )
        return State(running, everyone.found, done, more)

    def in_group(taken: Array, group: Group, steps: Array) -> tuple[Array, tuple[Group, Array]]:
        """A step of one group, and the rows that its beams go on from.

        Args:
            taken: `(b v)` float32, how many beams of the groups before it have taken a token.
            group: before the step.
            steps: `()` int32, new tokens after it.
        """
        batch = taken.shape[0]
        logprobs = group.logprobs - diversity_penalty * jnp.repeat(taken, s, axis=0)
        logprobs = processed(logprobs, group.history, options, processors, keep=1)
        best = candidates(logprobs.reshape(batch, s, -1) + group.scores[..., None], wide, options.eos)
        own, row = rows_of(best.parent, s), rows_of(group.number * s + best.parent, beams)
        written = jnp.where(best.end, options.eos[0], best.token)
        trail = extend(group.trail, best.parent, written, logprobs[own, best.token], row)

        first, scores, wanted = jax.tree.map(lambda x: x[:, :s], (trail, best.scores, best.end & ~group.done[:, None]))
        found = add(group.found, first, by_length(scores, steps, length_penalty), wanted)
        done = group.done | is_done(found, best.scores[:, 0], steps, options, length_penalty, early_stopping)

        best, trail, own, row = take((best, trail, own, row), going_on(best, s))
        token = jnp.where(group.done[:, None], options.pad, best.token)
        history = said.take_rows(group.history, own.reshape(-1))
        history = said.append(history, token.reshape(-1), jnp.ones(token.size, bool), options.automata)
        scores = jnp.where(group.done[:, None], 0.0, best.scores)
        taken = taken.at[jnp.arange(batch)[:, None], token].add(1.0)
        return taken, (Group(group.number, logprobs, history, trail, scores, found, done), row)

    def more(state: State) -> Array:
        return state.more

    def finish(state: State) -> Result:
        running, wanted = state.running, ~state.done[..., None]
        trail, scores = beams_by_group((running.trail, running.scores))
        scores = by_length(scores, running.steps, length_penalty)
        found = jax.vmap(add)(state.found, trail, scores, jnp.broadcast_to(wanted, scores.shape))
        there = jax.vmap(lambda found: found.there)(found)
        trail, scores = in_order(*beams_by_prompt((found.trail, found.scores, there)))
        return result(trail, scores, sequences, running, options.pad)

    def newest(state: State) -> Array:
        return state.running.history.last[::beams]

    def by_group(rows: T) -> T:
        """Arrays `(b·g·s …)` as `(g b·s …)`."""

        def one(x: Array) -> Array:
            return x.reshape(-1, groups, s, *x.shape[1:]).swapaxes(0, 1).reshape(groups, -1, *x.shape[1:])

        return jax.tree.map(one, rows)

    def by_prompt(rows: T) -> T:
        """The inverse of `by_group`."""

        def one(x: Array) -> Array:
            return x.reshape(groups, -1, s, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

        return jax.tree.map(one, rows)

    def beams_by_group(trails: T) -> T:
        """Arrays `(b g·s …)` as `(g b s …)`."""
        return jax.tree.map(lambda x: x.reshape(-1, groups, s, *x.shape[2:]).swapaxes(0, 1), trails)

    def beams_by_prompt(trails: T) -> T:
        """Arrays `(g b s …)` as `(b g·s …)`."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], groups * s, *x.shape[3:]), trails)

    return by_choices(prompt, read, choose, more, finish, newest, keeps=ask != NOTHING)
