"""Positions of tokens, and rotary position embeddings in all of transformers 5's forms."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from fmodels.types import Array, Cache


def from_mask(mask: Array) -> Array:
    """`cumsum(mask) - 1`, not below 0: real tokens count from 0 in each row, wherever the padding is.

    Example:
        >>> import jax.numpy as jnp
        >>> from_mask(jnp.array([[0, 1, 1], [1, 1, 0]]))
        Array([[0, 0, 1],
               [0, 1, 1]], dtype=int32)
    """
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def of_call(tokens: Array, mask: Array | None, positions: Array | None, cache: Cache | None) -> tuple[Array, Array]:
    """Which tokens of a call are real, `(b t)` bool, and their positions: unless given, they go on after the cache's."""
    present = jnp.ones(tokens.shape, bool) if mask is None else mask
    if positions is None:
        before = 0 if cache is None else cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
        positions = from_mask(present) + before
    return present, positions


def columns(tokens: Array, cache: Cache | None) -> Array:
    """Positions `(b t)` that count columns, or slots of the cache, whatever the mask."""
    start = jnp.zeros((1, 1), jnp.int32) if cache is None else jnp.reshape(cache.length, (-1, 1))
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + start, tokens.shape)


def distance_buckets(distances: Array, count: int, *, causal: bool, max_distance: int) -> Array:
    """Numbers of T5's buckets: one for each short distance, then ever wider ones up to `max_distance`.

    Args:
        distances: int32, of the key from the query; negative where it is before it.
        count: of buckets; both directions share them, unless `causal`.
        causal: whether keys after the query are left out; they count as at its place.
        max_distance: from which on all share the last bucket.

    Example:
        >>> import jax.numpy as jnp
        >>> distance_buckets(jnp.array([-200, -20, -3, 0, 3]), 32, causal=False, max_distance=128)
        Array([15, 10,  3,  0, 19], dtype=int32)

    Source: Raffel et al. 2020; matches transformers' `T5Attention._relative_position_bucket`.
    """
    side = count if causal else count // 2
    exact = side // 2
    # A table, so that rounding of logarithms in float32 is numpy's on every platform.
    far = np.maximum(np.arange(max_distance + 1), 1).astype(np.float32)
    wide = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    number = np.where(far < exact, far, np.minimum(exact + np.trunc(wide), side - 1)).astype(np.int32)
    number[0] = 0
    steps = jnp.maximum(-distances, 0) if causal else jnp.abs(distances)
    found = jnp.asarray(number)[jnp.minimum(steps, max_distance)]
    return found if causal else found + jnp.where(distances > 0, side, 0)


def signed_log_buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """DeBERTa's buckets of the distances `i - j` in a text, `(t t)` int32: the near ones themselves, the far ones ever wider.

    Args:
        length: of the text.
        count: of buckets on each side; below 1 for distances as they are.
        max_distance: the longest that has a bucket of its own.

    Example:
        >>> signed_log_buckets(8, 4, 8)[7].tolist()
        [3, 3, 3, 3, 3, 2, 1, 0]

    Source: He et al. 2021; matches transformers' `make_log_bucket_position`.
    """
    distances = np.arange(length, dtype=np.int32)[:, None] - np.arange(length, dtype=np.int32)[None]
    middle = count // 2
    if count < 1:
        return distances
    far = np.maximum(np.abs(distances), middle).astype(np.float32) / np.float32(middle)
    with np.errstate(all="ignore"):  # buckets that reach beyond max_distance
        wide = np.ceil(np.log(far) / np.log(np.float32((max_distance - 1) / middle)) * np.float32(middle - 1)) + middle
    return np.where(np.abs(distances) <= middle, distances, wide * np.sign(distances)).astype(np.int32)


def sinusoids(positions: Array, size: int) -> Array:
    """Sines, then cosines, of `(b t)` positions at `size / 2` frequencies: `(b t size)` float32.

    Source: Vaswani et al. 2017; matches transformers' `XGLMSinusoidalPositionalEmbedding`.
    """
    half = size // 2
    steps = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(np.exp(steps))[None, None]
    found = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(found, [(0, 0), (0, 0), (0, size % 2)])


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float32: a geometric series; beyond a power of two, every other of a finer one.

    Example:
        >>> alibi_slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]

    Source: Press et al. 2021; matches transformers' `build_alibi_tensor`.
    """
    power = 2 ** int(math.log2(heads))
    base, finer = (np.float32(2 ** (-(2 ** (3 - math.log2(n))))) for n in (power, 2 * power))
    return np.concatenate([base ** np.arange(1, power + 1), finer ** np.arange(1, 2 * (heads - power), 2)]).astype(
        np.float32
    )


def last_real(mask: Array) -> Array:
    """The column of the last True of each row of `(b t)`, 0 where there is none: `(b)` int32."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    return jnp.argmax(jnp.where(mask, columns, 0), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The settings of rotary position embeddings, by transformers' names.

    `type` is one of default, linear, dynamic, yarn, longrope, llama3, proportional.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    partial_rotary_factor: float = 1.0


def rope_tables(rope: Rope, positions: Array, head_dim: int, max_positions: int) -> tuple[Array, Array]:
    """Cosines and sines of the angles `position * frequency`, times the type's attention factor.

    Two types depend on the longest sequence: `dynamic` stretches its base beyond `max_positions`, and `longrope`
    takes its long factors beyond `original_max_positions`. Both look at the largest of `positions`, so that rows of
    a batch share one table, as in transformers.

    Args:
        rope: the settings.
        positions: `(b t)` int.
        head_dim: size of a head.
        max_positions: the config's maximum of positions.

    Returns:
        Two float32 arrays `(b t k/2)`.

    Source: Su et al. 2021; Peng et al. 2023 (yarn); Ding et al. 2024 (longrope); matches transformers 5's
    `modeling_rope_utils` and `LlamaRotaryEmbedding`.
    """
    frequencies, factor = _frequencies(rope, head_dim, max_positions, jnp.max(positions) + 1)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _frequencies(rope: Rope, dim: int, max_positions: int, length: Array) -> tuple[Array, float]:
    original = rope.original_max_positions or max_positions
    exponents = np.arange(0, dim, 2, dtype=np.int64).astype(np.float32) / np.float32(dim)
    inverse = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)

    if rope.type == "dynamic":
        scale = rope.factor or 1.0
        longest = jnp.maximum(length, max_positions).astype(jnp.float32)
        base = rope.theta * (scale * longest / max_positions - (scale - 1)) ** (dim / (dim - 2))
        return 1.0 / base ** jnp.asarray(exponents), 1.0

    if rope.type == "longrope":
        scale = rope.factor or max_positions / original
        factor = 1.0 if scale <= 1.0 else math.sqrt(1 + math.log(scale) / math.log(original))
        factor = factor if rope.attention_factor is None else rope.attention_factor
        powers = np.float32(rope.theta) ** exponents
        short, long = (1.0 / (np.asarray(f, np.float32) * powers) for f in (rope.short_factor, rope.long_factor))
        return jnp.where(length > original, jnp.asarray(long), jnp.asarray(short)), factor

    if rope.type == "yarn":
        return jnp.asarray(
            _yarn(rope, dim, exponents, rope.factor or max_positions / original, original)
        ), _yarn_factor(rope, rope.factor or max_positions / original)

    if rope.type == "llama3":
        assert rope.factor is not None and rope.low_freq_factor is not None and rope.high_freq_factor is not None
        low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
        wavelength = 2 * math.pi / inverse
        slow = np.where(wavelength > low, inverse / rope.factor, inverse)
        smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - smooth) * slow / rope.factor + smooth * slow
        medium = ~(wavelength < high) & ~(wavelength > low)
        return jnp.asarray(np.where(medium, between, slow).astype(np.float32)), 1.0

    if rope.type == "proportional":
        rotated = int(rope.partial_rotary_factor * dim // 2)
        inverse = np.where(np.arange(dim // 2) < rotated, inverse, 0.0).astype(np.float32)

    if rope.type in ("linear", "proportional"):
        inverse = (inverse / np.float32(rope.factor or 1.0)).astype(np.float32)
    return jnp.asarray(inverse), 1.0


def _yarn(rope: Rope, dim: int, exponents: np.ndarray, factor: float, original: int) -> np.ndarray:
    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast or 32), correction(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1).astype(np.float32)
    powers = np.float32(rope.theta) ** exponents
    return (1.0 / (factor * powers) * ramp + 1.0 / powers * (1 - ramp)).astype(np.float32)


def _yarn_factor(rope: Rope, factor: float) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotate(x: Array, tables: tuple[Array, Array], *, interleaved: bool = False) -> Array:
    """Rotates the pairs `(x[i], x[i + r/2])` of each head by the angles of the tables (the half-split pairing).

    Args:
        x: `(b t h k)`.
        tables: cosines and sines `(b t r/2)` from `rope_tables`; the last `k - r` numbers of each head stay.
        interleaved: pairs are `(x[2i], x[2i + 1])`.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    size = 2 * cos.shape[-1]
    wide, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pairs, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(pairs, axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
