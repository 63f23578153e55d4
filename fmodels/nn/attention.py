"""Multi-head and grouped-query attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.arrays import precision, take
from fmodels.nn import kernels
from fmodels.nn.cache import NO_SLOT, Slot, read, ring_places, write
from fmodels.nn.linear import linear
from fmodels.nn.positions import distance_buckets, from_mask, rotate
from fmodels.types import Array, Cache, Params


class Attend(NamedTuple):
    """Which keys each query sees.

    Attributes:
        new: `(b t t)` bool, of the tokens of this call.
        old: `(b 1 s)` or `(b t s)` bool, of the slots of the cache; None where there is no cache or nothing in it.
        new_bias: `(1 h t t)`, or `(b h 1 t)`, float32, added to the scores; None for nothing.
        old_bias: `(b h t s)`, or with 1 in the place of `b` or `t`, as `new_bias`.
    """

    new: Array
    old: Array | None
    new_bias: Array | None = None
    old_bias: Array | None = None


class Part(NamedTuple):
    """Keys and values that queries look at.

    Attributes:
        keys: `(b g s k)`.
        values: `(b g s k)`.
        seen: `(b t s)` or `(b 1 s)` bool, which of them each query sees.
        bias: `(b h t s)` float32, or with 1 in the place of `b` or `t`, added to the scores; None for nothing.
    """

    keys: Array
    values: Array
    seen: Array
    bias: Array | None = None


def attend(
    present: Array,
    cache: Cache | None = None,
    *,
    causal: bool,
    window: int | None = None,
    slots: int | None = None,
    reach: int | None = None,
) -> Attend:
    """Who sees whom.

    Args:
        present: `(b t)` bool, True for real tokens.
        cache: with the tokens before these; one that they fill from end to end has none.
        causal: whether a token of this call sees only those of this call at its own place and before it.
        window: how many tokens a token of a causal model sees at most, itself included. Columns count, as in transformers; but
            with a cache only real tokens, so that padding behind a prompt takes no place.
        slots: how many slots the layers' keys and values have, where that is fewer than the columns of the cache: a ring.
        reach: how many columns away a token of an encoder sees others, before it and behind it.
    """
    t = present.shape[1]
    new = jnp.broadcast_to(present[:, None, :], (present.shape[0], t, t))
    if reach is not None:
        places = jnp.arange(t, dtype=jnp.int32)
        new = new & (jnp.abs(places[:, None] - places[None]) <= reach)[None]
    if causal:
        new = new & jnp.tril(jnp.ones((t, t), bool))[None]
    old = None if cache is None or cache.mask.shape[1] == t else cache.mask[:, None, :]
    if window is not None:
        places = jnp.arange(t, dtype=jnp.int32)[None]
        if cache is not None:
            before = cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
            places = jnp.cumsum(present, axis=-1, dtype=jnp.int32) + before
        new = new & (places[:, :, None] - places[:, None, :] < window)
        if old is not None and cache is not None:
            before, there = jnp.cumsum(cache.mask, axis=-1, dtype=jnp.int32), cache.mask
            if slots is not None and slots < cache.mask.shape[1]:
                before = ring_places(cache.mask.sum(-1, dtype=jnp.int32), slots) + 1
                there = before > 0
            old = there[:, None, :] & (places[:, :, None] - before[:, None, :] < window)
    return Attend(new, old)


def with_distances(
    seen: Attend,
    table: Array,
    cache: Cache | None = None,
    *,
    causal: bool,
    max_distance: int,
    count: int | None = None,
) -> Attend:
    """Adds T5's bias by the distance from query to key, counted in columns, or slots of the cache, padding included.

    Args:
        seen: from `attend`.
        table: `(m h)`, a number for each bucket of distances and each head.
        cache: as in `attend`.
        causal: whether all buckets are for keys before the query, or half of them.
        max_distance: from which on all distances share a bucket.
        count: of buckets, where it is not the table's.
    """
    t = seen.new.shape[1]
    columns = jnp.arange(t, dtype=jnp.int32)

    def bias(queries: Array, keys: Array) -> Array:
        distances = keys[None, None, :] - queries[:, :, None]
        buckets = distance_buckets(distances, count or table.shape[0], causal=causal, max_distance=max_distance)
        return jnp.moveaxis(take(table, buckets).astype(jnp.float32), -1, 1)

    old = None
    if cache is not None and seen.old is not None:
        places = jnp.atleast_1d(cache.length)[:, None] + columns[None]
        old = bias(places, jnp.arange(seen.old.shape[-1], dtype=jnp.int32))
    return seen._replace(new_bias=bias(columns[None], columns), old_bias=old)


def distance_scores(
    query: Array,
    key: Array,
    *,
    index: Array,
    scale: float,
    for_queries: Array | None = None,
    for_keys: Array | None = None,
) -> Array:
    """DeBERTa's scores `(b h t s)` of the content of queries, and of keys, with the distance between them.

    Args:
        query: `(b t h k)`.
        key: `(b s h k)`.
        index: `(t s)` int, the row of the tables for the distance of each key from each query.
        scale: of the scores.
        for_queries: `(m h k)`, what queries meet at each distance; None for nothing.
        for_keys: likewise, of keys.

    Source: He et al. 2020; matches transformers' `DisentangledSelfAttention`.
    """

    def score(content: Array, table: Array, index: Array) -> Array:
        all_scores = jnp.einsum(
            "bthk,mhk->bhtm", content, table, precision=precision(content.dtype), preferred_element_type=jnp.float32
        )
        return scale * jnp.take_along_axis(all_scores, index[None, None], axis=-1)

    parts = [] if for_queries is None else [score(query, for_queries, index)]
    parts += [] if for_keys is None else [score(key, for_keys, index.T).swapaxes(2, 3)]
    return functools.reduce(jnp.add, parts)


def with_slopes(
    seen: Attend,
    slopes: Array,
    positions: Array,
    cache: Cache | None = None,
    *,
    scale: float = 1.0,
    rounded: bool = False,
) -> Attend:
    """Adds ALiBi: `slope · position` of each key, which differs from `-slope · distance` by a number of each query.

    Args:
        seen: from `attend`.
        slopes: `(h)` float32.
        positions: `(b t)`, of the tokens of this call.
        cache: as in `attend`; its keys are at the numbers of real tokens before them.
        scale: of what is added.
        rounded: whether slopes, positions and their products have the precision of bfloat16, as Falcon's.

    Source: Press et al. 2021; matches transformers' `build_alibi_tensor`.
    """

    def narrow(x: Array) -> Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if rounded else x

    def bias(places: Array) -> Array:
        products = narrow(slopes)[None, :, None, None] * narrow(places.astype(jnp.float32))[:, None, None, :]
        return narrow(products) * scale

    old = None if cache is None or seen.old is None else bias(from_mask(cache.mask))
    return seen._replace(new_bias=bias(positions), old_bias=old)


def attention(
    params: Params,
    x: Array,
    seen: Attend,
    *,
    slot: Slot = NO_SLOT,
    rope: tuple[Array, Array] | None = None,
    interleaved: bool = False,
    norm: Callable[[Params, Array, str], Array] | None = None,
    scale: Any = None,
    cap: float | None = None,
    bias: Callable[[Array, Array], Array] | None = None,
    product: Callable[..., tuple[Array, list[Array]]] | None = None,
) -> tuple[Array, Slot]:
    """`softmax(q kᵀ · scale) v`, with as many query heads per key-value head as the weights have.

    Args:
        params: `query` `(h k d)`, `key` and `value` `(g k d)`, `output` `(d h k)`, each with an optional bias; optionally
            `sinks` `(h)`, see `dot_product`.
        x: `(b t d)`.
        seen: from `attend`.
        slot: this layer's place in the cache; keys and values of `x` are written there, and the weights if it keeps them.
        rope: cosines and sines from `rope_tables`.
        interleaved: of `rotate`.
        norm: `(params, x (b t h k), "query" or "key") -> (b t h k)`, of queries and keys before they are rotated.
        scale: of the scores; `1 / sqrt(k)` if None.
        cap: scores are squeezed between `-cap` and `cap`, by `tanh`.
        bias: `(queries (b t h k), keys (b t g k)) -> (b h t t)`, added to the scores of an encoder.
        product: what combines queries, keys and values, such as `block_sparse`; `dot_product` if None.

    Returns:
        `(b t d)` and the updated slot. A query that sees no key gives the mean of the values, never NaN.

    Source: Vaswani et al. 2017; Ainslie et al. 2023 (groups); matches transformers' eager attention: scores are
    masked with the lowest number, the softmax is in float32.
    """
    query = linear(params["query"], x, "btd,hkd->bthk")
    key = linear(params["key"], x, "btd,gkd->btgk")
    value = linear(params["value"], x, "btd,gkd->btgk")
    if norm is not None:
        query, key = norm(params, query, "query"), norm(params, key, "key")
    if rope is not None:
        query, key = (rotate(x, rope, interleaved=interleaved) for x in (query, key))
    new_bias = seen.new_bias if bias is None else bias(query, key)
    parts = [Part(key.swapaxes(1, 2), value.swapaxes(1, 2), seen.new, new_bias)]
    if slot.keys is not None and seen.old is not None:
        parts.insert(0, Part(*read(slot), seen.old, seen.old_bias))
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    context, weights = (product or dot_product)(query, parts, scale, cap=cap, sinks=params.get("sinks"))
    slot = keep(slot, weights)
    if slot.keys is not None:
        slot = write(slot, key, value, context)
    return linear(params["output"], context, "bthk,dhk->btd"), slot


def keep(slot: Slot, weights: list[Array]) -> Slot:
    """The slot with the weights of an attention, of what is in the cache and of the new tokens, if they are asked for."""
    if slot.weights is None:
        return slot
    return slot.keep(weights[0] if len(weights) == 1 else _by_slot(weights[0], weights[1], slot))


def _by_slot(old: Array, new: Array, slot: Slot) -> Array:
    """The weights of the slots `(b h t s)` with those of the new tokens `(b h t t)`, by columns of the cache."""
    if old.shape[-1] < slot.columns:
        assert slot.held is not None
        there = (slot.held >= 0) & (slot.held > slot.held.max(-1, keepdims=True) - old.shape[-1])
        index = jnp.where(there, slot.held % old.shape[-1], 0)[:, None, None]
        old = jnp.where(there[:, None, None], jnp.take_along_axis(old, index, axis=-1), 0)
    since = jnp.arange(old.shape[-1], dtype=jnp.int32)[None] - jnp.atleast_1d(slot.start)[:, None]
    inside = (since >= 0) & (since < new.shape[-1])
    index = jnp.broadcast_to(jnp.where(inside, since, 0)[:, None, None], old.shape)
    return jnp.where(inside[:, None, None], jnp.take_along_axis(new, index, axis=-1), old)


def cross_attention(
    params: Params, x: Array, read: tuple[Array, Array], mask: Array, *, slot: Slot = NO_SLOT, scale: Any = None
) -> tuple[Array, Slot]:
    """Attention of `x` to what an encoder has read.

    Args:
        params: as in `attention`.
        x: `(b t d)`.
        read: keys and values, from `keys_and_values`.
        mask: `(b s)` bool, which of them are real.
        slot: keeps the weights, if it does.
        scale: of the scores; `1 / sqrt(k)` if None.

    Returns:
        `(b t d)` and the slot.
    """
    query = linear(params["query"], x, "btd,hkd->bthk")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    context, weights = dot_product(query, [Part(*read, mask[:, None, :])], scale)
    return linear(params["output"], context, "bthk,dhk->btd"), keep(slot, weights)


def keys_and_values(params: Params, x: Array) -> tuple[Array, Array]:
    """What `cross_attention` reads of an encoder's `(b s d)`: `(b g s k)` each."""
    key, value = (linear(params[name], x, "btd,gkd->btgk").swapaxes(1, 2) for name in ("key", "value"))
    return key, value


def dot_product(
    query: Array, parts: Sequence[Part], scale: Any, *, cap: float | None = None, sinks: Array | None = None
) -> tuple[Array, list[Array]]:
    """Softmax attention of `(b t h k)` over all parts together, heads of a group side by side.

    The queries of a group become the rows of one matrix, `n` of them: on CPU, XLA's products and softmax over arrays of
    four axes run at up to three times the speed of those over five.

    Args:
        query: `(b t h k)`.
        parts: keys and values, and which of them each query sees.
        scale: of the scores.
        cap: as in `attention`.
        sinks: `(h)`, the score of one more key of each head, whose value is 0.

    Returns:
        `(b t h k)`, with the values' `k`, and the weights of each part `(b h t s)`; without weights where another kernel
        than XLA's is chosen.
    """
    if (kernel := kernels.chosen()) is not None:
        return _by_kernel(kernel, query, parts, scale, cap=cap, sinks=sinks), []
    b, t, h, k = query.shape
    groups = parts[0][0].shape[1]
    each = h // groups
    rows = query.reshape(b, t, groups, each, k).transpose(0, 2, 3, 1, 4).reshape(b, groups, each * t, k)
    full = precision(query.dtype)
    lowest = jnp.finfo(jnp.float32).min

    def score(part: Part) -> Array:
        keys, _, seen, bias = part
        x = jnp.einsum(
            "bgnk,bgsk->bgns", rows, keys.astype(rows.dtype), precision=full, preferred_element_type=jnp.float32
        )
        x = x * scale
        if cap is not None:
            x = jnp.tanh(x / cap) * cap
        if bias is not None:
            bias = jnp.broadcast_to(bias, (bias.shape[0], h, t, bias.shape[-1]))
            x = x + jnp.broadcast_to(bias.reshape(bias.shape[0], groups, each * t, bias.shape[-1]), x.shape)
        seen = seen if seen.shape[1] == 1 else jnp.tile(seen, (1, each, 1))
        return jnp.where(seen[:, None], x, lowest)

    scores = [score(part) for part in parts]
    if sinks is not None:
        sink = jnp.repeat(sinks.astype(jnp.float32).reshape(groups, each), t, axis=1)
        scores.append(jnp.broadcast_to(sink[None, :, :, None], (b, groups, each * t, 1)))
    ends = np.cumsum([part.keys.shape[2] for part in parts])
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)[..., : ends[-1]]
    weights = jnp.split(weights.astype(rows.dtype), ends[:-1], axis=-1)
    context = sum(
        jnp.einsum("bgns,bgsk->bgnk", w, part.values.astype(rows.dtype), precision=full)
        for w, part in zip(weights, parts, strict=True)
    )
    return jnp.asarray(context).reshape(b, h, t, parts[0].values.shape[-1]).swapaxes(1, 2), [
        w.reshape(b, h, t, -1) for w in weights
    ]


def block_sparse(
    query: Array, parts: Sequence[Part], scale: Any, *, size: int, repeats: int = 0, **rest: Any
) -> tuple[Array, list[Array]]:
    """`dot_product` of a long text whose tokens see the block they are in, those beside it, the first and the last.

    Tokens of the first and the last block see everything. Time and memory grow with the length, not with its square.

    Args:
        query: `(b t h k)`, of at least four blocks.
        parts: one, whose `seen` is `(b 1 t)` and which has no bias.
        scale: of the scores.
        size: how many tokens a block has.
        repeats: how many more times the first block counts for tokens of the others.
        rest: as in `dot_product`.

    Returns:
        `(b t h k)`, and the weights `(b h t t)`, of the first block that of one of the times it counts.

    Source: Zaheer et al. 2020.
    """
    (part,) = parts
    b, t, h, k = query.shape
    count = -(-t // size)
    more = count * size - t
    queries = jnp.pad(query, ((0, 0), (0, more), (0, 0), (0, 0))).reshape(b, count, size, h, k)
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in part[:2])
    seen = jnp.pad(part.seen, ((0, 0), (0, 0), (0, more)))

    edges = jnp.concatenate([queries[:, 0], queries[:, -1]], axis=1)
    outer, outer_weights = dot_product(edges, [Part(keys, values, seen)], scale, **rest)

    inner = np.arange(1, count - 1)
    blocks = np.stack([0 * inner, inner - 1, inner, inner + 1, 0 * inner + count - 1], axis=1)
    every = inner > 0  # a neighbour may be the first block or the last, which count once
    new = np.stack([every, inner > 1, every, inner < count - 2, every], axis=1)
    times = np.repeat(np.array([1 + repeats, 1, 1, 1, 1], np.float32), size)

    def near(x: Array) -> Array:
        """Of `(b g t …)`, what each block sees: `(b count-2 g 5·size …)`."""
        x = x.reshape(*x.shape[:2], count, size, *x.shape[3:])[:, :, blocks]
        return jnp.moveaxis(x.reshape(*x.shape[:3], 5 * size, *x.shape[5:]), 2, 1)

    def rows(x: Array) -> Array:
        return x.reshape(b * (count - 2), *x.shape[2:])

    there = rows(near(seen) & np.repeat(new, size, axis=1)[None, :, None])
    often = jnp.log(jnp.asarray(times))[None, None, None]
    middle, weights = dot_product(
        rows(queries[:, 1:-1]), [Part(rows(near(keys)), rows(near(values)), there, often)], scale, **rest
    )
    middle = middle.reshape(b, count - 2, size, h, -1)
    ends = outer.reshape(b, 2, size, h, -1)
    context = jnp.concatenate([ends[:, :1], middle, ends[:, 1:]], axis=1).reshape(b, count * size, h, -1)[:, :t]
    if not weights:
        return context, []
    near_weights = (weights[0] / times.astype(query.dtype)[None, None, None]).reshape(b, count - 2, h, size, 5, size)
    spread = jnp.zeros((b, h, count - 2, size, count, size), query.dtype)
    spread = spread.at[:, :, np.arange(count - 2)[:, None], :, blocks].add(near_weights.transpose(1, 4, 0, 2, 3, 5))
    outer_weights = outer_weights[0].reshape(b, h, 2, size, count, size)
    whole = jnp.concatenate([outer_weights[:, :, :1], spread, outer_weights[:, :, 1:]], axis=2)
    return context, [whole.reshape(b, h, count * size, count * size)[:, :, :t, :t]]


def _by_kernel(kernel: Callable[..., Array], query: Array, parts: Sequence[Part], scale: Any, **rest: Any) -> Array:
    """`dot_product` by one of `kernels.KERNELS`, with all parts in a row."""
    b, t, h, _ = query.shape
    keys, values = (
        jnp.concatenate(x, axis=2).astype(query.dtype) for x in ([p.keys for p in parts], [p.values for p in parts])
    )
    seen = jnp.concatenate([jnp.broadcast_to(p.seen, (b, t, p.seen.shape[-1])) for p in parts], axis=-1)
    seen = seen | ~seen.any(-1, keepdims=True)  # who sees nothing sees all: no kernel divides by nothing
    bias = None
    if any(p.bias is not None for p in parts):
        biases = [jnp.zeros((1, 1, 1, p.seen.shape[-1])) if p.bias is None else p.bias for p in parts]
        bias = jnp.concatenate([jnp.broadcast_to(x, (b, h, t, x.shape[-1])) for x in biases], axis=-1)
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    return kernel(scaled, keys.swapaxes(1, 2), values.swapaxes(1, 2), seen, bias, **rest)
