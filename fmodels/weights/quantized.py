"""Quantised checkpoints: the tensors of one weight, told apart by their names, become one description, and back.

`join` comes before the layout map, which then sees each weight under its usual name; `leaves` makes the tree's leaves, and
`split` the tensors of a file from them. Blocks of GGUF files are one tensor: `kept` describes those that a leaf can have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fmodels import tree
from fmodels.arrays import Quantized, Rows
from fmodels.codecs import Ggml
from fmodels.types import Params
from fmodels.weights import ggml
from fmodels.weights.methods import FLOATS, METHODS, Group, Options, Packed, packed_of
from fmodels.weights.rules import Place, Rule, is_turned
from fmodels.weights.tensors import Tensor, aligned_empty, computed, listing


def join(tensors: Mapping[str, Tensor], options: Options | None) -> dict[str, Tensor]:
    """The tensors, with one `Packed` in place of those of each quantised weight.

    Args:
        tensors: by their names in the file.
        options: the `quantization_config` of config.json; None for none.

    Raises:
        ValueError: tensors of quantised weights are missing, or of another shape or dtype; all are listed.
    """
    if options is None:
        return dict(tensors)
    method = METHODS[options["quant_method"]]
    groups: dict[str, dict[str, Tensor]] = {}
    owner: dict[str, str] = {}
    endings = [(part, method.separator + part) for part in sorted(method.parts, key=len, reverse=True)]
    for name, tensor in tensors.items():
        part = next((part for part, ending in endings if name.endswith(ending)), None)
        if part is not None:
            owner[name] = name[: -len(part) - 1]
            groups.setdefault(owner[name], {})[part] = tensor
    problems: list[str] = []
    joined: dict[str, Packed] = {}
    for stem, parts in groups.items():
        if not any(mark in parts for mark in method.marks):
            tensor = next(iter(parts.values()))
            if tensor.dtype.name not in (*FLOATS, "float64"):
                problems.append(f"{stem!r}: has numbers of {tensor.dtype} and no {method.marks[0]!r}")
            continue
        if _is_listed(stem, options.get(method.ignored)):
            problems.append(f"{stem!r}: has {sorted(parts)}, but {method.ignored} says that it is not quantised")
        packed = method.build(options, Group(stem, parts, problems))
        if packed is None:
            continue
        if packed.name in tensors and owner.get(packed.name) != stem:
            problems.append(f"{stem!r}: {packed.name!r} is there as it is, too")
        joined[stem] = packed
    if problems:
        raise ValueError(
            f"load: {len(problems)} problems with quantised weights ({options['quant_method']}):\n  "
            + listing(problems, 200, "\n  ")
            + "\nDownload the checkpoint again, or correct its quantization_config."
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed = joined.get(owner.get(name, ""))
        found |= {name: tensor} if packed is None else {packed.name: packed}
    return found


def _is_listed(stem: str, listed: Any) -> bool:
    """Whether a list of modules has this one, or what it is in.

    Regular expressions are not tried: a hostile one runs for years, and the tensors tell, too, what is quantised.
    """
    return any(stem == one or stem.startswith(f"{one}.") or stem.endswith(f".{one}") for one in listed or ())


def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a `Packed` in place of those of a GGUF file whose blocks a leaf can have as they lie there."""
    return {name: _of_blocks(name, tensor) or tensor for name, tensor in tensors.items()}


def _of_blocks(name: str, tensor: Tensor) -> Packed | None:
    held = tensor.blocks if isinstance(tensor, ggml.Turned) else tensor
    if not isinstance(held, ggml.Blocks) or held.packed is None or held.type not in Ggml.TYPES:
        return None
    if len(held.shape) < 2:
        return None
    whole, each = held.packed, ggml.TYPES[held.type].nbytes
    shape = (*whole.shape[:-1], whole.shape[-1] // each, each)
    blocks = dataclasses.replace(whole, shape=shape, get=lambda: whole.array().reshape(shape))
    return packed_of(
        name, Ggml(held.type), tensor.shape, tensor.dtype, {"blocks": blocks}, turned=isinstance(tensor, ggml.Turned)
    )


def expanded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the arrays that quantised weights stand for."""
    return {name: computed(tensor) if isinstance(tensor, Packed) else tensor for name, tensor in tensors.items()}


def is_even(members: Sequence[Tensor]) -> bool:
    """Whether tensors can be the parts of one stacked leaf: all plain, or quantised in the same way."""
    kinds = {tensor.kind if isinstance(tensor, Packed) else None for tensor in members}
    return len(kinds) == 1


Members = Sequence[tuple[Tensor, Place]]


def apart(members: Members) -> tuple[list[tuple[Packed, Place]], list[tuple[Tensor, Place]]]:
    """The quantised tensors of one kind, and the others.

    Raises:
        ValueError: experts of one layer are some of each.
    """
    packed = [(tensor, place) for tensor, place in members if isinstance(tensor, Packed)]
    plain = [(tensor, place) for tensor, place in members if not isinstance(tensor, Packed)]
    both = {place.layer for _, place in packed} & {place.layer for _, place in plain}
    if both and members[0][1].number is not None:
        raise ValueError(
            f"load: of the experts of layer {min(filter(None, both), default=0)} some are quantised and some are not, such "
            f"as {packed[0][0].name!r} and {plain[0][0].name!r}; quantise or dequantise all of them"
        )
    return packed, plain


def leaves(
    rule: Rule, members: Sequence[tuple[Packed, Place]], sizes: Mapping[str, int], *, stacked: bool, dtype: Any
) -> dict[str, Quantized]:
    """The leaves of one kind of quantised tensors, with numpy parts.

    Args:
        rule: of all of them.
        members: the tensors and their places, by layer and expert.
        sizes: letter -> size.
        stacked: whether layers are stacked.
        dtype: what the leaves stand for; None for the tensor's own.

    Raises:
        ValueError: weights that cannot stay as they are: experts that differ, input axes before output axes.
    """
    groups: dict[int | None, list[Packed]] = {}
    for packed, place in members:
        groups.setdefault(None if stacked else place.layer, []).append(packed)
    found: dict[str, Quantized] = {}
    for layer, group in groups.items():
        first = group[0]
        same = [packed.parts for packed, _ in members if packed.kind == first.kind]
        shapes = {name: max((parts[name].shape for parts in same), key=lambda shape: shape[:1]) for name in first.parts}
        if not is_even(group):
            raise ValueError(f"load: experts such as {first.name!r} are not all quantised in the same way")
        lead: tuple[int, ...] = ()
        if stacked and members[0][1].layer is not None:
            lead += (len({place.layer for _, place in members}),)
        if members[0][1].number is not None:
            lead += (len({place.number for _, place in members}),)
        parts: dict[str, Any] = {
            name: _read([packed.parts[name] for packed in group], lead, shapes[name]) for name in first.parts
        }
        parts |= {n: a.view(np.uint8) for n, a in parts.items() if a.dtype.name == first.codec.as_bytes.get(n)}
        parts |= {
            n: np.stack([p.derived[n] for p in group]).reshape((*lead, *first.derived[n].shape)) for n in first.derived
        }
        place = Place(rule, layer)
        paths = place.leaves(stacked=stacked)
        for leaf, size, rows in _views(rule, first, sizes):
            wanted = first.dtype if dtype is None else np.dtype(dtype)
            found[paths[leaf]] = Quantized(parts, first.codec, size, wanted, rows)
    return found


def _read(tensors: Sequence[Tensor], lead: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One array of equal tensors, or of texts, which zeros make equally long."""
    whole = aligned_empty((len(tensors), *shape), tensors[0].dtype)
    for i, tensor in enumerate(tensors):
        out = whole[i, ...]
        if tensor.shape == shape:
            tensor.read_into(out)
        else:
            out[...] = 0
            out[: tensor.shape[0]] = tensor.array()
    return whole.reshape((*lead, *shape))


def _views(rule: Rule, packed: Packed, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...], Rows | None]]:
    """Leaf, its shape in the matrix, and its rows there."""
    offset, along = 0, rule.along
    axes = len(packed.shape)
    if packed.turned and len(rule.leaves) > 1:
        along = {axes - 1: axes - 2, axes - 2: axes - 1}.get(along, along)
    for leaf, groups in zip(rule.leaves, rule.layouts, strict=True):
        groups = (*groups[:-2], groups[-1], groups[-2]) if packed.turned else groups
        letters = "".join(groups[-2:])
        if (axes >= 2 and "".join(groups) != "".join(rule.letters(leaf))) or along not in (0, axes - 2):
            raise ValueError(
                f"load: {packed.name!r} is quantised and has its axes in another order than {leaf!r}; "
                "that is not supported, load a checkpoint that is not quantised"
            )
        size = tuple(sizes[letter] for letter in letters)
        if len(rule.leaves) == 1:
            yield leaf, size, None
            continue
        count = 1 if rule.within is None else sizes[rule.within]
        width = math.prod(sizes[letter] for letter in groups[-2]) // count
        yield leaf, size, Rows(count, offset, width)
        offset += width


def split(rule: Rule, name: str, leaf: Quantized, index: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors on disk of a quantised weight.

    Args:
        rule: the weight's.
        name: its usual one.
        leaf: one of the leaves that lie in it.
        index: of its layer and expert, as far as they are axes of the leaf.
    """
    codec, stem = leaf.codec, name.removesuffix(".weight")
    if isinstance(codec, Ggml):
        blocks = leaf.parts["blocks"]
        *rows, count, each = blocks.shape[len(index) :]
        get = functools.partial(_rows_of_blocks, blocks, index)
        held = ggml.Blocks.of(name, codec.type, Tensor.lazy(name, np.uint8, (*rows, count * each), get))
        return {name: ggml.Turned.of(name, held) if is_turned(rule) else held}
    found: dict[str, Tensor] = {}
    for part, array in leaf.parts.items():
        if part in codec.derived:
            continue
        full = stem + codec.separator + part
        if part in codec.padded:
            text = np.asarray(array[index])
            text = text[: len(text.tobytes().rstrip(b"\0"))]
            found[full] = Tensor.lazy(full, text.dtype, text.shape, lambda text=text: text)
            continue
        shape = array.shape[len(index) :]
        dtype = np.dtype(codec.as_bytes[part]) if part in codec.as_bytes and array.dtype == np.uint8 else array.dtype
        found[full] = Tensor.lazy(full, dtype, shape, functools.partial(_part, array, index, dtype))
    for part, constant in codec.constants().items():
        full = stem + codec.separator + part
        found[full] = Tensor.lazy(full, constant.dtype, constant.shape, lambda constant=constant: constant)
    return found


def _part(array: Any, index: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.asarray(array[index]).view(dtype)


def _rows_of_blocks(blocks: Any, index: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(blocks[index])
    return array.reshape(*array.shape[:-2], -1)


def shardings(path: str, leaf: Quantized, sharding: Any) -> Quantized:
    """The leaf with the sharding of each part, from one for the leaf.

    Raises:
        ValueError: a part cannot be split so.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda part: sharding, leaf)
    specs = leaf.partition(tuple(sharding.spec))
    own = jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    for name, part in leaf.parts.items():
        try:
            own.parts[name].shard_shape(part.shape)
        except ValueError as error:
            raise ValueError(f"load: {name!r} of {path!r} cannot be split by {specs.parts[name]}: {error}") from None
    return own


def dialects_of(params: Params) -> set[str]:
    """The dialects of the files that have the parts of the tree's quantised leaves; none if it has no such leaves."""
    return {leaf.codec.dialect for leaf in tree.flatten(params).values() if isinstance(leaf, Quantized)}
