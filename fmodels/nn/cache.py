"""The key-value cache: made once, carried through the layers, written one token at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
        held: `(b columns)` int32, how many real tokens are before that of each column, -1 where there is none; None in a
            cache without rings.
        places: `(b t)` int32, likewise of the new tokens.
        weights: `(b h t s)` of the layer's attentions so far, in the order in which they are called; None where nobody
            asks for them.
        routed: `(b t x)`, the logits of the layer's router, if it has one.
    """

    keys: Any = None
    values: Any = None
    layer: Any = None
    start: Any = None
    columns: int = 0
    held: Array | None = None
    places: Array | None = None
    weights: tuple[Array, ...] | None = None
    routed: Array | None = None

    def keep(self, weights: Array) -> Slot:
        """With the weights of another attention, if they are asked for."""
        return self if self.weights is None else self._replace(weights=(*self.weights, weights))


NO_SLOT = Slot()
"""Of a layer without a cache."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Keys, or values, of stacked layers that do not need equally many slots.

    Attributes:
        stacks: `(m b g s k)` of the `m` layers with so many slots, in their order, for each number of slots.
        which: of each layer, the number of its stack; static.
    """

    stacks: tuple[Any, ...]
    which: tuple[int, ...] = dataclasses.field(metadata={"static": True})


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
        config: the model's; with it layers that see a window have no more slots than that, see `rings`.
        ahead: how many of the last tokens may be taken back.

    Returns:
        A `Cache` with stacked `(l b g s k)` arrays for a stacked tree (`Groups` of them where layers do not need equally many
        slots), with a tuple of `(b g s k)` for a tuple of layers.

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

    def zeros(shape: tuple[int, ...], slots: int, count: int | None) -> Any:
        *depth, groups, size = shape
        depth = depth if count is None else [count]
        empty = jnp.zeros((*depth, batch, groups, slots, size), dtype)
        return Scaled(empty.astype(jnp.int8), jnp.zeros((*empty.shape[:-1], 1), dtype)) if quantized else empty

    def of_layer(layer: Params, slots: int, count: int | None = None) -> tuple[Any, Any]:
        part = layer["attention"]
        if "latent" in part:  # what all heads share
            shapes = [(*part[name]["weight"].shape[:-2], 1, part[name]["weight"].shape[-2]) for name in LATENT]
        else:
            shapes = [part[name]["weight"].shape[:-1] for name in ("key", "value")]
        return zeros(shapes[0], slots, count), zeros(shapes[1], slots, count)

    if not isinstance(layers, Mapping):
        sizes = sizes or (length,) * len(layers)
        keys, values = (tuple(part) for part in zip(*map(of_layer, layers, sizes), strict=True))
    elif sizes is None or len(set(sizes)) == 1:
        keys, values = of_layer(dict(layers), sizes[0] if sizes else length)
    else:
        stacks = [of_layer(dict(layers), slots, sizes.count(slots)) for slots in dict.fromkeys(sizes)]
        keys, values = (Groups(tuple(part), _numbered(sizes)) for part in zip(*stacks, strict=True))
    return Cache(keys, values, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


def rings(params: Params, config: Any, columns: int, *, ahead: int = 0) -> tuple[int, ...] | None:
    """How many slots each layer needs for a text of so many columns; None where all need all.

    A token sees those of the window before it, which may still be written over once it is read. Only real tokens are written,
    so that padding between them takes no room. Layers that are stacked run a period of their pattern at a time (five with a
    window and one without, say); where the pattern is so irregular that more than `WRITTEN_OUT` layers would have to be
    compiled, all get as many slots as the one that needs most.

    Args:
        params: the tree.
        config: its config; `config.windows`.
        columns: of the text.
        ahead: how many of the last tokens may be taken back: what they wrote over must not be missed.
    """
    if config.windows is None:
        return None
    layers = params["layers"]
    depth = jax.tree.leaves(layers)[0].shape[0] if isinstance(layers, Mapping) else len(layers)
    windows = config.windows[:depth]  # a draft may be the first layers alone
    sizes = tuple(columns if w is None else min(columns, max(w - 1 + ahead, 1)) for w in windows)
    if isinstance(layers, Mapping) and sum(n for _, n, _ in periods(_numbered(sizes))) > WRITTEN_OUT:
        sizes = (max(sizes),) * len(sizes)
    return None if min(sizes) == columns else sizes


WRITTEN_OUT = 12
"""How many layers of a stacked tree are compiled apart at most, because their caches differ in size."""


def _numbered(sizes: Sequence[int]) -> tuple[int, ...]:
    """The number of each size, in the order in which they occur."""
    different = list(dict.fromkeys(sizes))
    return tuple(map(different.index, sizes))


@functools.lru_cache
def periods(which: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """A pattern in pieces that repeat themselves: `(first, length of the period, times)`, with the shortest periods in sum.

    Example:
        >>> periods((0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0))
        ((0, 3, 3), (9, 1, 2))
    """
    best: dict[int, tuple[int, tuple[Any, ...]]] = {len(which): (0, ())}
    for first in reversed(range(len(which))):
        found = []
        for length in range(1, len(which) - first + 1):
            end = first + length
            while True:
                cost, rest = best[end]
                found.append((cost + length, ((first, length, (end - first) // length), *rest)))
                if which[end : end + length] != which[first : first + length]:
                    break
                end += length
        best[first] = min(found, key=lambda one: (one[0], len(one[1]), -one[1][0][1] * one[1][0][2]))
    return best[0][1]


def slots_of(cache: Cache) -> tuple[int, ...]:
    """How many slots each layer has."""
    keys = cache.keys
    if isinstance(keys, tuple):
        return tuple(x.shape[-2] for x in keys)
    if isinstance(keys, Groups):
        return tuple(keys.stacks[group].shape[-2] for group in keys.which)
    return (keys.shape[-2],) * keys.shape[0]


def opened(cache: Cache, present: Array) -> Slot:
    """What the slots of all layers share, for new tokens that are `present` `(b t)`."""
    columns = cache.mask.shape[1]
    slot = Slot(start=cache.length, columns=columns)
    if min(slots_of(cache)) == columns:
        return slot
    held = _places(cache.mask)
    return slot._replace(held=held, places=_places(present, held.max(-1, keepdims=True) + 1))


def _places(mask: Array, before: Any = 0) -> Array:
    """`(b s)` int32: how many real tokens are before each, -1 for padding; so many are before all of them."""
    return jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1 + before, -1)


def ring_places(count: Array, slots: int) -> Array:
    """`(b slots)` int32: which real token each slot of a ring holds after `count` `(b)` of them; negative for none."""
    last = count[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots


def by_layer(keys: Any) -> tuple[Any, ...]:
    """Keys, or values, of each layer, `(b g s k)`."""
    if isinstance(keys, tuple):
        return keys
    if isinstance(keys, Groups):
        places = [keys.which[:i].count(group) for i, group in enumerate(keys.which)]
        pairs = [(keys.stacks[group], place) for group, place in zip(keys.which, places, strict=True)]
    else:
        pairs = [(keys, i) for i in range(keys.shape[0])]
    return tuple(jax.tree.map(lambda x, i=i: x[i], stack) for stack, i in pairs)


def stacked(keys: Any) -> Any:
    """Of keys, or values, of each layer: one array of all, or `Groups` where they differ in their numbers of slots."""
    if not isinstance(keys, tuple):
        return keys
    which = _numbered([x.shape[-2] for x in keys])
    groups = [[x for x, mine in zip(keys, which, strict=True) if mine == group] for group in range(max(which) + 1)]
    stacks = tuple(jax.tree.map(lambda *a: jnp.stack(a), *group) for group in groups)
    return stacks[0] if len(stacks) == 1 else Groups(stacks, which)


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
    """As `_write_rows`, into a ring, which real tokens alone go to; of more than it has slots the last."""
    assert slot.places is not None
    slots, places = array.shape[-2], slot.places
    stays = (places >= 0) & (places > places.max(-1, keepdims=True) - slots)
    places = jnp.where(stays, places % slots, slots)  # beyond the end
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    new = new.swapaxes(1, 2)  # axes that are indexed apart come first
    if slot.layer is None:
        return array.at[rows, :, places].set(new, mode="drop")
    return array.at[jnp.full_like(rows, slot.layer), rows, :, places].set(new, mode="drop")


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
        new: of `n` rows, with at most as many columns.
        rows: `(n)` int32.
    """
    new = grow(new, cache.mask.shape[1], slots_of(cache))
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


def grow(cache: Cache, columns: int, sizes: Sequence[int] | None = None) -> Cache:
    """A cache with room for `columns` columns, those that it has included.

    Args:
        cache: to be grown.
        columns: how many.
        sizes: of each layer, from `rings`: layers that need fewer slots become rings, of the last real tokens; rings that
            have fewer get more, none gets fewer. If None, rings stay as they are.
    """
    before = cache.mask.shape[1]
    columns = max(columns, before)
    now = slots_of(cache)
    sizes = [columns if slots == before else slots for slots in now] if sizes is None else sizes
    sizes = [max(size, slots) if slots < before else size for size, slots in zip(sizes, now, strict=True)]
    fit = functools.partial(_fit, cache=cache, columns=columns)
    if isinstance(cache.keys, tuple):
        keys, values = (tuple(map(fit, part, sizes)) for part in (cache.keys, cache.values))
    else:
        keys, values = (_regroup(part, sizes, fit) for part in (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, mask=jnp.pad(cache.mask, [(0, 0), (0, columns - before)]))


def _regroup(keys: Any, sizes: Sequence[int], fit: Any) -> Any:
    """Stacked keys, or values, with so many slots of each layer. Layers that have differed before do so now."""
    which = _numbered(sizes)
    old = keys if isinstance(keys, Groups) else Groups((keys,), (0,) * len(sizes))
    stacks = []
    for group in range(max(which) + 1):
        members = [i for i, mine in enumerate(which) if mine == group]
        stack, theirs = (
            old.stacks[old.which[members[0]]],
            [i for i, g in enumerate(old.which) if g == old.which[members[0]]],
        )
        if members != theirs:
            places = np.asarray([theirs.index(i) for i in members])
            stack = jax.tree.map(lambda x, places=places: x[places], stack)
        stacks.append(fit(stack, sizes[members[0]]))
    return stacks[0] if len(stacks) == 1 else Groups(tuple(stacks), which)


def _fit(keys: Any, size: int, *, cache: Cache, columns: int) -> Any:
    """Keys or values `(… b g s k)` of the cache in `size` slots, when it has so many columns."""
    slots, before = keys.shape[-2], cache.mask.shape[1]
    if slots == before and size == columns:
        more = columns - before
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) if more else x, keys)
    if slots == size and slots < before:
        return keys
    held = _places(cache.mask)
    wanted = ring_places(held.max(-1) + 1, size) if size < columns else jnp.pad(held, ((0, 0), (0, size - before)))
    wanted = jnp.maximum(wanted, 0)
    if slots < before:
        index = wanted % slots
    else:
        order = jnp.argsort(~cache.mask, axis=-1, stable=True).astype(jnp.int32)
        index = jnp.take_along_axis(order, jnp.minimum(wanted, before - 1), axis=1)

    def take(x: Array) -> Array:
        where = index.reshape(*[1] * (x.ndim - 4), index.shape[0], 1, size, 1)
        return jnp.take_along_axis(x, where, axis=-2)

    return jax.tree.map(take, keys)
