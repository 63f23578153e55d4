"""Constraints in the languages of llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fmodels.generation.constraints.expressions import parse_regex
from fmodels.generation.constraints.schema_merge import ANNOTATIONS, subschemas
from fmodels.generation.constraints.syntax import Begin, Chars, Choice, Concat, End, Node, Repeat, Text


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
            return (
                f"[{''.join(f'{_rust_code(low)}-{_rust_code(high)}' for low, high in ranges)}]"
                if ranges
                else r"[^\s\S]"
            )
        case Concat(parts):
            # The beginning and the end of the text may stand at the beginning and the end.
            kept = list(parts)
            while kept and isinstance(kept[0], Begin):
                kept.pop(0)
            while kept and isinstance(kept[-1], End):
                kept.pop()
            return "".join(map(_to_rust, kept))
        case Choice(parts):
            return f"(?:{'|'.join(map(_to_rust, parts))})"
        case Repeat(part, least, most):
            return f"(?:{_to_rust(part)}){{{least},{'' if most is None else most}}}"
    raise ValueError(
        f"Guidance: {type(node).__name__.lower()} of the text inside of a large regular expression; leave it out"
    )


def _rust_code(code: int) -> str:
    return f"\\x{{{code:x}}}"


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
        elif name not in ANNOTATIONS and not (name == "uniqueItems" and (not value or schema.get("maxItems", 2) < 2)):
            kept[name] = value
    if kept.get("minProperties", 1) <= len(kept.get("required", ())):
        kept.pop("minProperties", None)
    if close and "properties" in kept:
        kept.setdefault("additionalProperties", False)
    if close and "prefixItems" in kept:
        kept.setdefault("items", False)
    return kept
