"""Layer normalisation and root-mean-square normalisation, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmodels.types import Array, Params


def layer_norm(params: Params, x: Array, eps: float) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis.

    Args:
        params: `scale` and, optionally, `bias`, both `(d)`.
        x: `(… d)`.
        eps: added to the biased variance.

    Returns:
        `(… d)` in the dtype of `x`.

    Source: Ba et al. 2016; matches `torch.nn.LayerNorm`.
    """
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    normal = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    normal = _along_last(params["scale"], normal) * normal
    if "bias" in params:
        normal = normal + _along_last(params["bias"], normal)
    return normal.astype(x.dtype)


def rms_norm(params: Params, x: Array, eps: float) -> Array:
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis.

    Args:
        params: `scale` `(d)`.
        x: `(… d)`.
        eps: added to the mean square.

    Returns:
        `(… d)` in the dtype of `x`; as in transformers' `LlamaRMSNorm`, the scale multiplies after the cast to it.

    Source: Zhang and Sennrich 2019.
    """
    wide = x.astype(jnp.float32)
    normal = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)
    return params["scale"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)) * normal


def _along_last(vector: Array, like: Array) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))
