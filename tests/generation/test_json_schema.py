"""JSON Schema: whatever the automata let through is valid for the package `jsonschema`, within every budget."""

from __future__ import annotations

import datetime
import json
import re
import uuid

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

import fmodels as fm
from fmodels.generation.constraints import (
    TooLargeError,
    advance,
    allowed,
    json_schema,
    read_vocabulary,
    stack,
)
from tests.generation.random_schemas import document

END = 2


@pytest.fixture(scope="module")
def vocabulary():
    return read_vocabulary(fm.assets.TINY_LLAMA)


def walk(automaton, vocabulary, rng, budget):
    """A text of random tokens, uniform among those that are allowed with the budget; the last is an end token."""
    state, chosen = 0, []
    while True:
        follow = automaton.next[state]
        good = (follow >= 0) & (automaton.distance[follow] < budget - len(chosen))
        mask = good[automaton.classes[0]] | (automaton.final[state] & automaton.ends)
        token = int(rng.choice(np.flatnonzero(mask)))
        if automaton.ends[token]:
            assert len(chosen) < budget
            return vocabulary.text(chosen).decode()
        chosen.append(token)
        state = automaton.next[state, automaton.classes[0, token]]


@pytest.mark.parametrize("block", range(10))
def test_hundreds_of_schemas(vocabulary, block):
    rng = np.random.default_rng(block)
    for seed in range(block * 40, block * 40 + 40):
        made = document(seed)
        whitespace = ["optional", "dumps", "compact"][seed % 3]
        jsonschema.Draft202012Validator.check_schema(made)
        validator = jsonschema.Draft202012Validator(made, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        automaton = json_schema(made, whitespace=whitespace).compile(vocabulary, [END])
        least = int(automaton.distance[0])
        for budget in (least, least + 1, least + 5, 20 + least, 60 + least):
            text = walk(automaton, vocabulary, rng, budget)
            try:
                validator.validate(json.loads(text))
            except (ValueError, jsonschema.ValidationError) as error:
                raise AssertionError(f"seed {seed}: {json.dumps(made)}\n{text!r}\n{error}") from None
            outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
            assert whitespace != "compact" or " " not in outside
            assert whitespace != "dumps" or not re.search(r"[,:](?! )|  ", outside)


def test_walks_on_the_device_are_those_on_the_host(vocabulary):
    made = [document(seed) for seed in (3, 8, 21)]
    automata = [json_schema(s).compile(vocabulary, [END]) for s in made]
    whole = stack([*automata, None])
    state, rng, chosen = jnp.asarray(whole.start), np.random.default_rng(0), [[] for _ in range(4)]
    step = jax.jit(allowed), jax.jit(advance)
    budget = max(int(a.distance[0]) for a in automata) + 10
    for left in range(budget, 0, -1):
        mask = np.asarray(step[0](whole, state, jnp.full(4, left)))
        assert mask.any(1).all()
        tokens = [int(rng.choice(np.flatnonzero(row))) for row in mask]
        for row, token in zip(chosen, tokens, strict=True):
            if END not in row:
                row.append(token)
        state = step[1](whole, state, jnp.array(tokens))
    for row, s in zip(chosen, made, strict=False):
        assert row[-1] == END
        jsonschema.validate(json.loads(vocabulary.text(row)), s)


# What is allowed, and what not


@pytest.mark.parametrize(
    ("made", "good", "bad"),
    [
        ({"type": "integer", "minimum": 7, "maximum": 131}, ["7", "99", "100", "131"], ["6", "132", "-7", "007", "1310"]),
        ({"type": "integer", "exclusiveMinimum": -12, "exclusiveMaximum": 3}, ["-11", "-1", "0", "2"], ["-12", "3", "-0"]),
        ({"type": "integer", "multipleOf": 7, "minimum": 0}, ["0", "7", "49", "700"], ["8", "-7"]),
        ({"type": "number"}, ["0", "-1.5", "2e10", "1E-3"], [".5", "1.", "01", "+1", "NaN"]),
        (
            {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2.25},
            ["0.5", "0.51", "1", "1.9", "2", "2.0", "2.2", "2.249"],
            ["0.4", "0", "2.25", "2.250", "2.3", "-1", "1e0"],
        ),
        ({"type": "number", "exclusiveMinimum": -1.5, "maximum": 0}, ["-1.49", "-0.1", "0", "0.0"], ["-1.5", "-1.50", "0.1"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.1", "1", "123456789"], ["0", "0.0", "-1"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"é\\n"', '"\\"\\\\\\u0001"'], ['"a"', '"abcd"', '"a\n"']),
        ({"type": "string", "pattern": "^a+$", "minLength": 2}, ['"aa"'], ['"a"', '"ab"']),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"b"'], ['"a"']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"1999-12-31"'], ['"2023-02-29"', '"2024-04-31"', '"1900-02-29"']),
        ({"type": "string", "format": "ipv4"}, ['"127.0.0.1"', '"255.249.9.0"'], ['"256.1.1.1"', '"1.2.3"', '"01.2.3.4"']),
        ({"enum": ["a", 1, None], "type": ["string", "null"]}, ['"a"', "null"], ["1"]),
        ({"enum": [1, 5, 9], "minimum": 2, "multipleOf": 3}, ["9"], ["1", "5"]),
        ({"enum": ["a", "bb"], "minLength": 2}, ['"bb"'], ['"a"']),
        ({"const": 1, "enum": [1, 2]}, ["1"], ["2"]),
        ({"const": {"k": [1, 2]}}, ['{"k": [1, 2]}', '{"k":[1,2]}'], ["{}"]),
        (
            {"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "required": ["b"]},
            ['{"b": null}', '{"a": null, "b":null}', '{"b":null,"c":null}', '{"a":null,"b":null,"c":null}'],
            ["{}", '{"a":null}', '{"b":null,"a":null}', '{"b":null,}', '{,"b":null}', '{"b":null,"d":null}'],
        ),
        (
            {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            ["{}", '{"a":null}', '{"x":1,"y":2}', '{"a":null,"x":1}'],
            ['{"a":1}', '{"x":1,"a":null}', '{"x":null}', '{"a":null,"a":1}'],
        ),
        ({"type": "object", "required": ["k"], "additionalProperties": {"type": "null"}}, ['{"k":null}'], ["{}"]),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, ["[null]", "[null, null]"], ["[]", "[null,]"]),
        ({"prefixItems": [{"type": "null"}, {"const": 1}], "items": {"const": 2}}, ["[]", "[null]", "[null,1,2,2]"], ["[null,2]"]),
        ({"prefixItems": [{"const": 1}], "minItems": 1}, ["[1]"], ["[]", "[1,1]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": 1}], "additionalItems": {"const": 2}},
         ["[]", "[1,2]"], ["[2]"]),
        ({"oneOf": [{"const": 1}, {"type": "null"}]}, ["1", "null"], ["2"]),
        ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 4}]}, ["3", "4"], ["2", "5"]),
        ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2.0, 3, 4]}]}, ["2", "3"], ["1", "4"]),
        ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 5, "maximum": 6}, ["5"], ["4"]),
        (
            {"allOf": [{"$ref": "#/$defs/b"}, {"properties": {"c": {"$ref": "#/$defs/b"}}, "required": ["c"]}],
             "$defs": {"b": {"type": "object", "properties": {"k": {"type": "null"}}}}},
            ['{"c":{"k":null}}', '{"k":null,"c":{}}'],
            ["{}"],
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            ['{"a":1}', '{"b":2}', '{"a":1,"b":2}'],
            ["{}"],
        ),
        ({"anyOf": [{"type": "null"}, False]}, ["null"], ["1"]),
    ],
)  # fmt: skip
def test_what_is_allowed(made, good, bad):
    constraint = json_schema(made)
    for text in good:
        assert constraint.matches(text), text
        jsonschema.validate(json.loads(text), made)
    for text in bad:
        assert not constraint.matches(text), text


def test_formats_are_what_their_parsers_take(vocabulary):
    rng = np.random.default_rng(1)
    parsers = {"date": datetime.date.fromisoformat, "time": datetime.time.fromisoformat, "uuid": uuid.UUID,
               "date-time": datetime.datetime.fromisoformat}  # fmt: skip
    for name, parse in parsers.items():
        automaton = json_schema({"type": "string", "format": name}).compile(vocabulary, [END])
        for _ in range(40):
            parse(json.loads(walk(automaton, vocabulary, rng, 60)))


@pytest.mark.parametrize("bound", [0.1, 0.3, 1e-5, 2.675, 123.456, 1 / 3, -0.7])
@pytest.mark.parametrize("names", [("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum")])
def test_decimals_compare_as_floats_do(vocabulary, bound, names):
    rng = np.random.default_rng(2)
    made = {"type": "number", names[0]: bound, names[1]: bound + 1e-4}
    automaton = json_schema(made).compile(vocabulary, [END])
    for _ in range(30):
        jsonschema.validate(json.loads(walk(automaton, vocabulary, rng, 40)), made)


def test_all_problems_are_listed():
    made = {
        "type": "object",
        "patternProperties": {"^a": {}},
        "properties": {
            "a": {"not": {}},
            "b": {"type": "string", "format": "hostname"},
            "c": {"type": "string", "pattern": r"(?=x)y"},
            "d": {"type": "array", "items": {"type": "null"}, "uniqueItems": True},
            "e": {"type": "float"},
            "f": {"type": "number", "multipleOf": 0.1},
            "g": {"$ref": "other.json"},
            "h": {"$ref": "#/$defs/nowhere"},
            "i": {"type": "string", "minLength": "2"},
            "j": {"type": "object", "properties": {"x": {"type": "null"}}, "minProperties": 1},
            "k": {"type": "string", "pattern": "(?i)a"},
            "l": 3,
            "m": {"type": "object", "required": [3]},
            "n": {"allOf": 3},
        },
    }
    with pytest.raises(ValueError, match="json_schema") as error:
        json_schema(made)
    for part in ("#/patternProperties", "properties/a/not", "'hostname'", "lookaround", "uniqueItems", "'float'", "multipleOf",
                 "'other.json'", "no '#/$defs/nowhere'", "i/minLength", "minProperties", "(?i)", "properties/l", "m/required",
                 "n/allOf"):  # fmt: skip
        assert part in str(error.value), part


def test_errors_of_the_schema_itself():
    with pytest.raises(ValueError, match="no JSON"):
        json_schema("{")
    with pytest.raises(ValueError, match="no JSON"):
        json_schema({"const": object()})
    with pytest.raises(ValueError, match="is not JSON"):
        json_schema({"const": float("nan")})
    with pytest.raises(TypeError, match="expected a dict"):
        json_schema(3)
    with pytest.raises(ValueError, match="whitespace is one of"):
        json_schema({"type": "null"}, whitespace="pretty")
    with pytest.raises(ValueError, match="no text fulfils"):
        json_schema({"type": "integer", "minimum": 3, "maximum": 2}).dfa()
    with pytest.raises(ValueError, match="no text fulfils"):
        json_schema({"allOf": [{"type": "null"}, {"type": "string"}]}).dfa()


@pytest.mark.parametrize(
    "made",
    [True, {}, {"type": "object"}, {"type": "array"}, {"additionalProperties": True}, {"properties": {"a": {"$ref": "#"}}},
     {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}},
     {"type": "string", "maxLength": 20000}, {"properties": {"a": {"type": "string", "maxLength": 3}, "b": {}}}],
)  # fmt: skip
def test_what_no_table_holds_says_so(made):
    with pytest.raises(TooLargeError, match=r"llguidance|shorter"):
        json_schema(made).dfa()


def test_models_and_texts():
    import pydantic

    class Pet(pydantic.BaseModel):
        name: str
        legs: int = pydantic.Field(default=4, ge=0, le=8)

    class Owner(pydantic.BaseModel):
        pets: list[Pet] = pydantic.Field(max_length=3)
        mail: str | None = None

    constraint = json_schema(Owner)
    assert constraint == json_schema(json.dumps(Owner.model_json_schema()))
    for value in (Owner(pets=[]), Owner(pets=[Pet(name="é", legs=3)], mail="x")):
        assert constraint.matches(value.model_dump_json())
    assert not constraint.matches('{"pets": [{"name": "x", "legs": 9}]}')
