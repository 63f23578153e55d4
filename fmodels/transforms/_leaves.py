"""What transforms do to a leaf: an array, an array-like leaf (`fmodels.arrays`), or a hole in an optimizer's state."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.arrays import Quantized


def integer(value: Any) -> int | None:
    """The value as an int if it is an integer of any library and no bool, else None."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        return None


def is_hole(leaf: Any) -> bool:
    """True for what stands in a state where there is no array: None, optax's `MaskedNode`."""
    return not jax.tree.leaves(leaf)


def is_plain(leaf: Any) -> bool:
    """True for an array (or tracer, or `ShapeDtypeStruct`), False for an array-like leaf of several arrays."""
    return jax.tree.structure(leaf) == jax.tree.structure(0)


def stack(*parts: Any) -> Any:
    """`(…)` of each layer as one `(l …)`; numpy stays numpy, array-like leaves are stacked part by part."""

    def join(*arrays: Any) -> Any:
        return np.stack(arrays) if all(isinstance(a, np.ndarray) for a in arrays) else jnp.stack(arrays)

    return jax.tree.map(join, *parts)


def index(leaf: Any, layer: int) -> Any:
    """`leaf[layer]`, part by part; an array, a view if numpy, also where nothing but the layer is indexed."""
    return jax.tree.map(lambda part: part[layer, ...], leaf)


def select(path: str, leaf: Any, where: Any, axis: int) -> Any:
    """`leaf[…, where, …]` along `axis`; parts of an array-like leaf that have size 1 there are shared and stay.

    Raises:
        NotImplementedError: an array-like leaf whose parts do not have the leaf's axes (packed bits, low rank).
    """
    size = leaf.shape[axis]
    if isinstance(leaf, Quantized):
        raise NotImplementedError(
            f"{path!r} is quantised as on disk ({type(leaf.codec).__name__}) and would have to be quantised anew; "
            "use fm.dequantize(params) first (fmodels convert --dequantize)"
        )

    def pick(part: Any) -> Any:
        if part.ndim != len(leaf.shape) or part.shape[axis] not in (1, size):
            raise NotImplementedError(
                f"{path!r} is a {type(leaf).__name__} of parts such as {part.shape} for {tuple(leaf.shape)}, which "
                "cannot be cut along an axis; turn it into an array first"
            )
        return part if part.shape[axis] == 1 != size else part[(slice(None),) * axis + (where,)]

    return jax.tree.map(pick, leaf)
