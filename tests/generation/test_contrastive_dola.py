"""Contrastive search and DoLa against transformers 4.55.4, the last with both: `goldens/make_generation.py`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmodels as fm

GOLDENS = Path(__file__).parents[1] / "goldens" / "generation"
PROGRAMS = {
    "gpt2": ("k_2", "k_4", "k_6", "low", "high", "layers_1_3"),
    "llama": ("k_4", "low", "high", "layers_1_3"),
    "bart": ("k_4",),
    "t5": ("k_4",),
    "t5_gated": ("k_4",),
}
"""The cases that share programs: what is static is how many candidates, and which layers."""


def load(name):
    """A model of the goldens, which has no end tokens but those of a case."""
    params, config = fm.load(GOLDENS / name)
    return params, dataclasses.replace(config, eos_token_id=None)


def cases(name, part):
    found = json.loads((GOLDENS / name / "cases.json").read_text())
    found = [case for case in found if case["strategy"] in ("contrastive", "dola")]
    others = ("one_row", "two_ends") if name != "gpt2" else ("one_row",)  # programs of their own
    return [case for case in found if part in case["name"] and not case["name"].endswith(others)]


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PROGRAMS.items() for part in parts])
def test_equals_transformers(name, part):
    """Tokens, and the scores that they were chosen with, in one program for rows with and without ends and penalties."""
    params, config = load(name)
    found = cases(name, part)
    assert len(found) >= 2
    for case in found:
        options = fm.GenerationConfig(output_scores=True, **case["kwargs"])
        got = fm.generate(params, config, case["tokens"], mask=case["mask"], options=options)
        want = np.array(case["sequences"])
        np.testing.assert_array_equal(got.tokens, want, err_msg=case["name"])
        scores = np.array([[np.nan if score is None else score for score in row] for row in case["step_scores"]])
        new = want[:, want.shape[1] - scores.shape[1] :]
        mine = np.take_along_axis(np.asarray(got.outputs["scores"]), new[:, :, None], 2)[..., 0]
        real = ~np.isnan(scores)
        np.testing.assert_allclose(mine[real], scores[real], rtol=1e-4, atol=3e-3, err_msg=case["name"])
        np.testing.assert_array_equal(real.sum(1), got.lengths)


def test_dola_samples_and_streams():
    """With one candidate a sample is the likeliest token, here as well; steps one by one give the same."""
    params, config = load("gpt2")
    (case,) = [case for case in cases("gpt2", "dola_low") if case["name"] == "dola_low"]
    arguments = {"mask": case["mask"], "key": jax.random.key(0)}
    width = len(case["tokens"][0])
    for options in ({"do_sample": True, "top_k": 1}, {"do_sample": True, "temperature": 3.0, "top_p": 0.5}):
        options = fm.GenerationConfig(output_scores=True, **case["kwargs"], **options)
        got = fm.generate(params, config, case["tokens"], options=options, **arguments)
        if options.top_k == 1:
            np.testing.assert_array_equal(got.tokens, case["sequences"])
    steps = np.stack(list(fm.stream(params, config, case["tokens"], options=options, **arguments)), axis=1)
    np.testing.assert_array_equal(steps, np.asarray(got.tokens)[:, width:])


@pytest.mark.parametrize("part", ["contrastive_a_0.6_k_4", "dola_low"])
def test_the_cache_goes_on(part):
    """The next call reads what the last has left in the cache: each row's own tokens but the last, nothing after its end.

    In float64: in float32 the third row is up to 2.8e-4 away from the model in float64, the others 2e-5.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        check_the_cache(part)


def check_the_cache(part):
    params, config = load("gpt2")
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
    (case,) = [case for case in cases("gpt2", part) if case["name"] == part]
    options = fm.GenerationConfig(**case["kwargs"])
    first = fm.generate(params, config, case["tokens"], mask=case["mask"], options=options, keep_cache=True)
    assert len(set(np.asarray(first.lengths).tolist())) > 1
    np.testing.assert_array_equal(np.asarray(first.cache.mask).sum(1), np.asarray(first.mask).sum(1) - 1)
    more = np.array([[20, 21]] * 3)
    got = fm.generate(params, config, more, max_new_tokens=6, prefix=first)
    whole, real = (np.concatenate(x, axis=1) for x in ((first.tokens, more), (first.mask, np.ones_like(more))))
    want = fm.generate(params, config, whole, mask=real, max_new_tokens=6)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    if "contrastive" in part:
        with pytest.raises(ValueError, match="leave prefix out"):
            fm.generate(params, config, more, options=options, prefix=first)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", {"dola_layers": "low"}, "without an encoder"),
        ("gpt2", {"dola_layers": [40]}, "leaves none"),
        ("gpt2", {"dola_layers": "low", "guidance_scale": 2.0}, "leave one out"),
        ("gpt2", {"dola_layers": "low", "penalty_alpha": 0.5}, "different ways"),
        ("gpt2", {"dola_layers": "low", "num_beams": 2}, "beams"),
    ],
)
def test_contradictions(name, options, message):
    params, config = load(name)
    with pytest.raises(ValueError, match=message):
        fm.generate(params, config, [[5, 6]], max_new_tokens=3, options=fm.GenerationConfig(**options))


def test_one_candidate_is_greedy():
    params, config = load("gpt2")
    want = fm.generate(params, config, [[5, 6, 7]], max_new_tokens=6).tokens
    options = fm.GenerationConfig(penalty_alpha=0.5, top_k=1)
    np.testing.assert_array_equal(
        fm.generate(params, config, [[5, 6, 7]], max_new_tokens=6, options=options).tokens, want
    )
