"""Families that know positions in ways of their own: tables with an offset, sines, ALiBi, a part of each head rotated."""

import numpy as np
import pytest
import torch

import fmodels as fm

ROWS = [
    "gpt_neox/causal-lm", "opt/causal-lm/projected", "bloom/causal-lm", "falcon/causal-lm", "falcon/causal-lm/alibi",
    "xglm/causal-lm",
]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_tokens_equal_transformers(case, name):
    """Of prompts that are padded on the left, as stacked layers and one by one."""
    row = case(name)
    given = {name: a for name, a in row.inputs("left").items() if name != "positions"}
    tensors = {"inputs": torch.tensor(given["tokens"]).long(), "attention_mask": torch.tensor(given["mask"]).long()}
    want = row.model.generate(**tensors, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for params in (row.params, row.unstacked):
        got = fm.generate(params, row.config, **given, max_new_tokens=8, options=fm.GenerationConfig(pad_token_id=3))
        np.testing.assert_array_equal(got.tokens, want)
