"""The two forms of a stack of layers: one dict of stacked leaves `(l …)`, and a tuple with one tree per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fmodels import tree
from fmodels.arrays import Quantized
from fmodels.transforms import _leaves
from fmodels.types import Params


def stack_layers(params: Params) -> Params:
    """A tuple of equal layers as one dict of stacked leaves; the inverse of `unstack_layers`.

    Stacked layers are run by `lax.scan`: compile time does not grow with depth. Works under `jit`; numpy leaves stay
    numpy, array-like leaves are stacked part by part; optimizer state: see `map_state`.

    Args:
        params: a tree whose `layers` is a sequence of trees, an encoder's and a decoder's each; what is stacked is
            returned as it is.

    Returns:
        The tree with `layers` stacked; leaves outside of `layers` are shared.

    Raises:
        ValueError: there are no layers, or they differ in leaves, shapes or dtypes, as after uneven pruning; the
            message names the first path that differs. Such layers stay a tuple, which every function accepts.
        KeyError: the tree has no `layers`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layers": ({"norm": jnp.zeros(4)}, {"norm": jnp.ones(4)})}
        >>> stack_layers(params)["layers"]["norm"].shape
        (2, 4)
        >>> stack_layers({"layers": ({"norm": jnp.zeros(4)}, {"norm": jnp.ones(3)})})
        Traceback (most recent call last):
        ValueError: stack_layers: 'layers.1.norm' is float32 (3,), but 'layers.0.norm' is float32 (4,). Layers ...
    """
    return _map_stacks(_stack, params)


def _map_stacks(function: Callable[[str, Any], Any], params: Params) -> Params:
    """The tree with `function(path, layers)` in place of the layers of each stack; other leaves are shared."""
    for path, layers in tree.stacks(params).items():
        new = function(path, layers)
        if new is not layers:
            *part, last = path.split(".")
            params = {**params, part[0]: {**params[part[0]], last: new}} if part else {**params, last: new}
    return params


def _stack(where: str, layers: Any) -> Params:
    if isinstance(layers, Mapping):
        return layers  # pyright: ignore[reportReturnType]
    layers = [tree.flatten(layer) for layer in layers]
    if not layers:
        raise ValueError(f"stack_layers: there are no layers to stack; {where!r} is empty")
    for i, layer in enumerate(layers):
        difference = _difference(where, layers[0], layer, i)
        if difference:
            raise ValueError(
                f"stack_layers: {difference}. Layers that differ stay a tuple, which every function accepts."
            )
    return tree.unflatten({path: _leaves.stack(*(layer[path] for layer in layers)) for path in layers[0]})


def _difference(where: str, first: dict[str, Any], layer: dict[str, Any], i: int) -> str | None:
    for path in {**first, **layer}:
        if path not in layer or path not in first:
            has, lacks = (0, i) if path in first else (i, 0)
            found = _describe((first | layer)[path])
            return f"'{where}.{has}' has {path!r} {found}, which '{where}.{lacks}' has not"
        if _describe(layer[path]) != _describe(first[path]):
            here, there = f"{where}.{i}.{path}", f"{where}.0.{path}"
            return f"{here!r} is {_describe(layer[path])}, but {there!r} is {_describe(first[path])}"
    return None


def _describe(leaf: Any) -> str:
    parts = " and ".join(f"{part.dtype} {tuple(part.shape)}" for part in jax.tree.leaves(leaf))
    kind = repr(leaf.codec) if isinstance(leaf, Quantized) else type(leaf).__name__
    return parts if _leaves.is_plain(leaf) else f"{kind}({parts})"


def unstack_layers(params: Params) -> Params:
    """Stacked leaves as a tuple with one tree per layer; the inverse of `stack_layers`.

    Unstack outside of `jit`: inside, every layer would be cut out of the stack at each call.

    Args:
        params: a tree whose `layers` is one dict of leaves `(l …)`; a tuple of layers is returned as it is.

    Returns:
        The tree with `layers` a tuple; leaves outside of `layers` are shared, numpy leaves are views.

    Raises:
        ValueError: leaves of `layers` differ in their first axis, or have none.
        KeyError: the tree has no `layers`.

    Example:
        >>> import jax.numpy as jnp
        >>> layers = unstack_layers({"layers": {"norm": jnp.ones((2, 4))}})["layers"]
        >>> len(layers), layers[1]["norm"].shape
        (2, (4,))
    """
    return _map_stacks(_unstack, params)


def _unstack(where: str, layers: Any) -> Any:
    if not isinstance(layers, Mapping):
        return layers
    flat = tree.flatten(dict(layers))
    parts = [(path, tuple(part.shape)) for path, leaf in flat.items() for part in jax.tree.leaves(leaf)]
    if not parts:
        raise ValueError(f"unstack_layers: there are no arrays in {where!r}, so the number of layers is not known")
    first, shape = parts[0]
    for path, other in parts:
        if not other or other[:1] != shape[:1]:
            raise ValueError(
                f"unstack_layers: '{where}.{path}' has shape {other}, but '{where}.{first}' has {shape}; the first "
                "axis of stacked leaves is the layer, the same in all"
            )
    return tuple(tree.unflatten({path: _leaves.index(leaf, i) for path, leaf in flat.items()}) for i in range(shape[0]))
