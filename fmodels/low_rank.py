"""The leaf of a weight with adapters of low rank beside it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fmodels.arrays import einsum, plain, precision, split_equation, take
from fmodels.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A weight with adapters beside it: `factor · (weight + b a) · columns`, never formed to multiply with it, and a bias.

    Several adapters lie side by side along the rank `r`. With `gain` each row of a batch has its own sum of them.

    Attributes:
        weight: `(… o i)`, an array or an array-like leaf; `o` and `i` stand for any number of axes, as in `einsum`, and
            `…` for those that all parts share: layers, experts.
        a: `(… r i)`.
        b: `(… o r)`.
        gain: `(… n r)`, for each of `n` rows of a batch what `a x` is multiplied with; None for 1. Batches with a
            multiple of `n` rows belong to them in order, as those of beams do.
        factor: `(… o)`, or `(… n o)` with `gain`; None for 1.
        columns: `(i)`, or `(n i)` with `gain`, a factor of the columns of a table, which shares no axes; None for 1.
        bias: `(… o)`, or `(… n o)` with `gain`, what is added to the product; None for 0.

    Source: Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA" (`factor`, `columns`); matches PEFT's `lora.Linear` and
    `lora.Embedding`: the products with `a` and `b` are in float32, or in the wider dtype of an adapter.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf = LowRank(jnp.eye(2), a=jnp.array([[1.0, 1.0]]), b=jnp.array([[0.5], [0.0]]))
        >>> einsum("bd,fd->bf", jnp.ones((1, 2)), leaf)
        Array([[2., 1.]], dtype=float32)
    """

    weight: Any
    a: Array
    b: Array
    gain: Array | None = None
    factor: Array | None = None
    columns: Array | None = None
    bias: Array | None = None

    cure: ClassVar[str] = "merge_adapters"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return len(self.weight.shape)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def shared(self) -> int:
        """How many leading axes all parts share."""
        return self.a.ndim + self.b.ndim - 2 - self.ndim

    def astype(self, dtype: Any) -> LowRank:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cast = {name: part.astype(dtype) for name, part in parts.items() if part is not None}
        return dataclasses.replace(self, **cast)

    def dequantize(self) -> Array:
        """The array that this leaf stands for, in its dtype; only where all rows have the same, and no bias.

        Raises:
            ValueError: the rows of a batch have adapters of their own, or there is a bias.
        """
        if self.bias is not None:
            raise ValueError("LowRank: an adapter with a bias (lora_bias) is more than an array; see merge_adapters")
        if self.gain is not None:
            raise ValueError("LowRank: each row of a batch has a weight of its own, so that there is no one array")
        wide = self._wide(self.dtype)
        shared, outputs = self.b.shape[: self.shared], self.b.shape[self.shared : -1]
        a = self.a.reshape(*shared, self.a.shape[self.shared], -1).astype(wide)
        b = self.b.reshape(*shared, math.prod(outputs), -1).astype(wide)
        whole = plain(self.weight).astype(wide) + jnp.matmul(b, a, precision=precision(wide)).reshape(self.shape)
        if self.factor is not None:
            inputs = self.ndim - self.factor.ndim
            whole = whole * self.factor.reshape(*self.factor.shape, *(1,) * inputs).astype(wide)
        if self.columns is not None:
            whole = whole * jnp.expand_dims(self.columns, range(self.ndim - self.columns.ndim)).astype(wide)
        return whole.astype(self.dtype)

    def negative(self) -> LowRank:
        """The leaf that takes away what this one adds."""
        return dataclasses.replace(self, b=-self.b, bias=None if self.bias is None else -self.bias)

    def einsum(self, equation: str, x: Array) -> Array:
        if self.shared:  # experts
            return einsum(equation, x, self.dequantize())
        inputs, outputs = split_equation(equation)
        letters, weight, _ = re.split(",|->", equation)
        lead, new = letters[: len(letters) - inputs], weight[:outputs]
        wide = self._wide(x.dtype)
        if self.columns is not None:
            scaled = x.astype(wide) * self._each_row(self.columns, x.astype(wide))
            x = scaled.astype(x.dtype)
        inner = einsum(f"{letters},R{weight[outputs:]}->{lead}R", x.astype(wide), self.a)
        inner = inner if self.gain is None else inner * _by_rows(self.gain, inner)
        y = einsum(equation, x, self.weight).astype(wide) + einsum(f"{lead}R,{new}R->{lead}{new}", inner, self.b)
        if self.factor is not None:
            y = y * self._each_row(self.factor, y)
        if self.bias is not None:
            y = y + self._each_row(self.bias, y)
        return y.astype(x.dtype)

    def take(self, index: Array) -> Array:
        wide = self._wide(self.dtype)
        inner = self.b[index].astype(wide)
        inner = inner if self.gain is None else inner * _by_rows(self.gain, inner)
        delta = jnp.einsum("...r,rd->...d", inner, self.a.astype(wide), precision=precision(wide))
        y = take(self.weight, index).astype(wide) + delta
        return (y if self.columns is None else y * self._each_row(self.columns, y)).astype(self.dtype)

    def _each_row(self, part: Array, y: Array) -> Array:
        """`factor`, `columns` or `bias`, to be broadcast over `(b … …)`."""
        return _by_rows(part[None] if self.gain is None else part, y)

    def _wide(self, dtype: Any) -> Any:
        return jnp.float64 if max(part.itemsize for part in (dtype, self.a.dtype, self.b.dtype)) > 4 else jnp.float32


def check_rows(name: str, params: Any, rows: int | None) -> None:
    """Raises a ValueError if adapters of the tree are chosen for another number of rows; None is any.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf = LowRank(jnp.eye(2), jnp.ones((1, 2)), jnp.ones((2, 1)), gain=jnp.ones((3, 1)))
        >>> check_rows("forward", {"weight": leaf}, 2)
        Traceback (most recent call last):
        ValueError: forward: adapters are chosen for 3 rows, the batch has 2; see add_adapter
    """
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LowRank)):
        if isinstance(leaf, LowRank) and leaf.gain is not None and leaf.gain.shape[-2] != rows:
            has = "its rows come and go" if rows is None else f"the batch has {rows}"
            raise ValueError(f"{name}: adapters are chosen for {leaf.gain.shape[-2]} rows, {has}; see add_adapter")


def _by_rows(rows: Array, y: Array) -> Array:
    """`(n …)` of `n` rows of a batch as a factor of `(b … …)`, where `b` is a multiple of `n`."""
    each, rest = divmod(y.shape[0], rows.shape[0])
    if rest:
        raise ValueError(
            f"forward: adapters are chosen for {rows.shape[0]} rows, the batch has {y.shape[0]}; expected a multiple"
        )
    rows = jnp.repeat(rows, each, axis=0) if rows.shape[0] > 1 else rows
    return rows.reshape(rows.shape[0], *(1,) * (y.ndim - rows.ndim), *rows.shape[1:]).astype(y.dtype)
