"""Writes `tests/goldens/quantized/`: tiny Llama checkpoints quantised by the libraries that the formats are from.

Each folder is a checkpoint as it lies on the Hub; `dequantized.json` beside it has, for each quantised weight, the SHA-256 of
the array that the library makes of it, little-endian and row by row.

    python -m venv quantized && quantized/bin/pip install torch transformers==5.23.0 accelerate safetensors \
        compressed-tensors==0.20.0 bitsandbytes==0.50.2 gptqmodel==7.7.0
    pip download --no-deps --no-binary :all: autoawq==0.2.9 && tar xf autoawq-0.2.9.tar.gz
    PYTHONPATH=autoawq-0.2.9 quantized/bin/python tests/goldens/make_quantized.py

GPTQModel and AutoAWQ only pack and unpack here, on CPU; the codes are rounded to the nearest, not calibrated. AutoAWQ's
files are loaded one by one; the loop that packs is that of its `WQLinear_GEMM.from_linear`. Its `WQLinear_GEMVFast` packs itself,
and GPTQModel's `repack_awq_gemv_fast` unpacks: both libraries compute with CUDA alone.
"""

import hashlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import bitsandbytes as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.mlx_packing import repack_awq_gemv_fast
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "quantized"
SIZES = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


def write(name, quantize, options, dtype=torch.float16, **sizes):
    """One checkpoint. `quantize(weight, layer) -> (tensors by part, dequantised weight)` for each linear layer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype)
    tensors, hashes = {}, {}
    for key, value in model.state_dict().items():
        if "_proj" not in key:
            tensors[key] = value
            continue
        stem = key.removesuffix(".weight")
        parts, plain = quantize(value * 4, stem)
        assert plain.shape == value.shape, (plain.shape, value.shape)
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        hashes[key] = [str(plain.dtype).removeprefix("torch."), digest(plain)]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = {
        key: config[key] for key in (*SIZES, "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    }
    kept |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**kept, "quantization_config": options}, indent=1) + "\n")
    (folder / "dequantized.json").write_text(json.dumps(hashes, indent=0) + "\n")


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def linear(weight):
    """A torch layer with the weight."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.detach().clone()
    return layer


def scales_and_zeros(weight, bits, group):
    """Of each group of inputs `(out groups)`; zeros are not in the middle."""
    parts = weight.float().reshape(weight.shape[0], -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    return scales.half().float(), torch.round(-low / scales).clamp(1, 2**bits - 1).int()


def gptq(bits, group, version, act_order):
    def quantize(weight, stem):
        order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
        g_idx = torch.empty(weight.shape[1], dtype=torch.int32)
        g_idx[order] = (torch.arange(weight.shape[1]) // group).int()
        scales, zeros = scales_and_zeros(weight[:, order], bits, group)
        module = TorchLinear(
            bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=weight.shape[1],
            out_features=weight.shape[0], bias=False, pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        module.pack_block(linear(weight.float()), scales, zeros, g_idx)
        module.post_init()
        plain = module.dequantize_weight().T
        parts = {part: getattr(module, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        if version == 1:  # what `convert_gptq_v2_to_v1_format_module` undoes, and checked by its inverse
            ones = sum(1 << shift for shift in range(0, 32, bits))
            parts["qzeros"] = parts["qzeros"] - ones
            module.qzeros = parts["qzeros"].clone()
            convert_gptq_v1_to_v2_format_module(module, bits=bits, pack_dtype=torch.int32)
            assert torch.equal(module.dequantize_weight().T, plain)
        return parts, plain.half()

    return quantize


def autoawq(name):
    """A module of AutoAWQ, without the packages that it is in."""
    folder = next(Path(p) / "awq" for p in os.environ["PYTHONPATH"].split(":") if (Path(p) / "awq").is_dir())
    sys.modules.setdefault("awq", types.ModuleType("awq")).__path__ = [str(folder)]
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounded(weight, group):
    """Codes, and scales and zeros as `scales_and_zeros`, as they are and once for each input."""
    scales, zeros = scales_and_zeros(weight, 4, group)
    wide = [part.repeat_interleave(group, 1) for part in (scales, zeros)]
    codes = torch.round(weight.float() / wide[0] + wide[1]).clamp(0, 15).int()
    return codes, scales, zeros, wide


def awq(group):
    packing = autoawq("utils/packing_utils")

    def pack(numbers):
        words = torch.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=torch.int32)
        for column in range(words.shape[1]):
            for i, place in enumerate(packing.AWQ_ORDER):
                words[:, column] |= numbers[:, column * 8 + place] << (i * 4)
        return words

    def quantize(weight, stem):
        codes, scales, zeros, _ = rounded(weight, group)
        parts = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales.T.half()}
        plain = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, group)
        return parts, plain.T.half()

    return quantize


def awq_fast(group):
    def quantize(weight, stem):
        codes, scales, zeros, wide = rounded(weight, group)
        layer = linear((codes - wide[1]) * wide[0])  # as AutoAWQ's `pseudo_quantize_tensor` leaves it
        fast = autoawq("modules/linear/gemv_fast").WQLinear_GEMVFast
        state = fast.from_linear(layer, 4, group, scales=scales, zeros=zeros).state_dict()
        held = [state[part].numpy() for part in ("qweight", "qzeros", "scales")]
        words, *factors = map(torch.tensor, repack_awq_gemv_fast(*held, *weight.shape[::-1], group))
        unpacked = ((words.long()[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2)
        assert torch.equal(unpacked.int(), codes)
        scale, zero = (part.float().repeat_interleave(group, 1) for part in factors)
        return state, (unpacked * scale + zero).half()

    return quantize


def bnb4(kind, nested, dtype):
    def quantize(weight, stem):
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=kind,
        )
        layer.weight = bnb.nn.Params4bit(
            weight.detach().clone(), requires_grad=False, compress_statistics=nested, quant_type=kind
        )
        layer = layer.to("cpu")
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert "weight.absmax" in state
        plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return state, plain + 0  # the CPU kernel makes -0 of fp4's code 8, for which `quant_map` has 0

    return quantize


def bnb8(weight, stem):
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == {"weight", "SCB", "weight_format"}
    return state, bnb.functional.int8_vectorwise_dequant(codes, scales).half()


def compressed(form, dtype, activations=None, **weights):
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantize(weight, stem):
        rows, columns = weight.shape
        high, wide = {
            "tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size), "block": args.block_structure,
        }[args.strategy]  # fmt: skip
        blocks = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % high))
        blocks = blocks.unflatten(0, (-1, high)).unflatten(2, (-1, wide))
        scale, zero = calculate_qparams(blocks.amin((1, 3)).to(dtype), blocks.amax((1, 3)).to(dtype), args)
        scale = scale.reshape(1) if args.strategy == "tensor" else scale
        zero = zero.reshape(scale.shape)
        state = {"weight": weight.to(dtype), "weight_scale": scale.to(dtype), "weight_zero_point": zero}
        state = compressor.compress(state, scheme)
        plain = compressor.decompress(state, scheme)["weight"]
        return {key: value for key, value in state.items() if value is not None}, plain

    return quantize, json.loads(config.model_dump_json(exclude_none=True))


def main():
    common = {"quant_method": "gptq", "group_size": 16, "sym": False, "true_sequential": True, "damp_percent": 0.01}
    write("gptq4", gptq(4, 16, 1, True), {**common, "bits": 4, "desc_act": True, "checkpoint_format": "gptq"})
    write("gptq8", gptq(8, 32, 2, False), {
        **common, "bits": 8, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2",
    })  # fmt: skip
    write("awq", awq(16), {
        "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None,
    })  # fmt: skip
    write("awq-gemv_fast", awq_fast(64), {
        "quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast", "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=1)  # fmt: skip
    # Rows of 24 and 40 numbers: blocks of 64 go over the ends of rows.
    odd = {"hidden_size": 24, "intermediate_size": 40}
    four = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_skip_modules": ["lm_head"],
    }
    for name, kind, nested, dtype in (
        ("nf4", "nf4", True, torch.bfloat16), ("fp4", "fp4", False, torch.float16)
    ):  # fmt: skip
        options = {**four, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
        write(name, bnb4(kind, nested, dtype), options, dtype, **odd)
    write("int8", bnb8, {**four, "load_in_4bit": False, "load_in_8bit": True}, **odd)
    odd = {"hidden_size": 24, "intermediate_size": 44}
    cases = {
        "packed": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 4, "symmetric": False}),
        "packed-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "ints": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "floats": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "naive": (
            "naive-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
        ),
    }
    for name, (form, weights) in cases.items():
        dynamic = QuantizationArgs(num_bits=8, type=weights.get("type", "int"), dynamic=True, strategy="token")
        quantize, options = compressed(
            form, torch.bfloat16, None if form in ("pack-quantized", "naive-quantized") else dynamic, **weights
        )
        write(name, quantize, options, torch.bfloat16, **odd)


if __name__ == "__main__":
    main()
