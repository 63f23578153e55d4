"""Rotary settings in GGUF: keys of the metadata, and tensors by whose numbers frequencies are divided.

Source: conversion/llama.py, conversion/phi.py and src/llama-model.cpp of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmodels.dialects.gguf_names import of_family
from fmodels.models import Config
from fmodels.models._rope import rotated
from fmodels.nn.positions import Rope
from fmodels.weights import Tensor

LONG, SHORT, FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


def factor_tensors(config: Config) -> dict[str, Tensor]:
    """The tensors that say how rotary frequencies are divided, by name."""
    rope = getattr(config, "rope", None)
    if rope is None or rope.type not in of_family(type(config)).factors:
        return {}
    short, long = _factors(rope, rotated(config.head_dim, rope))
    by_name = {FACTORS: short} if _is_one_row(config) else {LONG: long, SHORT: short}
    return {name: Tensor.lazy(name, np.float32, v.shape, lambda v=v: v) for name, v in by_name.items()}


def is_factor_tensor(name: str, config: Config) -> bool:
    """Whether a tensor of a file is one that `config_from_gguf` reads."""
    rope = getattr(config, "rope", None)
    return name in (LONG, SHORT, FACTORS) and rope is not None and rope.type in ("llama3", "longrope")


def _is_one_row(config: Any) -> bool:
    """Whether the frequencies of all texts are divided by the same factors, and llama.cpp can read such."""
    rope = config.rope
    if rope.type == "longrope" and "llama3" in of_family(type(config)).factors:
        return rope.short_factor == rope.long_factor and attention_factor(rope, config.max_positions) == 1.0
    return rope.type == "llama3"


def rope_values(config: Config) -> dict[str, Any]:
    """The keys of the rotary settings."""
    if not getattr(config, "rotary", False):
        return {}
    rope: Rope = getattr(config, "rope")  # noqa: B009
    size = rotated(config.head_dim, rope)
    if size % 2:
        raise ValueError(
            f"gguf: llama.cpp turns pairs of numbers; of head_dim={config.head_dim} {size} would be turned"
        )
    found = {"rope.freq_base": float(rope.theta), "rope.dimension_count": size}
    if _is_one_row(config):
        original = rope.original_max_positions if rope.type == "llama3" else None
        return {**found, "rope.scaling.original_context_length": original}
    if rope.type in ("linear", "yarn", "longrope"):
        found |= {"rope.scaling.type": rope.type}
    if rope.type in ("linear", "yarn"):
        found |= {"rope.scaling.factor": None if rope.factor is None else float(rope.factor)}
    if rope.type in ("yarn", "longrope"):
        found |= {"rope.scaling.original_context_length": rope.original_max_positions or config.max_positions}
    if rope.type == "yarn":
        found |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    if rope.type == "longrope":
        found |= {"rope.scaling.attn_factor": attention_factor(rope, config.max_positions)}
    local: Rope | None = getattr(config, "local_rope", None)
    if local is not None:
        found |= {"rope.freq_base_swa": float(local.theta)}
    return found


def rope_meaning(rope: Rope, config: Config) -> tuple[Any, ...]:
    """What decides on the rotary angles, in a form that is the same for the same angles."""
    size = rotated(config.head_dim, rope)
    if rope.type in ("default", "linear", "llama3", "longrope"):
        short, long = _factors(rope, size)
        edge = None if same(short, long) else rope.original_max_positions or config.max_positions
        factor = attention_factor(rope, config.max_positions) if rope.type == "longrope" else 1.0
        return rope.theta, size, tuple(short.tolist()), tuple(long.tolist()), edge, factor
    if rope.type == "yarn":
        rope = dataclasses.replace(
            rope, factor=rope.factor or config.max_positions / (rope.original_max_positions or config.max_positions),
            original_max_positions=rope.original_max_positions or config.max_positions, beta_fast=rope.beta_fast or 32.0,
            beta_slow=rope.beta_slow or 1.0,
        )  # fmt: skip
    return (size, *dataclasses.astuple(dataclasses.replace(rope, partial_rotary_factor=1.0)))


def _factors(rope: Rope, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the frequencies of short and of long texts are divided by, `(size / 2)` float32."""
    if rope.type == "longrope":
        return np.asarray(rope.short_factor, np.float32), np.asarray(rope.long_factor, np.float32)
    found = np.ones(size // 2, np.float32)
    if rope.type == "linear":
        found *= np.float32(rope.factor or 1.0)
    elif rope.type == "llama3":
        assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_positions
        low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        waves = np.float32(2 * math.pi) * np.float32(rope.theta) ** exponents
        with np.errstate(divide="ignore"):  # between is used where smooth is from 0 to 1
            smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
            between = 1 / ((1 - smooth) / np.float32(rope.factor) + smooth)
        found = np.where(waves < original / high, 1, np.where(waves > original / low, rope.factor, between))
    return found.astype(np.float32), found.astype(np.float32)


def from_factors(vector: tuple[float, ...], original: Any, longest: int, size: int, common: Mapping[str, Any]) -> Rope:
    """Llama 3's settings if they give these factors, else settings of longrope that have them for texts of every length."""
    rope = Rope(
        type="llama3", factor=max(vector), low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_positions=original if type(original) is int and original > 0 else 8192, **common,
    )  # fmt: skip
    if same(tuple(_factors(rope, size)[0].tolist()), vector):
        return rope
    return Rope(
        type="longrope",
        short_factor=vector,
        long_factor=vector,
        attention_factor=1.0,
        original_max_positions=longest,
        **common,
    )


def attention_factor(rope: Rope, max_positions: int) -> float:
    """Of longrope, as in `fmodels.nn.positions`."""
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    original = rope.original_max_positions or max_positions
    scale = rope.factor or max_positions / original
    return 1.0 if scale <= 1.0 else math.sqrt(1 + math.log(scale) / math.log(original))


def factors_of(tensor: Tensor, count: int) -> tuple[float, ...]:
    """The numbers of a tensor by which so many frequencies are divided.

    Raises:
        ValueError: there are more or fewer, or one is not positive.
    """
    if tensor.shape != (count,) or count > 2**16:
        raise ValueError(
            f"load: tensor {tensor.name!r} of the GGUF file must have shape {[count]}, got {list(tensor.shape)}"
        )
    array = tensor.array().astype(np.float32)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"load: tensor {tensor.name!r} of the GGUF file must have positive numbers")
    return tuple(map(plain, array))


def plain(value: Any) -> Any:
    """One of Python's for one of numpy's."""
    if not isinstance(value, np.generic):
        return value
    return float(str(value)) if value.dtype == np.float32 else value.item()


def same(first: Any, second: Any) -> bool:
    """Whether numbers are those of float32; all else must be equal."""
    if isinstance(first, np.ndarray):
        return same(tuple(first.tolist()), tuple(np.asarray(second).tolist()))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=2e-6)
    return first == second
