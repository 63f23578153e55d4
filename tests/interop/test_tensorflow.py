"""TensorFlow against transformers 5 on PyTorch: values, gradients, an optimizer's step, round trips, files, SavedModel.

Compiling is what takes the time here (XLA in TensorFlow has no cache on disk), so that there is one model for each
family, and one shape for most tests.
"""

import dataclasses
import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers

import fmodels as fm
from interop.tensorflow import TFModel, from_tensorflow, to_tensorflow
from tests import families

THREE = ("gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm")


def bits(tree):
    return [(path, a.dtype.name, a.shape, np.asarray(a).tobytes()) for path, a in sorted(fm.tree.flatten(tree).items())]


def gradients(model, given, weights):
    """Of the weighted sum of the logits, by name; and the logits."""
    with tf.GradientTape() as tape:
        logits = model(**given).logits
        loss = tf.reduce_sum(logits * weights)
    values = tape.gradient(loss, model.trainable_variables)
    return dict(zip(model.named_variables, values, strict=True)), logits


@pytest.fixture(params=THREE)
def trained(request, case, tmp_path_factory):
    """A row of the table, its inputs padded on the right, and random weights of the logits."""
    loaded = case(request.param)
    given = {name: a for name, a in loaded.inputs("right").items() if name != "positions"}
    shape = (*given["tokens"].shape, loaded.config.vocab_size)
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32) * given["mask"][..., None]
    return loaded, given, weights


def test_values_gradients_and_a_step_equal_transformers(trained):
    loaded, given, weights = trained
    model = TFModel(loaded.params, loaded.config)
    found, logits = gradients(model, given, weights)

    hf = loaded.model
    hf.zero_grad()
    theirs = families.outputs(families.call(hf, loaded.inputs("right")))["logits"]
    (theirs * torch.tensor(weights)).sum().backward()
    real = given["mask"].astype(bool)
    want = theirs.detach().numpy()
    assert np.max(np.abs(logits.numpy() - want)[real] / np.maximum(1, np.abs(want[real]))) <= 1e-5

    wanted = {name: parameter.grad.numpy() for name, parameter in hf.named_parameters() if parameter.grad is not None}
    assert set(found) == {name for name, _ in hf.named_parameters()} & set(found)
    for name, gradient in found.items():
        value = np.zeros(gradient.shape, np.float32) if gradient is None else gradient.numpy()
        target = wanted.get(name, np.zeros_like(value))
        assert np.max(np.abs(value - target)) <= 1e-4 * max(1, np.max(np.abs(target))), name
    assert set(wanted) <= set(found)

    # One step of SGD on both sides; Keras' optimizer takes tf.Variables, and the next call sees what it did.
    before = bits(loaded.params)
    optimizer = tf.keras.optimizers.SGD(0.01)
    optimizer.apply_gradients(zip(found.values(), model.trainable_variables, strict=True))
    stepped = dict(hf.named_parameters())
    for name, variable in model.named_variables.items():
        target = stepped[name].detach().numpy() - 0.01 * wanted.get(name, np.float32(0))
        np.testing.assert_allclose(variable.numpy(), target, atol=1e-5, rtol=1e-5, err_msg=name)
    after = model(**given).logits
    assert float(tf.reduce_sum(after * weights)) < float(tf.reduce_sum(logits * weights))
    assert bits(loaded.params) == before, "training changed the tree that the model was made from"
    now = fm.forward(model.params, loaded.config, **given).logits
    np.testing.assert_allclose(after.numpy()[real], np.asarray(now)[real], atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["bert/multiple-choice", "bert/pretraining", "t5/sequence-classification", "bart/base", "deepseek_v3/base"],
)
def test_other_tasks(case, name):
    loaded = case(name)
    given = {n: a for n, a in loaded.inputs("left").items() if n != "positions"}
    out = TFModel(loaded.params, loaded.config)(**given)
    asked = ("hidden_states", "attentions", "router_logits")
    want = {name: a for name, a in loaded.reference("left").items() if not name.endswith(asked)}
    families.assert_equal(out, want, **loaded.masks("left"), causal=loaded.case.causal)
    assert out.last_hidden_state is out.hidden
    assert out.pooler_output is out.pooled


def test_hidden_states_and_attentions(case):
    loaded = case("gpt2/causal-lm")
    given = {n: a for n, a in loaded.inputs("left").items() if n != "positions"}
    out = TFModel(loaded.params, loaded.config)(
        **given, output_hidden_states=True, output_attentions=True, training=True
    )
    assert out.attentions is not None
    families.assert_equal(out, loaded.reference("left"), **loaded.masks("left"), causal=True)


def test_adam_inside_tf_function_and_aliases(case):
    loaded = case("llama/causal-lm")
    model = TFModel(loaded.params, loaded.config)
    optimizer = tf.keras.optimizers.Adam(1e-2)
    tokens = tf.constant(loaded.inputs()["tokens"], tf.int64)

    @tf.function(autograph=False)
    def step(tokens):
        with tf.GradientTape() as tape:
            logits = model({"input_ids": tokens, "attention_mask": tf.ones_like(tokens)}).logits
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tokens[:, 1:], logits=logits[:, :-1])
            )
        values = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(values, model.trainable_variables, strict=True))
        return loss

    losses = [float(step(tokens)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", THREE)
def test_round_trips_are_exact(case, name, dtype):
    loaded = case(name)
    # Cast by numpy, which compiles nothing.
    params = fm.tree.map_leaves(lambda _, leaf: jax.device_put(np.asarray(leaf).astype(dtype)), loaded.params)
    tensors = to_tensorflow(params, loaded.config)
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    assert set(tensors) == set(fm.to_disk(params, loaded.config, tied=True, module=True))
    assert bits(from_tensorflow(tensors, loaded.config)) == bits(params)
    if dtype == "bfloat16":
        tensors = to_tensorflow(fm.unstack_layers(params), loaded.config)
        assert bits(from_tensorflow(tensors, loaded.config)) == bits(params)
    model = TFModel(params, loaded.config)
    assert bits(from_tensorflow(model, loaded.config)) == bits(params) == bits(model.params)
    mixed = {n: v if i % 2 else v.numpy() for i, (n, v) in enumerate(model.named_variables.items())}
    assert bits(from_tensorflow(mixed, loaded.config)) == bits(params)


@pytest.mark.parametrize("name", THREE)
def test_tensors_equal_transformers(case, name):
    loaded = case(name)
    theirs = loaded.model.state_dict()
    for name, tensor in to_tensorflow(loaded.params, loaded.config).items():
        np.testing.assert_array_equal(tensor.numpy(), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_memory_is_shared_where_promised(dtype):
    config = fm.models.llama.Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=16, task="causal-lm",
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = fm.tree.map_leaves(
        lambda _, leaf: jax.device_put(random.normal(size=leaf.shape).astype(leaf.dtype)),
        fm.abstract(config, dtype=dtype),
    )
    tensors = to_tensorflow(params, config)
    integers = {2: tf.uint16, 4: tf.uint32}[np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16).itemsize]

    def address(tensor):
        return np.from_dlpack(tf.bitcast(tensor, integers)).ctypes.data

    up = params["layers"]["mlp"]["up"]["weight"]
    assert address(tensors["model.embed_tokens.weight"]) == params["embed"]["tokens"].unsafe_buffer_pointer()
    assert address(tensors["model.layers.1.mlp.up_proj.weight"]) == up.unsafe_buffer_pointer() + up.nbytes // 2
    again = from_tensorflow(tensors, config)
    assert again["embed"]["tokens"].unsafe_buffer_pointer() == params["embed"]["tokens"].unsafe_buffer_pointer()

    # What can change is not shared: neither variables nor the user's own arrays.
    variables = {name: tf.Variable(tensor) for name, tensor in tensors.items()}
    copy = from_tensorflow(variables, config)
    for variable in variables.values():
        variable.assign(tf.zeros_like(variable))
    assert bits(copy) == bits(params) == bits(again)
    arrays = {name: np.array(tensor.numpy()) for name, tensor in tensors.items()}
    copy = from_tensorflow(arrays, config)
    for array in arrays.values():
        array[...] = 0
    assert bits(copy) == bits(params)


@pytest.mark.parametrize("name", ["gpt2/causal-lm", "llama/causal-lm"])
def test_generate_equals_transformers(case, name):
    loaded = case(name)
    model = TFModel(loaded.params, loaded.config)
    given = loaded.inputs("left")
    with torch.no_grad():
        want = loaded.model.generate(
            torch.tensor(given["tokens"]).long(),
            attention_mask=torch.tensor(given["mask"]),
            max_new_tokens=6,
            do_sample=False,
        )
    got = model.generate(tf.constant(given["tokens"], tf.int64), given["mask"], max_new_tokens=6)
    assert got.dtype == tf.int64
    np.testing.assert_array_equal(got.numpy(), want.numpy())
    got = model.generate(input_ids=given["tokens"], attention_mask=given["mask"], max_new_tokens=6)
    assert got.dtype == tf.int32
    np.testing.assert_array_equal(got.numpy(), want.numpy())
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 3}
    first, second = (model.generate(given["tokens"], given["mask"], **options) for _ in range(2))
    np.testing.assert_array_equal(first.numpy(), second.numpy())


def test_resize_and_prune_then_save(case, tmp_path):
    loaded = case("gpt2/causal-lm")
    model = TFModel(loaded.params, loaded.config)
    given = {name: a for name, a in loaded.inputs("right").items() if name != "positions"}
    old = model(**given).logits.numpy()
    kept = model.named_variables["transformer.h.0.mlp.c_fc.weight"]
    table = model.resize_token_embeddings(pad_to_multiple_of=8)
    assert table is model.get_input_embeddings()
    assert model.config.vocab_size == 64
    assert table.shape == (64, 20)
    assert model.named_variables["transformer.h.0.mlp.c_fc.weight"] is kept
    np.testing.assert_allclose(model(**given).logits.numpy()[..., :61], old, atol=1e-5)
    assert model.num_parameters() == sum(p.numel() for p in loaded.model.parameters()) + 3 * 20
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - (64 + 32) * 20

    folder = tmp_path / "resized"
    model.save_pretrained(folder)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, parameter in hf.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), model.named_variables[name].numpy(), err_msg=name)

    model.prune_heads({0: [1], 2: [0, 3]})
    assert model.named_variables["transformer.h.2.attn.c_attn.weight"].shape == (20, 3 * 2 * 5)
    pruned = fm.prune_heads(*fm.resize_embeddings(loaded.params, loaded.config, 64), {0: [1], 2: [0, 3]})
    logits = model(**given).logits.numpy()
    np.testing.assert_allclose(logits, np.asarray(fm.forward(*pruned, **given).logits), atol=1e-5)
    model.save_pretrained(tmp_path / "pruned")
    again = TFModel.from_pretrained(tmp_path / "pruned")
    assert bits(again.params) == bits(model.params)
    assert again.config == model.config


def test_export_runs_without_jax(case, tmp_path):
    loaded = case("bert/masked-lm")
    model = TFModel(loaded.params, loaded.config)
    model.export(tmp_path / "saved", inputs=("tokens", "mask", "token_types"))
    given = {name: a for name, a in loaded.inputs("right").items() if name != "positions"}
    np.savez(tmp_path / "given.npz", **given)
    code = """
import json, sys
sys.modules["jax"] = sys.modules["jaxlib"] = None  # importing either raises
import numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1] + "/saved")
serve = loaded.signatures["serving_default"]
given = {name: tf.constant(a) for name, a in np.load(sys.argv[1] + "/given.npz").items()}
one = serve(**{name: tensor[:1, :4] for name, tensor in given.items()})
np.savez(sys.argv[1] + "/got.npz", **{name: tensor.numpy() for name, tensor in serve(**given).items()})
assert not any(name.split(".")[0] in ("jax", "jaxlib", "fmodels") for name, module in sys.modules.items() if module)
print(json.dumps([one["logits"].shape.as_list(), sorted(loaded.weights)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, names = json.loads(done.stdout)
    assert shape == [1, 4, 61]
    assert names == sorted(model.named_variables)
    got = np.load(tmp_path / "got.npz")
    np.testing.assert_allclose(got["logits"], loaded.reference("right")["logits"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="export: inputs are tokens and any of mask"):
        model.export(tmp_path / "other", inputs=("mask",))


def test_bad_inputs(case):
    loaded = case("gpt2/causal-lm")
    model = TFModel(loaded.params, loaded.config)
    tokens = loaded.inputs()["tokens"]
    for match, arguments in {
        r"tokens have shape \(b t\) for task 'causal-lm'; got \(7,\)": {"tokens": tokens[0]},
        "there are no tokens": {"tokens": tokens[:, :0]},
        "tokens must be a tensor whose rows are equally long, got list": {"tokens": [[1, 2], [3]]},
        "tokens must be a tensor whose rows .* got RaggedTensor": {"tokens": tf.ragged.constant([[1, 2], [3]])},
        "tokens must be integers, int32 or int64; got float32": {"tokens": tokens.astype(np.float32)},
        r"mask has shape \(2, 6\), tokens have \(2, 7\)": {"tokens": tokens, "mask": np.ones((2, 6), np.int32)},
        "tokens reach from 1 to 61, outside of 0 … 60, the vocabulary": {"tokens": [[1, 61]]},
        "mask holds 1 for tokens and 0 for padding; got numbers from 1 to 5": {"tokens": [[1, 2]], "mask": [[1, 5]]},
        "33 tokens are more than the 32 positions": {"tokens": np.ones((1, 33), np.int32)},
        "positions reach from 0 to 32": {"tokens": [[1, 2]], "positions": [[0, 32]]},
        "tokens .or input_ids. are missing": {},
    }.items():
        with pytest.raises(ValueError, match=match):
            model(**arguments)
    with pytest.raises(TypeError, match="unknown input 'label'"):
        model(tokens, label=tokens)
    with pytest.raises(TypeError, match="input_ids and tokens are the same input"):
        model(tokens, input_ids=tokens)
    with pytest.raises(ValueError, match=r"call it outside of tf\.function"):
        tf.function(lambda x: model.generate(x, max_new_tokens=2), autograph=False)(tf.constant(tokens))
    with pytest.raises(TypeError, match="one of seed= and key="):
        model.generate(tokens, seed=1, key=jax.random.key(1))


def test_bad_tensors(case):
    loaded = case("gpt2/causal-lm")
    tensors = to_tensorflow(loaded.params, loaded.config)
    few = {name: tensor for name, tensor in tensors.items() if "ln_f" not in name}
    with pytest.raises(ValueError, match=r"missing 'transformer.ln_f.weight'[^+]*missing 'transformer.ln_f.bias'"):
        from_tensorflow(few, loaded.config)
    with pytest.raises(ValueError, match=r"no rule of gpt2.*'strange'"):
        from_tensorflow(tensors | {"strange": tf.zeros(3)}, loaded.config)
    wide = {name: tf.cast(tensor, tf.float64) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"64 bits, which jax would cut to 32: 'transformer.wte.weight' is float64"):
        from_tensorflow(wide, loaded.config)
    with pytest.raises(ValueError, match=r"the config ties 'lm_head.weight' to another tensor, but they differ"):
        from_tensorflow(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, loaded.config)
    untied = dataclasses.replace(loaded.config, tie_word_embeddings=False)
    assert "lm_head" in from_tensorflow(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, untied)
    with pytest.raises(TypeError, match="expected a dict of tensors or an object with `variables`, got list"):
        from_tensorflow([1], loaded.config)
    with pytest.raises(
        TypeError, match=r"'transformer.wte.weight' must be a tensor, variable or numpy array; got object"
    ):
        from_tensorflow(tensors | {"transformer.wte.weight": object()}, loaded.config)
    with pytest.raises(ValueError, match=r"not plain arrays: 'embed.tokens' is a str"):
        to_tensorflow(fm.tree.update(loaded.params, {"embed.tokens": "text"}), loaded.config)
