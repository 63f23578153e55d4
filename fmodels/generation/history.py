"""What a row has said so far, in the forms that logits functions ask for; every array has the rows first."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation.constraints.automaton import TokenAutomaton, advance
from fmodels.types import Array


class Context(NamedTuple):
    """The text that the options of the encoder speak of: the encoder's input, or a decoder's prompt.

    Attributes:
        tokens: `(b c)` int32.
        mask: `(b c)` bool.
        match: `(b c)` int32, as in `History`, of the context against the end of the history.
    """

    tokens: Array
    mask: Array
    match: Array


class History(NamedTuple):
    """The tokens of each row: padding on the left, the prompt, the new tokens, room.

    Attributes:
        tokens: `(b s)` int32.
        start: `(b)` int32, the column of the first real token.
        prompt: `(b)` int32, the column of the first new token.
        end: `(b)` int32, the column of the next token.
        seen: `(b v)` bool, whether a token occurs in the row.
        match: `(b s)` int32: how many tokens before a column equal, one by one backwards, those at the end of the row;
            None unless something asks for n-grams.
        context: see there; None unless something asks for it.
        grammar: `(b)` int32, state of the automaton that constrains the row; None without.
        stop: `(b)` int32, state of the automaton of stop strings; None without.
    """

    tokens: Array
    start: Array
    prompt: Array
    end: Array
    seen: Array
    match: Array | None = None
    context: Context | None = None
    grammar: Array | None = None
    stop: Array | None = None

    @property
    def length(self) -> Array:
        """`(b)` real tokens, prompt included."""
        return self.end - self.start

    @property
    def new(self) -> Array:
        """`(b)` new tokens."""
        return self.end - self.prompt

    @property
    def last(self) -> Array:
        """`(b)` the newest token."""
        return at(self.tokens, self.end - 1)


class Automata(NamedTuple):
    """The automata that run beside a history.

    Attributes:
        grammar: constrains the tokens.
        stop: looks for stop strings.
    """

    grammar: TokenAutomaton | None = None
    stop: TokenAutomaton | None = None


def at(array: Array, column: Array) -> Array:
    """`array[b, column[b]]`."""
    return jnp.take_along_axis(array, column[:, None], axis=1)[:, 0]


def begin(
    tokens: Array,
    mask: Array,
    vocabulary: int,
    *,
    room: int,
    pad: Array,
    ngrams: bool = False,
    context: tuple[Array, Array] | None = None,
    automata: Automata | None = None,
) -> History:
    """The history of prompts.

    Args:
        tokens: `(b t)` int32, padding on the left.
        mask: `(b t)` bool.
        vocabulary: size of the vocabulary.
        room: columns for new tokens.
        pad: `()` int32, what the room is filled with.
        ngrams: whether to keep `match`.
        context: tokens and mask `(b c)`, kept with its own `match`.
        automata: those whose states the history carries; both begin with the first new token.
    """
    batch, width = tokens.shape
    rows = jnp.arange(batch)[:, None]
    filled = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=0)
    new = jnp.arange(width + room) >= width
    start = jnp.argmax(mask, axis=-1).astype(jnp.int32)
    history = History(
        tokens=jnp.where(new[None], pad, filled),
        start=start,
        prompt=jnp.full(batch, width, jnp.int32),
        end=jnp.full(batch, width, jnp.int32),
        seen=jnp.zeros((batch, vocabulary), bool).at[rows, tokens].max(mask),
    )
    if automata is not None and automata.grammar is not None:
        history = history._replace(grammar=jnp.broadcast_to(automata.grammar.start, (batch,)).astype(jnp.int32))
    if automata is not None and automata.stop is not None:
        history = history._replace(stop=jnp.broadcast_to(automata.stop.start, (batch,)).astype(jnp.int32))
    if context is not None:
        history = history._replace(context=Context(*context, jnp.zeros(context[0].shape, jnp.int32)))
    if not ngrams and context is None:
        return history

    def read(carry: History, column: Array) -> tuple[History, None]:
        return _match(carry._replace(end=jnp.full(batch, column)), tokens[:, column], mask[:, column]), None

    history = history._replace(match=jnp.zeros(history.tokens.shape, jnp.int32) if ngrams else None)
    matched, _ = jax.lax.scan(read, history, jnp.arange(width, dtype=jnp.int32))
    return matched._replace(end=history.end)


def append(history: History, token: Array, alive: Array, automata: Automata | None = None) -> History:
    """The history with one more token in the rows that are `alive`.

    Args:
        history: before.
        token: `(b)` int32.
        alive: `(b)` bool.
        automata: as for `begin`.
    """
    rows = jnp.arange(token.shape[0])
    history = _match(history, token, alive)
    column = jnp.where(alive, history.end, history.tokens.shape[1])
    changes: dict[str, Any] = {}
    for name in ("grammar", "stop"):
        state, automaton = getattr(history, name), getattr(automata, name, None)
        if state is not None and automaton is not None:
            changes[name] = jnp.where(alive, advance(automaton, state, token), state)
    return history._replace(
        tokens=history.tokens.at[rows, column].set(token, mode="drop"),
        end=history.end + alive.astype(jnp.int32),
        seen=history.seen.at[rows, token].max(alive),
        **changes,
    )


def _match(history: History, token: Array, alive: Array) -> History:
    """`match` after `token`: where the token before a column is this one, one more than the column before had."""

    def after(match: Array, tokens: Array, real: Array) -> Array:
        same = (tokens == token[:, None]) & real
        longer = jnp.where(same, match + 1, 0)
        moved = jnp.pad(longer, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(alive[:, None], moved, match)

    if history.match is not None:
        column = jnp.arange(history.tokens.shape[1])[None]
        real = (column >= history.start[:, None]) & (column < history.end[:, None])
        history = history._replace(match=after(history.match, history.tokens, real))
    if history.context is not None:
        context = history.context
        history = history._replace(context=context._replace(match=after(context.match, context.tokens, context.mask)))
    return history


def take_rows(history: History, rows: Array) -> History:
    """Rows of the history in a new order."""
    return jax.tree.map(lambda x: x[rows], history)


def repeat_rows(history: History, count: int) -> History:
    """Each row `count` times, copies side by side."""
    return history if count == 1 else jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), history)
