"""The names of our own tree: dotted paths of its leaves, stacked or as a tuple of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fmodels import schema
from fmodels.arrays import Quantized
from fmodels.models import Config, family
from fmodels.weights import Tensor, quantized, rules
from fmodels.weights.rules import Place, Weights


def read(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors of PyTorch's files, each cut from its leaves; leaves that no rule knows stay."""
    leaf = functools.lru_cache(maxsize=4)(lambda path: tensors[path].array())  # those of one rule
    found, used = from_leaves(tensors, config, leaf)
    return found | {name: tensor for name, tensor in tensors.items() if name not in used}


def from_leaves(
    flat: Mapping[str, Any], config: Config, fetch: Callable[[str], np.ndarray]
) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of PyTorch's files, each put together from its leaves when its array is asked for.

    Args:
        flat: path -> leaf, of which the dtype is read; a tensor of which a leaf is not there is left out.
        config: of the model.
        fetch: gives the leaf at a path.

    Returns:
        The tensors by name, and the paths that they are made of.
    """
    stacked = not any(schema.split_layer(path)[1] is not None for path in flat)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, (place, source) in _map(config).sources(config, flat.__contains__).items():
        where = source if stacked or place.layer is None else place.leaves(stacked=False)
        if not all(path in flat for path in where.values()):
            continue
        used |= set(where.values())
        if isinstance(leaf := flat[where[place.rule.leaves[0]]], Quantized):
            found |= quantized.split(place.rule, name, leaf, place.position(stacked=stacked))
            continue

        def get(place: Place = place, where: dict[str, str] = where) -> np.ndarray:
            leaves = {leaf: place.part(fetch(where[leaf]), stacked=stacked) for leaf in place.rule.leaves}
            return rules.to_disk(place.rule, leaves, np.concatenate)

        shape = rules.disk_shape(place.rule, place.sizes(config))
        found[name] = Tensor.lazy(name, np.dtype(flat[where[place.rule.leaves[0]]].dtype), shape, get)
    return found, used


def write(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The leaves of the tree, each put together when it is asked for; stacked unless the layers are ragged."""
    stacked = not schema.is_ragged(config)
    members: dict[str, list[tuple[str, str, Place]]] = {}
    for name, place in _map(config).places(config).items():
        if name in tensors:
            for leaf, path in place.leaves(stacked=stacked).items():
                members.setdefault(path, []).append((leaf, name, place))

    def fill(path: str, parts: list[tuple[str, str, Place]]) -> np.ndarray:
        dtypes = {tensors[name].dtype for _, name, _ in parts}
        if len(dtypes) > 1:
            raise ValueError(
                f"write: the layers of {path!r} have the types {sorted(map(str, dtypes))}; cast them to one"
            )
        out = np.empty(schema.shape(path, config), tensors[parts[0][1]].dtype)
        for leaf, name, place in parts:
            whole = rules.from_disk(place.rule, tensors[name].array(), place.sizes(config))
            place.part(out, stacked=stacked)[...] = whole[leaf]
        return out

    found: dict[str, Tensor] = {}
    for path, parts in members.items():
        dtypes = {tensors[name].dtype for _, name, _ in parts}
        if len(dtypes) > 1:
            raise ValueError(
                f"write: the layers of {path!r} have the types {sorted(map(str, dtypes))}; cast them to one"
            )
        shape = schema.shape(path, config)
        found[path] = Tensor.lazy(path, dtypes.pop(), shape, functools.partial(fill, path, parts))
    return found


def _map(config: Config) -> Weights:
    weights = family(config).weights
    return weights.of_module if config.module_names else weights
