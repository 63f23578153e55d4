"""A vocabulary of another size: every leaf with the letter `v` grows or shrinks together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fmodels import schema, tree
from fmodels.transforms import _leaves
from fmodels.types import Array, Key, Params

Config = TypeVar("Config", bound=Any)

INITS = ("mean", "normal", "zeros")
EPSILON = 1e-9
"""transformers' factor of the covariance of new rows, and of the standard deviation of new biases."""


def resize_embeddings(
    params: Params,
    config: Config,
    new_size: int | None,
    *,
    key: Key | None = None,
    pad_to_multiple_of: int | None = None,
    init: str = "mean",
) -> tuple[Params, Config]:
    """Changes the size of the vocabulary: token table, untied head and head bias, every leaf with the letter `v`.

    Old rows stay bit for bit. With `init="mean"` and E the old table `(v d)`, in float32, a new row is drawn from

        N(μ, 1e-9 Σ),   μ = mean(E),   Σ = (E - μ)ᵀ (E - μ) / v

    and is μ itself without `key`, or where 1e-9 Σ is not positive definite (always for v ≤ d). A new entry of an
    untied head's bias b is drawn from N(mean(b), (1e-9 std(b))²); that of a tied head's bias is 0. A head is tied if
    there is no leaf `lm_head.weight`. Works under `jit`, on stacked and unstacked trees and, with `init="zeros"`, on
    optimizer state (`map_state`).

    Args:
        params: the tree.
        config: its config.
        new_size: the number of tokens, at least 1; None keeps the present number, for `pad_to_multiple_of` to round up.
        key: random key for the new rows; without it the result is deterministic.
        pad_to_multiple_of: the size is rounded up to a multiple of this; 64 or 128 suit accelerators.
        init: of new rows: `"mean"`; `"normal"` for N(0, `config.initializer_range`²), which needs `key`, with biases 0;
            `"zeros"` for everything, as an optimizer's moments of rows that it has never seen.

    Returns:
        `(params, config)` with `config.vocab_size` set. A `pad_token_id` outside of the new vocabulary becomes None, as
        `padding_idx` does in transformers; other token ids of the config are left as they are.

    Raises:
        ValueError: `new_size` or `pad_to_multiple_of` below 1; an unknown `init`; `"normal"` without `key`; leaves with
            `v` that differ in size, or none.
        TypeError: a size that is not an integer; a table that is not floating.
        NotImplementedError: a quantised table that should grow (it can shrink).

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
        ...     head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> longer, config = fm.resize_embeddings(params, config, 13, pad_to_multiple_of=8)
        >>> longer["embed"]["tokens"].shape, config.vocab_size
        ((16, 8), 16)

    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models"; matches transformers 5
    `resize_token_embeddings(mean_resizing=True)`. Where it differs: `init="normal"` is for new rows only, as there; an
    unused second bias (`lm_head.spare_bias`) keeps its own old entries, there it becomes the first.
    """
    size, multiple = _check_arguments(new_size, pad_to_multiple_of, init, key)
    found = {path: schema.axes(path).index("v") for path in tree.flatten(params) if "v" in schema.axes(path)}
    tables = {path: leaf for path in found if not _leaves.is_hole(leaf := tree.get(params, path))}
    sizes = {path: int(leaf.shape[found[path]]) for path, leaf in tables.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"resize_embeddings: expected leaves with one size of the axis v, got {sizes or 'no leaf that has it'}"
        )
    old = next(iter(sizes.values()))
    new = -(-(old if size is None else size) // multiple) * multiple
    config = _with_size(config, new)
    if new == old:
        return params, config
    tied = "lm_head.weight" not in found
    keys = dict(zip(tables, (None,) * len(tables) if key is None else jax.random.split(key, len(tables)), strict=True))
    resized = {}
    for path, leaf in tables.items():
        if new < old:
            resized[path] = _leaves.select(path, leaf, slice(new), found[path])
        else:
            bias = len(leaf.shape) == 1
            how = "zeros" if bias and (tied or init == "normal") else init
            resized[path] = _grow(path, leaf, found[path], new - old, how, keys[path], config)
    return tree.update(params, resized), config


def _check_arguments(new_size: Any, multiple: Any, init: str, key: Any) -> tuple[int | None, int]:
    """The new size, None for the present one, and what to round up to a multiple of."""
    numbers = []
    for name, value in (("new_size", new_size), ("pad_to_multiple_of", multiple)):
        number = _leaves.integer(value)
        if value is not None and number is None:
            raise TypeError(f"resize_embeddings: expected an integer {name}, got {value!r}")
        if number is not None and number < 1:
            raise ValueError(f"resize_embeddings: expected {name} of at least 1, got {number}")
        numbers.append(number)
    if init not in INITS:
        raise ValueError(f"resize_embeddings: init={init!r} is not one of {', '.join(map(repr, INITS))}")
    if init == "normal" and key is None:
        raise ValueError("resize_embeddings: init='normal' needs a key, such as key=jax.random.key(0)")
    return numbers[0], numbers[1] or 1


def _with_size(config: Config, size: int) -> Config:
    changes: dict[str, Any] = {} if config.vocab_size == size else {"vocab_size": size}
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and pad >= size:
        changes["pad_token_id"] = None
    return dataclasses.replace(config, **changes) if changes else config


def _grow(path: str, leaf: Any, axis: int, count: int, how: str, key: Key | None, config: Any) -> Any:
    if not _leaves.is_plain(leaf):
        raise NotImplementedError(
            f"resize_embeddings: {path!r} is a {type(leaf).__name__}, which cannot grow; use fm.dequantize(params) "
            "first, or resize before quantising"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"resize_embeddings: {path!r} is {leaf.dtype}, expected a floating dtype")
    shape = [size for i, size in enumerate(leaf.shape) if i != axis]
    rows = jnp.moveaxis(jnp.asarray(leaf), axis, 0).reshape(leaf.shape[axis], math.prod(shape)).astype(jnp.float32)
    fresh = _new_rows(rows, count, how, key, config, scalar=not shape)
    fresh = jnp.moveaxis(fresh.reshape(count, *shape), 0, axis)
    if isinstance(leaf, np.ndarray) and not isinstance(fresh, jax.core.Tracer):
        return np.concatenate([leaf, np.asarray(fresh).astype(leaf.dtype)], axis)
    return jnp.concatenate([leaf, fresh.astype(leaf.dtype)], axis)


def _new_rows(rows: Array, count: int, how: str, key: Key | None, config: Any, *, scalar: bool) -> Array:
    """`(count d)` new rows for the old ones `(v d)`, float32; of entries of a bias, `scalar`, d is 1."""
    size, width = rows.shape
    if how == "zeros":
        return jnp.zeros((count, width), jnp.float32)
    if how == "normal":
        assert key is not None
        return config.initializer_range * jax.random.normal(key, (count, width), jnp.float32)
    mean = rows.mean(0, keepdims=True)
    flat = jnp.broadcast_to(mean, (count, width))
    # v rows about their mean span v - 1 dimensions: up to v = d the covariance is singular, whatever rounding says.
    if key is None or size <= width:
        return flat
    noise = jax.random.normal(key, (count, width), jnp.float32)
    if scalar:
        return flat + EPSILON * rows.std(0, ddof=1, keepdims=True) * noise
    centered = rows - mean
    covariance = jnp.matmul(centered.T, centered, precision="highest") / size
    factor = jnp.linalg.cholesky(EPSILON * covariance)
    return jnp.where(jnp.isfinite(factor).all(), flat + jnp.matmul(noise, factor.T, precision="highest"), flat)
