"""Regular expressions in Python's syntax, as the parts of an automaton."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

from fmodels.generation.constraints.syntax import (
    UNICODE,
    Begin,
    Chars,
    Choice,
    Concat,
    End,
    Node,
    Ranges,
    Repeat,
    complement_ranges,
    normal_ranges,
)

_UNSUPPORTED = {
    "ASSERT": "lookaround (?=…) or (?<=…)",
    "ASSERT_NOT": "negative lookaround (?!…) or (?<!…)",
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a conditional (?(1)…)",
    "ATOMIC_GROUP": "an atomic group (?>…)",
    "POSSESSIVE_REPEAT": "a possessive repetition",
    "AT_BOUNDARY": r"a word boundary \b",
    "AT_NON_BOUNDARY": r"a word boundary \B",
}
_DIGITS: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))
_LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


def parse_regex(pattern: str, *, unicode: bool = False, escaped: bool = False) -> Node:
    r"""The node of a pattern that is to match a whole text, as `re.fullmatch` does.

    Args:
        pattern: in the syntax of `re`. Groups are only for precedence, and lazy repetitions mean the greedy ones. `^` and
            `$` are the beginning and the end of the text, wherever they stand.
        unicode: whether `\d`, `\w`, `\s` mean all of Unicode; else ASCII, as with `re.ASCII` and in JSON Schema.
        escaped: whether the text stands inside of a JSON string. Then a class means what it means in each of ASCII,
            Unicode and JavaScript, so that `\D` is no digit of any script, and `.` no end of line of any kind.

    Raises:
        ValueError: a syntax error, or a construct that no automaton has: it is named.

    Source: the syntax tree is that of `re` itself.
    """
    try:
        parsed = importlib.import_module("re._parser").parse(pattern, 0 if unicode else re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"regex: {pattern!r} is no regular expression: {error}") from None
    return _Builder(pattern, unicode, escaped).sequence(parsed, parsed.state.flags)


class _Builder:
    """Nodes from the tree of `re._parser`."""

    def __init__(self, pattern: str, unicode: bool, escaped: bool):
        self.pattern = pattern
        self.unicode = unicode
        self.escaped = escaped

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"regex: {self.pattern!r} has {what}, which no finite automaton can follow; write it without")

    def sequence(self, items: Any, flags: int) -> Node:
        if flags & re.MULTILINE:
            raise self.refuse("the flag (?m)")
        if flags & re.IGNORECASE and (self.unicode or self.escaped):
            raise ValueError(f"regex: {self.pattern!r} has the flag (?i), which is only here for ASCII; write classes")
        parts = tuple(self.node(str(name), argument, flags) for name, argument in items)
        return parts[0] if len(parts) == 1 else Concat(parts)

    def node(self, name: str, argument: Any, flags: int) -> Node:
        match name:
            case "LITERAL":
                return self.chars(((argument, argument),), flags)
            case "NOT_LITERAL":
                return self.chars(((argument, argument),), flags, negated=True)
            case "ANY":
                lines = _LINE_ENDS if self.escaped else ((10, 10),)
                return self.chars(() if flags & re.DOTALL else lines, 0, negated=True)
            case "IN":
                return self.set(argument, flags)
            case "CATEGORY":
                return self.set([(name, argument)], flags)
            case "BRANCH":
                return Choice(tuple(self.sequence(branch, flags) for branch in argument[1]))
            case "SUBPATTERN":
                _, add, remove, items = argument
                return self.sequence(items, (flags | add) & ~remove)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, items = argument
                unbounded = str(most) == "MAXREPEAT"
                return Repeat(self.sequence(items, flags), least, None if unbounded else most)
            case "AT" if str(argument) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
                return Begin()
            case "AT" if str(argument) in ("AT_END", "AT_END_STRING"):
                return End()
            case "FAILURE":
                return Choice(())
        name = str(argument) if name == "AT" else name
        raise self.refuse(_UNSUPPORTED.get(name, name))

    def set(self, items: Any, flags: int) -> Node:
        negated, ranges = False, []
        for name, argument in items:
            match str(name):
                case "NEGATE":
                    negated = True
                case "LITERAL":
                    ranges.append((argument, argument))
                case "RANGE":
                    ranges.append(argument)
                case "CATEGORY":
                    ranges += self.category(str(argument), negated)
                case other:
                    raise self.refuse(other)
        return self.chars(tuple(ranges), flags, negated=negated)

    def category(self, name: str, negated: bool) -> Ranges:
        kind = name.removeprefix("CATEGORY_").removeprefix("NOT_")
        ranges = {"DIGIT": _DIGITS, "WORD": _WORD, "SPACE": _SPACE}[kind]
        excluded = ("_NOT_" in name) != negated
        if self.unicode or (self.escaped and excluded):
            # JavaScript counts the byte order mark as a space.
            more = ((0xFEFF, 0xFEFF),) if self.escaped and kind == "SPACE" else ()
            ranges = normal_ranges(ranges + _unicode_category(kind) + more)
        return complement_ranges(ranges) if "_NOT_" in name else ranges

    def chars(self, ranges: Ranges, flags: int, *, negated: bool = False) -> Node:
        if flags & re.IGNORECASE:
            ranges = ranges + tuple(
                (max(low, first) + shift, min(high, last) + shift)
                for low, high in ranges
                for first, last, shift in ((65, 90, 32), (97, 122, -32))
                if max(low, first) <= min(high, last)
            )
        return Chars(complement_ranges(ranges) if negated else normal_ranges(ranges), self.escaped)


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "WORD": lambda c: c.isalnum() or c == "_",
    "SPACE": str.isspace,
}


@functools.lru_cache(maxsize=3)
def _unicode_category(kind: str) -> Ranges:
    r"""The characters of `\d`, `\w` or `\s` in Unicode."""
    holds = _CATEGORIES[kind]
    return normal_ranges((code, code) for low, high in UNICODE for code in range(low, high + 1) if holds(chr(code)))
