"""Layer normalisation and root-mean-square normalisation, computed in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fmodels.types import Array, Params


def layer_norm(params: Params, x: Array, eps: float) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis.

    Args:
        params: `scale` and `bias`, both optional and `(d)`, or with more of the last axes of `x`.
        x: `(… d)`.
        eps: added to the biased variance.

    Returns:
        `(… d)` in the dtype of `x`.

    Source: Ba et al. 2016; matches `torch.nn.LayerNorm`.
    """
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    normal = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    if "scale" in params:
        normal = _along_last(params["scale"], normal) * normal
    if "bias" in params:
        normal = normal + _along_last(params["bias"], normal)
    return normal.astype(x.dtype)


def rms_norm(params: Params, x: Array, eps: float) -> Array:
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis.

    Args:
        params: `scale` `(d)`, or with more of the last axes of `x`.
        x: `(… d)`.
        eps: added to the mean square.

    Returns:
        `(… d)` in the dtype of `x`; as in transformers' `LlamaRMSNorm`, the scale multiplies after the cast to it.

    Source: Zhang and Sennrich 2019.
    """
    wide = x.astype(jnp.float32)
    normal = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)
    return _along_last(params["scale"], normal, x.dtype) * normal


def rms_norm_plus_one(params: Params, x: Array, eps: float) -> Array:
    """`x / sqrt(mean(x²) + eps) * (1 + scale)` over the last axis, all of it in float32; arguments as of `rms_norm`.

    Source: matches transformers' `Gemma2RMSNorm`.
    """
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (normal * (1.0 + _along_last(params["scale"], normal))).astype(x.dtype)


def _along_last(vector: Array, like: Array, dtype: Any = jnp.float32) -> Array:
    return vector.astype(dtype).reshape((1,) * (like.ndim - vector.ndim) + vector.shape)
