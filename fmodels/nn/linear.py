"""Affine maps and activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmodels.arrays import einsum
from fmodels.types import Array, Params


def linear(params: Params, x: Array, equation: str = "btd,fd->btf") -> Array:
    """`einsum(equation, x, weight) + bias`; no `bias` key means no bias.

    Args:
        params: `weight` and, optionally, `bias` with the weight's output axes.
        x: the activations.
        equation: an einsum string whose second operand is the weight, output axes first.
    """
    y = einsum(equation, x, params["weight"])
    if "bias" in params:
        bias = params["bias"].astype(y.dtype)
        y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


def convolution(params: Params, x: Array) -> Array:
    """Along the text, with zeros beyond its ends: `y[t] = Σ_w weight[w] x[t + w - ⌊w/2⌋]`.

    Args:
        params: `weight` `(f d w)`, of odd width, and, optionally, `bias` `(f)`.
        x: `(b t d)`.

    Source: matches `torch.nn.Conv1d` with one group and a padding of half the width.
    """
    width = params["weight"].shape[-1]
    padded = jnp.pad(x, ((0, 0), (width // 2, width // 2), (0, 0)))
    shifted = jnp.stack([padded[:, i : i + x.shape[1]] for i in range(width)], axis=-1)
    return linear(params, shifted, "btdw,fdw->btf")


def _gelu(x: Array) -> Array:
    # By erfc, not erf: jax exports erf as an operation that TensorFlow 2.21 cannot read.
    return jax.nn.gelu(x, approximate=False)


def _gelu_accurate(x: Array) -> Array:
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_new": _gelu_accurate,
    "gelu_accurate": _gelu_accurate,
    "gelu_fast": _gelu_accurate,
    "gelu_pytorch_tanh": _gelu_accurate,
    "gelu_python_tanh": _gelu_accurate,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * jax.lax.erfc((0.707107 - x) / (0.282095 * math.sqrt(2.0))),
    "leaky_relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""transformers' names of activations (`ACT2FN`); those with parameters of their own are not here."""


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that transformers calls `name`.

    Raises:
        ValueError: there is none, with the list of those that are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: {name!r} is not supported; one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
