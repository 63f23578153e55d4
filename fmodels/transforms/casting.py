"""Another floating dtype for all leaves, or for some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels import tree
from fmodels.transforms import _leaves
from fmodels.types import Params


def cast(params: Params, dtype: Any, *, where: Callable[[str], bool] | None = None) -> Params:
    """Casts floating leaves; integer leaves stay as they are, of quantised leaves the scale is cast, of adapted ones all.

    Works under `jit`, on stacked and unstacked trees, on numpy leaves, and on optimizer state (`map_state`).

    Args:
        params: the tree.
        dtype: a floating dtype, such as `"bfloat16"`.
        where: `where(path)` says which leaves, by the tree's own paths (`"layers.mlp.up.weight"`, or
            `"layers.3.mlp.up.weight"` when unstacked); all if None. It does what `mask` did in transformers' `to_bf16`.

    Returns:
        The tree; leaves that have the dtype already are shared.

    Raises:
        TypeError: `dtype` is not a dtype, or is not floating.
        ValueError: 64 bits for jax arrays while `jax_enable_x64` is off.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": {"tokens": jnp.ones((5, 4)), "norm": {"scale": jnp.ones(4)}}}
        >>> half = cast(params, "bfloat16", where=lambda path: "norm" not in path)
        >>> half["embed"]["tokens"].dtype.name, half["embed"]["norm"]["scale"].dtype.name
        ('bfloat16', 'float32')
    """
    try:
        target = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"cast: {dtype!r} is not a dtype; write one such as 'bfloat16' or 'float32'") from None
    if not jnp.issubdtype(target, jnp.floating):
        raise TypeError(
            f"cast: expected a floating dtype, got {target}; integers need a scale, which cast does not make"
        )

    def convert(path: str, leaf: Any) -> Any:
        chosen = not _leaves.is_hole(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != target
        if not chosen or (where is not None and not where(path)):
            return leaf
        if not isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(target) != target:
            raise ValueError(
                f"cast: {path!r} is a jax array, which cannot be {target}; "
                "set jax.config.update('jax_enable_x64', True) first"
            )
        return leaf.astype(target)

    return tree.map_leaves(convert, params)
