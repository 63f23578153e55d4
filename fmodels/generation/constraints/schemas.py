"""JSON Schema as the parts of an automaton: the texts that a generation may write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fmodels.generation.constraints import schema_values
from fmodels.generation.constraints.dfa import TooLargeError, difference
from fmodels.generation.constraints.expressions import parse_regex
from fmodels.generation.constraints.schema_merge import OF_TYPE, Flattener, RecursiveError, Schema
from fmodels.generation.constraints.syntax import (
    EMPTY,
    NOTHING,
    Choice,
    Concat,
    Joined,
    Machine,
    Node,
    Repeat,
    Text,
    compile_node,
    concat,
)

WHITESPACE = {"optional": (",", ":", True), "dumps": (", ", ": ", False), "compact": (",", ":", False)}
"""Behind commas and colons: a space or none, always one as `json.dumps` writes, or none."""


def parse_schema(schema: Schema, *, whitespace: str = "optional") -> Node:
    """The node of the JSON texts of a schema; see `json_schema`, which says what they are.

    Raises:
        ValueError: keywords that are not supported or have impossible values; all of them are listed.
        TooLargeError: a recursive schema, or one that allows any value at some place, which is recursive too.
    """
    builder = _Builder(schema, whitespace)
    node = builder.node(schema, "#")
    if problems := list(dict.fromkeys(builder.flattener.problems)):
        raise ValueError("json_schema: " + "; ".join(problems))
    if builder.large:
        raise TooLargeError(f"json_schema: {builder.large[0]}; no table can follow that, but llguidance can")
    return node


class _Builder:
    """Nodes from schemas.

    Attributes:
        large: the places that no table can follow.
        nodes: those of the references that were followed.
    """

    def __init__(self, root: Schema, whitespace: str):
        self.flattener = Flattener(root)
        self.problems = self.flattener.problems
        self.large: list[str] = []
        self.nodes: dict[Any, Node] = {}
        comma, colon, optional = WHITESPACE[whitespace]
        space = Choice((EMPTY, Text(b" "))) if optional else EMPTY
        self.comma, self.colon = concat(comma, space), concat(colon, space)

    def node(self, schema: Any, path: str) -> Node:
        """The texts of a schema that stands at `path`."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) and len(schema) == 1 else None
        if reference in self.nodes:
            return self.nodes[reference]
        try:
            flat = self.flattener.flatten(schema, path)
            node = NOTHING if flat is None else self.flat(flat, path)
        except RecursiveError as error:
            self.large.append(str(error))
            node = NOTHING
        if isinstance(reference, str):
            self.nodes[reference] = node
        return node

    def flat(self, flat: dict[str, Any], path: str) -> Node:
        if "groups" in flat:
            (*groups, last), rest = flat["groups"], {name: flat[name] for name in flat if name != "groups"}
            if groups:
                rest["groups"] = groups
            return Choice(tuple(self.alternative(rest, part, where) for part, where in last))
        if "enum" in flat:
            return Choice(tuple(self.literal(value, path) for value in flat["enum"] if self.fulfils(value, flat, path)))
        types = flat.get("type") or [name for name, words in OF_TYPE.items() if any(word in flat for word in words)]
        if not types:
            self.large.append(f"{path}: any value is allowed")
            return NOTHING
        return Choice(tuple(self.typed(name, flat, path) for name in types))

    def alternative(self, rest: dict[str, Any], part: Any, path: str) -> Node:
        try:
            more = self.flattener.flatten(part, path)
            merged = None if more is None else self.flattener.merge(rest, more, path)
            return NOTHING if merged is None else self.flat(merged, path)
        except RecursiveError as error:
            self.large.append(str(error))
            return NOTHING

    def literal(self, value: Any, path: str) -> Node:
        """One value, as `json.dumps` writes it."""
        if isinstance(value, list):
            return concat("[", Joined(tuple((self.literal(v, path), True) for v in value), self.comma), "]")
        if isinstance(value, dict):
            pairs = (concat(self.literal(name, path), self.colon, self.literal(v, path)) for name, v in value.items())
            return concat("{", Joined(tuple((pair, True) for pair in pairs), self.comma), "}")
        try:
            return Text(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
        except (ValueError, TypeError) as error:
            self.problems.append(f"{path}/enum: {value!r} is not JSON: {error}")
            return NOTHING

    def fulfils(self, value: Any, flat: Mapping[str, Any], path: str) -> bool:
        """Whether a value of an `enum` also has the type and the bounds that stand beside it."""
        kind = kind_of(value)
        if "type" in flat and kind not in flat["type"] and not (kind == "integer" and "number" in flat["type"]):
            return False
        words = OF_TYPE.get("number" if kind == "integer" else kind, ())
        beside = {name: flat[name] for name in words if name in flat}
        if not beside:
            return True
        if kind == "string":
            text = json.dumps(value, ensure_ascii=False).encode()
            return compile_node(self.typed(kind, beside, path)).matches(text)
        if kind in ("integer", "number"):
            good = beside.get("minimum", value) <= value <= beside.get("maximum", value)
            good &= not ("exclusiveMinimum" in beside and value <= beside["exclusiveMinimum"])
            good &= not ("exclusiveMaximum" in beside and value >= beside["exclusiveMaximum"])
            if "multipleOf" not in beside:
                return good
            factor = beside["multipleOf"]
            if not isinstance(factor, int) or not isinstance(value, int) or factor < 1:
                self.problems.append(f"{path}/multipleOf: with an enum it is only here for integers")
                return False
            return good and value % factor == 0
        self.problems.append(f"{path}: enum with {kind}s beside {', '.join(beside)}; leave one of them out")
        return False

    def typed(self, name: str, flat: Mapping[str, Any], path: str) -> Node:
        """The texts of one type."""
        try:
            match name:
                case "null":
                    return Text(b"null")
                case "boolean":
                    return Choice((Text(b"true"), Text(b"false")))
                case "string":
                    return self.string(flat, path)
                case "integer":
                    return schema_values.integer(flat)
                case "number":
                    return schema_values.number(flat)
                case "array":
                    return self.array(flat, path)
                case _:
                    return self.object(flat, path)
        except TooLargeError as error:
            self.large.append(f"{path}: {error}")
        except ValueError as error:
            self.problems.append(f"{path}/{error}")
        return NOTHING

    def string(self, flat: Mapping[str, Any], path: str) -> Node:
        if (format := flat.get("format")) is not None and format not in schema_values.FORMATS:
            self.problems.append(f"{path}/format: {format!r} is not among {', '.join(schema_values.FORMATS)}")
            return NOTHING
        for pattern in flat.get("patterns", ()):
            try:
                parse_regex(pattern, escaped=True)
            except ValueError as error:
                self.problems.append(f"{path}/pattern: {error}")
                return NOTHING
        return schema_values.string(flat)

    def array(self, flat: Mapping[str, Any], path: str) -> Node:
        least, most = flat.get("minItems", 0), flat.get("maxItems")
        if flat.get("uniqueItems") and (most is None or most > 1):
            self.problems.append(
                f"{path}/uniqueItems: no finite automaton can follow it; leave it out, or use maxItems 1"
            )
        prefix = flat.get("prefixItems", [])
        rest = flat.get("items", not prefix)
        if most is not None and most < least:
            return NOTHING
        prefix = prefix if most is None else prefix[:most]
        items = [self.node(item, f"{path}/prefixItems/{i}") for i, item in enumerate(prefix)]
        more = None if most is None else most - len(items)
        if rest is False or more == 0:
            item, more = NOTHING, 0
        else:
            item = self.node(rest, f"{path}/items")
        # From the end on: what may follow the first items, comma included, if it may.
        needed = max(least - len(items), 0)
        tail = NOTHING if more is not None and needed > more else Repeat(concat(self.comma, item), needed, more)
        if not items:
            if more == 0:
                return Text(b"[]") if needed == 0 else NOTHING
            first = concat(
                item, Repeat(concat(self.comma, item), max(needed - 1, 0), None if more is None else more - 1)
            )
            return concat("[", first if needed else Choice((EMPTY, first)), "]")
        for i in range(len(items) - 1, -1, -1):
            here = concat(items[i], tail) if i == 0 else concat(self.comma, items[i], tail)
            tail = Choice((EMPTY, here)) if i >= least else here
        return concat("[", tail, "]")

    def object(self, flat: Mapping[str, Any], path: str) -> Node:
        properties, required = dict(flat.get("properties", {})), list(flat.get("required", ()))
        rest = flat.get("additionalProperties", not properties)
        for name in required:
            properties.setdefault(name, rest if "additionalProperties" in flat else True)
        least, most = flat.get("minProperties", 0), flat.get("maxProperties")
        items = [
            (concat(self.literal(name, path), self.colon, self.node(value, f"{path}/properties/{name}")),
             name in required)
            for name, value in properties.items()
            if value is not False or name in required
        ]  # fmt: skip
        if rest is not False:
            pair = concat(self.key(list(properties)), self.colon, self.node(rest, f"{path}/additionalProperties"))
            count = None if most is None or items else most - 1
            if count != -1:
                items.append((Concat((pair, Repeat(concat(self.comma, pair), 0, count))), not items and least == 1))
        fixed = sum(needed for _, needed in items)
        unbounded = rest is not False and bool(properties)
        if least > fixed or (most is not None and (unbounded or (rest is False and most < len(items)))):
            self.problems.append(
                f"{path}: minProperties and maxProperties are only here where they follow from required and properties, or "
                "with additionalProperties alone"
            )
        return concat("{", Joined(tuple(items), self.comma), "}")

    def key(self, names: list[str]) -> Node:
        """Any string but the listed names."""
        every = compile_node(schema_values.string({}))
        if not names:
            return Machine(every)
        return Machine(difference(every, compile_node(Choice(tuple(self.literal(name, "") for name in names)))))


def kind_of(value: Any) -> str:
    """The JSON type of a value of Python."""
    if isinstance(value, float) and value.is_integer():
        return "integer"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
    return kinds.get(type(value), "object")
