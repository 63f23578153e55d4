"""Tables of positions, longer or shorter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import fmodels as fm

POSITIONS = ("embed.positions", "encoder.embed.positions", "decoder.embed.positions")
"""The leaves that are tables of positions."""


def resize_positions(params: fm.Params, config: Any, size: int, key: Any = None) -> tuple[fm.Params, Any]:
    """The tree and config with another number of positions in all tables of positions.

    Example:
        >>> config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=1,
        ...                                num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> params, config = resize_positions(params, config, 12)
        >>> params["embed"]["positions"].shape, config.max_positions
        ((12, 8), 12)
    """
    tables = {p: leaf for p, leaf in fm.tree.flatten(params).items() if p in POSITIONS}
    if not tables:
        raise NotImplementedError(f"resize_position_embeddings: {config.model_type} has no table of positions")
    if size < 1:
        raise ValueError(f"resize_position_embeddings: expected at least one position, got {size}")
    rows = size + config.position_offset
    if key is None and any(rows > leaf.shape[0] for leaf in tables.values()):
        raise ValueError(
            f"resize_position_embeddings: {size} positions are more than {config.max_positions}; pass key=jax.random.key(…), "
            "from which the new rows are drawn"
        )
    changed: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(tables.items()):
        new = leaf[:rows]
        if rows > leaf.shape[0]:
            assert key is not None
            drawn = jax.random.normal(jax.random.fold_in(key, i), (rows - leaf.shape[0], *leaf.shape[1:]))
            new = np.concatenate([np.asarray(leaf), np.asarray(config.initializer_range * drawn).astype(leaf.dtype)])
        changed[path] = jax.numpy.asarray(new)
    params, config = fm.tree.update(params, changed), dataclasses.replace(config, max_positions=size)
    fm.check(params, config)
    return params, config
