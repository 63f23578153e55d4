"""Constrained beam search: texts that contain phrases, by beams of which some are always pushed on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation import phrases as trees
from fmodels.generation.history import History
from fmodels.generation.hypotheses import Candidates, Hypotheses, add, candidates, going_on, in_order, is_done, nothing
from fmodels.generation.options import Options, Processor
from fmodels.generation.phrases import Phrases, Progress, advances, bank, complete, update
from fmodels.generation.running import (
    LOW,
    Running,
    advance,
    begin,
    beside,
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


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        running: `k` beams of each prompt.
        progress: `(b·k)`, how far each has come with the phrases.
        found: `(b k …)`, the texts that have ended.
        done: `(b)` bool, prompts that want no more.
        more: `()` bool.
    """

    running: Running
    progress: Progress
    found: Hypotheses
    done: Array
    more: Array


def constrained_beam_search(
    model: Model,
    options: Options,
    *,
    room: int,
    beams: int,
    ends: int,
    widest: int,
    length_penalty: Array,
    early_stopping: Array,
    phrases: Phrases,
    sequences: int = 1,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    ask: Ask = NOTHING,
) -> Strategy:
    """A beam search in which the beams are chosen evenly among those that have come equally far with the phrases.

    A text of which not all phrases are there does not end before `max_new_tokens`; one is returned only if there are not
    enough others. What the prompt contains counts.

    Args:
        model: bound.
        options: arrays, a row for each prompt.
        room: columns for new tokens; static.
        beams: how many texts of a prompt go on; static.
        ends: how many end tokens there are; static.
        widest: how many tokens can go on with the phrases; static.
        length_penalty: as in `beam_search`.
        early_stopping: as in `beam_search`.
        phrases: that every text must contain.
        sequences: how many texts of a prompt are returned; static.
        processors: logits functions of the user's; they see log-probabilities.
        stops: stopping criteria of the user's; the search ends where all beams of all prompts meet one.
        ask: what to keep of each step.

    Source: Hu et al. 2019 (banks); matches transformers 4.55's `_constrained_beam_search` with its
    `ConstrainedBeamSearchScorer`, which writes the first end token whichever ends a text; except that padding before the
    prompt is no part of the text.
    """
    k, wide = beams, max(2, 1 + ends) * beams
    options = options.repeat(k)

    def prompt(start: Start) -> tuple[State, Next]:
        running = begin(start, k, room)
        batch = running.scores.shape[0]
        state = State(
            running=running._replace(scores=running.scores.at[:, 1:].set(LOW)),
            progress=said_so_far(running.history),
            found=nothing(running.trail),
            done=jnp.zeros(batch, bool),
            more=jnp.ones((), bool),
        )
        return state, of_prompt(start, k)

    def said_so_far(history: History) -> Progress:
        """What the prompt contains of the phrases."""

        def read(progress: Progress, column: Array) -> tuple[Progress, None]:
            after = update(phrases, progress, history.tokens[:, column])
            real = (column >= history.start) & (column < history.end)
            return jax.tree.map(
                lambda x, y: jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, y), after, progress
            ), None

        columns = jnp.arange(history.tokens.shape[1] - room, dtype=jnp.int32)
        return jax.lax.scan(read, trees.begin(phrases, history.end.shape[0]), columns)[0]

    def read(state: State) -> tuple[State, Next]:
        running, says = advance(model, state.running, ask)
        return state._replace(running=running), says

    def choose(state: State, says: Next) -> State:
        running, steps = state.running, state.running.steps + 1
        batch = running.scores.shape[0]
        logprobs = jax.nn.log_softmax(says.logits, axis=-1)
        logprobs = processed(logprobs, running.history, options, processors, keep=1)
        running = record(running, ask, says, logprobs, room)
        scores = logprobs.reshape(batch, k, -1) + running.scores[..., None]
        best = candidates(scores, wide, options.eos)

        ended = jax.tree.map(lambda x: x[:, :k], best)
        row = rows_of(ended.parent, k)
        first = jnp.broadcast_to(options.eos[0], row.shape)
        trail = extend(running.trail, ended.parent, first, logprobs[row, ended.token], row)
        wanted = ended.end & ~state.done[:, None] & complete(phrases, state.progress)[row]
        found = add(state.found, trail, by_length(ended.scores, steps, length_penalty), wanted)
        done = state.done | is_done(found, best.scores[:, 0], steps, options, length_penalty, early_stopping)

        best = push(state, scores, take(best, going_on(best, k)))
        row = rows_of(best.parent, k)
        trail = extend(running.trail, best.parent, best.token, logprobs[row, best.token], row)
        token = jnp.where(state.done[:, None], options.pad, best.token).reshape(-1)
        history = said.take_rows(running.history, row.reshape(-1))
        history = said.append(history, token, jnp.ones(token.size, bool), options.automata)
        enough = stopped(history, options, stops) | jnp.repeat(done, k)
        return State(
            running=running._replace(
                history=history,
                parents=row.reshape(-1),
                trail=trail,
                scores=jnp.where(state.done[:, None], 0.0, best.scores),
                steps=steps,
            ),
            progress=update(phrases, progress_of(state, row), token),
            found=found,
            done=done,
            more=~done.all() & (steps < options.max_new_tokens) & ~enough.all(),
        )

    def progress_of(state: State, row: Array) -> Progress:
        return jax.tree.map(lambda x: x[row.reshape(-1)], state.progress)

    def push(state: State, scores: Array, best: Candidates) -> Candidates:
        """The beams that go on: of the `k` best, and of each beam with each token that goes on with its phrases.

        Those with equal banks are put in order; then come the first of each bank, the second of each, and so on.

        Args:
            state: before the step.
            scores: `(b k v)`, of all tokens.
            best: `k` of each prompt.

        Source: `step_sentence_constraint` of transformers 4.55.
        """
        batch = scores.shape[0]
        tokens, there, banks = (x.reshape(batch, k * widest) for x in advances(phrases, state.progress, widest))
        parent = jnp.broadcast_to(jnp.repeat(jnp.arange(k, dtype=jnp.int32), widest)[None], tokens.shape)
        pushed = Candidates(
            scores=scores[jnp.arange(batch)[:, None], parent, tokens],
            parent=parent,
            token=tokens,
            end=jnp.zeros(tokens.shape, bool),
        )
        known, again = same(state.running, pushed, best), same(state.running, pushed, pushed)
        before = jnp.tril(jnp.ones((k * widest, k * widest), bool), -1)[None]
        new = there & ~known.any(-1) & ~(again & before & there[:, None]).any(-1)

        row = rows_of(best.parent, k)
        own = bank(phrases, update(phrases, progress_of(state, row), best.token.reshape(-1))).reshape(batch, k)
        everyone, banks = beside((best, own), (pushed, banks))
        real = jnp.concatenate([jnp.ones((batch, k), bool), new], axis=1)
        keys = banks.astype(jnp.float32) * 100.0 + everyone.scores
        order = jnp.lexsort((-keys, ~real), axis=-1)  # stable
        banks, real = take((banks, real), order)
        places = jnp.arange(banks.shape[1], dtype=jnp.int32)[None]
        begins = jnp.concatenate([jnp.ones((batch, 1), bool), banks[:, 1:] != banks[:, :-1]], axis=1)
        nth = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
        chosen = jnp.argsort(jnp.where(real, nth, places.shape[1]), axis=-1, stable=True)[:, :k]
        evenly = take(everyone, jnp.take_along_axis(order, chosen, axis=1))
        return jax.tree.map(lambda x, y: jnp.where(new.any(-1)[:, None], x, y), evenly, best)

    def same(running: Running, some: Candidates, others: Candidates) -> Array:
        """`(b m n)` bool, whether they are the same texts: at the first step the beams of a prompt are."""
        tokens = running.history.tokens.reshape(-1, k, running.history.tokens.shape[1])
        texts = (tokens[:, :, None] == tokens[:, None]).all(-1)
        rows = jnp.arange(texts.shape[0])[:, None, None]
        equal = texts[rows, some.parent[:, :, None], others.parent[:, None]]
        return equal & (some.token[:, :, None] == others.token[:, None])

    def more(state: State) -> Array:
        return state.more

    def finish(state: State) -> Result:
        running = state.running
        scores = by_length(running.scores, running.steps, length_penalty)
        whole = complete(phrases, state.progress).reshape(scores.shape)
        open_ = ~state.done[:, None]
        found = add(state.found, running.trail, scores, whole & open_)
        too_few = whole.sum(-1, keepdims=True) < sequences
        found = add(found, running.trail, scores, ~whole & open_ & too_few)
        trail, scores = in_order(found.trail, found.scores, found.there)
        return result(trail, scores, sequences, running, options.pad)

    def newest(state: State) -> Array:
        return state.running.history.last[::k]

    return by_choices(prompt, read, choose, more, finish, newest, keeps=ask != NOTHING)
