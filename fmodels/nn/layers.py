"""The one place that knows the two forms of a stack of layers: stacked leaves (`lax.scan`) and a tuple of trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.nn.attention import keys_and_values
from fmodels.nn.cache import NO_SLOT, Groups, Slot, by_layer, extend, opened, periods, stacked
from fmodels.types import NOTHING, Array, Cache, Cross, Keep, Output, Params

Layer = Callable[[Params, Any, Array, Slot], tuple[Array, Slot]]
"""`layer(params, index, x, slot) -> (x, slot)`; the index is a number, traced or not, or `Among`: `choose` takes all three."""


class Among(NamedTuple):
    """The number of a layer, traced, of which is known that it is one of some.

    Attributes:
        number: int32.
        numbers: those.
    """

    number: Array
    numbers: Sequence[int]


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
        present: `(b t)` bool, which of the new tokens are real; for the cache. All if None.
        keep: what to return beside, and for the gradient.
        order: which layer is applied at each step, where that is not each of them once; then there is no cache.
    """
    if order is not None and cache is not None:
        raise ValueError("layers.run: layers that are applied in an order of their own have no cache")
    layer = _recomputed(layer) if keep.remat else layer
    slot = NO_SLOT
    if cache is not None:
        present = jnp.ones(x.shape[:2], bool) if present is None else present
        slot = opened(cache, present)
    slot = slot._replace(weights=() if keep.attentions else None)
    if not isinstance(layers, Mapping):
        ran = _unroll(layer, layers, x, cache, keep, order, slot)
    else:
        if cache is not None:
            cache = cache._replace(keys=stacked(cache.keys), values=stacked(cache.values))
        if cache is not None and isinstance(cache.keys, Groups):
            ran = _scan_periods(layer, dict(layers), x, cache, keep, slot)
        else:
            ran = _scan(layer, dict(layers), x, cache, keep, order, slot)
    return ran if ran.cache is None or present is None else ran._replace(cache=extend(ran.cache, present))


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
    """The number of a layer, traced or not, to what it takes of `choices`.

    Args:
        choices: what is computed once, for all layers of a kind: trees of equal shapes, as far as numbers are traced and
            nothing is known of them.
        which: of each layer.
    """

    def at_layer(index: Any) -> Any:
        if isinstance(index, int):
            return choices[which[index]]
        index, numbers = index if isinstance(index, Among) else (index, range(len(which)))
        possible = list(dict.fromkeys(which[i] for i in numbers))
        if len(possible) == 1:
            return choices[possible[0]]
        places = jnp.asarray([possible.index(kind) if kind in possible else 0 for kind in which], jnp.int32)
        return jax.tree.map(lambda *a: jnp.stack(a)[places[index]], *(choices[kind] for kind in possible))

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
    layer: Layer,
    layers: Sequence[Params],
    x: Array,
    cache: Cache | None,
    keep: Keep,
    order: Sequence[int] | None,
    slot: Slot,
) -> Ran:
    found = []
    keys, values = ([], []) if cache is None else (list(by_layer(cache.keys)), list(by_layer(cache.values)))
    for i in range(len(layers)) if order is None else order:
        mine = slot if cache is None else slot._replace(keys=keys[i], values=values[i])
        x, mine, kept = _apply(layer, layers[i], i, x, mine, keep)
        found.append(kept)
        if cache is not None:
            keys[i], values[i] = mine.keys, mine.values
    if cache is not None:
        same = isinstance(cache.keys, tuple)
        keys, values = (tuple(a) if same else stacked(tuple(a)) for a in (keys, values))
        cache = cache._replace(keys=keys, values=values)
    inputs, weights, routed = zip(*found, strict=True)
    weights = tuple(jnp.stack(w) if len({a.shape for a in w}) == 1 else w for w in zip(*weights, strict=True))
    routed = [a for a in routed if a is not None]
    return Ran(
        x, cache, jnp.stack(inputs) if keep.hidden_states else None, weights, jnp.stack(routed) if routed else None
    )


def _apply(layer: Layer, params: Params, index: Any, x: Array, slot: Slot, keep: Keep) -> tuple[Array, Slot, Any]:
    """What a layer makes of `x`, its slot, and what is kept of it: its input, weights and its router's logits."""
    y, slot = layer(params, index, x, slot)
    return y, slot, (x if keep.hidden_states else None, slot.weights or (), slot.routed if keep.router_logits else None)


def _at(layers: Params, index: Array) -> Params:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)


def _scan(
    layer: Layer, layers: Params, x: Array, cache: Cache | None, keep: Keep, order: Sequence[int] | None, slot: Slot
) -> Ran:
    depth = jax.tree.leaves(layers)[0].shape[0]

    def body(carry: Any, item: Any) -> Any:
        x, kv = carry
        params, index = item
        params = params if order is None else _at(layers, index)
        mine = slot if kv is None else slot._replace(keys=kv[0], values=kv[1], layer=index)
        y, mine, kept = _apply(layer, params, index, x, mine, keep)
        return (y, None if kv is None else (mine.keys, mine.values)), kept

    numbers = jnp.arange(depth, dtype=jnp.int32) if order is None else jnp.asarray(order, jnp.int32)
    kv = None if cache is None else (cache.keys, cache.values)
    (x, kv), (inputs, weights, routed) = jax.lax.scan(body, (x, kv), (layers if order is None else None, numbers))
    if cache is not None and kv is not None:
        cache = cache._replace(keys=kv[0], values=kv[1])
    return Ran(x, cache, inputs, weights, routed)


def _scan_periods(layer: Layer, layers: Params, x: Array, cache: Cache, keep: Keep, slot: Slot) -> Ran:
    """As `_scan`, for layers whose caches differ in size: those of a period of their pattern are written out."""
    which: tuple[int, ...] = cache.keys.which
    carry: Any = (x, list(zip(cache.keys.stacks, cache.values.stacks, strict=True)))
    found = []
    for first, length, times in periods(which):
        of_period = which[first : first + length]

        def body(carry: Any, turn: Array, first: int = first, times: int = times, of_period: Any = of_period) -> Any:
            x, kv = carry
            kept = []
            for place, group in enumerate(of_period):
                number = first + place
                index = number + turn * len(of_period)
                mine = slot._replace(
                    keys=kv[group][0],
                    values=kv[group][1],
                    layer=which[:number].count(group) + turn * of_period.count(group),
                )
                among = Among(index, range(number, first + times * len(of_period), len(of_period)))
                x, mine, one = _apply(layer, _at(layers, index), among, x, mine, keep)
                kv = [(mine.keys, mine.values) if i == group else pair for i, pair in enumerate(kv)]
                kept.append(one)
            return (x, kv), jax.tree.map(lambda *a: jnp.stack(a), *kept)

        carry, kept = jax.lax.scan(body, carry, jnp.arange(times, dtype=jnp.int32))
        found.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept))
    inputs, weights, routed = jax.tree.map(lambda *a: jnp.concatenate(a), *found)
    x, kv = carry
    keys, values = (Groups(part, which) for part in zip(*kv, strict=True))
    return Ran(x, cache._replace(keys=keys, values=values), inputs, weights, routed)
