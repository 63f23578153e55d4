"""The one place that knows the two forms of a stack of layers: stacked leaves (`lax.scan`) and a tuple of trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.nn.attention import keys_and_values
from fmodels.nn.cache import NO_SLOT, Slot, extend
from fmodels.types import NOTHING, Array, Cache, Cross, Keep, Output, Params

Layer = Callable[[Params, Any, Array, Slot], tuple[Array, Slot]]
"""`layer(params, index, x, slot) -> (x, slot)`"""


class Ran(NamedTuple):
    """What the layers have made.

    Attributes:
        x: `(b t d)`.
        cache: with the new tokens in it.
        inputs: `(l b t d)`, of every layer; None where nobody asks.
        weights: of the layers' attentions, `(l b h t s)` for each that a layer has, or a tuple of `(b h t s)` where layers
            differ; empty where nobody asks.
        routed: `(l b t x)`, the logits of those layers' routers that have one; None where nobody asks.
    """

    x: Array
    cache: Cache | None
    inputs: Array | None
    weights: tuple[Any, ...]
    routed: Array | None = None

    def onto(self, out: Output, hidden: Array) -> Output:
        """The output with what is kept of the layers; `hidden` is the last of the hidden states if it is `(b t d)`, too."""
        states = self.inputs
        if states is not None and hidden.shape == self.x.shape:
            states = jnp.concatenate([states, hidden[None]])
        attentions, cross = (*self.weights, None, None)[:2]
        return out._replace(
            hidden_states=states, attentions=attentions, cross_attentions=cross, router_logits=self.routed
        )


def run(
    layer: Layer,
    layers: Params | Sequence[Params],
    x: Array,
    cache: Cache | None = None,
    present: Array | None = None,
    *,
    keep: Keep = NOTHING,
    order: Sequence[int] | None = None,
) -> Ran:
    """Applies the layers in turn.

    Args:
        layer: the function of one layer; it is called with the layer's parameters, its number, `x` and its `Slot`.
        layers: stacked leaves `(l …)`, or one tree per layer.
        x: `(b t d)`.
        cache: carried through and returned with the new tokens in it.
        present: `(b t)` bool, which of the new tokens are real; for the cache.
        keep: what to return beside, and for the gradient.
        order: which layer is applied at each step, where that is not each of them once; then there is no cache.
    """
    if order is not None and cache is not None:
        raise ValueError("layers.run: layers that are applied in an order of their own have no cache")
    run_all = _scan if isinstance(layers, Mapping) else _unroll
    layer = _recomputed(layer) if keep.remat else layer
    ran = run_all(layer, layers, x, cache, keep, order)  # pyright: ignore[reportArgumentType]
    cache = ran.cache
    return ran if cache is None or present is None else ran._replace(cache=extend(cache, present))


def _recomputed(layer: Layer) -> Layer:
    """The layer without a cache, of which the backward pass finds only the input."""

    def apply(params: Params, index: Any, x: Array, slot: Slot) -> tuple[Array, Slot]:
        unrolled = isinstance(index, int)

        def make(params: Params, index: Any, x: Array) -> tuple[Array, Any, Any]:
            y, made = layer(params, index, x, slot)
            return y, made.weights, made.routed

        # Inside of a scan nothing can be shared with the forward pass, so that nothing has to forbid it.
        again = jax.checkpoint(make, prevent_cse=unrolled, static_argnums=(1,) if unrolled else ())
        y, weights, routed = again(params, index, x)
        return y, slot._replace(weights=weights, routed=routed)

    return apply


def first(layers: Params | Sequence[Params]) -> Params:
    """The parameters of the first layer."""
    return jax.tree.map(lambda leaf: leaf[0], layers) if isinstance(layers, Mapping) else layers[0]


def choose(choices: Sequence[Any], which: Sequence[int]) -> Callable[[Any], Any]:
    """The number of a layer, traced or not, to what it takes of `choices`: trees of equal shapes.

    Args:
        choices: what is computed once, for all layers of a kind.
        which: of each layer.
    """
    if len(set(which)) == 1:
        return lambda index: choices[which[0]]

    def at_layer(index: Any) -> Any:
        if isinstance(index, int):
            return choices[which[index]]
        return jax.tree.map(lambda *a: jnp.stack(a)[jnp.asarray(which, jnp.int32)[index]], *choices)

    return at_layer


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
    layer: Layer, layers: Sequence[Params], x: Array, cache: Cache | None, keep: Keep, order: Sequence[int] | None
) -> Ran:
    inputs, weights, routed = [], [], []
    keys, values = (list(cache.keys), list(cache.values)) if cache is not None else ([], [])
    for i in range(len(layers)) if order is None else order:
        inputs.append(x)
        slot = NO_SLOT if cache is None else Slot(keys[i], values[i], None, cache.length, cache.mask.shape[1])
        x, slot = layer(layers[i], i, x, slot._replace(weights=() if keep.attentions else None))
        weights.append(slot.weights or ())
        routed += [] if slot.routed is None else [slot.routed]
        if cache is not None:
            keys[i], values[i] = slot.keys, slot.values
    if cache is not None:
        same = isinstance(cache.keys, tuple)
        keys, values = (tuple(a) if same else jnp.stack(a) for a in (keys, values))
        cache = cache._replace(keys=keys, values=values)
    found = tuple(jnp.stack(w) if len({x.shape for x in w}) == 1 else w for w in zip(*weights, strict=True))
    states = jnp.stack(inputs) if keep.hidden_states else None
    return Ran(x, cache, states, found, jnp.stack(routed) if keep.router_logits and routed else None)


def _scan(layer: Layer, layers: Params, x: Array, cache: Cache | None, keep: Keep, order: Sequence[int] | None) -> Ran:
    depth = jax.tree.leaves(layers)[0].shape[0]
    kv = None if cache is None else (cache.keys, cache.values)
    if kv is not None and isinstance(kv[0], tuple):
        kv = (jnp.stack(kv[0]), jnp.stack(kv[1]))

    def body(carry: Any, item: Any) -> Any:
        x, kv = carry
        params, index = item
        if order is not None:
            params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)
        slot = NO_SLOT if kv is None or cache is None else Slot(kv[0], kv[1], index, cache.length, cache.mask.shape[1])
        y, slot = layer(params, index, x, slot._replace(weights=() if keep.attentions else None))
        kept = (x if keep.hidden_states else None, slot.weights or (), slot.routed if keep.router_logits else None)
        return (y, None if kv is None else (slot.keys, slot.values)), kept

    numbers = jnp.arange(depth, dtype=jnp.int32) if order is None else jnp.asarray(order, jnp.int32)
    (x, kv), (inputs, weights, routed) = jax.lax.scan(body, (x, kv), (layers if order is None else None, numbers))
    if cache is not None and kv is not None:
        cache = cache._replace(keys=kv[0], values=kv[1])
    return Ran(x, cache, inputs, weights, routed)
