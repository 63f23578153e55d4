"""GGUF files as llama.cpp makes them of transformers' models: names, types and metadata by the package `gguf`.

What `gguf` does not have, the order of rows and the layouts, is written here from the descriptions of conversion/*.py of
llama.cpp, apart from what `fmodels` does.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file

import fmodels as fm
from fmodels.models import family
from fmodels.nn import linear
from fmodels.types import Params

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "phi": "phi2",
    "starcoder2": "starcoder2", "gpt2": "gpt2", "stablelm": "stablelm", "gpt_neox": "gptneox", "falcon": "falcon",
    "bloom": "bloom", "olmo2": "olmo2", "cohere": "command-r", "granite": "granite", "smollm3": "smollm3",
}  # fmt: skip
TURNED = ("llama", "granite", "smollm3")  # those that derive from LlamaModel


def turn(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`."""
    parts = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return parts.swapaxes(1, 2).reshape(weights.shape)


def ungroup(tensor: np.ndarray, groups: int, heads: int) -> np.ndarray:
    """Of key-value groups that have their queries, key and value side by side: all queries, all keys, all values."""
    parts = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
    rows = (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])
    return np.concatenate([part.reshape(-1, *tensor.shape[1:]) for part in rows])


def convert(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """The tensors of llama.cpp, of the weights that transformers saved in `folder`."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config.num_hidden_layers
    mapped = gguf.get_tensor_name_map(kind, layers)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensor = tensor.numpy()
        if architecture in TURNED and ".q_proj." in name:
            tensor = turn(tensor, heads)
        if architecture in TURNED and ".k_proj." in name:
            tensor = turn(tensor, groups)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if architecture in ("bloom", "gptneox", "falcon") and "query_key_value" in name:
            tensor = ungroup(tensor, groups, heads)
        if architecture == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            tensor = tensor.T
        if architecture == "bloom":
            name = name.removeprefix("transformer.")
        if match := re.fullmatch(r"(.*)(\.\d+\.)(.*)\.experts\.\d+\.(\w+)\.weight", name):
            merged = "layers{1}feed_forward.experts.{3}" if architecture == "llama" else "{0}{1}{2}.experts.{3}"
            experts.setdefault(merged.format(*match.groups()) + ".weight", []).append(tensor)
            continue
        own = mapped.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        found[own] = tensor.squeeze() if tensor.ndim > 1 and architecture == "qwen2moe" else tensor
    for name, parts in experts.items():  # transformers saves them in their order
        own = mapped.get_name(name, try_suffixes=(".weight",))
        assert own is not None, name
        found[own] = np.stack(parts)
    return found


def write(path: Path, model: Any, tensors: dict[str, np.ndarray], types: dict[str, str] | None = None) -> None:
    """A file by `gguf.GGUFWriter`, with the metadata that llama.cpp's converter adds.

    Args:
        path: of the file.
        model: of transformers.
        tensors: by llama.cpp's names.
        types: name -> quantised type.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    hidden, heads = config.hidden_size, config.num_attention_heads
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    inner = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(config.model_type, "intermediate_size")
    writer.add_feed_forward_length(getattr(config, inner, 4 * hidden))
    writer.add_head_count(heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
    writer.add_head_count_kv(groups)
    head = getattr(config, "head_dim", None)
    if callable(head) or head is None:
        head = hidden // heads
    if head * heads != hidden:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, name) for name in names if hasattr(config, name)))
    rope = getattr(config, "rope_parameters", None)
    if rope:
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] in ("yarn", "longrope"):
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, key in (
        ("attn_logit_softcapping", "add_attn_logit_softcapping"), ("final_logit_softcapping", "add_final_logit_softcapping"),
        ("logit_scale", "add_logit_scale"), ("logits_scaling", "add_logit_scale"), ("embedding_multiplier", "add_embedding_scale"),
        ("attention_multiplier", "add_attention_scale"), ("residual_multiplier", "add_residual_scale"),
        ("num_local_experts", "add_expert_count"), ("num_experts", "add_expert_count"),
        ("num_experts_per_tok", "add_expert_used_count"), ("moe_intermediate_size", "add_expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "add_expert_shared_feed_forward_length"),
    ):  # fmt: skip
        value = getattr(config, name, None)
        if value is not None and f"{architecture}.{key}" not in writer.kv_data[0]:
            getattr(writer, key)(value)
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            known = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(name, gguf.quants.quantize(tensor, known), raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope: dict[str, Any], size: int) -> np.ndarray:
    """The factors of llama.cpp's `rope_freqs.weight`."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    waves = 2 * np.pi / frequencies
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (original / waves - low) / (high - low)
    found = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(waves < original / high, 1.0, torch.where(waves > original / low, factor, found))
    return found.to(torch.float32).numpy()


def drawn(name: str, architecture: str, row: dict[str, Any]) -> tuple[Params, Any]:
    """A model whose numbers numpy draws, the same ones on all machines, of a row of `tests.test_gguf.ROWS`."""
    kind = name.split("/")[0]
    config = family(kind).config.from_hf({**row, "model_type": kind, "architectures": [architecture]})
    rng = np.random.default_rng(0)
    leaves = fm.tree.flatten(fm.abstract(config))
    flat = {
        path: rng.normal(1.0 if path.endswith("scale") else 0.0, 0.3, leaves[path].shape).astype(np.float32)
        for path in sorted(leaves)
    }
    return fm.tree.unflatten(flat), config


@contextlib.contextmanager
def gelu_of_float16() -> Iterator[None]:
    """GELU as llama.cpp has it on CPUs: by tanh for all models, from a table of float16."""

    def gelu(x: jax.Array) -> jax.Array:
        half = jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True).astype(jnp.float16)
        return jnp.where(jnp.abs(x) < 10, half.astype(jnp.float32), jnp.maximum(x, 0))

    own = {name: known for name, known in linear.ACTIVATIONS.items() if name.startswith("gelu")}
    linear.ACTIVATIONS.update(dict.fromkeys(own, gelu))
    try:
        yield
    finally:
        linear.ACTIVATIONS.update(own)
