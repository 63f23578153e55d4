"""Multi-head and grouped-query attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fmodels.arrays import precision
from fmodels.nn.cache import Slot, write
from fmodels.nn.linear import linear
from fmodels.nn.positions import rotate
from fmodels.types import Array, Params


def attend_mask(mask: Array, *, causal: bool, start: Any = None) -> Array:
    """Which key each query sees: `(b t s)` bool.

    Args:
        mask: `(b s)` bool, True for real tokens; of the whole cache where there is one.
        causal: whether a query sees only keys at its own place and before it.
        start: the slot of the first query, and the number of queries, `(start, t)`, where keys come from a cache.
    """
    first, queries = (0, mask.shape[1]) if start is None else start
    if not causal:
        return jnp.broadcast_to(mask[:, None, :], (mask.shape[0], queries, mask.shape[1]))
    query = jnp.arange(queries, dtype=jnp.int32)[:, None] + first
    key = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    return (key <= query)[None] & mask[:, None, :]


def attention(
    params: Params,
    x: Array,
    attend: Array,
    *,
    slot: Slot | None = None,
    rope: tuple[Array, Array] | None = None,
    scale: Any = None,
) -> tuple[Array, Slot | None]:
    """`softmax(q kᵀ · scale) v`, with as many query heads per key-value head as the weights have.

    Args:
        params: `query` `(h k d)`, `key` and `value` `(g k d)`, `output` `(d h k)`, each with an optional bias.
        x: `(b t d)`.
        attend: `(b t s)` bool from `attend_mask`.
        slot: this layer's place in the cache; keys and values of `x` are written there first.
        rope: cosines and sines from `rope_tables`.
        scale: of the scores; `1 / sqrt(k)` if None.

    Returns:
        `(b t d)` and the updated slot. A query that sees no key gives the mean of the values, never NaN.

    Source: Vaswani et al. 2017; Ainslie et al. 2023 (groups); matches transformers' eager attention: scores are
    masked with the lowest number, the softmax is in float32.
    """
    query = linear(params["query"], x, "btd,hkd->bthk")
    key = linear(params["key"], x, "btd,gkd->btgk")
    value = linear(params["value"], x, "btd,gkd->btgk")
    if rope is not None:
        query, key = rotate(query, rope), rotate(key, rope)
    if slot is None:
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    else:
        slot, keys, values = write(slot, key, value)
    context = dot_product(query, keys, values, attend, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return linear(params["output"], context, "bthk,dhk->btd"), slot


def dot_product(query: Array, keys: Array, values: Array, attend: Array, scale: Any) -> Array:
    """Softmax attention of `(b t h k)` over `(b g s k)`, heads of a group side by side; returns `(b t h k)`.

    The queries of a group become the rows of one matrix, `n` of them: on CPU, XLA's products and softmax over arrays of
    four axes run at up to three times the speed of those over five.
    """
    b, t, h, k = query.shape
    groups, each = keys.shape[1], h // keys.shape[1]
    rows = query.reshape(b, t, groups, each, k).transpose(0, 2, 3, 1, 4).reshape(b, groups, each * t, k)
    full = precision(query.dtype)
    scores = jnp.einsum(
        "bgnk,bgsk->bgns", rows, keys.astype(rows.dtype), precision=full, preferred_element_type=jnp.float32
    )
    seen = jnp.tile(attend, (1, each, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * scale, jnp.finfo(jnp.float32).min), axis=-1).astype(rows.dtype)
    context = jnp.einsum("bgns,bgsk->bgnk", weights, values.astype(rows.dtype), precision=full)
    return context.reshape(b, h, t, k).swapaxes(1, 2)
