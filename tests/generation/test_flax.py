"""Greedy decoding and beams against the Flax classes of transformers 4.57.6: `goldens/make_generation_flax.py`.

Of its cases those are read in which Flax does what PyTorch does, which is our reference. Its `min_length` is longer by one
and counts padding; its beams leave out texts that did not end as soon as one did, and divide scores by lengths that count
the prompt, so that those are compared in which no text ends. Ours are PyTorch's, token for token (`test_beams.py`).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import fmodels as fm

GOLDENS = Path(__file__).parents[1] / "goldens" / "generation"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/cases_flax.json"))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_flax(name):
    params, config = fm.load(GOLDENS / name)
    config = dataclasses.replace(config, eos_token_id=None)
    found = json.loads((GOLDENS / name / "cases_flax.json").read_text())
    found = [case for case in found if not {"num_beams", "min_length"} & case["kwargs"].keys()]
    assert len(found) == 2
    for case in found:
        options = fm.GenerationConfig(**case["kwargs"])
        got = np.asarray(fm.generate(params, config, case["tokens"], mask=case["mask"], options=options).tokens)
        want = np.array(case["sequences"])
        np.testing.assert_array_equal(got, want[:, : got.shape[1]], err_msg=case["name"])
        assert (want[:, got.shape[1] :] == case["kwargs"]["pad_token_id"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_beams_equal_flax(name):
    params, config = fm.load(GOLDENS / name)
    config = dataclasses.replace(config, eos_token_id=None)
    found = json.loads((GOLDENS / name / "cases_flax.json").read_text())
    found = [case for case in found if case["name"].endswith("_endless")]
    assert len(found) == 3
    for case in found:
        options = fm.GenerationConfig(**{n: value for n, value in case["kwargs"].items() if n != "eos_token_id"})
        got = fm.generate(params, config, case["tokens"], mask=case["mask"], options=options).tokens
        np.testing.assert_array_equal(got, case["sequences"], err_msg=case["name"])
