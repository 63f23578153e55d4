"""Quantised trees in the rest of the library: the wrappers, exports, transforms, adapters, certificates, the command line.

The truth is transformers' model with the dequantised weights, whose hashes `tests/weights/test_quantized.py` has from the
libraries that the formats are from.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

import fmodels as fm
from fmodels import cli
from interop import flax, saved_model
from interop import tensorflow as itf
from interop import torch as it
from interop.transformers import to_transformers

GOLDENS = Path(__file__).parents[1] / "goldens" / "quantized"
TOKENS = np.random.default_rng(0).integers(0, 16, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """`(folder, params, config, logits of transformers)`, in float32."""
    params, config = fm.load(GOLDENS / "gptq4", dtype="float32")
    plain = tmp_path_factory.mktemp("plain")
    fm.save(fm.dequantize(params), config, plain)
    model = transformers.LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    return GOLDENS / "gptq4", params, config, logits


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)


def test_wrappers_read_and_dequantise(golden, tmp_path):
    folder, _, _, want = golden
    model = it.TorchModel.from_pretrained(folder, dtype="float32")
    close(model(torch.tensor(TOKENS)).logits.detach(), want)
    assert model.config.quantization is None
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    close(itf.TFModel.from_pretrained(folder, dtype="float32")(tf.constant(TOKENS)).logits, want)
    renamed = it.TorchModel.from_pretrained(folder, key_mapping={"never": "so"})  # another way to read
    for name, (_, digest) in json.loads((folder / "dequantized.json").read_text()).items():
        data = renamed.state_dict()[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest()[:16] == digest, name


def test_flax_modules_keep_the_leaves(golden, tmp_path):
    folder, params, config, want = golden
    close(flax.LinenModel(config).apply({"params": params}, TOKENS).logits, want)
    model = flax.NNXModel(params, config)
    close(model(TOKENS).logits, want)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    gradients = nnx.grad(lambda model: model(TOKENS).logits.std())(model)
    assert len(jax.tree.leaves(gradients)) == 5  # of the leaves that are arrays


def test_torch_state_dict_of_a_quantised_file(golden):
    folder, _, config, want = golden
    params = it.from_torch(load_file(folder / "model.safetensors"), config)
    close(fm.forward(fm.cast(params, "float32"), config, TOKENS).logits, want)


def test_to_transformers_of_the_dequantised(golden, tmp_path):
    _, params, config, want = golden
    model = to_transformers(fm.dequantize(params), config)
    with torch.no_grad():
        close(model(torch.tensor(TOKENS, dtype=torch.long)).logits, want)
    assert getattr(model.config, "quantization_config", None) is None


def test_what_needs_arrays_says_so(golden, tmp_path):
    _, params, config, _ = golden
    for call in (
        lambda: it.to_torch(params, config),
        lambda: it.TorchModel(params, config),
        lambda: itf.to_tensorflow(params, config),
        lambda: itf.TFModel(params, config),
        lambda: flax.to_flax(params, config),
        lambda: to_transformers(params, config),
        lambda: fm.save(params, config, tmp_path, format="gguf"),
    ):
        with pytest.raises(ValueError, match=r"use fm\.dequantize\(params\) first"):
            call()
    for change in (
        lambda: fm.prune_heads(params, config, {0: [1]}),
        lambda: fm.mask_heads(params, config, {0: [1]}),
        lambda: fm.scale_heads(params, jax.numpy.ones((2, 4))),
    ):
        with pytest.raises(NotImplementedError, match=r"use fm\.dequantize\(params\) first"):
            change()
    assert not list(tmp_path.iterdir())


EXPORTED = """
import sys, numpy, fmodels as fm
exported = fm.load_exported(sys.argv[1])
assert any(isinstance(leaf, fm.arrays.Quantized) for leaf in fm.tree.flatten(exported.params).values())
tokens = numpy.load(sys.argv[1] + "/tokens.npy")
numpy.savez(sys.argv[1] + "/out", logits=exported.forward(exported.params, tokens).logits,
            tokens=exported.generate(exported.params, tokens).tokens)
"""


def test_exported_programs_take_the_leaves(golden, tmp_path):
    _, params, config, want = golden
    fm.export_forward(params, config, tmp_path)
    fm.export_generate(params, config, tmp_path, max_new_tokens=3)
    np.save(tmp_path / "tokens.npy", TOKENS)
    subprocess.run([sys.executable, "-c", EXPORTED, str(tmp_path)], check=True)
    out = np.load(tmp_path / "out.npz")
    close(out["logits"], want)
    np.testing.assert_array_equal(out["tokens"], fm.generate(params, config, TOKENS, max_new_tokens=3).tokens)


def test_exported_programs_of_gguf(tmp_path):
    fm.save(*fm.load(fm.assets.TINY_LLAMA), tmp_path / "gguf", format="gguf", dtype="q8_0")
    params, config = fm.load(tmp_path / "gguf", dequantize=False)
    fm.export_forward(params, config, tmp_path / "exported", platforms=("cpu",))
    exported = fm.load_exported(tmp_path / "exported")
    got, want = exported.forward(exported.params, TOKENS).logits, fm.forward(params, config, TOKENS).logits
    np.testing.assert_array_equal(got, want)


def test_resized_and_cast(golden, tmp_path):
    folder, params, config, want = golden
    larger, resized = fm.resize_embeddings(params, config, 20)
    close(fm.forward(larger, resized, TOKENS).logits[..., :16], want)
    fm.save(larger, resized, tmp_path / "larger")
    again, config_again = fm.load(tmp_path / "larger")
    assert again["embed"]["tokens"].shape[0] == config_again.vocab_size == 20
    assert json.loads(config_again.quantization) == json.loads(config.quantization)
    close(fm.forward(fm.cast(fm.load(folder)[0], "float32"), config, TOKENS).logits, want)


def test_adapters_beside_quantised_leaves(golden):
    _, params, config, _ = golden
    spec = fm.AdapterConfig(r=2, target_modules=("q_proj", "down_proj"), init_lora_weights=False)
    adapter = fm.init_adapter(params, config, spec, jax.random.key(0))
    whole = fm.merge_adapters(fm.add_adapter(fm.dequantize(params), config, adapter))
    with torch.no_grad():
        want = to_transformers(whole, config)(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    adapted = fm.add_adapter(params, config, adapter)
    close(fm.forward(adapted, config, TOKENS).logits, want)
    with pytest.raises(NotImplementedError, match=r"adapter of a Quantized; .* fm\.dequantize\(params\)"):
        fm.merge_adapters(adapted)


def test_saved_model(tmp_path):
    """A config that still says that its weights are quantised, with those that are not any more."""
    params, config = fm.load(GOLDENS / "packed", dtype="float32")
    model = itf.TFModel(fm.dequantize(params), config)
    saved_model.export(model, tmp_path / "saved")
    call = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    got = call(tokens=tf.constant(TOKENS), mask=tf.ones_like(TOKENS))["logits"]
    close(got, np.asarray(fm.forward(params, config, TOKENS).logits))


def test_certificate(tmp_path, capsys):
    """Of the file alone, of two forms of it, and of its arrays in another file."""
    for name, how in (("torch", ["--to", "torch"]), ("arrays", ["--dequantize"])):
        assert cli.main(["convert", str(GOLDENS / "gptq4"), str(tmp_path / name), *how]) == 0
    for name in ("torch", "arrays"):
        found = fm.verify(GOLDENS / "gptq4", tmp_path / name, frameworks=("transformers",), gradients=name == "torch")
        assert found.ok, found.failures
        assert [check.other for check in found.tensors] == ["equal"] * 21
        theirs = next(c for c in found.comparisons if c.name == "transformers")
        assert (theirs.status, theirs.note) == ("pass", "its weights were handed over, as A is quantised")
        assert (
            "14 tensors are quantised: dtypes, hashes and outputs are of the arrays that they stand for" in found.notes
        )
    capsys.readouterr()
    assert cli.main(["verify", str(GOLDENS / "nf4"), "--frameworks", "none", "--no-gradients"]) == 0
    assert "tensors of A: 21, 21 of them equal to the byte after load and save" in capsys.readouterr().out


def test_info(capsys):
    assert cli.main(["info", str(GOLDENS / "gptq4"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["quantization"]
    assert shown == {"quant_method": "gptq", "bits": 4, "group_size": 16, "tensors": 14}
    assert cli.main(["info", str(GOLDENS / "nf4")]) == 0
    assert "quant_method bitsandbytes, tensors 14" in capsys.readouterr().out
