"""The scalar values of JSON Schema as parts of an automaton: strings, integers and numbers with their bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from fmodels.generation.constraints.dfa import Dfa, intersect
from fmodels.generation.constraints.expressions import parse_regex
from fmodels.generation.constraints.syntax import (
    EMPTY,
    NOTHING,
    UNICODE,
    Chars,
    Choice,
    Concat,
    Machine,
    Node,
    Repeat,
    Text,
    compile_node,
    concat,
)

DIGITS = 15
"""Digits of an integer without bounds, and significant digits of a number with them: so many are exact in every reader."""

_ANY = Repeat(Chars(UNICODE, escaped=True))
_YEAR = r"[1-9]\d{3}"
_LEAP_YEAR = r"(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR = r"(?:[01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_HOUR}:[0-5]\d(?:\.\d{{1,6}})?(?:Z|[+-]{_HOUR})"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+",
    "ipv4": rf"(?:{_OCTET}\.){{3}}{_OCTET}",
    "ipv6": r"(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "uri": rf"https?://{_LABEL}(?:\.{_LABEL})*(?::[1-9]\d{{0,3}})?(?:/[A-Za-z0-9._~-]+)*/?(?:\?[A-Za-z0-9._~=&-]+)?",
}
"""Texts of each format; all of them are valid, though not all valid ones are here: years of four digits, and so on."""


def string(schema: Mapping[str, Any]) -> Node:
    """A JSON string with `minLength`, `maxLength`, `patterns` (a list) and `format`.

    Raises:
        ValueError: a pattern that is no regular expression or not a regular language.
        TooLargeError: too many states.
    """
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    most = None if most is None else int(most)
    if most is not None and most < least:
        return NOTHING
    patterns = list(schema.get("patterns", ()))
    if "format" in schema:
        patterns.append(f"^(?:{FORMATS[schema['format']]})$")
    if not patterns:
        return concat('"', Repeat(_ANY.part, least, most), '"')
    dfa = _search(patterns[0])
    for pattern in patterns[1:]:
        dfa = intersect(dfa, _search(pattern))
    if least or most is not None:
        dfa = intersect(dfa, compile_node(Repeat(_ANY.part, least, most)))
    return concat('"', Machine(dfa), '"')


@functools.lru_cache(maxsize=128)
def _search(pattern: str) -> Dfa:
    """The insides of JSON strings in which a pattern is found."""
    return compile_node(concat(_ANY, parse_regex(pattern, escaped=True), _ANY))


def integer(schema: Mapping[str, Any]) -> Node:
    """An integer with `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, `multipleOf`.

    Without a bound it has at most `DIGITS` digits, or as many as the other bound and one more.

    Raises:
        ValueError: a `multipleOf` that is no integer from 1 to 1000.
        TooLargeError: too many states.
    """
    low, high = _bounds(schema)
    least = None if low is None else math.ceil(low[0]) + (low[1] and low[0].denominator == 1)
    most = None if high is None else math.floor(high[0]) - (high[1] and high[0].denominator == 1)
    widest = 10 ** max(DIGITS, *(len(str(abs(bound))) + 1 for bound in (least, most) if bound is not None), 0) - 1
    least, most = -widest if least is None else least, widest if most is None else most
    parts = []
    if most >= 0:
        parts.append(_whole_between(max(least, 0), most))
    if least < 0:
        parts.append(concat("-", _whole_between(max(1, -most), -least)))
    node = Choice(tuple(parts))
    if "multipleOf" in schema:
        factor = Fraction(str(schema["multipleOf"]))
        if factor.denominator != 1 or not 1 <= factor <= 1000:
            raise ValueError(f"multipleOf: {schema['multipleOf']!r} is no integer from 1 to 1000")
        node = Machine(intersect(compile_node(node), _multiples(int(factor))))
    return node


def number(schema: Mapping[str, Any]) -> Node:
    """A number with `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`.

    Without bounds it may have an exponent of two digits; with bounds it has none, and at most `DIGITS` digits in all, so
    that it compares with them as its decimal digits do.

    Raises:
        ValueError: a `multipleOf`, or bounds of more digits.
    """
    if "multipleOf" in schema:
        raise ValueError("multipleOf: is only here for the type integer")
    low, high = _bounds(schema)
    if low is None and high is None:
        digits = Repeat(_digit(0, 9), 0, DIGITS - 1)
        whole = Choice((Text(b"0"), Concat((_digit(1, 9), digits))))
        sign, e = Choice((EMPTY, Text(b"-"))), Choice((Text(b"e"), Text(b"E")))
        power = concat(e, Choice((EMPTY, Text(b"-"), Text(b"+"))), Repeat(_digit(0, 9), 1, 2))
        return concat(sign, whole, _fraction(17), Choice((EMPTY, power)))
    ends = [math.floor(abs(bound[0])) for bound in (low, high) if bound is not None]
    width = max(len(str(end)) for end in ends)
    width = max(width, 9) if low is None or high is None else width
    if width >= DIGITS:
        raise ValueError(f"minimum, maximum: bounds of a number have less than {DIGITS} digits before the point")
    limit = Fraction(10**width)
    low, high = low or (-limit, True), high or (limit, True)
    places = DIGITS - width
    parts = []
    if high[0] >= 0:
        parts.append(_between(max(low, (Fraction(0), False)), high, places))
    if low[0] < 0:
        # Zero has no sign here: "-0" is for those who want it.
        nearest = (-high[0], high[1]) if high[0] < 0 else (Fraction(0), True)
        parts.append(concat("-", _between(nearest, (-low[0], low[1]), places)))
    return Choice(tuple(parts))


def _bounds(schema: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tighter lower and upper bound, each `(value, open)` or None."""

    def read(names: Sequence[str]) -> list[tuple[Fraction, bool]]:
        return [(Fraction(Decimal(str(schema[name]))), name.startswith("ex")) for name in names if name in schema]

    low, high = read(["minimum", "exclusiveMinimum"]), read(["maximum", "exclusiveMaximum"])
    return (
        max(low) if low else None,
        min(high, key=lambda bound: (bound[0], not bound[1])) if high else None,
    )


def _digit(low: int, high: int) -> Node:
    return Chars(((48 + low, 48 + high),)) if low <= high else NOTHING


def _fraction(places: int) -> Node:
    return Choice((EMPTY, concat(".", Repeat(_digit(0, 9), 1, places))))


def _whole_between(low: int, high: int) -> Node:
    """The integers from `low` to `high`, both at least 0, without leading zeros."""
    parts = []
    for width in range(len(str(low)), len(str(high)) + 1):
        least, most = max(low, 10 ** (width - 1) if width > 1 else 0), min(high, 10**width - 1)
        if least <= most:
            parts.append(_digits_between(str(least), str(most)))
    return Choice(tuple(parts))


def _digits_between(low: str, high: str) -> Node:
    """Strings of digits of one length, in their order."""
    n = len(low)
    if low == "0" * n and high == "9" * n:
        return Repeat(_digit(0, 9), n, n)
    if low[0] == high[0]:
        return concat(low[0], _digits_between(low[1:], high[1:])) if n > 1 else Text(low.encode())
    if n == 1:
        return _digit(int(low), int(high))
    middle = concat(_digit(int(low[0]) + 1, int(high[0]) - 1), Repeat(_digit(0, 9), n - 1, n - 1))
    return Choice(
        (
            concat(low[0], _digits_between(low[1:], "9" * (n - 1))),
            middle,
            concat(high[0], _digits_between("0" * (n - 1), high[1:])),
        )
    )


def _between(low: tuple[Fraction, bool], high: tuple[Fraction, bool], places: int) -> Node:
    """The decimals between two bounds of at least 0, with up to `places` digits behind the point."""
    unit = 10**places
    least, most = math.ceil(low[0] * unit), math.floor(high[0] * unit)
    low_open, high_open = low[1] and least == low[0] * unit, high[1] and most == high[0] * unit
    if least > most or (least == most and (low_open or high_open)):
        return NOTHING
    (first, low_rest), (last, high_rest) = divmod(least, unit), divmod(most, unit)
    low_digits, high_digits = f"{low_rest:0{places}}", f"{high_rest:0{places}}"

    def tail(i: int, at_low: bool, at_high: bool) -> Node:
        """What may follow `i` digits behind the point that are those of a bound."""
        if not at_low and not at_high:
            return Repeat(_digit(0, 9), 0, places - i)
        ends = not (at_low and (low_open or low_digits[i:].strip("0"))) and not (
            at_high and high_open and not high_digits[i:].strip("0")
        )
        return Choice((EMPTY, step(i, at_low, at_high)) if ends else (step(i, at_low, at_high),))

    def step(i: int, at_low: bool, at_high: bool) -> Node:
        if i == places:
            return NOTHING
        a, b = int(low_digits[i]) if at_low else 0, int(high_digits[i]) if at_high else 9
        return Choice(
            tuple(concat(str(d), tail(i + 1, at_low and d == a, at_high and d == b)) for d in range(a, b + 1))
        )

    def behind(at_low: bool, at_high: bool) -> Node:
        ends = not (at_low and (low_open or low_rest)) and not (at_high and high_open and not high_rest)
        point = concat(".", step(0, at_low, at_high))
        return Choice((EMPTY, point)) if ends else point

    if first == last:
        return concat(str(first), behind(True, True))
    parts = [concat(str(first), behind(True, False)), concat(str(last), behind(False, True))]
    if first + 1 < last:
        parts.append(concat(_whole_between(first + 1, last - 1), _fraction(places)))
    return Choice(tuple(parts))


def _multiples(factor: int) -> Dfa:
    """Strings of digits, with a sign, whose value is a multiple."""
    classes = np.full(256, 11, np.int32)
    classes[48:58] = np.arange(10)
    classes[ord("-")] = 10
    table = np.full((factor + 1, 12), -1, np.int32)
    rest = np.arange(factor)
    table[1:, :10] = (rest[:, None] * 10 + np.arange(10)) % factor + 1
    table[0, :10] = np.arange(10) % factor + 1
    table[0, 10] = 1
    final = np.zeros(factor + 1, bool)
    final[1] = True
    return Dfa(classes, table, final)
