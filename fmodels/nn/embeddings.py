"""Token, position and token-type embeddings, and the way back from hidden states to logits."""

from __future__ import annotations

import jax.numpy as jnp

from fmodels.arrays import take
from fmodels.nn.linear import linear
from fmodels.types import Array, Params


def embed(
    params: Params,
    tokens: Array,
    positions: Array | None = None,
    types: Array | None = None,
    *,
    scale: float | None = None,
) -> Array:
    """The sum of the rows of the tables that `params` has.

    Args:
        params: `tokens` `(v e)` and, optionally, `positions` `(p e)` and `types` `(n e)`.
        tokens: `(b t)` int.
        positions: `(b t)` int, for the table of positions.
        types: `(b t)` int, for the table of token types; zeros if None.
        scale: of the rows of the token table.

    Returns:
        `(b t e)` in the dtype of the token table.
    """
    x = take(params["tokens"], tokens)
    x = x if scale is None else x * jnp.asarray(scale, x.dtype)
    if "types" in params:
        x = x + take(params["types"], jnp.zeros_like(tokens) if types is None else types).astype(x.dtype)
    if "positions" in params and positions is not None:
        x = x + take(params["positions"], positions).astype(x.dtype)
    return x


def lm_logits(params: Params, hidden: Array) -> Array:
    """Logits over the vocabulary, float32 `(b t v)`, of `(b t e)`; without `lm_head.weight` the token table is the head (tied)."""
    head = params.get("lm_head", {})
    weight = head.get("weight", params["embed"]["tokens"])
    bias = {"bias": head["bias"]} if "bias" in head else {}
    return linear({"weight": weight, **bias}, hidden, "btd,vd->btv").astype(jnp.float32)
