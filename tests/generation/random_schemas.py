"""Random JSON schemas that the automata support."""

from __future__ import annotations

import random

PATTERNS = [
    r"^[a-z]{2,5}$",
    r"\d+",
    r"^(foo|bar)-[0-9]{1,3}$",
    r"[^a-z]",
    r"\W\s",
    r"^\S+$",
    r'^["\\/]+$',
    "é|€",
    r"^\D\d?.$",
]


def scalar(r):
    kind = r.choice(
        ["string", "pattern", "format", "integer", "bounded", "number", "decimal", "boolean", "null", "enum", "const"]
    )
    low = r.randint(-300, 300)
    match kind:
        case "string":
            schema = {"type": "string"}
            if r.random() < 0.5:
                schema["minLength"] = r.randint(0, 4)
            if r.random() < 0.5:
                schema["maxLength"] = r.randint(4, 9)
            return schema
        case "pattern":
            return {"type": "string", "pattern": r.choice(PATTERNS)} | ({"maxLength": 9} if r.random() < 0.5 else {})
        case "format":
            return {
                "type": "string",
                "format": r.choice(["date", "date-time", "uuid", "email", "ipv4", "ipv6", "time", "uri"]),
            }
        case "integer":
            return {"type": "integer"} | ({"multipleOf": r.choice([2, 7, 10])} if r.random() < 0.4 else {})
        case "bounded":
            schema = {"type": "integer", r.choice(["minimum", "exclusiveMinimum"]): low}
            if r.random() < 0.7:
                schema[r.choice(["maximum", "exclusiveMaximum"])] = low + r.randint(2, 2000)
            if r.random() < 0.2:
                schema["multipleOf"] = 2
            return schema
        case "number":
            return {"type": "number"}
        case "decimal":
            low = r.choice([low, low / 8, low / 10, 0.1, 0])
            schema = {"type": "number", r.choice(["minimum", "exclusiveMinimum"]): low}
            if r.random() < 0.7:
                schema[r.choice(["maximum", "exclusiveMaximum"])] = low + r.choice([1, 0.25, 100, 1e-3])
            return schema
        case "enum":
            values = ["a", 'é\n"', 1, -2.5, None, True, [1, "x"], {"k": {}}, "", 1e-7]
            return {"enum": r.sample(values, r.randint(1, 5))}
        case "const":
            return {"const": r.choice(["x y", 3, False, {"a": [1, 2]}, 0.1])}
    return {"type": kind}


def schema(r, depth, names=()):
    if depth == 0 or r.random() < 0.2:
        return scalar(r)
    kind = r.choice(["object", "object", "object", "array", "tuple", "any", "types", "all", "ref", "map", "anywhere"])
    inner = lambda: schema(r, depth - 1, names)  # noqa: E731
    match kind:
        case "object":
            properties = {name: inner() for name in r.sample(["a", "b c", "naïve", 'q"', "id", "x/y"], r.randint(1, 4))}
            made = {"type": "object", "properties": properties}
            if r.random() < 0.8:
                made["required"] = [name for name in properties if r.random() < 0.5]
            if r.random() < 0.5:
                made["additionalProperties"] = r.choice([False, {"type": "integer"}, {"type": "boolean"}])
            if r.random() < 0.2:
                made["minProperties"] = min(1, len(made.get("required", ())))
            return made
        case "map":
            made = {"type": "object", "additionalProperties": inner()}
            return made | ({"maxProperties": r.randint(1, 3)} if r.random() < 0.5 else {})
        case "array":
            made = {"type": "array", "items": inner()}
            if r.random() < 0.5:
                made["minItems"] = r.randint(0, 2)
            if r.random() < 0.5:
                made["maxItems"] = r.randint(2, 3)
            return made
        case "tuple":
            made = {"type": "array", "prefixItems": [inner() for _ in range(r.randint(1, 2))]}
            if r.random() < 0.5:
                made["items"] = r.choice([False, {"type": "null"}])
            if made.get("items") is not False and "items" in made and r.random() < 0.5:
                made["minItems"] = r.randint(0, 3)
            return made
        case "any":
            return {"anyOf": [inner(), inner()]}
        case "types":
            return {"type": ["string", "integer", "null"], "minimum": r.randint(-9, 9), "maxLength": 5}
        case "all":
            a, b = r.randint(0, 9), r.randint(0, 9)
            left = {"properties": {"p": {"type": "integer", "minimum": a}}, "required": ["p"]}
            right = {"type": "object", "properties": {"p": {"maximum": 10 + b}, "q": inner()}}
            return {"allOf": [left, right]}
        case "anywhere":
            return {
                "type": "object",
                "properties": {"u": inner(), "v": inner()},
                "anyOf": [{"required": ["u"]}, {"required": ["v"]}],
            }
    return {"$ref": f"#/$defs/{r.choice(names)}"} if names else inner()


def document(seed):
    r = random.Random(seed)
    made = schema(r, r.randint(0, 2), ["one", "two"])
    return made | {"$defs": {"one": schema(r, 1), "two": {"anyOf": [{"$ref": "#/$defs/one"}, scalar(r)]}}, "title": "T"}
