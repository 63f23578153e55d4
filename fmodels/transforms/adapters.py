"""Low-rank adapters beside the leaves of a tree, and merged into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels import tree
from fmodels.arrays import plain
from fmodels.low_rank import LowRank
from fmodels.types import Array, Params


class Factors(NamedTuple):
    """What an adapter adds to a leaf in one layer: `b a`, and to its products a bias.

    Attributes:
        a: `(r i)`; of experts `(x r i)`.
        b: `(o r)`; of experts `(x o r)`.
        magnitude: `(o)`, the lengths of the rows of the sum, with DoRA.
        columns: `(i)`, those of its columns instead, for a table.
        bias: `(o)`, with `lora_bias`.
    """

    a: Array
    b: Array
    magnitude: Array | None = None
    columns: Array | None = None
    bias: Array | None = None

    @property
    def has_lengths(self) -> bool:
        """Whether there are lengths of DoRA."""
        return self.magnitude is not None or self.columns is not None


def low_rank(leaf: Any, adapters: Sequence[Mapping[int, Factors]], depth: int | None, choice: Array | None) -> LowRank:
    """The leaf with adapters side by side; of unequal ranks, and in layers without, the rest is zeros.

    Args:
        leaf: the base model's.
        adapters: of each, layer -> factors; the layer is 0 where the leaf has no layers.
        depth: how many layers the leaf has, None for no axis of layers.
        choice: `(n)` int32, the number of the adapter of each of `n` rows of a batch, -1 for none; None for the sum of all.
    """
    first = next(factors for one in adapters for factors in one.values())
    shared = first.a.ndim + first.b.ndim - 2 - (len(leaf.shape) - (depth is not None))
    widths = [max((factors.b.shape[-1] for factors in one.values()), default=0) for one in adapters]

    def side_by_side(part: int, axis: int) -> Array:
        def of(layer: int) -> Array:
            pairs = zip(adapters, widths, strict=True)
            return jnp.concatenate([_padded(one.get(layer), first, part, axis, width) for one, width in pairs], axis)

        return _by_layer(depth, of)

    a, b = side_by_side(0, shared), side_by_side(1, first.b.ndim - 1)
    rows, columns = ([_factor(leaf, one, depth, part) for one in adapters] for part in ("magnitude", "columns"))
    bias = _bias(adapters, depth, choice)
    if choice is None:
        factor, other = (next((one for one in each if one is not None), None) for each in (rows, columns))
        return LowRank(leaf, a, b, None, factor, other, bias)
    owner = jnp.asarray([i for i, width in enumerate(widths) for _ in range(width)], jnp.int32)
    gain = (choice[:, None] == owner[None]).astype(jnp.float32)
    factor, other = (_chosen(each, choice, depth) for each in (rows, columns))
    return LowRank(leaf, a, b, _by_layer(depth, lambda _: gain), factor, other, bias)


def _padded(factors: Factors | None, first: Factors, part: int, axis: int, width: int) -> Array:
    """The factor `a` or `b`, with zeros up to a rank of `width`; zeros where there is none."""
    if factors is None:
        shape = list((first.a, first.b)[part].shape)
        shape[axis] = width
        return jnp.zeros(shape, first.a.dtype)
    array = jnp.asarray(factors[part])
    return jnp.pad(array, [(0, width - size if i == axis else 0) for i, size in enumerate(array.shape)])


def _by_layer(depth: int | None, of: Callable[[int], Array]) -> Array:
    """`of(layer)` of all layers, stacked; of a leaf without layers that of layer 0."""
    return of(0) if depth is None else jnp.stack([of(layer) for layer in range(depth)])


def _bias(adapters: Sequence[Mapping[int, Factors]], depth: int | None, choice: Array | None) -> Array | None:
    """The sum of the adapters' biases, or `(n o)`, that of each row's adapter; None without any."""
    some = [factors.bias for one in adapters for factors in one.values() if factors.bias is not None]
    if not some:
        return None
    none = jnp.zeros_like(some[0])

    def of(layer: int) -> Array:
        found = [one[layer].bias if layer in one else None for one in adapters]
        each = jnp.stack([*(none if bias is None else bias for bias in found), none])
        return each.sum(0) if choice is None else each[choice]  # -1 is the last

    return _by_layer(depth, of)


def _factor(leaf: Any, adapter: Mapping[int, Factors], depth: int | None, part: str) -> Array | None:
    """`magnitude / ‖weight + b a‖` of each row, or `columns / …` of each column, 1 in layers without; None without any.

    Source: Liu et al. 2024, "DoRA", section 4.3, where the norm has no gradient; matches PEFT's `DoraLinearLayer` and
    `DoraEmbeddingLayer`.
    """
    lengths = {
        layer: getattr(factors, part) for layer, factors in adapter.items() if getattr(factors, part) is not None
    }
    if not lengths:
        return None
    alone = {layer: factors._replace(magnitude=None, columns=None) for layer, factors in adapter.items()}
    whole = low_rank(plain(leaf).astype(jnp.float32), [alone], depth, None).dequantize()
    kept, first = next(iter(lengths.values())).ndim, int(depth is not None)
    axes = range(first + kept, whole.ndim) if part == "magnitude" else range(first, whole.ndim - kept)
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.square(whole).sum(axes)))
    ones = jnp.ones(norm.shape[first:], jnp.float32)

    def of(layer: int) -> Array:
        if layer not in lengths:
            return ones
        return lengths[layer].astype(jnp.float32) / (norm if depth is None else norm[layer])

    return _by_layer(depth, of)


def _chosen(factors: Sequence[Array | None], choice: Array, depth: int | None) -> Array | None:
    """`(n …)`, the factor of each row's adapter."""
    present = {i: factor for i, factor in enumerate(factors) if factor is not None}
    if not present:
        return None
    axis = 0 if depth is None else 1
    found = jnp.ones((), jnp.float32)
    for i, factor in present.items():
        rows = jnp.expand_dims(factor, axis)
        mine = (choice == i).reshape(*(1,) * axis, -1, *(1,) * (rows.ndim - axis - 1))
        found = jnp.where(mine, rows, found.reshape(found.shape or (1,) * rows.ndim))
    return found


def merge_adapters(params: Params) -> Params:
    """The tree with its low-rank adapters in its weights: plain arrays, of the dtype that they had.

    Keep the tree of the base model, which `add_adapter` leaves as it is and whose arrays the adapted tree shares:
    `unmerge_adapters` takes out again what was merged, but not exactly.

    Args:
        params: a tree from `add_adapter`; one without adapters is returned as it is.

    Returns:
        The tree.

    Raises:
        ValueError: the rows of a batch have adapters of their own, or an adapter has a bias and the weight has none.
        NotImplementedError: an adapted weight is quantised.

    Example:
        >>> import jax, fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> spec = fm.AdapterConfig(r=2, target_modules=("q_proj",), init_lora_weights=False)
        >>> adapter = fm.init_adapter(params, config, spec, jax.random.key(0))
        >>> merged = fm.merge_adapters(fm.add_adapter(params, config, adapter))
        >>> merged["layers"]["attention"]["query"]["weight"].dtype.name
        'bfloat16'

    Source: PEFT's `merge_and_unload`, which rounds what it adds to the dtype of the weight first.
    """
    flat = tree.flatten(params)
    biases = {
        f"{path.removesuffix('weight')}bias": leaf.bias
        for path, leaf in flat.items()
        if isinstance(leaf, LowRank) and leaf.bias is not None and leaf.gain is None
    }
    if missing := sorted(biases.keys() - flat.keys()):
        raise ValueError(
            f"merge_adapters: {len(missing)} biases of adapters (lora_bias) have none of the model to be added to, "
            f"{missing[0]!r} is one; use the tree of add_adapter as it is"
        )

    def merge(path: str, leaf: Any) -> Any:
        if path in biases:
            wide = jnp.promote_types(leaf.dtype, biases[path].dtype)
            return (leaf.astype(wide) + biases[path].astype(wide)).astype(leaf.dtype)
        if not isinstance(leaf, LowRank):
            return leaf
        if hasattr(leaf.weight, "einsum"):
            raise NotImplementedError(
                f"merge_adapters: {path!r} is an adapter of a {type(leaf.weight).__name__}; a sum would have to be quantised "
                "again. Merge into the dequantised weight, of fm.dequantize(params)"
            )
        if leaf.gain is not None:
            raise ValueError(
                f"merge_adapters: {path!r} has an adapter for each row of a batch; add one adapter, without choice"
            )
        return dataclasses.replace(leaf, bias=None).dequantize()

    return tree.map_leaves(merge, params)


def check_merged(name: str, params: Params) -> None:
    """Raises a ValueError if a leaf has adapters beside it, which files of weights cannot say."""
    adapted = [path for path, leaf in tree.flatten(params).items() if isinstance(leaf, LowRank)]
    if adapted:
        raise ValueError(
            f"{name}: {len(adapted)} leaves have adapters, {adapted[0]!r} is one; give the tree of `merge_adapters`, or save "
            "the adapter by itself with `save_adapter`"
        )
