"""The parts that constraints are made of, and how they become an automaton over bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from fmodels.generation.constraints.dfa import Dfa, Nfa, determinise

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points, as sorted ranges with both ends included."""

UNICODE: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
"""All characters that UTF-8 can write."""


@dataclasses.dataclass(frozen=True)
class Chars:
    """One character out of `ranges`; `escaped` as the inside of a JSON string writes it."""

    ranges: Ranges
    escaped: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """Exactly these bytes."""

    text: bytes


@dataclasses.dataclass(frozen=True)
class Concat:
    """All parts, one after the other."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the parts."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """The part from `least` to `most` times; None for any number."""

    part: Node
    least: int = 0
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Joined:
    """The items in their order, those that are not required may be missing, with a separator between any two."""

    items: tuple[tuple[Node, bool], ...]
    separator: Node


@dataclasses.dataclass(frozen=True)
class Begin:
    """The beginning of the text."""


@dataclasses.dataclass(frozen=True)
class End:
    """The end of the text."""


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """What an automaton accepts."""

    dfa: Dfa


Node: TypeAlias = Chars | Text | Concat | Choice | Repeat | Joined | Begin | End | Machine

NOTHING = Choice(())
EMPTY = Concat(())


def concat(*parts: Node | str) -> Node:
    """All parts, one after the other; str are literal."""
    return Concat(tuple(Text(part.encode()) if isinstance(part, str) else part for part in parts))


def compile_node(node: Node) -> Dfa:
    """The minimal automaton of a node.

    Raises:
        TooLargeError: too many states.
    """
    nfa = Nfa()
    start = nfa.new()
    return determinise(nfa, start, build(nfa, node, start))


def build(nfa: Nfa, node: Node, start: int) -> int:
    """Adds a node behind the state `start`, with no edge into it, and returns the state where it ends."""
    match node:
        case Text(text):
            for byte in text:
                start = _edge(nfa, start, byte, byte)
            return start
        case Chars(ranges, escaped):
            return _add(nfa, _character_edges(ranges, escaped), start)
        case Concat(parts):
            for part in parts:
                start = build(nfa, part, start)
            return start
        case Choice(parts):
            end = nfa.new()
            for part in parts:
                nfa.free[build(nfa, part, start)].append(end)
            return end
        case Repeat(part, least, most):
            return _build_repeat(nfa, part, least, most, start)
        case Joined(items, separator):
            return _build_joined(nfa, items, separator, start)
        case Begin():
            end = nfa.new()
            nfa.begin.setdefault(start, []).append(end)
            return end
        case End():
            end = nfa.new()
            nfa.end.setdefault(start, []).append(end)
            return end
        case Machine(dfa):
            return _add(nfa, _edges_of(dfa), start)


def _edge(nfa: Nfa, start: int, low: int, high: int) -> int:
    end = nfa.new()
    nfa.edges[start].append((low, high, end))
    return end


def _build_repeat(nfa: Nfa, part: Node, least: int, most: int | None, start: int) -> int:
    for _ in range(least):
        start = build(nfa, part, start)
    if most is None:
        loop = nfa.new()
        nfa.free[start].append(loop)
        nfa.free[build(nfa, part, loop)].append(loop)
        end = nfa.new()  # so that nothing behind the loop becomes part of it
        nfa.free[loop].append(end)
        return end
    end = nfa.new()
    nfa.free[start].append(end)
    for _ in range(most - least):
        start = build(nfa, part, start)
        nfa.free[start].append(end)
    return end


def _build_joined(nfa: Nfa, items: Sequence[tuple[Node, bool]], separator: Node, start: int) -> int:
    """Two states in front of each item: nothing was written so far, or something was."""
    none: int | None = start
    some: int | None = None
    for item, required in items:
        enter = nfa.new()
        if none is not None:
            nfa.free[none].append(enter)
        if some is not None:
            nfa.free[build(nfa, separator, some)].append(enter)
        left = build(nfa, item, enter)
        if required:
            none, some = None, left
        elif some is None:
            some = left
        else:
            after = nfa.new()
            nfa.free[some].append(after)
            nfa.free[left].append(after)
            some = after
    end = nfa.new()
    for state in (none, some):
        if state is not None:
            nfa.free[state].append(end)
    return end


class _Edges(NamedTuple):
    """An automaton as edges: its number of states, `(state, low, high, target)`, and its final states."""

    states: int
    edges: list[tuple[int, int, int, int]]
    final: list[int]


def _edges_of(dfa: Dfa) -> _Edges:
    edges = []
    for q, row in enumerate(dfa.next[:, dfa.classes]):
        cuts = (np.flatnonzero(np.diff(row)) + 1).tolist()
        ranges = zip([0, *cuts], [*cuts, 256], strict=True)
        edges += [(q, low, high - 1, int(row[low])) for low, high in ranges if row[low] >= 0]
    return _Edges(len(dfa.final), edges, np.flatnonzero(dfa.final).tolist())


@functools.lru_cache(maxsize=256)
def _character_edges(ranges: Ranges, escaped: bool) -> _Edges:
    return _edges_of(characters(ranges, escaped))


def _add(nfa: Nfa, machine: _Edges, start: int) -> int:
    states = [nfa.new() for _ in range(machine.states)]
    for q, low, high, to in machine.edges:
        nfa.edges[states[q]].append((low, high, states[to]))
    nfa.free[start].append(states[0])
    end = nfa.new()
    for q in machine.final:
        nfa.free[states[q]].append(end)
    return end


@functools.lru_cache(maxsize=256)
def characters(ranges: Ranges, escaped: bool) -> Dfa:
    """The automaton of one character, in UTF-8 or as JSON writes it inside a string.

    JSON's writing is the one of `json.dumps(ensure_ascii=False)`: only quotes, backslashes and control characters are
    escaped, each in its shortest form.
    """
    spellings: list[tuple[tuple[int, int], ...]] = []
    if escaped:
        for code in _members(intersect_ranges(ranges, ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))):
            short = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 0x22: '"', 0x5C: "\\"}.get(code)
            written = f"\\{short}" if short else f"\\u{code:04x}"
            spellings.append(tuple((ord(c), ord(c)) for c in written))
        ranges = intersect_ranges(ranges, ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)))
    for low, high in intersect_ranges(ranges, UNICODE):
        spellings += _utf8(low, high)
    nfa = Nfa()
    start, end = nfa.new(), nfa.new()
    after: dict[tuple[tuple[int, int], ...], int] = {(): end}
    for spelling in spellings:
        for i in range(len(spelling) - 1, 0, -1):
            if spelling[i:] not in after:
                state = after[spelling[i:]] = nfa.new()
                nfa.edges[state].append((*spelling[i], after[spelling[i + 1 :]]))
        nfa.edges[start].append((*spelling[0], after[spelling[1:]]))
    return determinise(nfa, start, end)


def _members(ranges: Ranges) -> Iterable[int]:
    return (code for low, high in ranges for code in range(low, high + 1))


def _utf8(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that together write the characters from low to high.

    Source: the `utf8-ranges` of Rust's regex.
    """
    for most in (0x7F, 0x7FF, 0xFFFF):
        if low <= most < high:
            return _utf8(low, most) + _utf8(most + 1, high)
    if high <= 0x7F:
        return [((low, high),)]
    for i in range(1, 4):
        mask = (1 << (6 * i)) - 1
        if low & ~mask != high & ~mask:
            if low & mask:
                return _utf8(low, low | mask) + _utf8((low | mask) + 1, high)
            if high & mask != mask:
                return _utf8(low, (high & ~mask) - 1) + _utf8(high & ~mask, high)
    return [tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))]


def normal_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, with those that touch joined."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def complement_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All other characters.

    Example:
        >>> complement_ranges([(0, 0x60), (0x62, 0x10FFFF)])
        ((97, 97),)
    """
    found, at = [], 0
    for low, high in normal_ranges(ranges):
        if low > at:
            found.append((at, low - 1))
        at = high + 1
    if at <= 0x10FFFF:
        found.append((at, 0x10FFFF))
    return tuple(found)


def intersect_ranges(left: Iterable[tuple[int, int]], right: Iterable[tuple[int, int]]) -> Ranges:
    """The characters that are in both.

    Example:
        >>> intersect_ranges([(1, 5)], [(4, 9)])
        ((4, 5),)
    """
    pairs = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return normal_ranges((low, high) for low, high in pairs if low <= high)
