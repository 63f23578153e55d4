"""Small random models of all families, with every bias and norm moved off its initial value."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmodels as fm

SIZES = {
    "gpt2": {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 4, "head_dim": 4, "max_positions": 12, "task": "causal-lm",
    },
    "bert": {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 4, "head_dim": 4, "max_positions": 12, "task": "masked-lm",
    },
    "llama": {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 4, "max_positions": 12, "task": "causal-lm", "attention_bias": True,
    },
}  # fmt: skip
FAMILIES = tuple(SIZES)
TOKENS = jnp.array([[1, 5, 9, 2, 7, 3], [4, 4, 36, 0, 11, 30]], jnp.int32)


@functools.cache
def make(family: str, layers: str = "stacked", **changes: Any) -> tuple[fm.Params, Any]:
    """`(params, config)`; the same arguments give the same model."""
    config = getattr(fm.models, family).Config(**{**SIZES[family], "initializer_range": 0.2, **changes})
    draw = np.random.default_rng(0)
    params = fm.tree.map_leaves(
        lambda path, leaf: jnp.asarray(
            draw.normal(1.0 if path.endswith("scale") else 0.0, 0.2, leaf.shape), jnp.float32
        ),
        fm.abstract(config),
    )
    return (params if layers == "stacked" else fm.unstack_layers(params)), config


def to_numpy(params: fm.Params) -> fm.Params:
    return fm.tree.map_leaves(lambda path, leaf: np.asarray(leaf), params)


def logits(params: fm.Params, config: Any) -> np.ndarray:
    return np.asarray(fm.forward(params, config, TOKENS).logits)


def assert_same(a: Any, b: Any) -> None:
    """The same structure, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def shapes(params: fm.Params) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in fm.tree.flatten(params).items()}
