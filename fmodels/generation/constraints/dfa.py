"""Finite automata over bytes: determinisation, minimisation, intersection and difference."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

MAX_STATES = 8192
"""States of an automaton that is still compiled to tables; larger ones are for llguidance."""


class TooLargeError(ValueError):
    """A constraint that does not fit into tables: `Constraint.guidance` takes it."""


class Dfa(NamedTuple):
    """A deterministic automaton over bytes; its start is state 0, and every state leads to acceptance.

    Attributes:
        classes: `(256)` int32, the class of each byte.
        next: `(n k)` int32, the state after a byte of each class; -1 where there is none.
        final: `(n)` bool, where the text may end.
    """

    classes: np.ndarray
    next: np.ndarray
    final: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether it accepts nothing."""
        return not self.final.any()

    def step(self, state: int, byte: int) -> int:
        return int(self.next[state, self.classes[byte]]) if state >= 0 else -1

    def matches(self, text: bytes) -> bool:
        """Whether the whole text is accepted."""
        state = 0
        for byte in text:
            state = self.step(state, byte)
            if state < 0:
                return False
        return bool(self.final[state])


class Nfa:
    """A graph of states with edges for ranges of bytes, free edges, and edges that are free at one end of the text.

    Attributes:
        edges: for each state `[(low, high, target)]`, bytes from low to high inclusive.
        free: for each state the states that it is also in.
        begin: the same, at the beginning of the text only.
        end: the same, at its end only.
        limit: the number of states at which `new` raises.
    """

    def __init__(self, limit: int = 16 * MAX_STATES):
        self.edges: list[list[tuple[int, int, int]]] = []
        self.free: list[list[int]] = []
        self.begin: dict[int, list[int]] = {}
        self.end: dict[int, list[int]] = {}
        self.limit = limit

    def new(self) -> int:
        if len(self.edges) >= self.limit:
            raise TooLargeError(f"constraint: more than {self.limit} states; make its repetitions shorter")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def closure(self, state: int, *, begin: bool = False, end: bool = False) -> set[int]:
        """All states that are reached without reading a byte."""
        seen, todo = {state}, [state]
        while todo:
            at = todo.pop()
            more = self.free[at]
            if begin and at in self.begin:
                more = more + self.begin[at]
            if end and at in self.end:
                more = more + self.end[at]
            for to in more:
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        return seen


def determinise(nfa: Nfa, start: int, final: int, *, limit: int = MAX_STATES) -> Dfa:
    """The minimal automaton that accepts what leads from `start` to `final`.

    Raises:
        TooLargeError: more than `limit` states after minimisation, or four times as many before.
    """
    cut = np.zeros(257, bool)
    cut[0] = True
    for edges in nfa.edges:
        for low, high, _ in edges:
            cut[low] = cut[high + 1] = True
    classes = np.cumsum(cut[:256]) - 1
    keep = [bool(edges) or q == final or q in nfa.end for q, edges in enumerate(nfa.edges)]
    closures: dict[int, frozenset[int]] = {}
    moves: dict[int, dict[int, frozenset[int]]] = {}

    def closure(q: int) -> frozenset[int]:
        if q not in closures:
            closures[q] = frozenset(s for s in nfa.closure(q) if keep[s])
        return closures[q]

    def moves_of(q: int) -> dict[int, frozenset[int]]:
        if q not in moves:
            found: dict[int, frozenset[int]] = {}
            for low, high, to in nfa.edges[q]:
                reached = closure(to)
                for c in range(classes[low], classes[high] + 1):
                    found[c] = found[c] | reached if c in found else reached
            moves[q] = found
        return moves[q]

    def accepts(states: frozenset[int], first: bool) -> bool:
        return any(q == final or (q in nfa.end and final in nfa.closure(q, begin=first, end=True)) for q in states)

    first = frozenset(s for s in nfa.closure(start, begin=True) if keep[s])
    # The first state is kept apart, since only there the beginning of the text is also its end.
    rows, accepting = [], []
    todo = deque([(first, True)])
    number = {(first, True): 0}
    while todo:
        states, is_first = todo.popleft()
        if len(states) == 1:
            reached = moves_of(next(iter(states)))
        else:
            reached: dict[int, frozenset[int]] = {}
            for q in states:
                for c, to in moves_of(q).items():
                    reached[c] = reached[c] | to if c in reached else to
        row = {}
        for c, to in reached.items():
            if to:
                key = (to, False)
                if key not in number:
                    number[key] = len(number)
                    todo.append(key)
                row[c] = number[key]
        rows.append(row)
        accepting.append(accepts(states, is_first))
        if len(number) > 4 * limit:
            raise TooLargeError(f"constraint: more than {4 * limit} states; make it simpler, or use llguidance")
    table = np.full((len(rows), int(classes[-1]) + 1), -1, np.int32)
    for i, row in enumerate(rows):
        if row:
            table[i, list(row)] = list(row.values())
    dfa = minimise(Dfa(classes.astype(np.int32), table, np.array(accepting)))
    if len(dfa.final) > limit:
        raise TooLargeError(
            f"constraint: {len(dfa.final)} states, more than {limit}; make it simpler, or use llguidance"
        )
    return dfa


def reach(successors: np.ndarray, start: np.ndarray, *, backward: bool = False) -> np.ndarray:
    """The states `(n)` bool that are reached from those of `start`, or that reach them.

    Args:
        successors: `(n k)` int32, -1 for none.
        start: `(n)` bool.
        backward: whether edges are walked from their ends.
    """
    source, column = np.nonzero(successors >= 0)
    target = successors[source, column]
    if backward:
        source, target = target, source
    order = np.argsort(source, kind="stable")
    target = target[order]
    offsets = np.searchsorted(source[order], np.arange(len(start) + 1))
    seen, front = start.copy(), np.flatnonzero(start)
    while front.size:
        spans = [target[offsets[s] : offsets[s + 1]] for s in front.tolist()]
        new = np.unique(np.concatenate(spans))
        front = new[~seen[new]]
        seen[front] = True
    return seen


def minimise(dfa: Dfa) -> Dfa:
    """The smallest automaton with the same language: trimmed, equal states merged, equal bytes in one class."""
    first = np.zeros(len(dfa.final), bool)
    first[0] = True
    useful = reach(dfa.next, dfa.final, backward=True) & reach(dfa.next, first)
    if not useful[0]:
        return Dfa(np.zeros(256, np.int32), np.full((1, 1), -1, np.int32), np.zeros(1, bool))
    table, final = select(dfa.next, useful), dfa.final[useful]
    label = merge(table, final)
    # States are numbered in the order of their first member, so that the start stays 0.
    _, members = np.unique(label, return_index=True)
    table = np.where(table[members] >= 0, label[table[members]], -1).astype(np.int32)
    columns, inverse = np.unique(table, axis=1, return_inverse=True)
    return Dfa(inverse.reshape(-1)[dfa.classes].astype(np.int32), columns.astype(np.int32), final[members])


def select(table: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The rows of the kept states, renumbered; edges to others become -1."""
    number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    rows = table[keep]
    return np.where(rows >= 0, number[rows], -1).astype(np.int32)


def merge(table: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The class `(n)` of each state, where states of one class accept the same; classes by their first state.

    Moore's refinement on hashes of the rows; the result is checked exactly, so that a collision costs a repetition only.
    """
    seed = 0
    while True:
        random = np.random.default_rng(seed)
        label = final.astype(np.int64)
        values = random.integers(0, 2**64, size=len(final) + 2, dtype=np.uint64)
        factors = random.integers(0, 2**63, size=table.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        count = len(np.unique(label))
        while True:
            follow = np.where(table >= 0, label[table], len(final))
            hashes = (values[follow] * factors).sum(1, dtype=np.uint64) + values[label] * np.uint64(0x9E3779B97F4A7C15)
            _, label = np.unique(hashes, return_inverse=True)
            label = label.reshape(-1).astype(np.int64)
            if int(label.max()) + 1 == count:
                break
            count = int(label.max()) + 1
        follow = np.where(table >= 0, label[table], -1)
        _, members = np.unique(label, return_index=True)
        own = members[label]
        if (follow == follow[own]).all() and (final == final[own]).all():
            rank = np.empty(len(members), np.int64)
            rank[np.argsort(members)] = np.arange(len(members))
            return rank[label]
        seed += 1


def intersect(left: Dfa, right: Dfa, *, without: bool = False, limit: int = MAX_STATES) -> Dfa:
    """What both accept; with `without`, what the left accepts and the right does not.

    Raises:
        TooLargeError: more than four times `limit` pairs of states.
    """
    pairs, classes = np.unique(np.stack([left.classes, right.classes]), axis=1, return_inverse=True)
    # A last state of the right takes what it does not know.
    n = len(right.final) + 1
    b_next = np.where(right.next >= 0, right.next, n - 1)[:, pairs[1]]
    b_next = np.concatenate([b_next, np.full((1, pairs.shape[1]), n - 1)])
    b_final = np.append(right.final, False)
    a_next = left.next[:, pairs[0]]
    known = np.zeros(1, np.int64)
    front, edges = known, []
    while front.size:
        to_a, to_b = a_next[front // n], b_next[front % n]
        dead = (to_a < 0) | ((to_b == n - 1) & (not without))
        to = np.where(dead, -1, to_a.astype(np.int64) * n + to_b)
        edges.append((front, to))
        new = np.setdiff1d(to[to >= 0], known)
        known = np.union1d(known, new)
        if len(known) > 4 * limit:
            raise TooLargeError(f"constraint: more than {4 * limit} states; make it simpler, or use llguidance")
        front = new
    source = np.concatenate([s for s, _ in edges])
    to = np.concatenate([t for _, t in edges])[np.argsort(source)]
    table = np.where(to >= 0, np.searchsorted(known, to), -1).astype(np.int32)
    accepting = b_final[known % n] != without
    return minimise(Dfa(classes.reshape(-1).astype(np.int32), table, left.final[known // n] & accepting))


def difference(left: Dfa, right: Dfa) -> Dfa:
    """What the left accepts and the right does not."""
    return intersect(left, right, without=True)
