"""Diverse and constrained beams against golden files of transformers 4.55, which had them last; and plain ones.

A program takes seconds to compile and there are a few hundred cases, most with programs of their own: each kind of case
runs on one of the models, in turn. `FMODELS_ALL_GOLDENS=1` runs all cases on all models.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fmodels as fm
from fmodels.generation import phrases as trees
from fmodels.generation.hypotheses import add, nothing
from fmodels.generation.running import Trail
from tests.generation.pairs import PAD, ours, pair, prompts

FOLDER = Path(__file__).parents[1] / "goldens" / "generation"
MODELS = ("gpt2", "llama", "bart", "t5", "t5_gated")
STRATEGIES = ("beam", "group", "constrained")


def cases():
    """Pairs of model and case."""
    found = {}
    for model in MODELS:
        for case in json.loads((FOLDER / model / "cases.json").read_text(encoding="utf-8")):
            if case["strategy"] in STRATEGIES:
                found.setdefault(case["name"], []).append((model, case))
    if os.environ.get("FMODELS_ALL_GOLDENS"):
        chosen = [one for kind in found.values() for one in kind]
    else:
        chosen = [kind[i % len(kind)] for i, kind in enumerate(found.values())]
    return [pytest.param(model, case, id=f"{model}-{case['name']}") for model, case in chosen]


@pytest.fixture(scope="module")
def models():
    return {model: fm.load(FOLDER / model) for model in MODELS}


@pytest.mark.parametrize(("model", "case"), cases())
def test_beams_are_those_of_transformers_4(models, model, case):
    params, config = models[model]
    options = dict(case["kwargs"])
    words = [value for one in options.pop("constraints", []) for value in one.values()]
    words += options.pop("force_words_ids", [])
    got = ours(params, config, case["tokens"], case["mask"], force_words_ids=words or None, **options)
    new = np.asarray(got.tokens)[:, -got.logprobs.shape[1] :]
    want = np.array(case["sequences"])
    want = want[:, want.shape[1] - new.shape[1] :]
    np.testing.assert_array_equal(new, want)
    np.testing.assert_allclose(got.sequence_scores, case["sequences_scores"], rtol=2e-5, atol=2e-4)
    sums, lengths = np.asarray(got.logprobs).sum(1), np.asarray(got.lengths, np.float32)
    penalty = options.get("length_penalty", 1.0)
    np.testing.assert_allclose(sums / lengths**penalty, got.sequence_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"num_beam_groups": 2, "diversity_penalty": 0.7}, {"force_words_ids": [[20, 21], [[30, 31], [32]]]}], ids=["group", "words"]
)  # fmt: skip
def test_indices_of_beams_are_rows_of_the_scores(options):
    _, params, config = pair("llama")
    tokens, mask = prompts(2, 6)
    got = ours(
        params, config, tokens, mask, max_new_tokens=9, num_beams=4, num_return_sequences=4, pad_token_id=PAD, output_scores=True,
        eos_token_id=[17], **options,
    )  # fmt: skip
    each = fm.compute_transition_scores(got.tokens, got.outputs["scores"], got.beam_indices)
    np.testing.assert_allclose(each, got.logprobs, atol=1e-6)
    rows = np.asarray(got.beam_indices)
    assert (np.where(rows < 0, 4 * (np.arange(8) // 4)[:, None], rows) // 4 == (np.arange(8) // 4)[:, None]).all()


def test_phrases_are_followed_one_at_a_time():
    """A broken phrase goes to the end of the queue, and the token that breaks it begins no other."""
    tree, widest = trees.compile_phrases([[1, 2, 3], [[4, 5], [4, 6], [7]]], 10)
    assert widest == 3
    progress, banks = trees.begin(tree, 1), []
    for token in (1, 2, 4, 4, 6, 1, 2, 3):
        progress = trees.update(tree, progress, jnp.array([token]))
        banks.append(int(trees.bank(tree, progress)[0]))
    assert banks == [1, 2, 0, 2, 3, 4, 5, 6]
    assert bool(trees.complete(tree, progress)[0])
    tokens, there, _ = trees.advances(tree, trees.begin(tree, 1), widest)
    assert np.asarray(tokens)[np.asarray(there)].tolist() == [1, 4, 7]


def test_a_full_list_gives_up_its_worst_text_only_for_a_better_one():
    shape = (1, 2, 3)
    empty = nothing(
        Trail(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros((1, 2), jnp.int32))
    )

    def texts(*names: int) -> Trail:
        tokens = jnp.broadcast_to(jnp.array(names)[None, :, None], (1, len(names), 3))
        return Trail(tokens, jnp.zeros(tokens.shape), tokens, tokens[..., 0])

    found = add(empty, texts(1, 2, 3, 4), jnp.array([[-3.0, -1.0, -3.0, -2.0]]), jnp.array([[True, True, True, True]]))
    assert found.trail.length.tolist() == [[2, 4]]
    found = add(found, texts(5, 6), jnp.array([[-0.5, -0.1]]), jnp.array([[False, True]]))
    assert found.trail.length.tolist() == [[2, 6]]
    np.testing.assert_allclose(found.scores, [[-1.0, -0.1]])
