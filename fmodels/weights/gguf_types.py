"""Which type the tensors of a GGUF file are written in: llama.cpp's, as its converter has them.

Source: conversion/base.py (`prepare_tensors`) of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmodels.weights import ggml
from fmodels.weights.ggml import Blocks
from fmodels.weights.tensors import Tensor, cast, computed, is_floating

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
WRITABLE = ("f32", "f16", "bf16", "q8_0")  # what numbers can be written as; other blocks are copied
WIDE = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "token_types.weight",
)


def of_type(tensors: Mapping[str, Tensor], type: str) -> dict[str, Tensor]:
    """The tensors as files of llama.cpp's converter with `--outtype` have them, but that nothing is rounded that need not be.

    Args:
        tensors: by the names in the file.
        type: `"f32"`, `"f16"`, `"bf16"` or `"q8_0"` of those that llama.cpp does not want in float32. Rows that are no
            multiple of q8_0's 32 numbers keep their type.

    Raises:
        ValueError: another type.
    """
    if type not in WRITABLE:
        raise ValueError(f"write: type {type!r} of GGUF cannot be written, only {', '.join(WRITABLE)}")
    return {name: _of_type(name, tensor, type) for name, tensor in tensors.items()}


def _of_type(name: str, tensor: Tensor, type: str) -> Tensor:
    known, own = ggml.TYPES[type], tensor.type if isinstance(tensor, Blocks) else None
    if not is_floating(tensor.dtype) or own == type or (own is None and is_wide(name, tensor.shape)):
        return tensor
    if known.dtype is not None:
        return cast(tensor if own is None else computed(tensor), known.dtype)
    if tensor.shape[-1] % known.size:
        return tensor
    row = (*tensor.shape[:-1], tensor.shape[-1] // known.size * known.nbytes)
    return Blocks.of(name, type, Tensor.lazy(name, np.uint8, row, lambda: ggml.quantize_q8_0(tensor.array())))


def is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in float32, whatever the others are: biases, norms, routers, positions, token types."""
    return len(shape) < 2 or name.endswith(WIDE)


def kind_of(name: str, tensor: Tensor) -> str:
    """The type that a tensor is written in."""
    if isinstance(tensor, Blocks):
        return tensor.type
    if is_floating(tensor.dtype) and is_wide(name, tensor.shape):
        return "f64" if tensor.dtype == np.float64 else "f32"
    return ggml.BY_DTYPE.get(tensor.dtype, "")


def file_type(tensors: Mapping[str, Tensor], type: str | None = None) -> dict[str, Any]:
    """The type that most numbers have where llama.cpp does not want float32, as metadata, if there is a word for it."""
    most: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = kind_of(name, tensor)
        most[kind] = most.get(kind, 0) + (0 if is_wide(name, tensor.shape) else tensor.size)
    main = type or max(most, key=lambda kind: most[kind], default="f32")
    return {"general.file_type": np.uint32(FILE_TYPES[main])} if main in FILE_TYPES else {}
