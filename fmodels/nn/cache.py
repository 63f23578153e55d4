"""The key-value cache: made once, carried through the layers, written one token at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels import tree
from fmodels.arrays import Scaled
from fmodels.types import Array, Cache, Params


class Slot(NamedTuple):
    """What one layer sees of the cache: the arrays that it writes to, its place in them, and where to write.

    Attributes:
        keys: `(l b g s k)` with `layer`, or this layer's own `(b g s k)` without; of 8 bits if they are `Scaled`; None
            where there is no cache.
        values: as `keys`.
        layer: index into the leading axis, or None.
        start: int32, the column of the first new token: `()`, or `(b)` where rows are at different places.
        columns: of the cache's mask; keys and values with fewer slots are a ring.
        weights: `(b h t s)` of the layer's attentions so far, in the order in which they are called; None where nobody
            asks for them.
        routed: `(b t x)`, the logits of the layer's router, if it has one.
    """

    keys: Any = None
    values: Any = None
    layer: Any = None
    start: Any = None
    columns: int = 0
    weights: tuple[Array, ...] | None = None
    routed: Array | None = None

    def keep(self, weights: Array) -> Slot:
        """With the weights of another attention, if they are asked for."""
        return self if self.weights is None else self._replace(weights=(*self.weights, weights))


NO_SLOT = Slot()
"""Of a layer without a cache."""


LATENT = ("turned_key", "latent")
"""What latent attention caches in place of keys and of values."""


def init_cache(
    params: Params, batch: int, length: int, *, quantized: bool = False, config: Any = None, ahead: int = 0
) -> Cache:
    """An empty cache for `length` tokens; its shapes and dtype are read from the parameters.

    Args:
        params: a tree with `layers.attention.key`, or `decoder.layers.attention.key`, or with latent attention.
        batch: rows.
        length: slots per row.
        quantized: whether keys and values are kept in 8 bits, with a scale for each token and head.
        config: the model's; with it layers that see a window have no more slots than that, see `rings`. All tokens are
            written then, and in order; padding between them would take the room of tokens.
        ahead: how many of the last tokens may be taken back.

    Returns:
        A `Cache` with stacked `(l b g s k)` arrays for a stacked tree, with a tuple of them for a tuple of layers.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.mistral.Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2,
        ...                                   num_kv_heads=1, head_dim=4, sliding_window=16)
        >>> params = fm.init(config, jax.random.key(0))
        >>> fm.init_cache(params, 1, 100).keys.shape, fm.init_cache(params, 1, 100, config=config).keys.shape
        ((2, 1, 1, 100, 4), (2, 1, 1, 15, 4))
    """
    sizes = None if config is None else rings(params, config, length, ahead=ahead)
    dtype = params["embed"]["tokens"].dtype
    stacks = tree.stacks(params)
    layers = stacks.get("decoder.layers", stacks.get("layers"))
    if layers is None:
        raise ValueError(f"init_cache: this model has no decoder, only {', '.join(stacks)}; it needs no cache")

    def zeros(shape: tuple[int, ...], slots: int) -> Any:
        *depth, groups, size = shape
        empty = jnp.zeros((*depth, batch, groups, slots, size), dtype)
        return Scaled(empty.astype(jnp.int8), jnp.zeros((*empty.shape[:-1], 1), dtype)) if quantized else empty

    def of_layer(layer: Params, slots: int) -> tuple[Any, Any]:
        part = layer["attention"]
        if "latent" in part:  # what all heads share
            shapes = [(*part[name]["weight"].shape[:-2], 1, part[name]["weight"].shape[-2]) for name in LATENT]
        else:
            shapes = [part[name]["weight"].shape[:-1] for name in ("key", "value")]
        return zeros(shapes[0], slots), zeros(shapes[1], slots)

    if isinstance(layers, Mapping):
        keys, values = of_layer(dict(layers), length if sizes is None else sizes[0])
    else:
        sizes = sizes or (length,) * len(layers)
        keys, values = (tuple(part) for part in zip(*map(of_layer, layers, sizes), strict=True))
    return Cache(keys, values, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


def rings(params: Params, config: Any, columns: int, *, ahead: int = 0) -> tuple[int, ...] | None:
    """How many slots each layer needs for a text of so many columns; None where all need all.

    A token sees those of the window before it, which may still be written over once it is read. Layers that are stacked
    have caches of one size: they need all columns as soon as one of them sees all.

    Args:
        params: the tree.
        config: its config; `config.windows`.
        columns: of the text.
        ahead: how many of the last tokens may be taken back: what they wrote over must not be missed.
    """
    if config.windows is None:
        return None
    sizes = tuple(columns if w is None else min(columns, max(w - 1 + ahead, 1)) for w in config.windows)
    sizes = (max(sizes),) * len(sizes) if isinstance(params["layers"], Mapping) else sizes
    return None if min(sizes) == columns else sizes


def columns_of(length: Array, slots: int) -> Array:
    """`(b or 1, slots)` int32: which column each slot of a ring holds after `length` columns; negative for none."""
    last = jnp.atleast_1d(length)[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots


def read(slot: Slot) -> tuple[Array, Array]:
    """All keys and values of this layer, `(b g s k)` each."""
    keys, values = slot.keys, slot.values
    if slot.layer is not None:
        layer = jnp.asarray(slot.layer, jnp.int32)
        keys, values = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (slot.keys, slot.values)
        )
    keys, values = (x.dequantize() if isinstance(x, Scaled) else x for x in (keys, values))
    return keys, values


def write(slot: Slot, key: Array, value: Array, context: Array) -> Slot:
    """Writes new keys and values `(b t g k)`.

    Args:
        slot: where to.
        key: keys of the new tokens.
        value: their values.
        context: `(b t h k)`, what the layer has read. The new keys are made to depend on it, at no change of their
            values: XLA's CPU backend copies a whole cache at each step if it may write before it has read.
    """
    after = jax.lax.stop_gradient(jnp.minimum(jnp.abs(context[:, :, : key.shape[2]]), 0))
    zero = jnp.zeros((), jnp.int32)

    def put(array: Array, new: Array) -> Array:
        if array.shape[-2] < slot.columns:
            return _write_ring(array, new, slot)
        if slot.start.ndim:
            return _write_rows(array, new, slot)
        place = (zero, zero, slot.start, zero)
        if slot.layer is not None:
            new, place = new[None], (jnp.asarray(slot.layer, jnp.int32), *place)
        return jax.lax.dynamic_update_slice(array, new, place)

    arrays = []
    for array, new in ((slot.keys, key), (slot.values, value)):
        new = (new + after).swapaxes(1, 2).astype(array.dtype)
        arrays.append(jax.tree.map(put, array, Scaled.quantize(new) if isinstance(array, Scaled) else new))
    return slot._replace(keys=arrays[0], values=arrays[1])


def _write_rows(array: Array, new: Array, slot: Slot) -> Array:
    """`array` with `new` `(b g t k)` written from `slot.start` `(b)` on, each row at its own place.

    A row is one window of a scatter: XLA's CPU backend takes a step of a loop for each. A window that reaches beyond the
    end is moved back to it: that of a row that has ended.
    """
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    places, axes = [rows, slot.start], (0, 2)
    if slot.layer is not None:
        places, axes = [jnp.full_like(rows, slot.layer), *places], (0, 1, 3)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=axes[:-1], scatter_dims_to_operand_dims=axes
    )
    return jax.lax.scatter(
        array, jnp.stack(places, axis=1), new, numbers,
        indices_are_sorted=True, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP,
    )  # fmt: skip


def _write_ring(array: Array, new: Array, slot: Slot) -> Array:
    """As `_write_rows`, into a ring; of more tokens than it has slots the last."""
    slots, count = array.shape[-2], new.shape[2]
    first = max(0, count - slots)
    places = (jnp.atleast_1d(slot.start)[:, None] + jnp.arange(first, count, dtype=jnp.int32)[None]) % slots
    places = jnp.broadcast_to(places, (new.shape[0], count - first))
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    new = new[:, :, first:].swapaxes(1, 2)  # axes that are indexed apart come first
    if slot.layer is None:
        return array.at[rows, :, places].set(new)
    return array.at[jnp.full_like(rows, slot.layer), rows, :, places].set(new)


def extend(cache: Cache, present: Array) -> Cache:
    """Marks the next `t` slots by `present` `(b t)`."""
    zero = jnp.zeros((), jnp.int32)
    t = present.shape[1]
    if cache.length.ndim:
        since = jnp.arange(cache.mask.shape[1], dtype=jnp.int32)[None] - cache.length[:, None]
        new = jnp.take_along_axis(present, jnp.clip(since, 0, t - 1), axis=1)
        mask = jnp.where((since >= 0) & (since < t), new, cache.mask)
    else:
        mask = jax.lax.dynamic_update_slice(cache.mask, present, (zero, cache.length))
    return cache._replace(mask=mask, length=cache.length + t)


def map_rows(cache: Cache, function: Any) -> Cache:
    """The cache with `function(array, axis)` applied to every array that has an axis of rows, and which axis that is."""
    stacked = not isinstance(cache.keys, tuple)

    def both(keys: Any, values: Any) -> tuple[Any, Any]:
        axis = 1 if stacked else 0
        return jax.tree.map(lambda x: function(x, axis), (keys, values))

    keys, values = both(cache.keys, cache.values)
    cross = cache.cross
    if cross is not None:
        cross = cross._replace(**dict(zip(("keys", "values"), both(cross.keys, cross.values), strict=True)))
        cross = cross._replace(mask=function(cross.mask, 0))
    length = function(cache.length, 0) if cache.length.ndim else cache.length
    other = None if cache.other is None else map_rows(cache.other, function)
    return Cache(keys, values, function(cache.mask, 0), length, cross, other)


def take_rows(cache: Cache, rows: Array) -> Cache:
    """Rows of the cache, by number, in a new order: `rows` `(n)` int32."""
    return map_rows(cache, lambda x, axis: jnp.take(x, rows, axis=axis))


def repeat_rows(cache: Cache, count: int) -> Cache:
    """Each row `count` times, copies side by side."""
    return cache if count == 1 else map_rows(cache, lambda x, axis: jnp.repeat(x, count, axis=axis))


def put_rows(cache: Cache, new: Cache, rows: Array) -> Cache:
    """The cache with other rows in the place of `rows` `(n)`, each at its own length; numbers beyond the last are dropped.

    Args:
        cache: with a `length` for each row.
        new: of `n` rows, with at most as many slots.
        rows: `(n)` int32.
    """
    axis = 0 if isinstance(cache.keys, tuple) else 1

    def put(x: Array, y: Array, axis: int) -> Array:
        return set_rows(x, y, rows, axis)

    length = jnp.broadcast_to(new.length, rows.shape)
    cross = cache.cross
    if cross is not None and new.cross is not None:
        keys, values = jax.tree.map(
            lambda x, y: put(x, y, axis), (cross.keys, cross.values), (new.cross.keys, new.cross.values)
        )
        cross = cross._replace(keys=keys, values=values, mask=put(cross.mask, new.cross.mask, 0))
    keys, values = jax.tree.map(lambda x, y: put(x, y, axis), (cache.keys, cache.values), (new.keys, new.values))
    return Cache(keys, values, put(cache.mask, new.mask, 0), put(cache.length, length, 0), cross)


def set_rows(x: Array, y: Array, rows: Array, axis: int = 0) -> Array:
    """`x` with `y`, filled up with zeros to the size of a row, at the places `rows` of `axis`."""
    more = [(0, 0 if i == axis else n - m) for i, (n, m) in enumerate(zip(x.shape, y.shape, strict=True))]
    if any(after for _, after in more):
        y = jnp.pad(y, more)
    return x.at[(*[slice(None)] * axis, rows)].set(y, mode="drop")


def grow(cache: Cache, slots: int, sizes: tuple[int, ...] | None = None) -> Cache:
    """A cache with room for `slots` columns, those that it has included.

    Args:
        cache: to be grown; rings stay as they are.
        slots: how many columns.
        sizes: of each layer, from `rings`: layers that need fewer slots become rings, of the last columns.
    """
    columns = cache.mask.shape[1]
    more = max(slots - columns, 0)

    def fit(x: Any, size: int) -> Any:
        return jax.tree.map(lambda a: _fit(a, size, columns, cache.length), x)

    if isinstance(cache.keys, tuple):
        sizes = sizes or (columns + more,) * len(cache.keys)
        keys, values = (tuple(map(fit, part, sizes)) for part in (cache.keys, cache.values))
    else:
        size = columns + more if sizes is None else sizes[0]
        keys, values = fit(cache.keys, size), fit(cache.values, size)
    return cache._replace(keys=keys, values=values, mask=jnp.pad(cache.mask, [(0, 0), (0, more)]))


def _fit(x: Array, size: int, columns: int, length: Array) -> Array:
    """Keys or values `(… s k)` of so many columns in `size` slots."""
    slots = x.shape[-2]
    if slots < columns or slots == size:
        return x
    if size > slots:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - slots), (0, 0)])
    return jnp.take(x, jnp.maximum(columns_of(length, size)[0], 0), axis=-2)  # one length: it was just read
