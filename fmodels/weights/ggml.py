"""The types of elements that GGUF files have: plain numbers, and blocks of numbers that share their scales.

Dequantised here, in numpy, are q1_0, q2_0, q4_0, q4_1, q5_0, q5_1, q8_0 and q2_k to q8_k, and quantised is q8_0, with the
bits of the package `gguf`, or of llama.cpp for those that the package cannot; the other types (iq*, tq*, mxfp4, nvfp4) are left
to that package, which is imported only for them. llama.cpp itself cannot dequantise q8_1, a type of what lies between.
Source: ggml/src/ggml-quants.c of llama.cpp and its gguf-py/gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import Tensor, cast


class Type(NamedTuple):
    """A type of ggml.

    Attributes:
        code: its number in files.
        size: elements of a block.
        nbytes: of a block.
        dtype: of its elements, where blocks are single numbers.
    """

    code: int
    size: int
    nbytes: int
    dtype: np.dtype | None = None


def _plain(code: int, dtype: type) -> Type:
    return Type(code, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


TYPES: dict[str, Type] = {
    "f32": _plain(0, np.float32),
    "f16": _plain(1, np.float16),
    "q4_0": Type(2, 32, 18),
    "q4_1": Type(3, 32, 20),
    "q5_0": Type(6, 32, 22),
    "q5_1": Type(7, 32, 24),
    "q8_0": Type(8, 32, 34),
    "q2_k": Type(10, 256, 84),
    "q3_k": Type(11, 256, 110),
    "q4_k": Type(12, 256, 144),
    "q5_k": Type(13, 256, 176),
    "q6_k": Type(14, 256, 210),
    "q8_k": Type(15, 256, 292),
    "iq2_xxs": Type(16, 256, 66),
    "iq2_xs": Type(17, 256, 74),
    "iq3_xxs": Type(18, 256, 98),
    "iq1_s": Type(19, 256, 50),
    "iq4_nl": Type(20, 32, 18),
    "iq3_s": Type(21, 256, 110),
    "iq2_s": Type(22, 256, 82),
    "iq4_xs": Type(23, 256, 136),
    "i8": _plain(24, np.int8),
    "i16": _plain(25, np.int16),
    "i32": _plain(26, np.int32),
    "i64": _plain(27, np.int64),
    "f64": _plain(28, np.float64),
    "iq1_m": Type(29, 256, 56),
    "bf16": _plain(30, ml_dtypes.bfloat16),
    "tq1_0": Type(34, 256, 54),
    "tq2_0": Type(35, 256, 66),
    "mxfp4": Type(39, 32, 17),
    "nvfp4": Type(40, 64, 36),
    "q1_0": Type(41, 128, 18),
    "q2_0": Type(42, 64, 18),
}
"""Name, in lower case -> type."""

BY_CODE = {known.code: name for name, known in TYPES.items()}
BY_DTYPE = {known.dtype: name for name, known in TYPES.items() if known.dtype is not None}
CHUNK = 2**16  # numbers that are converted at a time: what lies between stays in the processor's cache


def dequantize(packed: np.ndarray, name: str) -> np.ndarray:
    """The numbers of quantised rows, float32.

    Args:
        packed: uint8, `(… bytes of a row)`.
        name: of the type.

    Raises:
        ImportError: the type needs the package `gguf`, which is not there.

    Example:
        >>> import numpy as np
        >>> dequantize(quantize_q8_0(np.arange(-127, 127, 8, dtype=np.float32)), "q8_0")[:3]
        array([-127., -119., -111.], dtype=float32)
    """
    kind = TYPES[name]
    shape = (*packed.shape[:-1], packed.shape[-1] // kind.nbytes * kind.size)
    blocks = packed.reshape(-1, kind.nbytes)
    out = np.empty((len(blocks), kind.size), np.float32)
    unpack = UNPACK.get(name) or _other(name)
    with np.errstate(all="ignore"):  # scales of a damaged file
        for part in _chunks(len(blocks), kind.size):
            out[part] = unpack(np.ascontiguousarray(blocks[part])).reshape(-1, kind.size)
    return out.reshape(shape)


@dataclass(frozen=True, eq=False)
class Blocks(Tensor):
    """A tensor that is quantised in blocks along its last axis; its array is what it stands for, in float32.

    Attributes:
        type: a name in `TYPES`.
        packed: the bytes, uint8, `(… bytes of a row)`.
    """

    type: str = ""
    packed: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return super().nbytes if self.packed is None else self.packed.nbytes

    @classmethod
    def of(cls, name: str, kind: str, packed: Tensor) -> Blocks:
        """The tensor with these bytes."""
        known = TYPES[kind]
        shape = (*packed.shape[:-1], packed.shape[-1] // known.nbytes * known.size)
        return cls(
            name, np.dtype(np.float32), shape, lambda: dequantize(packed.array(), kind), type=kind, packed=packed
        )


@dataclass(frozen=True, eq=False)
class Widened(Tensor):
    """A tensor of float16 or bfloat16 that lies, or is to lie, in the file as float32.

    Attributes:
        wide: the numbers in the file.
    """

    wide: Tensor | None = None

    @classmethod
    def of(cls, wide: Tensor, dtype: np.dtype) -> Widened:
        """The tensor with these numbers."""
        return cls(wide.name, dtype, wide.shape, cast(wide, dtype).get, wide=wide)


@dataclass(frozen=True, eq=False)
class Turned(Tensor):
    """A matrix of which the transpose is quantised, so that its blocks lie along its columns.

    Attributes:
        blocks: the transpose.
    """

    blocks: Blocks | None = None

    @classmethod
    def of(cls, name: str, blocks: Blocks) -> Turned:
        """The transpose of a matrix."""
        return cls(name, blocks.dtype, blocks.shape[::-1], lambda: blocks.array().T, blocks=blocks)


def part(tensor: Tensor, index: int) -> Tensor:
    """`tensor[index]` along the first axis, without reading, or dequantising, the others."""
    if isinstance(tensor, Blocks) and tensor.packed is not None:
        return Blocks.of(tensor.name, tensor.type, part(tensor.packed, index))
    shape = tensor.shape[1:]
    if tensor.file is None:
        return Tensor.lazy(tensor.name, tensor.dtype, shape, lambda: tensor.array()[index])
    offset = tensor.offset + index * (tensor.nbytes // tensor.shape[0])
    return Tensor.in_file(tensor.name, tensor.dtype, shape, tensor.file, offset)


def some_rows(tensor: Tensor, name: str, axis: int, start: int, stop: int) -> Tensor:
    """The part of a tensor from `start` to `stop` along an axis, which is not the last of what is quantised."""
    if isinstance(tensor, Blocks) and tensor.packed is not None:
        return Blocks.of(name, tensor.type, some_rows(tensor.packed, name, axis, start, stop))
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    at = (*(slice(None),) * axis, slice(start, stop))
    return Tensor.lazy(name, tensor.dtype, shape, lambda: tensor.array()[at])


def rows(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """The tensor with its rows in another order; `change` works on bytes where it is quantised."""
    if isinstance(tensor, Blocks) and tensor.packed is not None:
        return Blocks.of(tensor.name, tensor.type, rows(tensor.packed, change))
    return Tensor.lazy(tensor.name, tensor.dtype, tensor.shape, lambda: change(tensor.array()))


def quantize_q8_0(array: np.ndarray) -> np.ndarray:
    """Rows as blocks of 32 signed bytes and their scale: uint8, `(… bytes of a row)`.

    Args:
        array: `(… k)`, floating; k is a multiple of 32.

    Raises:
        ValueError: there are numbers whose scale float16 cannot hold.
    """
    blocks = np.ascontiguousarray(array).reshape(-1, 32)
    packed = np.empty((len(blocks), 34), np.uint8)
    for part in _chunks(len(blocks), 32):
        wide = blocks[part].astype(np.float32, copy=False)
        scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(
                f"array: q8_0 holds numbers up to 8319008, got {scale.max() * 127:g}; use bfloat16 or float32 for this model"
            )
        with np.errstate(divide="ignore"):
            inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        wanted = wide * inverse
        size = np.abs(wanted)
        floor = np.floor(size)  # halves are rounded away from zero, as by roundf
        rounded = np.sign(wanted) * (floor + np.floor(2 * (size - floor)))
        packed[part, :2] = half.view(np.uint8)
        packed[part, 2:] = rounded.astype(np.int8).view(np.uint8)
    return packed.reshape(*array.shape[:-1], -1)


def _chunks(blocks: int, size: int) -> Iterator[slice]:
    step = max(CHUNK // size, 1)
    return (slice(start, start + step) for start in range(0, blocks, step))


def _other(name: str) -> Callable[[np.ndarray], np.ndarray]:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as by_package
    except ImportError:
        raise ImportError(f"array: tensors of type {name} need the package gguf: pip install 'fmodels[gguf]'") from None
    kind = GGMLQuantizationType[name.upper()]
    return lambda blocks: by_package(blocks, kind)


def _halfs(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte of each block, as float32 `(n 1)`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _bits(octets: np.ndarray, width: int, group: int) -> np.ndarray:
    """`(n bytes)` to `(n -1)` numbers of `width` bits: of each `group` bytes first their lowest, then their next bits."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = octets.reshape(len(octets), -1, 1, group) >> shifts & np.uint8(2**width - 1)
    return parts.reshape(len(octets), -1)


def _fifth(octets: np.ndarray) -> np.ndarray:
    """Four bytes to 32 numbers, 0 or 16."""
    return np.unpackbits(octets, axis=1, bitorder="little") << np.uint8(4)


def _signed(numbers: np.ndarray, middle: int) -> np.ndarray:
    return (numbers.astype(np.int8) - np.int8(middle)).astype(np.float32)


def _scaled(b: np.ndarray, start: int, scales: np.ndarray) -> np.ndarray:
    """The scales of the parts of a block `(n p)`, times that of the block at a byte: `(n p 1)`."""
    return (_halfs(b, start) * scales.astype(np.float32))[..., None]


def _q1_0(b: np.ndarray) -> np.ndarray:
    return np.where(_bits(b[:, 2:], 1, 1), _halfs(b, 0), -_halfs(b, 0))


def _q2_0(b: np.ndarray) -> np.ndarray:
    return _signed(_bits(b[:, 2:], 2, 1), 1) * _halfs(b, 0)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _halfs(b, 0) * _signed(_bits(b[:, 2:], 4, 16), 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _halfs(b, 0) * _bits(b[:, 4:], 4, 16).astype(np.float32) + _halfs(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _halfs(b, 0) * _signed(_bits(b[:, 6:], 4, 16) | _fifth(b[:, 2:6]), 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _halfs(b, 0) * (_bits(b[:, 8:], 4, 16) | _fifth(b[:, 4:8])).astype(np.float32) + _halfs(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32) * _halfs(b, 0)


def _q2_k(b: np.ndarray) -> np.ndarray:
    scale, least = _scaled(b, 80, b[:, :16] & 15), _scaled(b, 82, b[:, :16] >> 4)
    return scale * _bits(b[:, 16:80], 2, 32).reshape(-1, 16, 16).astype(np.float32) - least


def _q3_k(b: np.ndarray) -> np.ndarray:
    high, low, scales = b[:, :32], b[:, 32:96], b[:, 96:108]
    scales = _signed(_bits(scales[:, :8], 4, 8) | _bits(scales[:, 8:], 2, 4) << np.uint8(4), 32)
    lacks = (_bits(high, 1, 32) ^ np.uint8(1)) << np.uint8(2)  # where the third bit is not there, 4 is taken away
    numbers = (_bits(low, 2, 32).astype(np.int8) - lacks.astype(np.int8)).astype(np.float32)
    return _scaled(b, 108, scales) * numbers.reshape(-1, 16, 16)


def _scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and minima of q4_k and q5_k, six bits each, times those of the block: `(n 8 1)`."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    least = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return _scaled(b, 0, scale), _scaled(b, 2, least)


def _q4_k(b: np.ndarray) -> np.ndarray:
    scale, least = _scales(b)
    return scale * _bits(b[:, 16:], 4, 32).reshape(-1, 8, 32).astype(np.float32) - least


def _q5_k(b: np.ndarray) -> np.ndarray:
    scale, least = _scales(b)
    numbers = _bits(b[:, 48:], 4, 32) | _bits(b[:, 16:48], 1, 32) << np.uint8(4)
    return scale * numbers.reshape(-1, 8, 32).astype(np.float32) - least


def _q6_k(b: np.ndarray) -> np.ndarray:
    numbers = _signed(_bits(b[:, :128], 4, 64) | _bits(b[:, 128:192], 2, 32) << np.uint8(4), 32)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _scaled(b, 208, scales) * numbers.reshape(-1, 16, 16)


def _q8_k(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b[:, :4]).view(np.float32) * np.ascontiguousarray(b[:, 4:260]).view(np.int8)


UNPACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "q1_0": _q1_0, "q2_0": _q2_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_k": _q2_k,
    "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "q8_k": _q8_k,
}  # fmt: skip
"""Type -> from `(n bytes)` to the numbers of the blocks."""
