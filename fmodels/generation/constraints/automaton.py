"""`TokenAutomaton`: an automaton over tokens as arrays, and the pure functions that follow it on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmodels.generation.constraints.dfa import MAX_STATES, Dfa, TooLargeError, reach, select
from fmodels.generation.constraints.vocabulary import Vocabulary
from fmodels.types import Array

MAX_ENTRIES = 2**24
"""Entries of a table of states and classes, 64 MiB; larger ones are for llguidance."""
_FAR = 2**30


class TokenAutomaton(NamedTuple):
    """Which tokens may follow, for each state; a pytree of arrays, of numpy until they reach the device.

    Tokens with the same effect in all states share a class. From every state some sequence of tokens leads to acceptance.
    Several automata may lie in one, each with its own states and its own line of classes.

    Attributes:
        classes: `(a v)` int32, for each automaton the class of each token.
        next: `(n c)` int32, the state after a token of each class; -1 where it is forbidden.
        final: `(n)` bool, where the text is complete: the end tokens are allowed here.
        distance: `(n)` int32, the least number of tokens that complete the text, the end token included; 0 in the state
            of rows without a constraint.
        owner: `(n)` int32, the automaton of each state, a row of `classes`.
        ends: `(v)` bool, the end tokens.
        start: `(b)` int32, the first state of each row; `(1)` in an automaton that is not stacked.
    """

    classes: Any
    next: Any
    final: Any
    distance: Any
    owner: Any
    ends: Any
    start: Any

    def accepts(self, state: Array) -> Array:
        """`(b)` bool, whether the text is complete in these states; for stop strings, whether one has just ended."""
        return jnp.asarray(self.final)[state]


def compile_tokens(
    dfa: Dfa, vocabulary: Vocabulary, end_tokens: Iterable[int], *, max_entries: int = MAX_ENTRIES
) -> TokenAutomaton:
    """Lifts an automaton over bytes to tokens.

    Args:
        dfa: what the text must be.
        vocabulary: the bytes of each token.
        end_tokens: ids that end a text, at least one; they are no part of it.
        max_entries: of `next`.

    Raises:
        ValueError: no end token, or no tokens that spell an accepted text.
        TooLargeError: the table has more than `max_entries`.
    """
    ends = _ends(end_tokens, len(vocabulary))
    n = len(dfa.final)
    if n > MAX_STATES:
        raise TooLargeError(f"constraint: {n} states, more than {MAX_STATES}; make it simpler, or use llguidance")
    columns, classes = walk(dfa, vocabulary, max_entries=max_entries)
    classes = np.where(ends, -1, classes)
    table = np.where(columns == n, -1, columns).T.astype(np.int32)  # (n c)
    table, classes = _drop_unused(table, classes)
    distance = _distance(table, dfa.final)
    first = np.zeros(n, bool)
    first[0] = True
    useful = distance < _FAR
    if not useful[0]:
        raise ValueError(
            "constraint: no sequence of the vocabulary's tokens spells an allowed text"
            + ("; it allows no text at all" if dfa.is_empty else "")
        )
    useful &= reach(np.where(useful[table], table, -1), first)
    table, classes = _join_classes(select(table, useful), classes)
    return TokenAutomaton(
        classes=classes[None],
        next=table,
        final=dfa.final[useful],
        distance=distance[useful],
        owner=np.zeros(len(table), np.int32),
        ends=ends,
        start=np.zeros(1, np.int32),
    )


def _ends(end_tokens: Iterable[int], size: int) -> np.ndarray:
    found = sorted({int(i) for i in end_tokens if i >= 0})
    if not found or found[-1] >= size:
        raise ValueError(
            f"constraint: expected at least one end token below {size}, got {found}; set eos_token_id in the options"
        )
    ends = np.zeros(size, bool)
    ends[found] = True
    return ends


def walk(
    dfa: Dfa, vocabulary: Vocabulary, *, starts: int | None = None, max_entries: int = MAX_ENTRIES
) -> tuple[np.ndarray, np.ndarray]:
    """Reads every token from every state, a level of the vocabulary's trie at a time, equal columns once.

    Args:
        dfa: an automaton over bytes of `n` states.
        vocabulary: the bytes of each token.
        starts: states to read from, the first ones; all if None.
        max_entries: of the columns.

    Returns:
        `(c m)` the state after a token of each class from each of the `m` starts, `n` where there is none; and `(v)` int32
        the class of each token, -1 where it leads nowhere or has no text.
    """
    n, k = dfa.next.shape
    kind = np.int16 if n < 2**15 - 1 else np.int32
    # One row for each class of bytes, with a last state that nothing leaves.
    delta = np.full((k, n + 1), n, kind)
    delta[:, :n] = np.where(dfa.next >= 0, dfa.next, n).T
    m = n if starts is None else starts
    trie = vocabulary.trie
    node_class = np.full(len(trie.parent), -1, np.int32)  # of the level that is read, into `columns`
    result = np.full(len(trie.parent), -1, np.int32)  # into `kept`, for nodes where a token ends
    is_token = np.zeros(len(trie.parent), bool)
    is_token[trie.node[trie.node >= 0]] = True
    byte_class = dfa.classes[trie.byte]
    columns = np.arange(m, dtype=kind)[None]
    node_class[0] = 0
    kept: dict[bytes, int] = {}
    for first, last in trie.levels:
        above = node_class[trie.parent[first:last]]
        nodes = np.flatnonzero(above >= 0)
        if not nodes.size:
            break
        steps, inverse = np.unique(above[nodes].astype(np.int64) * k + byte_class[first + nodes], return_inverse=True)
        if len(steps) * m > 8 * max_entries:
            raise TooLargeError(f"constraint: more than {max_entries} entries in its table; use llguidance")
        columns = delta[(steps % k)[:, None], columns[steps // k]]
        number: dict[bytes, int] = {}
        local = np.array([number.setdefault(column.tobytes(), len(number)) for column in columns], np.int32)
        _, members = np.unique(local, return_index=True)
        columns = columns[members]
        local = np.where((columns != n).any(1)[local], local, -1)
        node_class[first + nodes] = local[inverse.reshape(-1)]
        here = node_class[first:last]
        ended = np.unique(here[is_token[first:last] & (here >= 0)])
        final_class = np.full(len(columns) + 1, -1, np.int32)
        for i in ended.tolist():
            final_class[i] = kept.setdefault(columns[i].tobytes(), len(kept))
        result[first:last] = final_class[here]
        if len(kept) * m > 2 * max_entries:
            raise TooLargeError(f"constraint: more than {max_entries} entries in its table; use llguidance")
    rows = [np.frombuffer(column, kind) for column in kept]
    classes = np.where(trie.node >= 0, result[trie.node], -1).astype(np.int32)
    return np.stack(rows) if rows else np.full((0, m), n, kind), classes


def _drop_unused(table: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts a class 0, which is forbidden everywhere, in the place of -1, and leaves out what no token has."""
    used = np.zeros(table.shape[1], bool)
    used[classes[classes >= 0]] = True
    number = np.append(np.where(used, np.cumsum(used), 0), 0)
    nowhere = np.full((len(table), 1), -1, np.int32)
    return np.concatenate([nowhere, table[:, used]], axis=1), number[classes].astype(np.int32)


def _join_classes(table: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins classes whose columns are equal; class 0 keeps its number."""
    number: dict[bytes, int] = {}
    columns = np.ascontiguousarray(table.T)
    label = np.array([number.setdefault(column.tobytes(), len(number)) for column in columns], np.int32)
    _, members = np.unique(label, return_index=True)
    return np.ascontiguousarray(columns[members].T), label[classes]


def _distance(table: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The least number of tokens, end token included, that lead from each state to an end."""
    n = len(final)
    leads = np.zeros((n, n + 1), bool)
    leads[np.arange(n)[:, None], table] = True  # -1 is the last column
    distance = np.where(final, 1, _FAR).astype(np.int32)
    front, steps = final, 1
    while front.any():
        steps += 1
        front = leads[:, np.flatnonzero(front)].any(1) & (distance == _FAR)
        distance[front] = steps
    return distance


def unconstrained(size: int, end_tokens: Iterable[int] = ()) -> TokenAutomaton:
    """An automaton with one state that allows all tokens at all times."""
    ends = np.zeros(size, bool)
    ends[[i for i in end_tokens if 0 <= i < size]] = True
    zero, one = np.zeros(1, np.int32), np.ones(1, bool)
    return TokenAutomaton(np.zeros((1, size), np.int32), np.zeros((1, 1), np.int32), one, zero, zero, ends, zero)


def stack(automata: Sequence[TokenAutomaton | None], *, size: int | None = None, pad: bool = True) -> TokenAutomaton:
    """One automaton for a batch, with a first state for each row.

    Args:
        automata: one for each row, of one vocabulary and with the same end tokens; None for rows without a constraint. Rows
            with the same object share its states.
        size: tokens of the vocabulary; needed if all rows are None.
        pad: whether the tables grow to rounded sizes, so that other constraints need no other program.

    Raises:
        ValueError: the vocabularies or the end tokens differ.
    """
    given = [a for a in automata if a is not None]
    if not given and size is None:
        raise ValueError("stack: no row has a constraint; give size=, the tokens of the vocabulary")
    ends = given[0].ends if given else np.zeros(size or 0, bool)
    if any(a.ends.shape != ends.shape or (a.ends != ends).any() for a in given):
        raise ValueError(
            "stack: the constraints were compiled for different vocabularies or end tokens; compile them for one"
        )
    free = unconstrained(len(ends), np.flatnonzero(ends).tolist())
    rows = [free if a is None else a for a in automata]
    parts = list({id(a): a for a in rows}.values())
    offset, owner, at, line = {}, {}, 0, 0
    for part in parts:
        offset[id(part)], owner[id(part)] = at, line
        at, line = at + len(part.final), line + len(part.classes)
    n, c, a = at, max(part.next.shape[1] for part in parts), line
    if pad:
        n, c, a = _round(n), _round(c), 1 << (a - 1).bit_length()
    table = np.full((n, c), -1, np.int32)
    for part in parts:
        first = offset[id(part)]
        table[first : first + len(part.final), : part.next.shape[1]] = np.where(part.next >= 0, part.next + first, -1)

    def join(arrays: Iterable[np.ndarray], length: int) -> np.ndarray:
        whole = np.concatenate(list(arrays))
        return np.concatenate([whole, np.zeros((length - len(whole), *whole.shape[1:]), whole.dtype)])

    return TokenAutomaton(
        classes=join((part.classes for part in parts), a),
        next=table,
        final=join((part.final for part in parts), n),
        distance=join((part.distance for part in parts), n),
        owner=join((part.owner + owner[id(part)] for part in parts), n),
        ends=ends,
        start=np.concatenate([row.start[:1] + offset[id(row)] for row in rows]).astype(np.int32),
    )


def _round(length: int) -> int:
    """The smallest power of two from 16 on, or three quarters of one, that is not below `length`."""
    size = 1 << max(4, (length - 1).bit_length())
    return size * 3 // 4 if size * 3 // 4 >= max(16, length) else size


def allowed(automaton: TokenAutomaton, state: Array, left: Array | None = None) -> Array:
    """Which tokens may come next.

    `allowed[i, t] = next[state, class(t)] >= 0 and distance[next] < left`, and end tokens in final states.

    Args:
        automaton: of the batch.
        state: `(b)` int32.
        left: `(b)` int32, how many tokens may still come, this one and the end token included. If None, any number. As long
            as it is at least `distance[start]` at the start, some token is allowed at each step and the text is complete
            when none is left.

    Returns:
        `(b v)` bool, with at least one token in each row.
    """
    automaton = _on_device(automaton)
    follow = automaton.next[state]
    good = follow >= 0
    if left is not None:
        good &= automaton.distance[follow] < left[:, None]
    mask = jnp.take_along_axis(good, automaton.classes[automaton.owner[state]], axis=1)
    return mask | (automaton.final[state][:, None] & automaton.ends[None])


def advance(automaton: TokenAutomaton, state: Array, token: Array) -> Array:
    """The states after a token of each row; a token that is not allowed, such as an end token or padding, changes nothing.

    Args:
        automaton: of the batch.
        state: `(b)` int32.
        token: `(b)` int32.

    Returns:
        `(b)` int32.
    """
    automaton = _on_device(automaton)
    follow = automaton.next[state, automaton.classes[automaton.owner[state], token]]
    return jnp.where(follow >= 0, follow, state)


def _on_device(automaton: TokenAutomaton) -> TokenAutomaton:
    return TokenAutomaton(*(jnp.asarray(array) for array in automaton))


def require_room(automaton: TokenAutomaton, max_new_tokens: int) -> None:
    """Raises if `max_new_tokens` are too few for some row to complete its text.

    Raises:
        ValueError: it names the rows and what they need.
    """
    needed = np.asarray(automaton.distance)[np.asarray(automaton.start)]
    if (short := np.flatnonzero(needed > max_new_tokens)).size:
        raise ValueError(
            f"generate: rows {short.tolist()} need at least {needed[short].max()} tokens, the end token included, to fulfil "
            f"their constraints; raise max_new_tokens, which is {max_new_tokens}"
        )
