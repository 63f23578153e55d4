"""Arrays in place of quantised leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels import tree
from fmodels.types import Params


def dequantize(params: Params, dtype: Any = None, *, where: Callable[[str], bool] | None = None) -> Params:
    """The arrays that quantised leaves stand for; what changes weights, such as `resize_embeddings`, needs them.

    Args:
        params: the tree, stacked or a tuple of layers.
        dtype: of the new arrays, a floating dtype; that of each leaf if None. Other leaves stay as they are.
        where: `where(path)` says which leaves; all if None.

    Returns:
        The tree; leaves that are arrays are shared. `save` writes it as a checkpoint that is not quantised.

    Raises:
        TypeError: `dtype` is not a floating dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from fmodels.arrays import Scaled
        >>> leaf = Scaled(jnp.array([[2, -4]], jnp.int8), jnp.array([[0.5]]))
        >>> dequantize({"lm_head": {"weight": leaf}}, "bfloat16")["lm_head"]["weight"]
        Array([[1, -2]], dtype=bfloat16)
    """
    try:
        floating = dtype is None or jnp.issubdtype(np.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"dequantize: expected a floating dtype such as 'bfloat16', got {dtype!r}")

    def expand(path: str, leaf: Any) -> Any:
        if not hasattr(leaf, "dequantize") or (where is not None and not where(path)):
            return leaf
        if dtype is None:
            return _expand(leaf)
        return _expand(leaf.astype(dtype) if hasattr(leaf, "astype") else leaf).astype(dtype)

    return tree.map_leaves(expand, params)


@jax.jit
def _expand(leaf: Any) -> Any:
    return leaf.dequantize()
