"""Transforms of optimizer state, which holds copies of the tree: moments, accumulated gradients, averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fmodels import tree
from fmodels.transforms import _leaves
from fmodels.types import Params


def map_state(transform: Callable[[Params], Params], params: Params, state: Any) -> Any:
    """Applies a transform of trees to every copy of the tree inside an optimizer's state.

    A copy is a subtree with the paths of `params`: optax's moments, accumulated gradients and averages are, whatever
    chain, schedule or mask they lie in (leaves that a mask left out stay out); step counts and the like are not and
    pass. For transforms of one leaf, such as a change of dtype, `optax.tree_map_params` does the same.

    Args:
        transform: from tree to tree, such as `lambda tree: fm.prune_heads(tree, config, heads)[0]`. For
            `resize_embeddings` choose `init="zeros"`: new rows have no history.
        params: the parameters that the state belongs to, as they were before the transform.
        state: any pytree.

    Returns:
        The state with its copies transformed; it fits the transformed parameters.

    Raises:
        ValueError: the state has arrays but no copy of the tree (it belongs to another tree, or to the transformed
            one), or a copy has other shapes than the tree (Adafactor's factored moments).

    Example:
        >>> import jax, jax.numpy as jnp, optax, fmodels as fm
        >>> params = {"layers": ({"norm": jnp.ones(4)}, {"norm": jnp.ones(4)})}
        >>> state = optax.adam(1e-3).init(params)
        >>> fm.map_state(fm.stack_layers, params, state)[0].mu["layers"]["norm"].shape
        (2, 4)
    """
    own = tree.flatten(params)
    found = []

    def is_copy(node: Any) -> bool:
        return isinstance(node, Mapping) and tree.flatten(dict(node)).keys() == own.keys()

    def apply(node: Any) -> Any:
        if not is_copy(node):
            return node
        found.append(node)
        for path, leaf in tree.flatten(node).items():
            if not _leaves.is_hole(leaf) and tuple(leaf.shape) != tuple(own[path].shape):
                raise ValueError(
                    f"map_state: {path!r} has shape {tuple(leaf.shape)} in the state, but {tuple(own[path].shape)} "
                    "in params; a state that is not shaped like the parameters cannot be transformed, make a new one"
                )
        return transform(node)

    mapped = jax.tree.map(apply, state, is_leaf=is_copy)
    if not found and any(getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "map_state: the state holds arrays, but nowhere the paths of params; give the parameters that the state "
            "was made for, as they were before the transform"
        )
    return mapped
