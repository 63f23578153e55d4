"""`from_pretrained` of both wrappers, with the arguments of transformers'."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers

import fmodels as fm
from interop import loading
from tests.interop.wrapped import BERT, GPT2, LIBRARIES, bits, name_of_dtype


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A masked BERT."""
    path = tmp_path_factory.mktemp("bert")
    fm.save(fm.init(BERT, jax.random.key(0)), BERT, path)
    return path


def test_loaded_weights_are_never_drawn(library, folder, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a random number is drawn")

    for name in ("normal", "uniform", "truncated_normal", "bits", "split", "key", "PRNGKey"):
        monkeypatch.setattr(jax.random, name, refuse)
    monkeypatch.setattr(fm, "init", refuse)
    for name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "ones_", "zeros_"):
        monkeypatch.setattr(torch.nn.init, name, refuse)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    model, info = library.wrapper.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert bits(model.params) == bits(fm.load(folder)[0])
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    _, params = library.wrapper.from_pretrained(folder, _do_init=False)
    assert bits(params) == bits(model.params)


def test_loading_info_is_that_of_transformers(library, folder):
    theirs, want = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    model, info = library.wrapper.from_pretrained(
        folder, task="sequence-classification", seed=0, output_loading_info=True
    )
    assert set(info["missing_keys"]) == set(want["missing_keys"])
    assert set(info["unexpected_keys"]) == set(want["unexpected_keys"]) - {"cls.predictions.decoder.bias"}
    assert info["mismatched_keys"] == []
    state = {name: p for name, p in theirs.state_dict().items() if name not in want["missing_keys"]}
    named = model._named()
    assert all(np.array_equal(named[name].numpy(force=True) if isinstance(named[name], torch.Tensor) else named[name].numpy(),
                              p.numpy()) for name, p in state.items() if name in named)  # fmt: skip


def test_mismatched_sizes_are_those_of_transformers(library, tmp_path):
    config = dataclasses.replace(BERT, task="sequence-classification", num_labels=3)
    params = fm.init(config, jax.random.key(0), dtype="bfloat16")
    fm.save(params, config, tmp_path)
    theirs, want = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    load = library.wrapper.from_pretrained
    model, info = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True, seed=1)
    assert set(info["mismatched_keys"]) == {(n, tuple(a), tuple(b)) for n, a, b in want["mismatched_keys"]}
    assert info["missing_keys"] == []
    assert model.config.num_labels == 5
    assert model.params["classifier"]["weight"].shape == (5, 8)
    drawn = np.asarray(model.params["classifier"]["weight"])
    assert 0 < np.abs(drawn).max() < 0.2
    assert str(theirs.classifier.weight.dtype) == f"torch.{drawn.dtype}"
    before, after = bits(params), bits(model.params)
    assert {p for p in after if after[p] != before[p]} == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"classifier\.weight.*drawn anew"):
        load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"classifier\.weight.*expected \[5, 8\]"):
        load(tmp_path, num_labels=5)
    with pytest.raises(TypeError, match="num_lables"):
        load(tmp_path, num_lables=5)


def test_state_dicts_configs_and_other_names(library, folder):
    load, params = library.wrapper.from_pretrained, fm.init(GPT2, jax.random.key(0))
    tensors = {n: library.tensor(np.asarray(a).tolist(), "float32") for n, a in fm.to_disk(params, GPT2).items()}
    renamed = {f"net.{name.removeprefix('transformer.')}": tensor for name, tensor in tensors.items()}
    model = load(None, state_dict=renamed, config=GPT2, key_mapping={r"^net\.": "transformer.", "transformer": "x"})
    assert bits(model.params) == bits(params)
    assert bits(load(None, state_dict=tensors, config=GPT2.to_hf()).params) == bits(params)
    other = load(folder, config=dataclasses.replace(BERT, norm_eps=1e-3))
    assert other.config.norm_eps == 1e-3
    assert load(folder, config=folder, layer_norm_eps=1e-4).config.norm_eps == 1e-4
    theirs = transformers.BertConfig.from_pretrained(folder, layer_norm_eps=1e-5)
    assert load(folder, config=theirs).config.norm_eps == 1e-5
    assert library.wrapper.from_config(theirs, seed=0).config.norm_eps == 1e-5
    assert json.loads(dict(load(folder, use_cache=False).config.extra)["use_cache"]) is False  # changes no number
    options = {"output_hidden_states": True, "output_attentions": True}  # in config.json for all calls
    theirs, model = transformers.BertForMaskedLM.from_pretrained(folder, **options), load(folder, **options)
    out, want = model(library.tensor([[1, 2, 3]], "int32")), theirs(torch.tensor([[1, 2, 3]]))
    for name in ("hidden_states", "attentions"):
        found = library.numpy(getattr(out, name))
        np.testing.assert_allclose(found, torch.stack(getattr(want, name)).numpy(force=True), atol=1e-5)
    assert model(library.tensor([[1, 2, 3]], "int32"), output_attentions=False).attentions is None
    assert load(folder, hidden_act="relu").config.activation == "relu"
    assert load(folder, generation_config={"top_k": 4}).config.generation.top_k == 4
    assert load(folder, generation_config=transformers.GenerationConfig(top_k=3)).config.generation.top_k == 3
    for dtype in ("bfloat16", torch.bfloat16, tf.bfloat16):
        assert name_of_dtype(load(folder, dtype=dtype).dtype) == "bfloat16"
        assert name_of_dtype(load(folder, torch_dtype=dtype, hidden_act="gelu").dtype) == "bfloat16"
    assert name_of_dtype(load(folder, dtype="auto").dtype) == "float32"
    untied = {**tensors, "lm_head.weight": library.tensor(np.ones((11, 8)).tolist(), "float32")}
    with pytest.raises(ValueError, match=r"ties 'lm_head\.weight'"):
        load(None, state_dict=untied, config=GPT2)
    for error, options in (
        (TypeError, {"state_dict": tensors}),
        (TypeError, {"config": GPT2}),
        (TypeError, {"state_dict": [1], "config": GPT2}),
        (TypeError, {"state_dict": tensors, "config": 3}),
        (TypeError, {"state_dict": tensors, "config": GPT2, "dtype": "float32", "torch_dtype": "float32"}),
        (
            ValueError,
            {"state_dict": tensors, "config": GPT2, "sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
        ),
        (ValueError, {"state_dict": tensors, "config": GPT2, "dtype": {"": "float32"}}),
        (ValueError, {"state_dict": tensors, "config": {"hidden_size": 8}}),
    ):
        with pytest.raises(error, match="from_pretrained"):
            load(None, **options)


def test_formats_and_arguments_that_change_nothing_or_are_refused(library, folder, tmp_path):
    load = library.wrapper.from_pretrained
    model = load(
        folder, low_cpu_mem_usage=True, device_map="cpu", weights_only=True, from_pt=True, use_safetensors=True
    )
    model.save_pretrained(tmp_path, safe_serialization=False)
    want = bits(model.params)
    assert bits(load(tmp_path, use_safetensors=False, from_tf=False).params) == want
    for name, (allowed, _) in loading.REFUSED.items():
        assert bits(load(folder, **{name: allowed[0]}).params) == want
        with pytest.raises(ValueError, match=rf"from_pretrained: {name}="):
            load(folder, **{name: object()})
    with pytest.raises(ValueError, match="several formats"):
        load(folder, from_tf=True, from_flax=True)
    for option in ("from_tf", "from_flax"):
        name = option.removeprefix("from_")
        with pytest.raises(OSError, match=f"{name}_model"):
            load(folder, **{option: True})
        fm.save(model.params, BERT, tmp_path / name, format=name)
        assert bits(load(tmp_path / name, **{option: True}).params) == want
