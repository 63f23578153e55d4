"""How quantised checkpoints pack matrices: one small decoder for each form, for the leaf `arrays.Quantized`.

Decoders compute in float32 and round once, to the leaf's dtype, as the libraries do that these forms are from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp

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


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """Numbers of eight bits, and one float32 factor for each block of them.

    Attributes:
        block: rows and columns of a block; None for one factor of the whole matrix.

    Source: DeepSeek-AI 2024, section 3.3; matches transformers' `Fp8Dequantize`.
    """

    block: tuple[int, int] | None

    main: ClassVar[tuple[str, int]] = ("weight", 2)

    def decode(self, parts: Parts) -> Array:
        codes, scale = parts["weight"], parts["weight_scale_inv"].astype(jnp.float32)
        if self.block is None:
            return codes.astype(jnp.float32) * scale.reshape(*codes.shape[:-2], 1, 1)
        for axis in (-2, -1):
            scale = spread(scale, self.block[axis], axis, codes.shape[axis])
        return codes.astype(jnp.float32) * scale

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        if self.block is None:
            return {**parts, "weight": pick(parts["weight"], -2)}
        scale = spread(parts["weight_scale_inv"], self.block[0], -2, parts["weight"].shape[-2])
        return {**parts, "weight": pick(parts["weight"], -2), "weight_scale_inv": pick(scale, -2)}


@dataclasses.dataclass(frozen=True)
class Mxfp4(Codec):
    """Numbers of four bits, two in a byte, the first in its low half; each 32 of a row have a power of two.

    Source: Open Compute Project, Microscaling Formats 1.0; matches transformers' `convert_moe_packed_tensors`.
    """

    main: ClassVar[tuple[str, int]] = ("blocks", 3)
    separator: ClassVar[str] = "_"

    def decode(self, parts: Parts) -> Array:
        blocks, scales = parts["blocks"], parts["scales"]
        codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
        values = jnp.ldexp(jnp.asarray(FP4, jnp.float32)[codes], scales.astype(jnp.int32)[..., None] - 127)
        return values.reshape(*blocks.shape[:-2], -1)

    def rows(self, parts: Parts, pick: Pick) -> dict[str, Array]:
        return {"blocks": pick(parts["blocks"], -3), "scales": pick(parts["scales"], -2)}
