"""What both wrappers share: masks, counts, casts and changes against transformers 4.57.6 (goldens) and 5."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch

import fmodels as fm
from interop.tensorflow import TFModel
from interop.torch import TorchModel
from tests.interop.wrapped import BERT, GPT2, LIBRARIES, bits, name_of_dtype

GOLDENS = Path(__file__).parent.parent / "goldens" / "wrappers"


def golden(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


# --- masks, counts, dtypes ----------------------------------------------------------------------------------------------


def test_masks_are_those_of_version_4(library):
    decoder = dataclasses.replace(BERT, causal=True, task="causal-lm")
    models = {}
    for call in golden("masks"):
        key = call["dtype"], call["decoder"]
        if key not in models:
            models[key] = library.model(decoder if call["decoder"] else BERT, call["dtype"])
        mask = library.tensor(call["mask"], call["kind"])
        options = dict(call["options"])
        if call["method"] == "create_extended_attention_mask_for_decoder":
            made = library.wrapper.create_extended_attention_mask_for_decoder(options["input_shape"], mask)
        else:
            made = getattr(models[key], call["method"])(mask, **options)
        want = np.array(call["result"], np.float64)
        found = library.numpy(made)
        assert name_of_dtype(made.dtype) == call["result_dtype"], call
        assert found.shape == want.shape, call
        assert found.tobytes() == want.tobytes(), call  # the signs of zeros, too
    model = models["float32", False]
    assert model.get_head_mask(None, 3) == [None] * 3
    for call in golden("tf_masks"):
        made = model.get_head_mask(library.tensor(call["mask"], "float32"), call["num_hidden_layers"])
        assert library.numpy(made).tolist() == call["result"]
    other = model.get_extended_attention_mask(
        library.tensor([[1, 0]], "int64"), (1, 2), dtype=models["float16", False].dtype
    )
    assert library.numpy(other).tolist() == [[[[0, -65504]]]]
    for wrong in (
        lambda: model.invert_attention_mask(library.tensor([1, 0], "int64")),
        lambda: model.get_extended_attention_mask(library.tensor([[[[1]]]], "int64"), (1, 1)),
        lambda: model.create_extended_attention_mask_for_decoder((1, 3), library.tensor([[1, 1]], "int64")),
        lambda: model.get_head_mask(library.tensor([[[1.0]]], "float32"), 1),
    ):
        with pytest.raises(ValueError, match="expected a mask"):
            wrong()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_counts_are_those_of_version_4(library, family):
    want = golden("counts")[family]
    model = library.wrapper.from_config(want["config"], seed=0)
    inputs = {"input_ids": library.tensor(np.ones((2, 5), int).tolist(), "int64")}
    assert model.num_parameters() == want["num_parameters"]
    assert model.num_parameters(exclude_embeddings=True) == want["exclude_embeddings"]
    assert model.get_memory_footprint(return_buffers=False) == want["get_memory_footprint"]
    assert model.get_memory_footprint() == want["get_memory_footprint"]
    assert [model.estimate_tokens(inputs), model.estimate_tokens({"labels": 1})] == want["estimate_tokens"]
    ops = [model.floating_point_ops(inputs), model.floating_point_ops(inputs, exclude_embeddings=False)]
    assert ops == want["floating_point_ops"]
    if isinstance(model, torch.nn.Module):
        model.get_input_embeddings().weight.requires_grad_(False)
        assert model.num_parameters(only_trainable=True) == want["only_trainable"]
    assert model.can_generate() == (family == "gpt2")
    assert model.base_model_prefix == {"gpt2": "transformer", "bert": "bert"}[family]
    out = model(**model.dummy_inputs)
    assert tuple(out.logits.shape) == (3, 5, 11)
    with pytest.raises(TypeError, match="key= and seed="):
        library.wrapper.from_config(model.config)


def ours(name):
    """The name of PyTorch's tensor for one of Flax'."""
    return name.replace("/", ".").replace("kernel", "weight").replace("scale", "weight").replace("embedding", "weight")


def test_casts_with_masks_are_those_of_flax(library):
    want = golden("casts")
    kernels = {ours(name): name.endswith("kernel") for name in want["to_bf16"]}
    changes = {
        "to_bf16": lambda model: model.to_bf16(),
        "to_fp16 of kernels": lambda model: model.to_fp16(kernels.__getitem__),
        "to_bf16, then to_fp32 of kernels": lambda model: model.to_bf16().to_fp32(fm.tree.unflatten(kernels)),
    }
    for name, change in changes.items():
        model = library.model(GPT2)
        before = bits(model.params)
        assert change(model) is model
        found = {n: name_of_dtype(t.dtype) for n, t in model._named().items()}
        assert found == {ours(n): dtype for n, dtype in want[name].items()}
        if name == "to_fp16 of kernels":
            kept = {
                path: value
                for path, value in bits(model.params).items()
                if path in ("embed.tokens", "final_norm.scale")
            }
            assert kept.items() <= before.items()
    assert np.isfinite(library.numpy(model(**model.dummy_inputs).logits)).all()
    assert name_of_dtype(model.dtype) == "bfloat16"
    with pytest.raises(ValueError, match=r"to_bf16: .*wte"):
        model.to_bf16({n: value for n, value in kernels.items() if "wte" not in n})


# --- tables, trees, generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2/causal-lm", "bert/masked-lm", "llama/causal-lm", "t5/seq2seq-lm", "bert/base"])
def test_tables_and_heads_are_those_of_transformers(library, case, name):
    row = case(name)
    model = library.wrapper(row.params, row.config)

    def weight(module):
        return None if module is None else library.numpy(getattr(module, "weight", module))

    def expected(module):
        return None if module is None else module.weight.detach().double().numpy()

    for method in ("get_input_embeddings", "get_output_embeddings"):
        found, want = weight(getattr(model, method)()), expected(getattr(row.model, method)())
        assert (found is None) == (want is None), method
        assert want is None or np.array_equal(found, want), method
    if row.config.is_encoder_decoder or row.config.task == "base":
        return
    shape = expected(row.model.get_input_embeddings()).shape
    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model.set_input_embeddings(library.tensor(table.tolist(), "float32"))
    assert np.array_equal(weight(model.get_input_embeddings()), table)
    tied = row.config.tie_word_embeddings
    assert np.array_equal(weight(model.get_output_embeddings()), table) == tied
    assert np.array_equal(np.asarray(model.params["embed"]["tokens"]), table)
    given = {n: a for n, a in row.inputs().items() if n != "positions"}
    want = fm.forward(
        fm.tree.update(row.params, {"embed.tokens": jax.numpy.asarray(table)}), row.config, **given
    ).logits
    given = {n: library.tensor(a.tolist(), "int32") for n, a in given.items()}
    np.testing.assert_allclose(library.numpy(model(**given).logits), np.asarray(want), atol=2e-5, rtol=1e-5)


def test_positions_become_more_or_fewer(library, case):
    row = case("gpt2/causal-lm")
    model = library.wrapper(row.params, row.config)
    tokens = library.tensor(row.inputs()["tokens"][:, :5].tolist(), "int32")
    before, old = library.numpy(model(tokens).logits), np.asarray(row.params["embed"]["positions"])
    model.resize_position_embeddings(5)
    table = model.get_position_embeddings()
    assert tuple(getattr(table, "weight", table).shape) == (5, old.shape[1])
    assert model.config.max_positions == 5
    np.testing.assert_allclose(library.numpy(model(tokens).logits), before, atol=1e-6)
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        model.resize_position_embeddings(7)
    model.resize_position_embeddings(7, key=jax.random.key(1))
    new = np.asarray(model.params["embed"]["positions"])
    assert new.shape[0] == 7
    assert np.array_equal(new[:5], old[:5])
    assert 0 < np.abs(new[5:]).max() < 5 * row.config.initializer_range
    with pytest.raises(ValueError, match="at least one"):
        model.resize_position_embeddings(0)
    llama = case("llama/causal-lm")
    rotary = library.wrapper(llama.params, llama.config)
    for method in (rotary.get_position_embeddings, lambda: rotary.resize_position_embeddings(4)):
        with pytest.raises(NotImplementedError, match="no table of positions"):
            method()


def test_trees_go_in_and_come_out(library):
    model = library.model(GPT2)
    other = fm.init(GPT2, jax.random.key(1))
    model.params = other
    assert bits(model.params) == bits(other)
    assert ("embed", "tokens") in model.required_params
    assert model.params_shape_tree["embed"]["tokens"].shape == (11, 8)
    assert model.get_parameter_or_buffer("transformer.wpe.weight").shape == (16, 8)
    with pytest.raises(AttributeError, match="nothing"):
        model.get_parameter_or_buffer("nothing")
    with pytest.raises(ValueError, match="final_norm"):
        model.params = {name: node for name, node in other.items() if name != "final_norm"}
    assert model.resize_token_embeddings(new_num_tokens=12, mean_resizing=True) is not None
    assert model.config.vocab_size == 12


def test_gradient_checkpointing_changes_no_gradient(library):
    model = library.model(GPT2)
    inputs = model.dummy_inputs

    def gradients():
        if isinstance(model, torch.nn.Module):
            model.zero_grad()
            model(**inputs).logits.logsumexp(-1).sum().backward()
            return [p.grad.numpy().copy() for p in model.parameters()]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.reduce_logsumexp(model(**inputs).logits, -1))
        return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    for a, b in zip(plain, gradients(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_transition_scores_are_those_of_transformers(library, case):
    row = case("gpt2/causal-lm")
    tokens = torch.from_numpy(row.inputs()["tokens"]).long()
    made = row.model.generate(
        tokens, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True, eos_token_id=None
    )
    want = row.model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    model = library.wrapper(row.params, row.config)
    scores = tuple(library.tensor(score.tolist(), "float32") for score in made.scores)
    found = model.compute_transition_scores(
        library.tensor(made.sequences.tolist(), "int32"), scores, normalize_logits=True
    )
    np.testing.assert_allclose(library.numpy(found), want.numpy(), atol=1e-5)


def test_generate_returns_what_transformers_does(library, case):
    row = case("gpt2/causal-lm")
    tokens = row.inputs()["tokens"]
    options = {"max_new_tokens": 3, "num_beams": 2, "output_scores": True, "return_dict_in_generate": True}
    want = row.model.generate(inputs=torch.from_numpy(tokens).long(), do_sample=False, **options)
    model = library.wrapper(row.params, row.config)
    got = model.generate(inputs=library.tensor(tokens.tolist(), "int32"), streamer=None, logits_processor=[], **options)
    np.testing.assert_array_equal(library.numpy(got.sequences), want.sequences.numpy())
    np.testing.assert_allclose(library.numpy(got.sequences_scores), want.sequences_scores.numpy(), atol=1e-5)
    assert len(got.scores) == len(want.scores)
    each = model.compute_transition_scores(got.sequences, got.scores, got.beam_indices)
    theirs = row.model.compute_transition_scores(want.sequences, want.scores, want.beam_indices)
    np.testing.assert_allclose(library.numpy(each), theirs.numpy(), atol=1e-5)
    with pytest.raises(TypeError, match=r"stopping_criteria is of PyTorch's loop.*pass stops="):
        model.generate(library.tensor(tokens.tolist(), "int32"), stopping_criteria=[print])


def test_generate_takes_what_the_decoder_begins_with(library, case):
    row = case("t5/seq2seq-lm")
    tokens, begin = row.inputs()["tokens"].tolist(), [[3, 5], [3, 9]]
    tokens = tokens[: len(begin)]
    want = row.model.generate(
        torch.tensor(tokens), decoder_input_ids=torch.tensor(begin), max_new_tokens=3, do_sample=False
    )
    model = library.wrapper(row.params, row.config)
    got = model.generate(
        library.tensor(tokens, "int32"), decoder_input_ids=library.tensor(begin, "int32"), max_new_tokens=3
    )
    np.testing.assert_array_equal(library.numpy(got), want.numpy())


# --- saving --------------------------------------------------------------------------------------------------------------


def test_save_pretrained_follows_its_arguments(library, tmp_path, monkeypatch):
    model = library.model(GPT2)
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "pytorch_model.bin").exists()
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB", variant="half")
    assert len(list((tmp_path / "shards").glob("model.half-*-of-*.safetensors"))) > 1
    assert bits(library.wrapper.from_pretrained(tmp_path / "shards", variant="half").params) == bits(model.params)
    other = library.model(GPT2)
    other.params = fm.init(GPT2, jax.random.key(1))
    model.save_pretrained(tmp_path / "other", state_dict=dict(other._named()))
    assert bits(fm.load(tmp_path / "other")[0]) == bits(other.params)
    calls = []
    monkeypatch.setattr(fm, "push_to_hub", lambda *args, **options: calls.append((args[2], options)) or "address")
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True, private=True, max_shard_size="1MB")
    assert model.push_to_hub("me/tiny", create_pr=True, safe_serialization=False) == "address"
    assert calls == [
        ("tiny", {"private": True, "max_shard_size": "1MB"}),
        ("me/tiny", {"create_pr": True, "format": "torch"}),
    ]
    for error, options in (
        (TypeError, {"save_function": print}),
        (TypeError, {"state_dict": 5}),
        (TypeError, {"state_dict": {**other._named(), "x": object()}}),
        (ValueError, {"save_original_format": False}),
        (ValueError, {"commit_message": "text"}),
        (ValueError, {"safe_serialization": True, "format": "torch"}),
    ):
        with pytest.raises(error, match="save_pretrained"):
            model.save_pretrained(tmp_path / "no", **options)
    with pytest.raises(ValueError, match="push_to_hub"):
        model.push_to_hub("me/tiny", use_temp_dir=False)
    model.add_adapter({"r": 2, "target_modules": ["c_attn"]}, seed=0)
    with pytest.raises(ValueError, match="push_to_hub: an adapter"):  # which would be left behind
        model.push_to_hub("me/tiny")


# --- what one library has -------------------------------------------------------------------------------------------------


def test_torch_modules_of_the_parts(case):
    row = case("t5/seq2seq-lm")
    model = TorchModel(row.params, row.config)
    for part in ("get_encoder", "get_decoder"):
        theirs = dict(getattr(row.model, part)().named_parameters(remove_duplicate=False))
        found = dict(getattr(model, part)().named_parameters(remove_duplicate=False))
        assert found.keys() == theirs.keys()
    bert = LIBRARIES["torch"].model(BERT)
    assert bert.base_model is bert.bert is bert.get_decoder()
    bert.set_input_embeddings(torch.nn.Embedding(11, 8))
    assert bert.cls.predictions.decoder.weight is bert.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tied head"):
        bert.set_output_embeddings(torch.nn.Linear(8, 11))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        bert.set_input_embeddings(torch.zeros(12, 8))
    with pytest.raises(TypeError, match="weight"):
        bert.set_input_embeddings([1])
    untied = TorchModel(*fm.untie(fm.init(GPT2, jax.random.key(0)), GPT2))
    untied.set_output_embeddings(torch.nn.Linear(8, 11, bias=False))
    assert np.array_equal(untied.params["lm_head"]["weight"], untied.lm_head.weight.detach().numpy())


def test_tensorflow_biases_and_signature():
    model = LIBRARIES["tensorflow"].model(BERT)
    (name,) = model.get_bias()
    model.set_bias({name: np.arange(11, dtype=np.float32)})
    assert model.get_bias()[name].numpy().tolist() == list(range(11))
    assert model.get_lm_head() is model.get_input_embeddings()
    assert list(model.input_signature) == ["input_ids", "attention_mask", "position_ids", "token_type_ids"]
    with pytest.raises(ValueError, match="set_bias"):
        model.set_bias({"bias": np.zeros(11)})
    assert TFModel.from_config(dataclasses.replace(BERT, task="base"), seed=0).get_bias() is None
