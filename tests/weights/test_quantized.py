"""Quantised checkpoints: the numbers of the libraries that wrote them, transformers' logits, the same bytes back.

GPTQ, AWQ, bitsandbytes and compressed-tensors: `tests/goldens/make_quantized.py`. fp8 and mxfp4: codes are drawn here and
read by transformers' own functions.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import AwqFormat

import fmodels as fm
from fmodels import arrays, codecs
from fmodels.arrays import Quantized
from fmodels.weights import quantized, read_folder
from fmodels.weights.methods import check_options

GOLDENS = Path(__file__).parents[1] / "goldens" / "quantized"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
TOKENS = np.random.default_rng(0).integers(0, 16, (2, 9)).astype(np.int32)


def bytes_of(folder):
    """Name -> dtype, shape and bytes, read by the safetensors library."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                found[name] = str(tensor.dtype), tuple(tensor.shape), raw
    return found


def is_packed(leaf):
    return isinstance(leaf, Quantized)


def packed(params):
    return {path: leaf for path, leaf in fm.tree.flatten(params).items() if is_packed(leaf)}


def plain_model(folder, params, config):
    """transformers' model with the weights that the leaves stand for."""
    fm.save(fm.dequantize(params, "float32"), config, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_golden(name, tmp_path):
    params, config = fm.load(GOLDENS / name)
    assert len(packed(params)) == 7
    plain = fm.to_disk(fm.dequantize(params), config)
    for key, (dtype, digest) in json.loads((GOLDENS / name / "dequantized.json").read_text()).items():
        array = np.asarray(plain[key])
        assert (array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest()[:16]) == (dtype, digest), key
    before = bytes_of(GOLDENS / name)
    listed, _ = fm.load(GOLDENS / name, layers="list")
    again = fm.from_disk(fm.to_disk(params, config), config)
    for i, form in enumerate(
        (params, listed, fm.unstack_layers(params), fm.stack_layers(listed), fm.cast(again, "bfloat16"))
    ):
        fm.check(form, config)
        if i < 4:
            fm.save(form, config, tmp_path / str(i))
            assert bytes_of(tmp_path / str(i)) == before
        else:
            assert all(leaf.dtype == jnp.bfloat16 for leaf in packed(form).values())
            parts = fm.to_disk(form, config)
            assert all(parts[n].tobytes() == before[n][2] for n in parts if "_proj" in n)
        written = json.loads((tmp_path / "0" / "config.json").read_text())
        assert (
            written["quantization_config"]
            == json.loads((GOLDENS / name / "config.json").read_text())["quantization_config"]
        )


@pytest.mark.parametrize("name", ["gptq4", "nf4", "packed"])
def test_logits(name, tmp_path):
    params, config = fm.load(GOLDENS / name, dtype="float32")
    with torch.no_grad():
        want = plain_model(tmp_path, params, config)(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    for form in (params, fm.unstack_layers(params)):
        np.testing.assert_allclose(fm.forward(form, config, TOKENS).logits, want, atol=1e-5)


def test_tokens(tmp_path):
    params, config = fm.load(GOLDENS / "awq", dtype="float32")
    model, prompt = plain_model(tmp_path, params, config), TOKENS[:, :4]
    want = model.generate(
        torch.tensor(prompt, dtype=torch.long), attention_mask=torch.ones(prompt.shape, dtype=torch.long), do_sample=False,
        max_new_tokens=4, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    options = fm.GenerationConfig(eos_token_id=None, pad_token_id=0)
    assert (fm.generate(params, config, prompt, max_new_tokens=4, options=options).tokens == want.numpy()).all()


def fp8(tensor, block):
    """Codes and factors of a matrix."""
    rows, columns = tensor.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    whole = torch.zeros(high * block[0], wide * block[1])
    whole[:rows, :columns] = tensor
    scale = whole.unflatten(0, (high, -1)).unflatten(2, (wide, -1)).abs().amax((1, 3)).clamp(min=1e-6) / 448
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return (tensor / spread).to(torch.float8_e4m3fn), scale


def test_fp8_blocks(case, tmp_path):
    loaded, block = case("deepseek_v3/causal-lm"), [16, 8]
    options = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", "fmt": "e4m3"}
    coded, plain = {}, {}
    for name, tensor in load_file(loaded.folder / "model.safetensors").items():
        plain[name] = coded[name] = tensor
        if tensor.ndim == 2 and "_proj" in name and "kv_a" not in name:  # of both kinds, and several leaves in one
            coded[name], coded[f"{name}_scale_inv"] = fp8(tensor, block)
            plain[name] = _dequantize_fp8_weight(coded[name], coded[f"{name}_scale_inv"], block, torch.float32)
    for folder, tensors in ((tmp_path / "coded", coded), (tmp_path / "plain", plain)):
        shutil.copytree(loaded.folder, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = json.loads((tmp_path / "coded" / "config.json").read_text())
    listed = ["lm_head", *(f"model.layers.{i}.self_attn.kv_a_proj_with_mqa" for i in range(3))]
    data["quantization_config"] = {**options, "modules_to_not_convert": listed}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(data))
    params, config = fm.load(tmp_path / "coded", dtype="float32")
    assert {leaf.row_range is None for leaf in packed(params).values()} == {True, False}
    expanded = fm.to_disk(fm.dequantize(params), config)
    assert all(np.array_equal(expanded[name], tensor.numpy()) for name, tensor in plain.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    model.set_experts_implementation("eager")
    given = loaded.inputs("left")
    with torch.no_grad():
        want = model.eval()(
            torch.tensor(given["tokens"], dtype=torch.long), attention_mask=torch.tensor(given["mask"])
        ).logits.numpy()
    got = np.asarray(fm.forward(params, config, given["tokens"], mask=given["mask"]).logits)
    np.testing.assert_allclose(got[given["mask"] == 1], want[given["mask"] == 1], atol=1e-5)
    fm.save(params, config, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "coded")
    grads = jax.grad(
        lambda scale: fm.forward(
            fm.tree.update(params, {"final_norm.scale": scale}), config, given["tokens"]
        ).logits.std()
    )
    assert jnp.isfinite(grads(params["final_norm"]["scale"])).all()


def test_mxfp4_experts(tmp_path):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        model.state_dict()[name].copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    data = json.loads((tmp_path / "config.json").read_text())
    data["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    params, config = fm.load(tmp_path, dtype="float32")
    assert sorted(packed(params)) == [f"layers.moe.{name}.weight" for name in ("down", "gate", "up")]
    with torch.no_grad():
        want = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    for form, how in ((params, "dense"), (params, "grouped"), (fm.unstack_layers(params), None)):
        np.testing.assert_allclose(fm.forward(form, config, TOKENS, experts=how).logits, want, atol=1e-5)
    for form in (params, fm.unstack_layers(params)):
        fm.save(form, config, tmp_path / "again")
        assert bytes_of(tmp_path / "again") == bytes_of(tmp_path)


def test_one_layer_is_expanded_at_a_time():
    """A program that reads a prompt and then generates keeps less than two expanded layers beside its arguments."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 64,
    }
    config = fm.models.llama.Config(**sizes, vocab_size=16, max_positions=32, task="causal-lm")
    params = fm.abstract(config)

    def quantize(path, leaf):
        if leaf.ndim < 3:
            return leaf
        rows = int(np.prod(leaf.shape[1:-1])) if "output" not in path else 256
        columns = leaf.size // 8 // rows
        parts = {
            "weight": jax.ShapeDtypeStruct((8, rows, columns), jnp.uint8),
            "weight_scale_inv": jax.ShapeDtypeStruct((8, rows // 128, columns // 128), jnp.float32),
        }
        return Quantized(parts, codecs.Blocks((128, 128)), leaf.shape[1:], np.dtype("float32"))

    params = fm.tree.map_leaves(quantize, params)
    expanded = sum(fm.num_parameters(leaf) for leaf in [{"leaf": leaf} for leaf in packed(params).values()]) * 4 // 8

    def run(params, tokens):
        out = fm.forward(params, config, tokens, cache=fm.init_cache(params, 1, 32, config=config))

        def step(carry, _):
            token, cache = carry
            out = fm.forward(params, config, token, cache=cache)
            return (out.logits.argmax(-1).astype(jnp.int32), out.cache), token

        return jax.lax.scan(step, (out.logits[:, -1:].argmax(-1).astype(jnp.int32), out.cache), length=4)[1]

    compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct((1, 8), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * expanded


def test_layers_that_differ_are_a_tuple(tmp_path):
    """A module that `ignore` lists in one layer alone."""
    params, config = fm.load(GOLDENS / "ints")
    name = "model.layers.1.mlp.up_proj"
    shutil.copytree(GOLDENS / "ints", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    plain = np.asarray(fm.to_disk(fm.dequantize(params, "float32"), config)[f"{name}.weight"])
    tensors[f"{name}.weight"] = torch.tensor(plain).bfloat16()
    del tensors[f"{name}.weight_scale"]
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    data = json.loads((tmp_path / "mixed" / "config.json").read_text())
    data["quantization_config"]["ignore"].append(name)
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(data))
    mixed, config = fm.load(tmp_path / "mixed")
    assert [is_packed(layer["mlp"]["up"]["weight"]) for layer in mixed["layers"]] == [True, False]
    fm.save(mixed, config, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"stack_layers: 'layers.1.mlp.up.weight' is bfloat16"):
        fm.stack_layers(mixed)


def test_rows_and_tables():
    random = np.random.default_rng(0)
    parts = {
        "weight": jnp.asarray(random.normal(size=(10, 7)), jnp.float8_e4m3fn),
        "weight_scale_inv": jnp.asarray(random.random((3, 3)), jnp.float32),
    }
    leaf = Quantized(parts, codecs.Blocks((4, 3)), (10, 7), np.dtype("float32"))
    whole = leaf.dequantize()
    spread = np.repeat(np.repeat(np.asarray(parts["weight_scale_inv"]), 4, 0)[:10], 3, 1)[:, :7]
    assert (np.asarray(whole) == np.asarray(parts["weight"], np.float32) * spread).all()
    index = jnp.asarray([[3, 9], [0, 3]])
    assert (arrays.take(leaf, index) == whole[index]).all()
    part = Quantized(parts, leaf.codec, (2, 3, 7), leaf.dtype, arrays.Rows(2, 1, 3))
    assert (part.dequantize() == whole.reshape(2, 5, 7)[:, 1:4]).all()


def test_sharding_by_letters():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    letters = {"h": "model", "g": "model", "f": "model", "v": "model"}
    params, config = fm.load(GOLDENS / "gptq4")
    specs = fm.partition_specs(params, letters)
    P = PartitionSpec
    assert specs["layers"]["mlp"]["up"]["weight"].parts == {
        "qweight": P(None, None, "model"), "qzeros": P(None), "scales": P(None), "g_idx": P(None),
    }  # fmt: skip
    assert specs["layers"]["mlp"]["down"]["weight"].parts["qweight"] == P(None, "model", None)
    abstract = fm.partition_specs(fm.abstract(config), letters)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), abstract, is_leaf=lambda x: isinstance(x, P))
    sharded, _ = fm.load(GOLDENS / "gptq4", sharding=placed)
    assert sharded["layers"]["mlp"]["up"]["weight"].parts["qweight"].sharding.spec == P(None, None, "model")
    with pytest.raises(ValueError, match=r"partition: Bnb4 of shape .* cannot be split along axis 1"):
        fm.partition_specs(fm.load(GOLDENS / "nf4")[0], letters)


def test_transforms_ask_to_dequantize(tmp_path):
    params, config = fm.load(GOLDENS / "ints")
    for change in (lambda p: fm.prune_heads(p, config, {0: [1]}), lambda p: fm.mask_heads(p, config, {0: [1]})):
        with pytest.raises(NotImplementedError, match=r"use fm\.dequantize\(params\) first"):
            change(params)
        change(fm.dequantize(params))
    with pytest.raises(TypeError, match="dequantize: expected a floating dtype"):
        fm.dequantize(params, "int8")
    with pytest.raises(ValueError, match="save: the tree has quantised leaves"):
        fm.save(params, config, tmp_path / "new", format="orbax")


@pytest.mark.parametrize("name", ["gptq4", "nf4"])
def test_loaded_as_arrays(name):
    params, config = fm.load(GOLDENS / name, dequantize=True)
    kept, found = fm.load(GOLDENS / name, dequantize=False)
    assert packed(kept)
    assert (config.quantization, fm.load(GOLDENS / name)[1]) == (None, found)
    exact = fm.tree.flatten(fm.dequantize(kept))
    assert all(np.array_equal(leaf, exact[path]) for path, leaf in fm.tree.flatten(params).items())


@pytest.mark.parametrize("name", ["awq", "awq-gemv_fast", "floats", "gptq4", "nf4", "packed"])
def test_convert(tmp_path, name):
    """Bytes are equal when they come back; or the arrays are written, in any format."""
    for given in ({"format": "flax"}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=r"convert: quantised weights have no .*; pass dequantize=True"):
            fm.convert(GOLDENS / name, tmp_path / "no", **given)
    fm.convert(GOLDENS / name, tmp_path / "npz", format="npz")
    fm.convert(tmp_path / "npz", tmp_path / "back")
    want, got = read_folder(GOLDENS / name)[0], read_folder(tmp_path / "back")[0]
    assert want.keys() == got.keys()
    assert all(a.dtype == got[n].dtype and np.array_equal(a.array(), got[n].array()) for n, a in want.items())
    fm.convert(GOLDENS / name, tmp_path / "flax", format="flax", dequantize=True)
    params, config = fm.load(tmp_path / "flax")
    exact = fm.tree.flatten(fm.dequantize(fm.load(GOLDENS / name)[0]))
    assert config.quantization is None
    assert all(np.array_equal(leaf, exact[path]) for path, leaf in fm.tree.flatten(params).items())


def damaged(name, change):
    tensors, _ = read_folder(GOLDENS / name)
    options = json.loads((GOLDENS / name / "config.json").read_text())["quantization_config"]
    arrays = {n: t.array() for n, t in tensors.items()}
    change(arrays, options)
    described = {n: quantized.Tensor.lazy(n, a.dtype, a.shape, lambda a=a: a) for n, a in arrays.items()}
    return described, options


UP = "model.layers.0.mlp.up_proj"
DAMAGE = {
    "missing": ("gptq4", lambda a, o: [a.pop(f"{UP}.scales"), a.pop("model.layers.1.mlp.up_proj.qzeros")],
                ["'scales' is missing", "'qzeros' is missing"]),
    "shape": ("awq", lambda a, o: a.update({f"{UP}.qzeros": a[f"{UP}.qzeros"][:, 1:]}), ["'qzeros' has shape"]),
    "blocks": ("awq-gemv_fast", lambda a, o: a.update({f"{UP}.qweight": a[f"{UP}.qweight"][:, :32]}), ["expected whole blocks of 64"]),
    "rows": ("awq-gemv_fast", lambda a, o: a.update({f"{UP}.qweight": a[f"{UP}.qweight"][1:]}),
             ["'qzeros' has shape [16, 128], expected [?, 124]", "'scales' has shape [16, 128], expected [?, 124]"]),
    "version": ("awq-gemv_fast", lambda a, o: o.update(version="gemv"), ["'qweight' is int16, expected int32"]),
    "groups": ("awq-gemv_fast", lambda a, o: o.update(group_size=2), ["'qzeros' has 16 numbers of an output, expected at least 32"]),
    "more": ("awq-gemv_fast", lambda a, o: a.update({f"{UP}.scaled_zeros": a[f"{UP}.qzeros"]}), ["expected only 'qweight', 'scales' and"]),
    "group": ("gptq8", lambda a, o: a.update({f"{UP}.g_idx": a[f"{UP}.g_idx"] + 9}), ["'g_idx' has groups outside of 0 … 0"]),
    "dtype": ("ints", lambda a, o: a.update({f"{UP}.weight": a[f"{UP}.weight"].view(np.uint8)}), ["'weight' is uint8, expected int8"]),
    "codes": ("ints", lambda a, o: a.pop(f"{UP}.weight_scale"), ["has numbers of int8 and no 'weight_scale'"]),
    "listed": ("ints", lambda a, o: o["ignore"].append("up_proj"), ["ignore says that it is not quantised"]),
    "text": ("nf4", lambda a, o: a.update({f"{UP}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)}),
             ["does not tell shape, blocksize and dtype"]),
    "table": ("fp4", lambda a, o: a.update({f"{UP}.weight.quant_map": np.zeros(8, np.float32)}), ["expected [16]"]),
    "format": ("int8", lambda a, o: a.update({f"{UP}.weight_format": np.array(1, np.uint8)}), ["'weight_format' is not 0"]),
    "size": ("packed", lambda a, o: a.update({f"{UP}.weight_shape": np.array([1 << 40, 3])}), ["does not fit 'weight_shape'"]),
    "twice": ("gptq4", lambda a, o: a.update({f"{UP}.weight": np.zeros((2, 2), np.float16)}), ["is there as it is, too"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_all_that_does_not_fit_is_told(name):
    golden, change, messages = DAMAGE[name]
    with pytest.raises(ValueError, match="problems with quantised weights") as error:
        quantized.join(*damaged(golden, change))
    assert all(message in str(error.value) for message in messages), error.value


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("awq", {"version": version}) for version in ("GEMM", "exllama", "ipex")),
        ("awq", {"version": None, "format": "gemm", "backend": "marlin"}),
        ("awq", {"zero_point": False, "dynamic": {"-:lm_head": {}}}),
        ("awq-gemv_fast", {"version": "gemm", "checkpoint_format": "gemv_fast"}),
        ("awq-gemv_fast", {"version": "gemm", "backend": "llm-awq"}),
        ("awq-gemv_fast", {"version": "llm-awq"}),
    ],
)
def test_awq_that_lies_alike(name, options):
    """The versions of transformers 4's `AWQLinearVersion`, and what transformers 5 takes before `version`."""

    def change(arrays, found):
        found.update(options)
        if "llm-awq" in options.values():
            for key in [key for key in arrays if key.endswith(".qzeros")]:
                arrays[key.replace("qzeros", "scaled_zeros")] = arrays.pop(key)

    found, want = (quantized.join(*damaged(name, how))[f"{UP}.weight"] for how in (change, lambda arrays, found: None))
    np.testing.assert_array_equal(found.array(), want.array())
    assert not check_options(damaged(name, change)[1])


def test_awq_formats_of_transformers():
    for version in AwqFormat:
        assert not check_options({"quant_method": "awq", "version": version.value}), version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method='aqlm' is not supported; one of fp8, mxfp4, gptq, awq, bitsandbytes"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5 is not supported, only 2 or 3 or 4 or 8"),
        ({"quant_method": "gptq", "bits": 3, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}, "save it as gptq_v2"),
        (
            {"quant_method": "awq", "version": "marlin"},
            "'marlin' is not supported, only 'gemm' or 'gemv' or 'gemv_fast' or",
        ),
        ({"quant_method": "awq", "zero_point": None}, "zero_point=None is not supported, only True or False"),
        (
            {"quant_method": "awq", "dynamic": {"+:.*down": {"group_size": 32}}},
            "options of single modules are not supported",
        ),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24' is not supported"),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 1]},
            r"weight_block_size=\[0, 1\] is not two positive integers",
        ),
        ([1], "quant_method=None is not supported"),
    ],
)
def test_options_that_are_not_known_are_refused(options, message):
    data = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": options}
    with pytest.raises(ValueError, match=message):
        fm.models.llama.Config.from_hf(data)
