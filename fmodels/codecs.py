"""How quantised checkpoints pack matrices: one small decoder for each form, for the leaf `arrays.Quantized`.

Decoders compute in float32 and round once, to the leaf's dtype, as the libraries do that these forms are from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.arrays import Codec
from fmodels.types import Array

Parts = Mapping[str, Array]
Pick = Callable[[Array, int], Array]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of four bits e2m1."""


def spread(scale: Array, times: int, axis: int, size: int) -> Array:
    """Each number of `scale` `times` times along the (negative) `axis`, cut to `size`.

    Example:
        >>> spread(jnp.array([1, 2]), 2, -1, 3).tolist()
        [1, 1, 2]
    """
    if scale.shape[axis] == size:
        return scale
    return jnp.take(scale, jnp.arange(size, dtype=jnp.int32) // times, axis=axis)


def unpack(words: Array, bits: int) -> Array:
    """The numbers of the words of the last axis, the lowest bits first; of 3 bits 32 lie in three int32, across their ends.

    Example:
        >>> unpack(jnp.array([0x76543210], jnp.int32), 4).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> unpack(jnp.array([1 << 30, 1, 0], jnp.int32), 3)[9:12].tolist()
        [0, 5, 0]
    """
    if 32 % bits:
        groups = words.reshape(*words.shape[:-1], -1, bits)
        word, shift = np.divmod(np.arange(0, 32 * bits, bits, dtype=np.int32), 32)
        low = jax.lax.shift_right_logical(*jnp.broadcast_arrays(groups[..., word], jnp.asarray(shift)))
        rest = jnp.asarray(np.minimum(32 - shift, 31))  # of the next word; it is there where a number goes on
        high = jax.lax.shift_left(*jnp.broadcast_arrays(groups[..., np.minimum(word + 1, bits - 1)], rest))
        numbers = (low | jnp.where(jnp.asarray(shift + bits > 32), high, 0)) & (2**bits - 1)
        return numbers.reshape(*words.shape[:-1], -1)
    shifts = jnp.arange(0, 8 * words.dtype.itemsize, bits, dtype=words.dtype)
    numbers = jax.lax.shift_right_logical(*jnp.broadcast_arrays(words[..., None], shifts)) & (2**bits - 1)
    return numbers.reshape(*words.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Blocks(Codec):
    """`(weight - zero) * scale`: a number for each element, a factor (and perhaps a zero) for each block of them.

    Attributes:
        block: rows and columns of a block: `(1, 128)` for groups of 128 in a row; at most those of the matrix.
        scale: the name of the factors: `(rows columns)` of blocks, or any shape of as many.
        zero: the name of the zeros, of the same shape; none if None.

    Source: DeepSeek-AI 2024, section 3.3; matches transformers' `Fp8Dequantize` and compressed-tensors' `dequantize`.
    """

    block: tuple[int, int]
    scale: str = "weight_scale_inv"
    zero: str | None = None

    main: ClassVar[tuple[str, int]] = ("weight", 2)
    as_bytes: ClassVar[Mapping[str, str]] = {"weight": "float8_e4m3fn"}

    def decode(self, parts: Parts) -> Array:
        codes = self.codes(parts).astype(jnp.float32)
        if self.zero is not None:
            codes = codes - self._spread(self.zeros(parts, codes.shape), codes.shape)
        return codes * self._spread(parts[self.scale], codes.shape)

    def codes(self, parts: Parts) -> Array:
        """The number of each element."""
        codes = parts["weight"]
        return codes if codes.dtype != jnp.uint8 else jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)

    def zeros(self, parts: Parts, shape: tuple[int, ...]) -> Array:
        """The zero of each block of a matrix of the given shape."""
        return parts[self.zero or ""]

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array] | None:
        name, _ = self.main
        high, wide = parts[name].shape[-2:]
        found = {name: pick(parts[name], -2)}
        for part in filter(None, (self.scale, self.zero)):
            blocks = self._grid(parts[part], (*parts[name].shape[:-2], high, wide))
            found[part] = pick(spread(blocks, self.block[0], -2, high), -2)
        return {**parts, **found}

    def _grid(self, blocks: Array, shape: tuple[int, ...]) -> Array:
        """`(… rows columns)` of blocks, or `(… out columns)` where rows have been picked."""
        high = -(-shape[-2] // self.block[0])
        if blocks.shape[-2:-1] == shape[-2:-1] and blocks.ndim == len(shape):
            high = shape[-2]
        return blocks.reshape(*shape[:-2], high, -1)

    def _spread(self, blocks: Array, shape: tuple[int, ...]) -> Array:
        grid = spread(self._grid(blocks, shape).astype(jnp.float32), self.block[0], -2, shape[-2])
        return spread(grid, self.block[1], -1, shape[-1])


@dataclasses.dataclass(frozen=True)
class Mxfp4(Codec):
    """Numbers of four bits, two in a byte, the first in its low half; each 32 of a row have a power of two.

    Source: Open Compute Project, Microscaling Formats 1.0; matches transformers' `convert_moe_packed_tensors`.
    """

    main: ClassVar[tuple[str, int]] = ("blocks", 3)
    order: ClassVar[tuple[int, int] | None] = (-3, -2)
    separator: ClassVar[str] = "_"

    def decode(self, parts: Parts) -> Array:
        blocks, scales = parts["blocks"], parts["scales"]
        codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
        values = jnp.ldexp(jnp.asarray(FP4, jnp.float32)[codes], scales.astype(jnp.int32)[..., None] - 127)
        return values.reshape(*blocks.shape[:-2], -1)

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        return {"blocks": pick(parts["blocks"], -3), "scales": pick(parts["scales"], -2)}


@dataclasses.dataclass(frozen=True)
class Ggml(Codec):
    """Blocks of 32 numbers of a row, each a float16 to multiply them with and then their bytes.

    Attributes:
        type: `"q8_0"` for numbers of a signed byte; `"q4_0"` for four bits less 8, the first half of them in the low ones.

    Source: ggml/src/ggml-quants.c of llama.cpp; matches gguf-py's `dequantize`.
    """

    type: str

    main: ClassVar[tuple[str, int]] = ("blocks", 3)
    order: ClassVar[tuple[int, int] | None] = (-3, -2)
    dialect: ClassVar[str] = "gguf"
    TYPES: ClassVar[tuple[str, ...]] = ("q8_0", "q4_0")

    def decode(self, parts: Parts) -> Array:
        blocks = parts["blocks"]
        # Not two bytes at once, which an export does not know of rows whose number it does not know.
        bits = blocks[..., 0].astype(jnp.uint16) | blocks[..., 1].astype(jnp.uint16) << 8
        scale = jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
        codes = blocks[..., 2:]
        if self.type == "q8_0":
            numbers = jax.lax.bitcast_convert_type(codes, jnp.int8)
        else:
            numbers = jnp.concatenate([codes & 15, codes >> 4], axis=-1).astype(jnp.int8) - 8
        return (numbers.astype(jnp.float32) * scale[..., None]).reshape(*blocks.shape[:-2], -1)

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        return {"blocks": pick(parts["blocks"], -3)}


@dataclasses.dataclass(frozen=True)
class PackedBlocks(Blocks):
    """As `Blocks`, the numbers of few bits in a row of int32, the lowest bits first; they are minus half of their range.

    Attributes:
        bits: of a number: 2, 4 or 8.
        shape: rows and columns of the matrix, which the file has as `weight_shape`.

    Source: matches compressed-tensors' `pack-quantized`.
    """

    bits: int = 4
    shape: tuple[int, int] = (0, 0)

    main: ClassVar[tuple[str, int]] = ("weight_packed", 2)

    def codes(self, parts: Parts) -> Array:
        return unpack(parts["weight_packed"], self.bits)[..., : self.shape[1]] - 2 ** (self.bits - 1)

    def zeros(self, parts: Parts, shape: tuple[int, ...]) -> Array:
        columns = parts[self.zero or ""].swapaxes(-1, -2)
        numbers = unpack(columns, self.bits)[..., : shape[-2]] - 2 ** (self.bits - 1)
        return numbers.swapaxes(-1, -2)

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array] | None:
        return super().rows(parts, pick) if self.zero is None else None

    def constants(self) -> dict[str, Any]:
        return {"weight_shape": np.array(self.shape, np.int64)}


@dataclasses.dataclass(frozen=True)
class Gptq(Codec):
    """`(number - zero) * scale`; input `i` has those of group `g_idx[i]`. Eight numbers of four bits lie in an int32.

    Attributes:
        bits: of a number: 2, 3, 4 or 8.
        plus_one: whether zeros are one more than in the file (format `gptq`, and not `gptq_v2`).

    Source: Frantar et al. 2022; matches GPTQModel's `TorchLinear` and `convert_gptq_v1_to_v2_format`; of 3 bits AutoGPTQ's
    `QuantLinear`, which adds one to each zero by itself.
    """

    bits: int
    plus_one: bool

    main: ClassVar[tuple[str, int]] = ("qweight", 2)
    order: ClassVar[tuple[int, int] | None] = (-1, -2)

    def decode(self, parts: Parts) -> Array:
        codes = unpack(parts["qweight"].swapaxes(-1, -2), self.bits)
        if self.bits == 3:
            zeros = unpack(parts["qzeros"], self.bits) + int(self.plus_one)
        else:  # all numbers of a word at once, with carries: GPTQModel subtracts so where it writes
            ones = sum(1 << shift for shift in range(0, 32, self.bits))
            zeros = unpack(parts["qzeros"] + jnp.int32(ones if self.plus_one else 0), self.bits)
        zeros, scales = (
            jnp.take_along_axis(part.swapaxes(-1, -2), parts["g_idx"][..., None, :], axis=-1)
            for part in (zeros, parts["scales"])
        )
        return (codes - zeros).astype(jnp.float32) * scales.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Awq(Codec):
    """`(number - zero) * scale` for groups of inputs; eight numbers of four bits of neighbouring outputs lie in an int32.

    Attributes:
        group: inputs that share a scale and a zero.

    Source: Lin et al. 2023; matches AutoAWQ's `gemm` (`unpack_awq`, `reverse_awq_order`).
    """

    group: int

    main: ClassVar[tuple[str, int]] = ("qweight", 2)
    order: ClassVar[tuple[int, int] | None] = (-1, -2)
    ORDER: ClassVar[tuple[int, ...]] = (0, 4, 1, 5, 2, 6, 3, 7)
    """Where in the word the number of each output is."""

    def decode(self, parts: Parts) -> Array:
        codes, zeros = (self._numbers(parts[name]) for name in ("qweight", "qzeros"))
        zeros, scales = (spread(part, self.group, -2, codes.shape[-2]) for part in (zeros, parts["scales"]))
        return ((codes - zeros).astype(jnp.float32) * scales.astype(jnp.float32)).swapaxes(-1, -2)

    def _numbers(self, words: Array) -> Array:
        eights = unpack(words, 4).reshape(*words.shape, 8)
        return eights[..., jnp.asarray(self.ORDER, jnp.int32)].reshape(*words.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class AwqRows(Codec):
    """As `Awq`, with eight neighbouring inputs in an int32, the first in the lowest bits.

    Factors and zeros of an output lie side by side, and zeros behind them fill their words.

    Attributes:
        group: inputs that share a scale and a zero.

    Source: Lin et al. 2023; matches AutoAWQ's `gemv` (`WQLinear_GEMV`).
    """

    group: int

    main: ClassVar[tuple[str, int]] = ("qweight", 2)

    def decode(self, parts: Parts) -> Array:
        codes, zeros = (unpack(parts[name], 4) for name in ("qweight", "qzeros"))
        size = codes.shape[-1]
        groups = -(-size // self.group)
        zeros, scales = (spread(part[..., :groups], self.group, -1, size) for part in (zeros, parts["scales"]))
        return (codes - zeros).astype(jnp.float32) * scales.astype(jnp.float32)

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        return {name: pick(part, -2) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class AwqFast(Codec):
    """`number * scale + zero` for groups of inputs; of 32 inputs the word `i` of eight int16 has `i`, `i + 8`, `i + 16`, `i + 24`.

    Of four neighbouring rows the words of 64 inputs lie one after the other. Factors and zeros are `(groups out)`, and behind
    the groups that there are more may follow.

    Attributes:
        group: inputs that share a scale and a zero.
        zero: the name of the zeros, which are floats, times minus the scale already.

    Source: Lin et al. 2023; matches AutoAWQ's `gemv_fast` (`WQLinear_GEMVFast`) and llm-awq's `WQLinear`.
    """

    group: int
    zero: str = "qzeros"

    main: ClassVar[tuple[str, int]] = ("qweight", 2)

    def decode(self, parts: Parts) -> Array:
        words = self._words(parts)
        eights = unpack(words, 4).reshape(*words.shape[:-1], -1, 8, 4)
        codes = eights.swapaxes(-1, -2).reshape(*words.shape[:-1], -1).astype(jnp.float32)
        size = codes.shape[-1]
        groups = -(-size // self.group)
        scales, zeros = (
            spread(parts[name][..., :groups, :].swapaxes(-1, -2).astype(jnp.float32), self.group, -1, size)
            for name in ("scales", self.zero)
        )
        return codes * scales + zeros

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        found = {name: pick(parts[name], -1) for name in ("scales", self.zero)}
        return {**found, "qweight": pick(self._words(parts), -2)}

    def _words(self, parts: Parts) -> Array:
        """`(… out in/4)`, as the words lie already where rows have been picked."""
        words = parts["qweight"]
        *lead, high, wide = words.shape
        if high == parts["scales"].shape[-1]:
            return words
        return words.reshape(*lead, high, -1, 4, 16).swapaxes(-3, -2).reshape(*lead, 4 * high, wide // 4)


@dataclasses.dataclass(frozen=True)
class Bnb4(Codec):
    """Numbers of four bits, each the place in a table, two in a byte, the first in its high half; blocks have a factor.

    The rows lie one after the other without a break, blocks go on from one to the next. Factors may be places in a second
    table themselves, with factors for blocks of their own, and a number to be added.

    Attributes:
        shape: rows and columns of the matrix.
        block: numbers of a block.
        nested: factors of a block of factors, or None.

    Source: Dettmers et al. 2023; matches bitsandbytes' `dequantize_4bit`.
    """

    shape: tuple[int, int]
    block: int
    nested: int | None = None

    main: ClassVar[tuple[str, int]] = ("weight", 2)
    order: ClassVar[tuple[int, int] | None] = None
    derived: ClassVar[frozenset[str]] = frozenset({"nested_offset"})
    padded: ClassVar[frozenset[str]] = frozenset(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))

    def decode(self, parts: Parts) -> Array:
        bytes_ = parts["weight"].reshape(*parts["weight"].shape[:-2], -1)
        codes = jnp.stack([bytes_ >> 4, bytes_ & 15], axis=-1).reshape(*bytes_.shape[:-1], -1)
        scale = parts["weight.absmax"]
        if self.nested is not None:
            factors = spread(parts["weight.nested_absmax"], self.nested, -1, scale.shape[-1])
            scale = _entries(parts["weight.nested_quant_map"], scale) * factors + parts["nested_offset"][..., None]
        count = self.shape[0] * self.shape[1]
        values = _entries(parts["weight.quant_map"], codes[..., :count])
        values = values * spread(scale.astype(jnp.float32), self.block, -1, count)
        return values.reshape(*values.shape[:-1], *self.shape)


@dataclasses.dataclass(frozen=True)
class Bnb8(Codec):
    """`weight * SCB / 127`: a factor for each row.

    Source: Dettmers et al. 2022; matches bitsandbytes' `int8_vectorwise_dequant`.
    """

    main: ClassVar[tuple[str, int]] = ("weight", 2)

    def decode(self, parts: Parts) -> Array:
        return parts["weight"].astype(jnp.float32) * parts["SCB"][..., None] * BY_127

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        return {**parts, "weight": pick(parts["weight"], -2), "SCB": pick(parts["SCB"], -1)}


BY_127 = np.float32(7.874015718698502e-3)


def _entries(table: Array, index: Array) -> Array:
    """`table[index]`, with equal leading axes."""
    flat = jnp.take_along_axis(table, index.reshape(*table.shape[:-1], -1).astype(jnp.int32), axis=-1)
    return flat.reshape(index.shape)
