"""Constraints in the languages of llguidance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fmodels.generation.constraints.expressions import parse_regex
from fmodels.generation.constraints.schema_merge import ANNOTATIONS, subschemas
from fmodels.generation.constraints.schema_values import FORMATS
from fmodels.generation.constraints.syntax import (
    UNICODE,
    Begin,
    Chars,
    Choice,
    Concat,
    End,
    Node,
    Repeat,
    Text,
    intersect_ranges,
)


def choices_grammar(options: Sequence[str]) -> str:
    """The grammar of some texts."""
    import llguidance

    return llguidance.LLMatcher.grammar_from_regex(_to_rust(Choice(tuple(Text(option.encode()) for option in options))))


def regex_grammar(pattern: str, *, unicode: bool = False) -> str:
    """The grammar of a regular expression in Python's syntax."""
    import llguidance

    return llguidance.LLMatcher.grammar_from_regex(_to_rust(parse_regex(pattern, unicode=unicode)))


def _to_rust(node: Node) -> str:
    """A node in the syntax of Rust's regex, in which every class is written out."""
    match node:
        case Text(text):
            return "".join(map(_rust_code, map(ord, text.decode())))
        case Chars(ranges):
            ranges = intersect_ranges(ranges, UNICODE)
            return (
                f"[{''.join(f'{_rust_code(low)}-{_rust_code(high)}' for low, high in ranges)}]"
                if ranges
                else r"[^\s\S]"
            )
        case Concat():
            # The beginning and the end of the text may stand at the beginning and the end.
            return "".join(map(_to_rust, _without_ends(node)[1]))
        case Choice(parts):
            return f"(?:{'|'.join(map(_to_rust, parts))})" if parts else r"[^\s\S]"
        case Repeat(part, least, most):
            return f"(?:{_to_rust(part)}){{{least},{'' if most is None else most}}}"
    raise ValueError(
        f"Guidance: {type(node).__name__.lower()} of the text inside of a large regular expression; leave it out"
    )


def _rust_code(code: int) -> str:
    return f"\\x{{{code:x}}}"


def _without_ends(node: Node) -> tuple[bool, list[Node], bool]:
    """The parts of a node between the beginning and the end of the text, and whether these were named."""

    def flat(part: Node) -> list[Node]:
        return [inner for p in part.parts for inner in flat(p)] if isinstance(part, Concat) else [part]

    parts = flat(node)
    count = len(parts)
    while parts and isinstance(parts[0], Begin):
        parts.pop(0)
    begin, count = len(parts) < count, len(parts)
    while parts and isinstance(parts[-1], End):
        parts.pop()
    return begin, parts, len(parts) < count


def _found_in(node: Node) -> str:
    """Rust's regex of the whole texts in which a node is found."""
    if isinstance(node, Choice):
        return f"(?:{'|'.join(map(_found_in, node.parts))})" if node.parts else r"[^\s\S]"
    begin, parts, end = _without_ends(node)
    if len(parts) == 1 and isinstance(parts[0], Choice) and not begin and not end:
        return _found_in(parts[0])
    every = f"{_to_rust(Chars(UNICODE))}*"
    return f"{'' if begin else every}(?:{''.join(map(_to_rust, parts))}){'' if end else every}"


def schema_grammar(schema: Any, *, whitespace: str = "optional") -> str:
    """The grammar of a JSON Schema, under the same rules as `json_schema` as far as it knows them."""
    import llguidance

    comma, colon = {"optional": (", ?", ": ?"), "dumps": (", ", ": "), "compact": (",", ":")}[whitespace]
    options: Any = {
        "whitespace_flexible": False,
        "item_separator": comma,
        "key_separator": colon,
        "coerce_one_of": True,
    }
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(_strip({} if schema is True else schema, not _merges(schema))), overrides=options
    )


def _merges(schema: Any) -> bool:
    """Whether several schemas say something about one value somewhere: closing one of them would close all."""
    if not isinstance(schema, Mapping):
        return False
    several = "allOf" in schema or ("$ref" in schema and schema.keys() - {"$ref", *ANNOTATIONS})
    beside = {"anyOf", "oneOf"} & schema.keys() and "properties" in schema
    definitions = [part for name in ("$defs", "definitions") for part in schema.get(name, {}).values()]
    return bool(several or beside) or any(map(_merges, [*subschemas(schema), *definitions]))


def _strip(schema: Any, close: bool) -> Any:
    """A schema without annotations, its objects and arrays closed as `json_schema` closes them."""
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions"):
            kept[name] = {key: _strip(part, close) for key, part in value.items()}
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems") or (name == "items" and isinstance(value, list)):
            kept[name] = [_strip(part, close) for part in value]
        elif name in ("items", "additionalProperties", "additionalItems"):
            kept[name] = _strip(value, close)
        elif name in ("pattern", "format"):
            # The same texts as in the tables: what the words mean differs between the languages.
            pattern = value if name == "pattern" else f"^(?:{FORMATS[value]})$"
            words = {"pattern": f"^(?:{_found_in(parse_regex(pattern, escaped=True))})$"}
            if {"pattern", "format"} <= schema.keys():
                kept.setdefault("allOf", []).append(words)
            else:
                kept |= words
        elif name not in ANNOTATIONS and not (name == "uniqueItems" and (not value or schema.get("maxItems", 2) < 2)):
            kept[name] = value
    if kept.get("type") != "integer":
        kept = _open_bound(kept, "exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1)
        kept = _open_bound(kept, "exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1)
    if kept.get("minProperties", 1) <= len(kept.get("required", ())):
        kept.pop("minProperties", None)
    if close and "properties" in kept:
        kept.setdefault("additionalProperties", False)
    if close and "prefixItems" in kept:
        kept.setdefault("items", False)
    return kept


def _open_bound(schema: dict[str, Any], name: str, closed: str, others: tuple[str, str], sign: int) -> dict[str, Any]:
    """A bound that is open as a closed one a little inside.

    llguidance 1.9 allows a whole open bound itself where the other is near, and more digits than a float tells from it.
    """
    bound = schema.get(name)
    if bound is None:
        return schema
    far = next((schema[other] for other in others if other in schema), bound + sign)
    step = max(10.0 ** min(-6, math.floor(math.log10(abs(far - bound) or 1)) - 1), abs(bound) * 1e-12)
    bounds = [schema.get(closed, bound), bound + sign * step]
    rest = {key: value for key, value in schema.items() if key != name}
    return rest | {closed: max(bounds) if sign > 0 else min(bounds)}
