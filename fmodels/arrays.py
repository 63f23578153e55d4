"""Array-like leaves, and the two operations that understand them: `einsum` with a weight and `take` of rows.

A leaf is a `jax.Array` or any registered pytree node with `shape`, `dtype`, `einsum(equation, x)`, `take(index)` and
`dequantize()`, and with the name `cure` if it is another function that makes arrays of such leaves; the mathematics of `nn` goes
through the functions below and never asks which.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fmodels import tree
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
    inputs, outputs = split_equation(equation)
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
def split_equation(equation: str) -> tuple[int, int]:
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


def plain(leaf: Any, x: Array | None = None) -> Any:
    """The array that a leaf stands for, for products with `x` of other forms; not expanded before `x`, if given, is there."""
    if isinstance(leaf, Quantized) and x is not None:
        return leaf.after(x).dequantize()
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

    def astype(self, dtype: Any) -> Scaled:
        return dataclasses.replace(self, scale=self.scale.astype(dtype))

    def dequantize(self) -> Array:
        """The array that this leaf stands for, in the dtype of the scale."""
        return self.values.astype(self.scale.dtype) * self.scale

    def einsum(self, equation: str, x: Array) -> Array:
        return einsum(equation, x, self.dequantize())

    def take(self, index: Array) -> Array:
        scale = jnp.broadcast_to(self.scale, (self.shape[0], *self.scale.shape[1:]))
        return self.values[index].astype(self.dtype) * scale[index]


class Rows(NamedTuple):
    """Which rows of a matrix on disk are a leaf's: of `groups` groups of equal size, `width` each, from `start` on."""

    groups: int
    start: int
    width: int

    def pick(self, array: Array, axis: int) -> Array:
        """These rows of an array that has them along the (negative) `axis`."""
        axis %= array.ndim
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        apart = array.reshape(*before, self.groups, -1, *after)
        chosen = jax.lax.slice_in_dim(apart, self.start, self.start + self.width, axis=axis + 1)
        return chosen.reshape(*before, -1, *after)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How the parts of a quantised matrix lie on disk; a value without arrays, static under `jit`.

    Attributes:
        main: the part that tells the leading axes (layer, expert), and how many axes it has without them.
        order: the axes of that part along which rows and columns lie, as negative numbers; None if they do not.
        separator: what is between the name of the weight, without `.weight`, and that of a part on disk.
        derived: parts that are made from others when a file is read, and are not on disk.
        as_bytes: parts that are kept as uint8, and their dtype on disk. XLA's CPU backend has no 8-bit floats: where a scan
            has an array of them, it makes 16 bits of all layers.
        padded: parts of bytes that zeros behind them make equally long in all layers.
        dialect: of the files that have such parts: a key of `fmodels.dialects`.
    """

    main: ClassVar[tuple[str, int]]
    order: ClassVar[tuple[int, int] | None] = (-2, -1)
    separator: ClassVar[str] = "."
    derived: ClassVar[frozenset[str]] = frozenset()
    as_bytes: ClassVar[Mapping[str, str]] = {}
    padded: ClassVar[frozenset[str]] = frozenset()
    dialect: ClassVar[str] = "pt"

    def decode(self, parts: Mapping[str, Array]) -> Array:
        """The matrix `(… out in)`, float32."""
        raise NotImplementedError

    def rows(self, parts: Mapping[str, Array], pick: Callable[[Array, int], Array]) -> dict[str, Array] | None:
        """The parts of the rows that `pick(array, axis)` takes; None where parts do not have rows of their own."""
        return None

    def constants(self) -> dict[str, Any]:
        """Parts on disk that follow from the codec, as numpy arrays."""
        return {}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("codec", "size", "dtype", "row_range")
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A leaf whose parts are the tensors of a quantised checkpoint as they lie on disk, with layers and experts before.

    It is expanded where it is used: in a scan over stacked layers, one layer at a time. A tuple of layers in a loop, as in
    generation, XLA's CPU backend expands as a whole. Leaves that lie in one matrix on disk have the same parts, and each its
    own rows.

    Attributes:
        parts: name -> array.
        codec: how they make a matrix `(out in)`.
        size: the leaf's shape without the leading axes; its output axes are the matrix's rows, its input axes the columns.
        dtype: of the array that the leaf stands for.
        row_range: the rows of the matrix that are the leaf's; all if None.

    Example:
        >>> import jax.numpy as jnp
        >>> from fmodels.codecs import Blocks
        >>> parts = {"weight": jnp.ones((4, 6), jnp.float8_e4m3fn), "weight_scale_inv": jnp.full((1, 2), 0.5)}
        >>> leaf = Quantized(parts, Blocks((4, 4)), (2, 2, 6), jnp.dtype("float32"))
        >>> leaf.shape, einsum("bd,hkd->bhk", jnp.ones((1, 6)), leaf).tolist()
        ((2, 2, 6), [[[3.0, 3.0], [3.0, 3.0]]])
    """

    parts: dict[str, Array]
    codec: Codec
    size: tuple[int, ...]
    dtype: Any
    row_range: Rows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        name, axes = self.codec.main
        shape = tuple(self.parts[name].shape)
        return (*shape[: len(shape) - axes], *self.size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the parts."""
        return sum(part.nbytes for part in jax.tree.leaves(self.parts))

    def astype(self, dtype: Any) -> Quantized:
        """The leaf that stands for the array in `dtype`; its parts stay."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def partition(self, spec: Sequence[Any]) -> Quantized:
        """The leaf with a `PartitionSpec` for each part, from the entries of one for the leaf's own axes.

        All parts are split along leading axes. Along rows or columns only the main part is, by the first of their axes.

        Raises:
            ValueError: a part cannot be split so.
        """
        lead, (main, axes) = self.ndim - len(self.size), self.codec.main
        high = jax.eval_shape(self._matrix, self.parts).shape[-2]
        if (rows := self.row_range) is not None:
            high = rows.groups * rows.width
        count = next(i for i in range(1, len(self.size) + 1) if math.prod(self.size[:i]) == high)
        entries = tuple(spec) + (None,) * (self.ndim - len(spec))
        own: list[Any] = [None] * axes
        for i, entry in enumerate(entries[lead:]):
            first = i == count or (i == 0 and (rows is None or rows.groups == self.size[0]))
            if entry is not None and (self.codec.order is None or not first):
                raise ValueError(
                    f"partition: {type(self.codec).__name__} of shape {self.shape} cannot be split along axis {lead + i}; "
                    "leave its letter out, or use dequantize"
                )
            if entry is not None and self.codec.order is not None:
                own[self.codec.order[i == count]] = entry
        specs = {name: PartitionSpec(*entries[:lead], *(own if name == main else ())) for name in self.parts}
        return dataclasses.replace(self, parts=specs)

    def dequantize(self) -> Array:
        """The array that this leaf stands for."""
        return self._matrix(self.parts).reshape(self.shape)

    def _matrix(self, parts: Mapping[str, Array]) -> Array:
        """The leaf's rows of the matrix."""
        parts, rows = {name: jnp.asarray(part) for name, part in parts.items()}, self.row_range
        chosen = None if rows is None else self.codec.rows(parts, rows.pick)
        matrix = self.codec.decode(parts if chosen is None else chosen).astype(self.dtype)
        return rows.pick(matrix, -2) if rows is not None and chosen is None else matrix

    def einsum(self, equation: str, x: Array) -> Array:
        return einsum(equation, x, self.after(x).dequantize())

    def take(self, index: Array) -> Array:
        chosen = self.codec.rows(self.parts, lambda part, axis: jnp.take(part, index.reshape(-1), axis=axis))
        if chosen is None or self.row_range is not None or self.ndim != 2:
            return self.dequantize()[index]
        return self.codec.decode(chosen).astype(self.dtype).reshape(*index.shape, self.shape[1])

    def after(self, x: Array) -> Quantized:
        """The leaf, asked not to be expanded before `x` is there; XLA's CPU backend may do so all the same."""
        parts, _ = jax.lax.optimization_barrier(jax.lax.stop_gradient((self.parts, x)))
        return dataclasses.replace(self, parts=parts)


def check_plain(name: str, params: Any) -> None:
    """Raises a ValueError if a leaf of the tree is no array, for what other libraries shall hold.

    Example:
        >>> import jax.numpy as jnp
        >>> check_plain("to_torch", {"weight": Scaled.quantize(jnp.ones((2, 2)))})
        Traceback (most recent call last):
        ValueError: to_torch: 1 leaves are not plain arrays: 'weight' is a Scaled; use fm.dequantize(params) first
    """
    strange = {n: leaf for n, leaf in tree.flatten(params).items() if not isinstance(leaf, jax.Array | np.ndarray)}
    if not strange:
        return
    kinds = [f"{path!r} is a {type(leaf).__name__}" for path, leaf in list(strange.items())[:5]]
    known = [leaf for leaf in strange.values() if hasattr(leaf, "einsum")]
    cures = sorted({getattr(leaf, "cure", "dequantize") for leaf in known})
    raise ValueError(
        f"{name}: {len(strange)} leaves are not plain arrays: {', '.join(kinds)}{', …' if len(strange) > 5 else ''}"
        + (f"; use {' and '.join(f'fm.{cure}(params)' for cure in cures)} first" if cures else "")
    )
