"""Quantised checkpoints of other families than Llama: tiny files by hand, in the forms in which they are published.

Packing and unpacking here are numpy's, number by number and bit by bit, as AutoGPTQ's `QuantLinear.pack`, AutoAWQ's
`WQLinear_GEMM`, `WQLinear_GEMV` and `WQLinear_GEMVFast`, and compressed-tensors lay them out. transformers computes with what was unpacked.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmodels as fm
from fmodels.arrays import Quantized
from tests import families
from tests.families import LANGUAGE

GROUP = 32
SIZES = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 16, (2, 7)).astype(np.int32)


def pack(numbers, bits):
    """Rows of numbers as rows of int32: one stream of bits, the lowest first, which goes on from word to word."""
    stream = ((numbers[..., None] >> np.arange(bits)) & 1).reshape(len(numbers), -1, 32)
    return (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def quantise(weight, bits, size):
    """Codes `(out in)`, zeros and scales `(out groups)`, and the array that they stand for."""
    apart = weight.reshape(len(weight), -1, size)
    low, high = np.minimum(apart.min(-1), 0), np.maximum(apart.max(-1), 0)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 2**bits - 1).astype(np.int64)
    wide = [part.repeat(size, 1) for part in (zeros, scales)]
    codes = np.clip(np.round(weight / wide[1].astype(np.float32)) + wide[0], 0, 2**bits - 1).astype(np.int64)
    plain = (codes - wide[0]).astype(np.float32) * wide[1].astype(np.float32)
    return codes, zeros, scales, plain


def gptq(bits, version=1):
    def parts(weight):
        codes, zeros, scales, plain = quantise(weight, bits, GROUP)
        return {
            "qweight": pack(codes, bits).T, "qzeros": pack(zeros.T - (version == 1), bits), "scales": scales.T,
            "g_idx": (np.arange(weight.shape[1]) // GROUP).astype(np.int32),
        }, plain  # fmt: skip

    form = {1: "gptq", 2: "gptq_v2"}[version]
    return parts, {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": False,
        "checkpoint_format": form,
    }


def awq(version):
    def gemm(weight):
        codes, zeros, scales, plain = quantise(weight, 4, GROUP)

        def turned(numbers):  # word by word the outputs 0, 2, 4, 6, 1, 3, 5, 7
            return pack(numbers.T.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]], 4).reshape(numbers.shape[1], -1)

        return {"qweight": turned(codes), "qzeros": turned(zeros), "scales": scales.T}, plain

    def gemv(weight):
        codes, zeros, scales, plain = quantise(weight, 4, GROUP)
        filled = 32 - zeros.shape[1]  # groups of 32 have whole multiples of four words
        return {
            "qweight": pack(codes, 4), "qzeros": pack(np.pad(zeros, ((0, 0), (0, filled))), 4),
            "scales": np.pad(scales, ((0, 0), (0, filled))),
        }, plain  # fmt: skip

    def fast(weight):  # float16's zeros, too, are rounded
        codes, zeros, scales, _ = quantise(weight, 4, GROUP)
        offsets = -(scales * zeros.astype(np.float16))
        wide = [part.repeat(GROUP, 1).astype(np.float32) for part in (scales, offsets)]
        rows, columns = codes.shape
        words = np.zeros((rows, columns // 4), np.int64)
        for column in range(columns):
            block, place = divmod(column, 32)
            words[:, block * 8 + place % 8] |= codes[:, column] << place // 8 * 4
        together = [words[i : i + 4, j : j + 16].ravel() for i in range(0, rows, 4) for j in range(0, columns // 4, 16)]
        fill = ((0, 0), (0, 32 - zeros.shape[1]))
        return {
            "qweight": np.concatenate(together).astype(np.uint16).view(np.int16).reshape(rows // 4, columns),
            {"gemv_fast": "qzeros", "llm-awq": "scaled_zeros"}[version]: np.pad(offsets, fill).T,
            "scales": np.pad(scales, fill).T,
        }, codes.astype(np.float32) * wide[0] + wide[1]  # fmt: skip

    parts = {"gemm": gemm, "gemv": gemv}.get(version, fast)
    return parts, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": version, "zero_point": True}


def fp8(weight):
    scale = np.float32(np.abs(weight).max() / 448)
    codes = torch.tensor(weight / scale).to(torch.float8_e4m3fn)
    plain = codes.float() * torch.tensor(scale)
    return {"weight": codes, "weight_scale": torch.tensor([scale])}, plain.numpy()


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
FLOAT = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}  # fmt: skip
NF4 = np.array(
    [-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1],
    np.float32,
)


def nf4(weight):
    blocks = weight.reshape(-1, 64)
    scale = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / scale[:, None, None] - NF4).argmin(-1).astype(np.uint8)
    pairs = codes.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:], "weight.absmax": scale, "weight.quant_map": NF4,
        "weight.quant_state.bitsandbytes__nf4": text,
    }, (NF4[codes] * scale[:, None]).reshape(weight.shape)  # fmt: skip


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}
FEW = {"head_dim": None, "num_key_value_heads": None}
OPT = {**FEW, "intermediate_size": None, "ffn_dim": 64, "word_embed_proj_dim": 32}
GPT2 = dict.fromkeys(SIZES.keys() - {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}) | {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 32,
}  # fmt: skip
WIDE = {"hidden_size": 64, "head_dim": 16}
"""Blocks of 64 inputs."""
GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 8}
CASES = {
    "mistral-gptq4": ("Mistral", {}, gptq(4)),
    "llama-gptq3": ("Llama", {}, gptq(3)),
    "llama-gptq3-v2": ("Llama", {}, gptq(3, 2)),
    "llama-awq-gemv": ("Llama", {}, awq("gemv")),
    "llama-llm-awq": ("Llama", WIDE, awq("llm-awq")),
    "llama-llm-awq-2023": ("Llama", {}, (awq("gemv")[0], awq("llm-awq")[1])),
    "qwen2-awq": ("Qwen2", {}, awq("gemm")),
    "qwen3-fp8": ("Qwen3", {}, (fp8, FLOAT)),
    "gemma2-gptq4": ("Gemma2", GEMMA, gptq(4)),
    "phi3-gptq4": ("Phi3", {}, gptq(4)),
    "phi3-awq": ("Phi3", {}, awq("gemm")),
    "phi3-awq-gemv": ("Phi3", {}, awq("gemv")),
    "phi3-awq-gemv_fast": ("Phi3", WIDE, awq("gemv_fast")),
    "phi3-fp8": ("Phi3", {}, (fp8, FLOAT)),
    "mixtral-gptq4": ("Mixtral", {"num_local_experts": 3}, gptq(4)),
    "mixtral-awq": ("Mixtral", {"num_local_experts": 3}, awq("gemm")),
    "qwen3_moe-gptq4": ("Qwen3Moe", {"num_experts": 3, "moe_intermediate_size": 32, "num_experts_per_tok": 2}, gptq(4)),
    "qwen3_moe-fp8": (
        "Qwen3Moe",
        {"num_experts": 3, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        (fp8, FLOAT),
    ),
    "gpt2-gptq4": ("GPT2", GPT2, gptq(4)),
    "gpt2-nf4": ("GPT2", GPT2, (nf4, BNB)),
    "opt-gptq4": ("OPT", OPT, gptq(4)),
    "opt-awq": ("OPT", OPT, awq("gemm")),
    "gpt_neox-gptq4": ("GPTNeoX", FEW, gptq(4)),
    "gpt_neox-awq-gemv": ("GPTNeoX", FEW, awq("gemv")),
    "gpt_neox-awq-gemv_fast": ("GPTNeoX", FEW | {"hidden_size": 64}, awq("gemv_fast")),
    "phi3-nf4": ("Phi3", {}, (nf4, BNB)),
    "gemma2-nf4": ("Gemma2", GEMMA, (nf4, BNB)),
}


VALUES_ALONE = {
    "llama-gptq3-v2", "phi3-awq", "phi3-fp8", "mixtral-gptq4", "opt-awq", "gpt_neox-awq-gemv", "gemma2-nf4", "qwen3_moe-fp8", "qwen2-awq",
    "llama-llm-awq", "llama-llm-awq-2023", "gpt_neox-awq-gemv_fast",
}  # fmt: skip
"""Whose parts the other rows compute with."""


def bytes_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {
        n: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for n, t in tensors.items()
    }


@pytest.mark.parametrize("name", list(CASES))
def test_family(name, tmp_path):
    """The unpacked values, the same bytes back, and transformers' logits with those values."""
    kind, more, (make, options) = CASES[name]
    torch.manual_seed(0)
    sizes = {key: value for key, value in (SIZES | more).items() if value is not None}
    hf_config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, that would be zeros and ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    coded, plain = tmp_path / "coded", tmp_path / "plain"
    model.save_pretrained(plain)
    shutil.copytree(plain, coded)
    tensors = load_file(plain / "model.safetensors")
    packed, unpacked = {}, {}
    for key, tensor in tensors.items():
        linear = tensor.ndim == 2 and not any(
            word in key for word in ("embed", "lm_head", "gate.weight", "router", "wte", "wpe")
        )
        if not linear:
            packed[key] = unpacked[key] = tensor.clone()
            continue
        lies = np.transpose if kind == "GPT2" else np.asarray  # whose module has the inputs first
        parts, values = make(np.ascontiguousarray(lies(tensor.numpy())))
        found = {
            part: a if isinstance(a, torch.Tensor) else torch.from_numpy(np.array(a, order="C"))
            for part, a in parts.items()
        }
        packed |= {f"{key.removesuffix('.weight')}.{part}": array for part, array in found.items()}
        unpacked[key] = torch.from_numpy(np.ascontiguousarray(lies(values)))
    assert len(packed) > len(tensors)
    save_file(packed, coded / "model.safetensors", {"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", {"format": "pt"})
    data = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**data, "quantization_config": options}))

    params, config = fm.load(coded, dtype="float32")
    assert any(isinstance(leaf, Quantized) for leaf in fm.tree.flatten(params).values())
    arrays = fm.to_disk(fm.dequantize(params), config)
    assert arrays.keys() == unpacked.keys()
    for key, tensor in unpacked.items():
        np.testing.assert_array_equal(np.asarray(arrays[key]), tensor.numpy(), err_msg=key)
    fm.save(params, config, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(coded)
    if name in VALUES_ALONE:
        return
    reference = type(model).from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    if hasattr(config, "num_experts"):
        reference.set_experts_implementation("eager")
    with torch.no_grad():
        want = reference(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(fm.forward(params, config, TOKENS).logits, want, atol=1e-5)


def int8(weight):
    """compressed-tensors' rows of int8, each with a scale."""
    scale = np.abs(weight).max(1, keepdims=True).astype(np.float32) / 127
    codes = np.round(weight / scale).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


ROWS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": ROWS}},
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE.values(), ids=LANGUAGE)
def test_every_family(name, tmp_path):
    """The affine maps in the layers as rows of int8: the values, the bytes, and transformers' logits with those values."""
    row = families.by_name(name)
    model = families.build(row)
    model.save_pretrained(tmp_path / "plain")
    packed, unpacked = {}, {}
    lies = np.transpose if row.family == "gpt2" else np.asarray  # whose module has the inputs first
    for key, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        packed[key] = unpacked[key] = tensor
        if tensor.ndim == 2 and re.search(r"\.\d+\.(?!.*(router|(gate|norm)\.weight)).*\.weight$", key):
            parts, values = int8(np.ascontiguousarray(lies(tensor.numpy())))
            packed |= {f"{key.removesuffix('.weight')}.{part}": torch.tensor(a) for part, a in parts.items()}
            unpacked[key] = torch.from_numpy(np.ascontiguousarray(lies(values)))
    assert len(packed) > len(unpacked)
    shutil.copytree(tmp_path / "plain", tmp_path / "coded")
    save_file(packed, tmp_path / "coded" / "model.safetensors", {"format": "pt"})
    save_file(unpacked, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    data = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps({**data, "quantization_config": INT8}))

    params, config = fm.load(tmp_path / "coded")
    assert any(isinstance(leaf, Quantized) for leaf in fm.tree.flatten(params).values())
    fm.save(params, config, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "coded")
    reference = type(model).from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    loaded = families.Loaded(row, reference, tmp_path / "plain", params, config)
    want = {"logits": loaded.reference("right")["logits"]}
    got = loaded.forward("right", hidden_states=False, attentions=False)
    families.assert_equal(got, want, **loaded.masks("right"), causal=row.causal)
