"""Constraints that llguidance follows on the host: valid in every budget, and the tables' own language."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest

import fmodels as fm
from fmodels.generation.constraints import (
    Guidance,
    TokenAutomaton,
    choices,
    compile_rows,
    json_schema,
    read_vocabulary,
    regex,
    unpack,
)
from tests.generation.random_schemas import document

END = 2
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
    "title": "Tree",
}
ANY = {"type": "object"}
MIXED = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[a-z]{3}-[0-9]{2}$"},
        "data": {},
        "kind": {"enum": ["x", "yy"]},
    },
    "required": ["id", "data"],
}
LONG = {
    "type": "object",
    "properties": {"s": {"type": "string", "minLength": 30, "maxLength": 20000}},
    "required": ["s"],
}


@pytest.fixture(scope="module")
def vocabulary():
    return read_vocabulary(fm.assets.TINY_LLAMA)


def generate(guidance, vocabulary, budget, rng):
    """Uniformly random tokens, a step for all rows at a time."""
    state = guidance.start()
    guidance.require_room(state, budget)
    texts = [[] for _ in state]
    for left in range(budget, 0, -1):
        lefts = [left] * len(state)
        mask = np.asarray(unpack(guidance.mask(state, lefts), len(vocabulary)))
        assert mask.any(1).all()
        tokens = [int(rng.choice(np.flatnonzero(row))) for row in mask]
        state, taken = guidance.advance(state, tokens, lefts)
        for row, token in zip(texts, taken.tolist(), strict=True):
            if END not in row:
                row.append(token)
    assert all(row[-1] == END for row in texts)
    return [vocabulary.text(row).decode() for row in texts]


def test_random_walks_are_valid(vocabulary):
    made = [TREE, ANY, MIXED, LONG, True]
    guidance = Guidance([json_schema(s) for s in made], vocabulary, [END])
    least = max(len(row.plan) for row in guidance.start())
    rng = np.random.default_rng(0)
    for budget in (least, least + 3, least + 20, 100):
        for text, s in zip(generate(guidance, vocabulary, budget, rng), made, strict=True):
            jsonschema.validate(json.loads(text), s)


@pytest.mark.parametrize("seed", range(3000, 3025))
def test_schemas_that_tables_could_hold_too(vocabulary, seed):
    made = document(seed)
    guidance, rng = Guidance([json_schema(made)], vocabulary, [END]), np.random.default_rng(seed)
    validator = jsonschema.Draft202012Validator(made, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    least = len(guidance.start()[0].plan)
    for budget in (least, least + 10):
        validator.validate(json.loads(generate(guidance, vocabulary, budget, rng)[0]))


@pytest.mark.parametrize(
    "made",
    [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 0.25},
        {"type": "number", "minimum": -0.25, "exclusiveMaximum": 0},
        {"type": "number", "exclusiveMinimum": 10, "exclusiveMaximum": 10.001},
        {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.100001},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "date", "pattern": "^2|^1"},
        {"type": "string", "pattern": r"^\D\W$|a.$"},
    ],
)
def test_scalars_obey_their_bounds_and_patterns(vocabulary, made):
    dfa = json_schema(made).dfa()
    guidance, rng = Guidance([json_schema(made)], vocabulary, [END]), np.random.default_rng(0)
    for _ in range(10):
        text = generate(guidance, vocabulary, 20, rng)[0]
        assert dfa.matches(text.encode()) or made["type"] == "number", text  # which has more digits here
        jsonschema.validate(json.loads(text), made)


def test_state_is_not_changed(vocabulary):
    guidance = Guidance([json_schema(TREE), None], vocabulary, [END])
    state = guidance.start()
    before = guidance.mask(state)
    token = int(np.flatnonzero(unpack(before, len(vocabulary))[0])[0])
    after, taken = guidance.advance(state, [token, 5])
    assert taken.tolist() == [token, 5]
    np.testing.assert_array_equal(guidance.mask(state), before)
    assert (guidance.mask(after)[0] != before[0]).any()
    assert (guidance.mask(after)[1] == -1).all()
    with pytest.raises(ValueError, match=r"token 2 of row 0 is not allowed"):
        guidance.advance(state, [END, 5])
    with pytest.raises(ValueError, match=r"rows \[0\] need up to \d+ tokens"):
        guidance.require_room(state, 3)


def test_budget_replaces_what_cannot_be_completed(vocabulary):
    guidance = Guidance([json_schema(ANY)], vocabulary, [END])
    state = guidance.start()
    assert len(state[0].plan) == 3
    tokens = []
    for left in (4, 3, 2, 1):
        state, taken = guidance.advance(state, [vocabulary.tokens.index(b"{")], [left])
        tokens += taken.tolist()
    assert vocabulary.text(tokens[:2]) == b"{}"
    assert tokens[2] == END  # what comes after it does not matter


@pytest.mark.parametrize(
    "constraint",
    [choices(["yes", 'no "x"\n', "né/€"]), regex(r"(?:[^a-y\s]|\d{2}z)?é"), regex("^a|b$"), regex(r"[\]\\^-]?")],
)
def test_same_language_as_the_tables(constraint, vocabulary):
    guidance, automaton = Guidance([constraint], vocabulary, [END]), constraint.compile(vocabulary, [END])
    rng = np.random.default_rng(1)
    for _ in range(20):
        state, at = guidance.start(), 0
        for _ in range(6):
            mine = (automaton.next[at] >= 0)[automaton.classes[0]] | (automaton.final[at] & automaton.ends)
            theirs = np.asarray(unpack(guidance.mask(state), len(vocabulary)))[0]
            # Where llguidance knows what must come, it allows one way to spell it.
            assert not (theirs & ~mine).any()
            assert (theirs == mine).all() or theirs.sum() == 1
            token = int(rng.choice(np.flatnonzero(theirs)))
            if token == END:
                break
            state, _ = guidance.advance(state, [token])
            at = automaton.next[at, automaton.classes[0, token]]


def test_the_batch_takes_tables_where_it_can(vocabulary):
    small, large = choices(["a"]), json_schema(TREE)
    assert isinstance(compile_rows([small, None], vocabulary, [END]), TokenAutomaton)
    assert isinstance(compile_rows([small, large, None], vocabulary, [END]), Guidance)


def test_errors(vocabulary):
    with pytest.raises(ValueError, match="end token"):
        Guidance([choices(["a"])], vocabulary, [])
    with pytest.raises(ValueError, match="begin of the text inside"):
        Guidance([regex("(?:a^|b)c")], vocabulary, [END])
