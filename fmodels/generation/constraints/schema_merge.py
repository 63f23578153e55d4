"""JSON Schema made flat: keywords checked, references followed, `allOf` merged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any] | bool

ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $comment $schema $id $anchor $defs definitions "
    "contentEncoding contentMediaType contentSchema discriminator".split()
)
"""Keywords that allow every value."""
_NUMBER, _COUNT, _SCHEMA = (int, float), int, (Mapping, bool)
KEYWORDS: dict[str, Any] = {
    **dict.fromkeys(["type"], (str, list)),
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"], _NUMBER),
    **dict.fromkeys(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"], _COUNT),
    **dict.fromkeys(["pattern", "format", "$ref"], str),
    **dict.fromkeys(["enum", "required", "prefixItems", "anyOf", "oneOf", "allOf"], list),
    "const": object,
    "properties": Mapping,
    "additionalProperties": _SCHEMA,
    "items": (Mapping, bool, list),
    "additionalItems": _SCHEMA,
    "uniqueItems": bool,
}
"""Keywords that are handled, and the Python types of their values."""
OF_TYPE = {
    "string": ["minLength", "maxLength", "patterns", "format"],
    "number": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
    "array": ["items", "prefixItems", "minItems", "maxItems", "uniqueItems"],
    "object": ["properties", "required", "additionalProperties", "minProperties", "maxProperties"],
}
"""The keywords that say something about one type only."""
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")


class RecursiveError(ValueError):
    """A reference that leads to itself."""


class Flattener:
    """Turns a schema at one place into one mapping of keywords.

    Attributes:
        root: the whole schema.
        problems: what is not supported, with its path.
    """

    def __init__(self, root: Schema):
        self.root = root
        self.problems: list[str] = []

    def flatten(self, schema: Any, path: str) -> dict[str, Any] | None:
        """One mapping without `$ref`, `allOf`, `const`, `pattern`, `anyOf` and `oneOf`.

        `const` becomes an `enum`, `pattern` a list of `patterns`, each `anyOf` and `oneOf` one of the `groups`.

        Args:
            schema: at `path`.
            path: for messages.

        Returns:
            The mapping, or None if nothing fulfils it.

        Raises:
            RecursiveError: a reference leads to itself.
        """
        if isinstance(schema, bool):
            return {} if schema else None
        if not isinstance(schema, Mapping):
            self.problems.append(f"{path}: a schema is an object or a boolean, not {schema!r}")
            return None
        flat: dict[str, Any] | None = self._own(schema, path)
        parts = [(part, f"{path}/allOf/{i}") for i, part in enumerate(_list(schema, "allOf"))]
        if isinstance(name := schema.get("$ref"), str):
            if self.is_recursive(name):
                raise RecursiveError(f"{path}: {name!r} refers to itself")
            parts.insert(0, (self._resolve(name, path), name))
        for part, where in parts:
            more = self.flatten(part, where)
            flat = None if flat is None or more is None else self.merge(flat, more, path)
        return flat

    def is_recursive(self, name: str) -> bool:
        """Whether what a reference names contains the same reference, through others or itself."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            for inner in references(self._resolve(todo.pop(), "#")):
                if inner == name:
                    return True
                if inner not in seen:
                    seen.add(inner)
                    todo.append(inner)
        return False

    def _own(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        enums = []
        for name, value in schema.items():
            if name in ANNOTATIONS:
                continue
            kinds = KEYWORDS.get(name)
            if kinds is None:
                self.problems.append(f"{path}/{name}: this keyword is not supported")
            elif not isinstance(value, kinds) or (isinstance(value, bool) and kinds in (_NUMBER, _COUNT)):
                self.problems.append(f"{path}/{name}: {value!r} is not of the type that this keyword has")
            elif name == "required" and not all(isinstance(item, str) for item in _list(schema, name)):
                self.problems.append(f"{path}/required: {value!r} is no list of names")
            elif name == "const":
                enums.append([value])
            elif name == "enum":
                enums.append(_list(schema, name))
            elif name == "pattern":
                flat["patterns"] = [value]
            elif name in ("anyOf", "oneOf"):
                flat.setdefault("groups", []).append(
                    [(part, f"{path}/{name}/{i}") for i, part in enumerate(_list(schema, name))]
                )
            elif name == "type":
                flat["type"] = self._types(value, path)
            elif name not in ("allOf", "$ref"):
                flat[name] = value
        if isinstance(flat.get("items"), list):  # as until draft 2019-09
            flat["prefixItems"] = flat.pop("items")
            if "additionalItems" in flat:
                flat["items"] = flat["additionalItems"]
        flat.pop("additionalItems", None)
        if enums:
            known = {identity(value) for value in enums[-1]}
            flat["enum"] = [value for value in enums[0] if identity(value) in known]
        return flat

    def _types(self, value: Any, path: str) -> list[str]:
        names = [value] if isinstance(value, str) else list(value)
        if unknown := [name for name in names if name not in TYPES]:
            self.problems.append(f"{path}/type: {unknown} are not among {', '.join(TYPES)}")
        return [name for name in names if name in TYPES]

    def _resolve(self, name: str, path: str) -> Any:
        node: Any = self.root
        if not name.startswith("#") or (len(name) > 1 and name[1] != "/"):
            self.problems.append(f"{path}/$ref: {name!r} is not of the form '#/$defs/name'")
            return True
        for part in unquote(name[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (KeyError, IndexError, ValueError, TypeError):
                self.problems.append(f"{path}/$ref: there is no {name!r} in the schema")
                return True
        return node

    def merge(self, left: dict[str, Any], right: dict[str, Any], path: str) -> dict[str, Any] | None:
        """The keywords that say what two flat mappings say together; None if nothing fulfils both."""
        merged = {**left, **right}
        for name in left.keys() & right.keys():
            a, b = left[name], right[name]
            if name in ("properties", "additionalProperties", "prefixItems", "items"):
                continue
            if name == "type":
                merged[name] = [t for t in TYPES if _admits(a, t) and _admits(b, t)]
            elif name == "enum":
                known = {identity(value) for value in b}
                merged[name] = [value for value in a if identity(value) in known]
            elif name == "required":
                merged[name] = list(dict.fromkeys([*a, *b]))
            elif name in ("patterns", "groups"):
                merged[name] = [*a, *b]
            elif name.startswith(("min", "exclusiveMin")):
                merged[name] = max(a, b)
            elif name.startswith(("max", "exclusiveMax")):
                merged[name] = min(a, b)
            elif name == "multipleOf" and isinstance(a, int) and isinstance(b, int):
                merged[name] = math.lcm(a, b)
            elif name == "uniqueItems":
                merged[name] = a or b
            elif a != b:
                self.problems.append(f"{path}: allOf with two different {name}, {a!r} and {b!r}")
        self._merge_properties(left, right, merged)
        if {"prefixItems", "items"} & left.keys() and {"prefixItems", "items"} & right.keys():
            self._merge_items(left, right, merged)
        return None if merged.get("type") == [] else merged

    def _merge_properties(self, left: Mapping[str, Any], right: Mapping[str, Any], merged: dict[str, Any]) -> None:
        """A property of one side only also obeys the `additionalProperties` of the other."""

        def of(side: Mapping[str, Any], name: str) -> Schema:
            return side.get("properties", {}).get(name, side.get("additionalProperties", True))

        names = dict.fromkeys([*left.get("properties", ()), *right.get("properties", ())])
        if names:
            merged["properties"] = {name: both([of(left, name), of(right, name)]) for name in names}
        rest = [side["additionalProperties"] for side in (left, right) if "additionalProperties" in side]
        if rest:
            merged["additionalProperties"] = both(rest)

    def _merge_items(self, left: Mapping[str, Any], right: Mapping[str, Any], merged: dict[str, Any]) -> None:
        def at(side: Mapping[str, Any], i: int) -> Schema:
            prefix = side.get("prefixItems", [])
            return prefix[i] if i < len(prefix) else side.get("items", True)

        count = max(len(side.get("prefixItems", ())) for side in (left, right))
        if count:
            merged["prefixItems"] = [both([at(left, i), at(right, i)]) for i in range(count)]
        if "items" in left or "items" in right:
            merged["items"] = both([left.get("items", True), right.get("items", True)])


def both(schemas: Sequence[Schema]) -> Schema:
    """The schema of what fulfils all."""
    left = [schema for schema in schemas if schema is not True and schema != {}]
    if any(schema is False for schema in left):
        return False
    return True if not left else left[0] if len(left) == 1 else {"allOf": left}


def _admits(types: Sequence[str], name: str) -> bool:
    return name in types or (name == "integer" and "number" in types)


def identity(value: Any) -> str:
    """A text that is the same for values that JSON Schema counts as equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(identity, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{json.dumps(k)}:{identity(value[k])}' for k in sorted(value))}}}"
    return json.dumps(value)


def subschemas(schema: Any) -> Iterator[Any]:
    """All schemas directly inside of one, definitions left out."""
    if not isinstance(schema, Mapping):
        return
    for name in ("items", "additionalProperties", "additionalItems", "prefixItems", "anyOf", "oneOf", "allOf"):
        value = schema.get(name, ())
        yield from value if isinstance(value, list | tuple) else [value]
    if isinstance(schema.get("properties"), Mapping):
        yield from schema["properties"].values()


def references(schema: Any) -> Iterator[str]:
    """All references inside of a schema."""
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for part in subschemas(schema):
        yield from references(part)


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
