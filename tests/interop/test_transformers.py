"""`interop.transformers`: the real classes of transformers with our weights, and back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from interop.torch import to_torch
from interop.transformers import from_transformers, to_transformers
from tests import families


def assert_equal(a, b):
    """The same leaves, bit for bit."""
    a, b = fm.tree.flatten(a), fm.tree.flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert leaf.dtype == b[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(b[path]).tobytes(), path


def test_real_class_is_rebuilt_and_comes_back(loaded):
    model = to_transformers(loaded.params, loaded.config, attn_implementation=loaded.attention)
    assert type(model) is type(loaded.model)
    assert not model.training
    expected = loaded.model.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    want = loaded.reference("right")
    for name, value in families.reference(model, loaded.inputs("right")).items():
        assert np.array_equal(value, want[name]), name
    params, config = from_transformers(model)
    assert config == loaded.config
    assert_equal(params, loaded.params)
    params, config = from_transformers(loaded.model)
    assert config == loaded.config
    assert_equal(params, loaded.params)


@pytest.mark.parametrize("name", ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm/untied"])
def test_dtypes_are_kept_tensor_by_tensor(case, name):
    row = case(name)
    params = fm.tree.map_leaves(lambda path, a: a if path.endswith(".scale") else a.astype("bfloat16"), row.params)
    model = to_transformers(params, row.config)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert_equal(from_transformers(model)[0], params)


def test_weights_are_copies_and_the_head_is_tied(case):
    row = case("gpt2/causal-lm")
    before = {name: tensor.clone() for name, tensor in to_torch(row.params, row.config).items()}
    model = to_transformers(row.params, row.config)
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            assert parameter.is_contiguous()
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in to_torch(row.params, row.config).items())


def test_generation_config_goes_both_ways(case):
    row = case("llama/causal-lm")
    options = fm.GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5, eos_token_id=(2, 4))
    model = to_transformers(row.params, dataclasses.replace(row.config, generation=options))
    assert model.generation_config.temperature == 0.5
    assert model.generation_config.eos_token_id == [2, 4]
    generation = from_transformers(model)[1].generation
    assert (generation.max_new_tokens, generation.temperature, generation.eos_token_id) == (3, 0.5, (2, 4))
    generation.require_supported("test")


def test_what_a_tree_may_lack(case):
    row = case("bert/base")
    assert to_transformers(fm.tree.remove(row.params, "pooler"), row.config).pooler is None
    row = case("bert/masked-lm/untied")
    without = fm.tree.remove(row.params, "lm_head.spare_bias")
    model = to_transformers(without, row.config, attn_implementation="eager")
    assert torch.equal(model.cls.predictions.bias, model.cls.predictions.decoder.bias)
    got = families.reference(model, row.inputs())
    assert np.array_equal(got["logits"], row.reference()["logits"])


def test_pruned_models_are_refused(case):  # masked ones are not: tests/interop/test_torch.py compares the two
    row = case("gpt2/causal-lm")
    with pytest.raises(ValueError, match="mask_heads"):
        to_transformers(*fm.prune_heads(row.params, row.config, {1: [0]}))


def test_wrong_arguments(case):
    row = case("gpt2/causal-lm")
    with pytest.raises(TypeError, match=r"interop\.torch\.from_torch"):
        from_transformers(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"embed\.tokens"):
        to_transformers(row.params, dataclasses.replace(row.config, hidden_size=32))
    other = transformers.CTRLConfig(n_embd=8, dff=8, n_layer=1, n_head=2, vocab_size=9)
    with pytest.raises(ValueError, match="ctrl"):
        from_transformers(transformers.CTRLModel(other))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda p: to_transformers(p, row.config))(row.params)
