"""The one place that knows the two forms of a stack of layers: stacked leaves (`lax.scan`) and a tuple of trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fmodels.nn.attention import keys_and_values
from fmodels.nn.cache import Slot, extend
from fmodels.types import Array, Cache, Cross, Params

Layer = Callable[[Params, Any, Array, Slot | None], tuple[Array, Slot | None]]
"""`layer(params, index, x, slot) -> (x, slot)`"""


def run(
    layer: Layer,
    layers: Params | Sequence[Params],
    x: Array,
    cache: Cache | None = None,
    present: Array | None = None,
    *,
    collect: bool = False,
) -> tuple[Array, Cache | None, Array | None]:
    """Applies the layers in turn.

    Args:
        layer: the function of one layer; it is called with the layer's parameters, its number, `x` and its `Slot`.
        layers: stacked leaves `(l …)`, or one tree per layer.
        x: `(b t d)`.
        cache: carried through and returned with the new tokens in it.
        present: `(b t)` bool, which of the new tokens are real; for the cache.
        collect: also return the input of every layer.

    Returns:
        `x`, the cache, and `(l b t d)` or None.
    """
    run_all = _scan if isinstance(layers, Mapping) else _unroll
    x, cache, inputs = run_all(layer, layers, x, cache, collect)  # pyright: ignore[reportArgumentType]
    return x, extend(cache, present) if cache is not None and present is not None else cache, inputs


def cross(layers: Params | Sequence[Params], encoded: Array, mask: Array) -> Cross:
    """The keys and values that the layers' `cross_attention` has for an encoder's `(b s d)`, all layers at once."""
    if isinstance(layers, Mapping):
        keys, values = jax.lax.map(lambda params: keys_and_values(params, encoded), layers["cross_attention"])
    else:
        both = [keys_and_values(params["cross_attention"], encoded) for params in layers]
        keys, values = (tuple(part) for part in zip(*both, strict=True))
    return Cross(keys, values, mask)


def with_cross(layers: Params | Sequence[Params], cross: Cross) -> Params | Sequence[Params]:
    """The layers, each with its keys and values `cross`: `(b g s k)` both."""
    same = isinstance(cross.keys, tuple)
    if isinstance(layers, Mapping):
        keys, values = (jnp.stack(part) if same else part for part in (cross.keys, cross.values))
        return {**layers, "cross": (keys, values)}
    return tuple({**params, "cross": (cross.keys[i], cross.values[i])} for i, params in enumerate(layers))


def _unroll(
    layer: Layer, layers: Sequence[Params], x: Array, cache: Cache | None, collect: bool
) -> tuple[Array, Cache | None, Array | None]:
    inputs = []
    keys, values = (list(cache.keys), list(cache.values)) if cache is not None else ([], [])
    for i, params in enumerate(layers):
        inputs.append(x)
        x, slot = layer(params, i, x, None if cache is None else Slot(keys[i], values[i], None, cache.length))
        if slot is not None:
            keys[i], values[i] = slot.keys, slot.values
    if cache is not None:
        same = isinstance(cache.keys, tuple)
        keys, values = (tuple(a) if same else jnp.stack(a) for a in (keys, values))
        cache = cache._replace(keys=keys, values=values)
    return x, cache, jnp.stack(inputs) if collect else None


def _scan(
    layer: Layer, layers: Params, x: Array, cache: Cache | None, collect: bool
) -> tuple[Array, Cache | None, Array | None]:
    depth = jax.tree.leaves(layers)[0].shape[0]
    kv = None if cache is None else (cache.keys, cache.values)
    if kv is not None and isinstance(kv[0], tuple):
        kv = (jnp.stack(kv[0]), jnp.stack(kv[1]))

    def body(carry: Any, item: Any) -> Any:
        x, kv = carry
        params, index = item
        slot = None if kv is None or cache is None else Slot(kv[0], kv[1], index, cache.length)
        y, slot = layer(params, index, x, slot)
        return (y, None if slot is None else (slot.keys, slot.values)), x if collect else None

    (x, kv), inputs = jax.lax.scan(body, (x, kv), (layers, jnp.arange(depth, dtype=jnp.int32)))
    if cache is not None and kv is not None:
        cache = cache._replace(keys=kv[0], values=kv[1])
    return x, cache, inputs
