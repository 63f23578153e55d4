"""Single arrays between JAX, numpy and PyTorch, in the same memory wherever that is possible."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch import Tensor

DTYPES = frozenset(
    """float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64""".split()
)
"""The types that JAX and PyTorch have in common."""


def on_host(path: str, leaf: Any) -> np.ndarray:
    """A writable array of the leaf's own memory where that is possible, else of a copy."""
    if getattr(leaf, "dtype", None) is not None and leaf.dtype.name not in DTYPES:
        raise TypeError(f"to_torch: {path!r} is {leaf.dtype.name}, which PyTorch does not have; use fm.cast first")
    if isinstance(leaf, Tracer):
        raise TypeError(f"to_torch: {path!r} is traced by jit, grad or vmap; call to_torch outside of them")
    if isinstance(leaf, jax.Array):
        devices = leaf.devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            return to_numpy(torch.from_dlpack(jax.block_until_ready(leaf)), f"to_torch: {path!r}")
        return np.array(leaf)
    if not isinstance(leaf, np.ndarray):
        raise TypeError(f"to_torch: {path!r} is {kind_of(leaf)}; expected arrays of jax or numpy")
    return leaf if leaf.flags.writeable else leaf.copy()


def memory(array: np.ndarray) -> Any:
    """Equal for arrays that are the same numbers at the same place."""
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of the array's own memory."""
    try:
        return torch.from_numpy(array)
    except TypeError:  # bfloat16 and smaller, which PyTorch's numpy does not know
        return torch.from_numpy(array.view(f"u{array.dtype.itemsize}")).view(getattr(torch, array.dtype.name))


def to_numpy(tensor: Tensor, where: str) -> np.ndarray:
    """The tensor's own memory as an array of numpy; a copy from other devices."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{where} is a {'quantized' if tensor.is_quantized else tensor.layout} tensor; expected a dense one"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{where} is on the meta device and has no numbers; load the module first")
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # as above
        bits = torch.uint16 if tensor.itemsize == 2 else torch.uint8
        return tensor.view(bits).numpy().view(jnp.dtype(str(tensor.dtype).removeprefix("torch.")))


def to_jax(name: str, tensor: Tensor) -> jax.Array:
    """The tensor's own memory as an array of JAX; a copy if it does not lie there row by row."""
    if tensor.device.type != "cpu":
        raise ValueError(f"TorchModel: {name!r} is on {tensor.device}, but computes on the CPU; use module.to('cpu')")
    if is_too_wide(tensor.dtype):
        raise ValueError(
            f"TorchModel: {name!r} is {tensor.dtype}, which jax has only after "
            'jax.config.update("jax_enable_x64", True); use module.float()'
        )
    return jnp.from_dlpack(tensor.detach().contiguous())


def to_tensor(array: jax.Array) -> Tensor:
    """A tensor of the array's own memory."""
    return torch.from_dlpack(array)


def is_too_wide(dtype: Any) -> bool:
    """Whether JAX would cut the type to 32 bits."""
    wide = str(dtype).removeprefix("torch.") in ("float64", "int64", "uint64", "complex128")
    return wide and not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def kind_of(value: Any) -> str:
    """The type of a value, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
