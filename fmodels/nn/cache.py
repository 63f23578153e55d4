"""The key-value cache: made once, carried through the layers, written one token at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels import tree
from fmodels.types import Array, Cache, Params


class Slot(NamedTuple):
    """What one layer sees of the cache: the arrays that it writes to, its place in them, and where to write.

    Attributes:
        keys: `(l b g s k)` with `layer`, or this layer's own `(b g s k)` without.
        values: as `keys`.
        layer: index into the leading axis, or None.
        start: `()` int32, the slot of the first new token.
    """

    keys: Array
    values: Array
    layer: Any
    start: Array


def init_cache(params: Params, batch: int, length: int) -> Cache:
    """An empty cache for `length` tokens; its shapes and dtype are read from the parameters.

    Args:
        params: a tree with `layers.attention.key`.
        batch: rows.
        length: slots per row.

    Returns:
        A `Cache` with stacked `(l b g s k)` arrays for a stacked tree, with a tuple of them for a tuple of layers.
    """
    dtype = params["embed"]["tokens"].dtype

    def zeros(weight: Any) -> Array:
        *layers, groups, size, _ = weight.shape
        return jnp.zeros((*layers, batch, groups, length, size), dtype)

    if tree.is_stacked(params):
        keys, values = (zeros(tree.get(params, f"layers.attention.{name}.weight")) for name in ("key", "value"))
    else:
        keys, values = (
            tuple(zeros(layer["attention"][name]["weight"]) for layer in params["layers"]) for name in ("key", "value")
        )
    return Cache(keys, values, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


def write(slot: Slot, key: Array, value: Array) -> tuple[Slot, Array, Array]:
    """Writes new keys and values `(b t g k)` and returns the slot and all of this layer's, `(b g s k)`."""
    arrays, full = [], []
    zero = jnp.zeros((), jnp.int32)
    for array, new in ((slot.keys, key), (slot.values, value)):
        new = new.swapaxes(1, 2).astype(array.dtype)
        if slot.layer is None:
            array = jax.lax.dynamic_update_slice(array, new, (zero, zero, slot.start, zero))
            full.append(array)
        else:
            layer = jnp.asarray(slot.layer, jnp.int32)
            array = jax.lax.dynamic_update_slice(array, new[None], (layer, zero, zero, slot.start, zero))
            full.append(jax.lax.dynamic_index_in_dim(array, layer, keepdims=False))
        arrays.append(array)
    return slot._replace(keys=arrays[0], values=arrays[1]), full[0], full[1]


def extend(cache: Cache, mask: Array) -> Cache:
    """Marks the next `t` slots by `mask` `(b t)`; the layers then write to them at the old `cache.length`."""
    zero = jnp.zeros((), jnp.int32)
    return cache._replace(
        mask=jax.lax.dynamic_update_slice(cache.mask, mask, (zero, cache.length)),
        length=cache.length + mask.shape[1],
    )
