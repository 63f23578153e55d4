"""From tensors on disk to the leaves of a tree: each is read once, to where it stays."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import layout, schema, tree
from fmodels.arrays import Quantized
from fmodels.models import Config
from fmodels.types import Params
from fmodels.weights import Tensor, quantized, rules
from fmodels.weights.rules import Place
from fmodels.weights.tensors import ALIGNMENT, READERS, aligned_empty

Kinds = dict[rules.Rule, list[tuple[Tensor, Place]]]
"""The tensors of a checkpoint and their places, by rule, layer by layer."""


def read_tree(
    planned: layout.Plan, tensors: Mapping[str, Tensor], config: Config, *, dtype: Any, stacked: bool, sharding: Any
) -> Params:
    """Reads each tensor once, straight to where it stays: into its part of the stacked leaf, or mapped as it lies.

    One kind of tensor after the other, its layers in parallel, so that the host never holds more than one stacked leaf
    beside what is on its device already.

    Args:
        planned: which tensor is which.
        tensors: by name.
        config: of the model.
        dtype: of floating leaves; that of the files if None.
        stacked: whether layers are stacked, where they are all alike.
        sharding: one for all leaves, a tree of them, or None.
    """
    kinds = _kinds(planned, tensors)
    even = all(quantized.is_even([tensor for tensor, _ in members]) for members in kinds.values())
    stacked = stacked and even and not schema.is_ragged(config)
    shardings = tree.flatten(sharding) if isinstance(sharding, dict) else None
    leaves: dict[str, Any] = {}
    total = sum(tensor.nbytes for members in kinds.values() for tensor, _ in members)
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=total, desc="load", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        for rule, members in kinds.items():
            packed, members = quantized.apart(members)
            if packed:
                found = quantized.leaves(rule, packed, packed[0][1].sizes(config), stacked=stacked, dtype=dtype)
                leaves.update(_to_device(found, sharding if shardings is None else shardings))
                bar.update(sum(tensor.nbytes for tensor, _ in packed))
            if not members:
                continue
            target = _target_dtype(members[0][0].dtype, dtype)
            done: dict[str, np.ndarray] = {}
            first = members[0][1]
            if (stacked and first.layer is not None) or first.number is not None:
                whole = _as_one(rule, config, target, [tensor for tensor, _ in members]) if stacked else None
                if whole is not None:
                    leaves.update(_to_device(whole, sharding if shardings is None else shardings))
                    bar.update(sum(tensor.nbytes for tensor, _ in members))
                    continue
                paths = {path for _, place in members for path in place.leaves(stacked=stacked).values()}
                done = {path: aligned_empty(schema.shape(path, config), target) for path in paths}
                read = functools.partial(_read_part, config, done, stacked)
            else:
                read = functools.partial(_read_alone, config, target)
            mapped = not done and all(_is_mapped(rule, target, tensor) for tensor, _ in members)
            parts = (map if mapped else pool.map)(read, *zip(*members, strict=True))
            for (tensor, _), part in zip(members, parts, strict=True):
                done.update(part)
                bar.update(tensor.nbytes)
            leaves.update(_to_device(done, sharding if shardings is None else shardings))
    order = list(schema.AXES)
    return tree.unflatten(dict(sorted(leaves.items(), key=lambda item: _rank(item[0], order))))


def _kinds(planned: layout.Plan, tensors: Mapping[str, Tensor]) -> Kinds:
    """The tensors and their places by rule, layer by layer."""
    kinds: Kinds = {}
    for name, place in planned.tensors.items():
        kinds.setdefault(place.rule, []).append((tensors[name], place))
    for members in kinds.values():
        members.sort(key=lambda member: (member[1].layer or 0, member[1].number or 0))
    return kinds


def _rank(path: str, order: list[str]) -> tuple[int, int, int]:
    """Sorts leaves as in the table of axes, layer by layer, an encoder's and a decoder's after the shared embeddings."""
    line = schema.line(path)
    place = order.index("layers.attention_norm.scale" if line.startswith("layers.") else line)
    part = ("", "encoder", "decoder").index(schema.stack(path))
    return part if place < order.index("pooler.weight") else 3, place, schema.split_layer(path)[1] or 0


def _as_one(
    rule: rules.Rule, config: Config, target: np.dtype, layers: Sequence[Tensor]
) -> dict[str, np.ndarray] | None:
    """The stacked leaf, mapped, where the layers' tensors lie in one piece of a file, as `save` writes them."""
    first = layers[0]
    in_one = all(
        tensor.file is first.file and tensor.offset == first.offset + i * first.nbytes and tensor.dtype == target
        for i, tensor in enumerate(layers)
    )
    if first.file is None or not in_one or not _is_mapped(rule, target, first):
        return None
    shape = schema.shape(rule.leaves[0], config)
    return {rule.leaves[0]: Tensor.in_file(first.name, target, shape, first.file, first.offset).array()}


def _read_part(
    config: Config, wholes: dict[str, np.ndarray], stacked: bool, tensor: Tensor, place: Place
) -> dict[str, np.ndarray]:
    """Reads a tensor into its part of the leaves, without an intermediate copy where the layouts agree."""
    out = {path: place.part(wholes[where], stacked=stacked) for path, where in place.leaves(stacked=stacked).items()}
    first = out[place.rule.leaves[0]]
    if rules.is_same_order(place.rule) and first.dtype == tensor.dtype:
        tensor.read_into(first.reshape(tensor.shape))
    else:
        for path, part in rules.from_disk(place.rule, _read_whole(tensor), place.sizes(config)).items():
            out[path][...] = _cast(tensor.name, part, out[path].dtype)
    return {}


def _read_alone(config: Config, target: np.dtype, tensor: Tensor, place: Place) -> dict[str, np.ndarray]:
    """The leaves of a tensor, mapped if XLA can take them over as they lie.

    Mapped pages count as memory of the process, so a tensor that will be copied anyway is read and not mapped.
    """
    whole = tensor.array() if _is_mapped(place.rule, target, tensor) else _read_whole(tensor)
    parts = rules.from_disk(place.rule, whole, place.sizes(config))
    where = place.leaves(stacked=False)
    return {where[path]: _cast(tensor.name, part, target) for path, part in parts.items()}


def _is_mapped(rule: rules.Rule, target: np.dtype, tensor: Tensor) -> bool:
    aligned = tensor.file is None or not tensor.offset % ALIGNMENT
    return rules.is_same_order(rule) and tensor.dtype == target and aligned


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, copy=False)
    except FloatingPointError:
        raise ValueError(
            f"load: {name!r} has values that {dtype} cannot hold; use bfloat16, or keep the dtype on disk"
        ) from None


def _read_whole(tensor: Tensor) -> np.ndarray:
    out = aligned_empty(tensor.shape, tensor.dtype)
    tensor.read_into(out)
    return out


def _target_dtype(stored: np.dtype, wanted: Any) -> np.dtype:
    return np.dtype(wanted) if wanted is not None and jnp.issubdtype(stored, jnp.floating) else stored


def _to_device(arrays: Mapping[str, np.ndarray | Quantized], sharding: Any) -> dict[str, Any]:
    if sharding is None:  # leaves that lie in one tensor have the same parts, which are to stay one
        placed = jax.device_put({id(part): part for part in jax.tree.leaves(dict(arrays))})
        return jax.tree.map(lambda part: placed[id(part)], dict(arrays))

    placed: dict[Any, jax.Array] = {}

    def put(part: np.ndarray, own: Any) -> jax.Array:
        if (id(part), own) not in placed:
            placed[id(part), own] = jax.make_array_from_callback(part.shape, own, lambda index: part[index])
        return placed[id(part), own]

    def shard(path: str, array: np.ndarray | Quantized) -> Any:
        own = sharding[path] if isinstance(sharding, dict) else sharding
        own = quantized.shardings(path, array, own) if isinstance(array, Quantized) else own
        return jax.tree.map(put, array, own)

    return {path: shard(path, array) for path, array in arrays.items()}
