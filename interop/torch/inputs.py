"""The inputs of `TorchModel`: PyTorch's tensors, checked, as arrays of JAX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

import fmodels as fm
from interop.torch.arrays import kind_of

TABLES = {"tokens": "tokens", "decoder_tokens": "tokens", "positions": "positions", "token_types": "types"}
"""Input -> the table under `embed` of which it holds row numbers."""


def either(name: str, value: Any, other: str, other_value: Any) -> Any:
    """The input that is there under one of its two names."""
    if value is not None and other_value is not None:
        raise TypeError(f"TorchModel: {name} and {other} are the same input; pass one of them")
    return other_value if value is None else value


def read_inputs(config: Any, **tensors: Any) -> dict[str, Any]:
    """The inputs as arrays of their own memory, checked as `fm.forward` checks them outside of `jit`."""
    if tensors["tokens"] is None:
        raise TypeError("TorchModel: there are no tokens; pass tokens= (or input_ids=)")
    arrays: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            arrays[name] = None
            continue
        if not isinstance(tensor, Tensor) or (
            (tensor.is_floating_point() or tensor.is_complex()) and not name.endswith("mask")
        ):
            what = tensor.dtype if isinstance(tensor, Tensor) else kind_of(tensor)
            raise TypeError(f"TorchModel: {name} must be a torch.Tensor of integers, got {what}; use torch.tensor(…)")
        if tensor.numel():
            _check_range(name, tensor, config)
        kind = torch.bool if name.endswith("mask") else torch.int32
        arrays[name] = jnp.array(tensor.detach().to("cpu", kind).numpy(), copy=True)
    return arrays


def _check_range(name: str, tensor: Tensor, config: Any) -> None:
    low, high = tensor.min().item(), tensor.max().item()
    if name.endswith("mask"):
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise ValueError(
                f"TorchModel: {name} holds 1 for tokens and 0 for padding; got numbers from {low} to {high}"
            )
        return
    size = _table_sizes(config).get(TABLES[name])
    if size is not None and (low < 0 or high >= size):
        raise ValueError(f"TorchModel: {name} reach from {low} to {high}, outside of 0 … {size - 1}, their table")


@functools.lru_cache(maxsize=64)
def _table_sizes(config: Any) -> dict[str, int]:
    params = fm.abstract(config)
    embed = params["embed"] | params.get("decoder", {}).get("embed", {})
    offset = {"positions": config.position_offset}
    return {name: embed[name].shape[0] - offset.get(name, 0) for name in TABLES.values() if name in embed}


def random_key(seed: int | None, generator: torch.Generator | None, key: jax.Array | None) -> jax.Array | None:
    """The key that one of the three ways gives, None without any."""
    if sum(way is not None for way in (seed, generator, key)) > 1:
        raise TypeError("generate: pass one of seed=, generator= and key=")
    if generator is not None:
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device))
    return key if seed is None else jax.random.key(seed)
