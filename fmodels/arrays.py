"""Array-like leaves, and the two operations that understand them: `einsum` with a weight and `take` of rows.

A leaf is a `jax.Array` or any registered pytree node with `shape`, `dtype`, `einsum(equation, x)`, `take(index)` and
`dequantize()`; the mathematics of `nn` goes through the functions below and never asks which.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.types import Array


def einsum(equation: str, x: Array, weight: Any) -> Array:
    """`jnp.einsum(equation, x, weight)` in the dtype of `x`.

    float32 products are computed in full precision on every platform, as PyTorch does, unless the user has set
    `jax.default_matmul_precision`.

    Args:
        equation: `"…i,oi->…o"`, where `i` and `o` stand for one or more letters: the weight has its output axes first.
        x: the activations.
        weight: an array or an array-like leaf.

    Returns:
        An array with the dtype of `x`.

    Raises:
        ValueError: an equation of another form.
    """
    if hasattr(weight, "einsum"):
        return weight.einsum(equation, x)
    inputs, outputs = _split(equation)
    lead, rest = x.shape[: x.ndim - inputs], weight.shape[:outputs]
    # As one matrix: XLA's CPU backend copies a weight with several input or output axes at every product.
    matrix = weight.reshape(math.prod(rest), -1).astype(x.dtype)
    rows = x.reshape(*lead, matrix.shape[1])
    return _best_product(rows, matrix).reshape(*lead, *rest)


class Target(NamedTuple):
    """What is traced for another process than this one: an export.

    Attributes:
        few_rows: whether it shall have the form of products that is fastest on CPU for few rows, beside the plain one.
        recent: whether its reader knows what jax makes of `jax.lax.top_k` and `jax.lax.ragged_dot`; TensorFlow 2.21 does not.
    """

    few_rows: bool = True
    recent: bool = True


target = jax.make_user_context(None)
"""`with target(Target()):` what is traced within runs on every platform; None: it is for this process and its backend."""


def _best_product(rows: Array, matrix: Array) -> Array:
    """`_product` in the form that is fastest on the platform that it is for."""
    known = all(isinstance(n, int) for n in rows.shape)
    count = rows.size // rows.shape[-1] if known else None
    if rows.dtype != jnp.float32 or (count is not None and not 1 <= count <= FEW):
        return _product(rows, matrix)
    if target.value is None:
        return (_few_rows if known and jax.default_backend() == "cpu" else _product)(rows, matrix)
    if not target.value.few_rows:
        return _product(rows, matrix)
    return jax.lax.platform_dependent(rows, matrix, cpu=_few_rows if known else _maybe_few_rows, default=_product)


def _product(rows: Array, matrix: Array) -> Array:
    """`(… i) × (o i) -> (… o)`."""
    last = rows.ndim - 1
    return jax.lax.dot_general(rows, matrix, (((last,), (1,)), ((), ())), precision=precision(rows.dtype))


FEW = 64
"""Rows up to which XLA's CPU backend multiplies faster with the weight on the left: 1.5 times with 16 or 32 of them."""
SMALL = 2**19
"""Elements up to which it multiplies a weight and a single row on one core."""


def _few_rows(rows: Array, matrix: Array) -> Array:
    """`_product` in the form that is fastest on CPU for few rows; the same sums."""
    outputs, inputs = matrix.shape
    flat = rows.reshape(-1, inputs)
    if (count := flat.shape[0]) > 1:
        product = _turned(flat, matrix, 4 if count <= 4 else 8)
    elif outputs % 2 or matrix.size > SMALL:
        product = _product(flat, matrix)
    else:  # half of the outputs on each of two cores
        halves = matrix.reshape(2, outputs // 2, inputs)
        both = jnp.broadcast_to(flat, (2, inputs))
        product = jax.lax.dot_general(halves, both, (((2,), (1,)), ((0,), (0,))), precision=precision(rows.dtype))
    return product.reshape(*rows.shape[:-1], outputs)


def _turned(flat: Array, matrix: Array, group: int) -> Array:
    """`(n i) × (o i) -> (n o)` with the weight on the left, in whole groups of rows: 11 rows take longer than 16."""
    count = flat.shape[0]
    filled = jnp.pad(flat, ((0, -count % group), (0, 0)))
    # The barrier keeps XLA from turning the product around again.
    return jax.lax.optimization_barrier(_product(matrix, filled))[:, :count].T


def _maybe_few_rows(rows: Array, matrix: Array) -> Array:
    """`_product` of a number of rows that is known only when it is compiled: XLA then keeps one of the two forms."""
    flat = rows.reshape(-1, rows.shape[-1])
    count = jnp.asarray(flat.shape[0], jnp.int32)
    product = jax.lax.cond(
        (count > 1) & (count <= FEW), lambda flat, matrix: _turned(flat, matrix, 8), _product, flat, matrix
    )
    return product.reshape(*rows.shape[:-1], matrix.shape[0])


@functools.cache
def _split(equation: str) -> tuple[int, int]:
    """How many axes of the weight are contracted, and how many are new in the result."""
    x, weight, y = re.split(",|->", equation)
    outputs = sum(letter in y for letter in weight)
    inputs = len(weight) - outputs
    if not (x.endswith(weight[outputs:]) and y == x[: len(x) - inputs] + weight[:outputs]):
        raise ValueError(f"einsum: expected '…i,oi->…o', each of i and o one or more letters; got {equation!r}")
    return inputs, outputs


def precision(dtype: Any) -> str | None:
    """The precision of products in `dtype`: full for float32, unless `jax.default_matmul_precision` says otherwise."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "highest" if dtype == jnp.float32 and chosen is None else None


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest numbers of the last axis in descending order and their places; of equal ones the first."""
    if target.value is None or target.value.recent:
        return jax.lax.top_k(x, k)
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    turned, places = jax.lax.sort((-x, places), num_keys=1, is_stable=True)
    return -turned[..., :k], places[..., :k]


def take(table: Any, index: Array) -> Array:
    """Rows of a table: `table[index]`, for an array or an array-like leaf."""
    return table.take(index) if hasattr(table, "einsum") else table[index]


def plain(leaf: Any) -> Array:
    """The array that a leaf stands for, for products of other forms."""
    return leaf.dequantize() if hasattr(leaf, "einsum") else leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A quantised leaf: `values * scale`, with `scale` broadcast over `values` (size 1 on the axes that share it).

    Example:
        >>> import jax.numpy as jnp
        >>> leaf = Scaled(jnp.array([[2, -4]], jnp.int8), jnp.array([[0.5]]))
        >>> einsum("bd,fd->bf", jnp.ones((1, 2)), leaf)
        Array([[-1.]], dtype=float32)
    """

    values: Array
    scale: Array

    @classmethod
    def quantize(cls, x: Array) -> Scaled:
        """The nearest leaf of int8 with one scale for each vector of the last axis.

        Example:
            >>> import jax.numpy as jnp
            >>> Scaled.quantize(jnp.array([[2.54, -1.27]])).values
            Array([[127, -64]], dtype=int8)
        """
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny) / 127
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dequantize(self) -> Array:
        """The array that this leaf stands for, in the dtype of the scale."""
        return self.values.astype(self.scale.dtype) * self.scale

    def einsum(self, equation: str, x: Array) -> Array:
        return einsum(equation, x, self.dequantize())

    def take(self, index: Array) -> Array:
        scale = jnp.broadcast_to(self.scale, (self.shape[0], *self.scale.shape[1:]))
        return self.values[index].astype(self.dtype) * scale[index]
