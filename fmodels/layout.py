"""Trees and named tensors on disk, in both directions, by the family's layout map.

`to_disk(from_disk(tensors)) == tensors`, bit for bit. Both functions only reshape, transpose, slice and join, so they
work on numpy arrays, on jax arrays, and on tracers inside of `jit`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmodels import schema, tree
from fmodels.arrays import Quantized
from fmodels.models import Config, family
from fmodels.transforms._leaves import stack
from fmodels.transforms.adapters import check_merged
from fmodels.transforms.stacking import stack_layers
from fmodels.types import Params
from fmodels.weights import Tensor, quantized, rules
from fmodels.weights.methods import transposed
from fmodels.weights.rules import Place

logger = logging.getLogger("fmodels")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tensor is which.

    Attributes:
        tensors: name in the file -> its place.
        missing: places that no tensor fills, by name; only those that a new head may fill.
        tied: (name in the file, path of the leaf that it repeats).
        module: whether the names are those of PyTorch's module, and not those that transformers saves.
    """

    tensors: dict[str, Place]
    missing: dict[str, Place]
    tied: list[tuple[str, str]]
    module: bool


class LoadingInfo(NamedTuple):
    """How the tensors of a checkpoint and those of a model differ.

    Attributes:
        missing: names, as files have them, of the tensors that the model has and the checkpoint has not.
        unexpected: names in the checkpoint of what the model has not: other heads, and what no rule matches.
        mismatched: name in the checkpoint -> its shape, and the shape that the config says.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def loading_info(shapes: Mapping[str, tuple[int, ...]], config: Config) -> LoadingInfo:
    """What `load` would find missing, unexpected and of another shape.

    Args:
        shapes: name on disk -> shape.
        config: the config.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> shapes = {name: a.shape for name, a in fm.to_disk(params, config).items()}
        >>> shapes["extra"] = shapes.pop("model.norm.weight")
        >>> info = fm.loading_info(shapes, config)
        >>> info.missing, info.unexpected, info.mismatched
        (['model.norm.weight'], ['extra'], {})
    """
    match = _match(shapes, config)
    return LoadingInfo(list(match.missing), [*match.dropped, *match.unknown], match.mismatched)


@dataclasses.dataclass(frozen=True)
class _Match:
    """Which tensors have a place, by the place's name, and what has none; see `Plan` and `LoadingInfo`."""

    weights: rules.Weights
    places: dict[str, Place]
    found: dict[str, str]
    tied: list[tuple[str, str]]
    dropped: dict[str, list[str]]
    unknown: list[str]
    twice: list[tuple[str, str]]
    missing: dict[str, Place]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _match(shapes: Mapping[str, tuple[int, ...]], config: Config) -> _Match:
    weights = family(config).weights.of_names(shapes, config)
    places, others = weights.places(config), weights.places_of_other_tasks(config)
    repeats = weights.repeats(config, every=True)
    found: dict[str, str] = {}
    tied: list[tuple[str, str]] = []
    dropped: dict[str, list[str]] = {}
    unknown: list[str] = []
    twice: list[tuple[str, str]] = []
    for name in shapes:
        spellings = weights.spellings(name, config)
        match = next((s for s in spellings if s in places), None)
        if match is not None:
            if match in found:
                twice.append((name, found[match]))
            found[match] = name
        elif (repeat := next((s for s in spellings if s in repeats), None)) is not None:
            tied.append((name, repeats[repeat]))
        elif weights.is_ignored(name, config):
            continue
        elif any(s in others for s in spellings):
            dropped[name] = spellings
        else:
            unknown.append(name)
    for absent, stand_in in weights.fallbacks.items():
        if absent in places and absent not in found:
            other = next((name for name, spellings in dropped.items() if stand_in in spellings), None)
            if stand_in in found:
                found[absent] = found.pop(stand_in)
            elif other is not None:
                found[absent] = other
                del dropped[other]
    missing = {n: p for n, p in places.items() if n not in found and not p.rule.optional}
    wanted = {name: rules.disk_shape(places[name].rule, places[name].sizes(config)) for name in found}
    mismatched = {
        disk: (tuple(shapes[disk]), wanted[name]) for name, disk in found.items() if tuple(shapes[disk]) != wanted[name]
    }
    return _Match(weights, places, found, tied, dropped, unknown, twice, missing, mismatched)


def plan(shapes: Mapping[str, tuple[int, ...]], config: Config, *, new_head: bool = False, what: str = "load") -> Plan:
    """Finds the place of every tensor.

    Args:
        shapes: name on disk -> shape.
        config: the config.
        new_head: whether tensors of the task's head may be missing.
        what: the name of the function, for messages.

    Raises:
        ValueError: tensors are missing, unexpected, there twice, or of another shape; all are listed.
    """
    match = _match(shapes, config)
    places, found, missing, dropped = match.places, match.found, match.missing, match.dropped
    problems = [f"{name!r} and {other!r} are the same tensor under two names" for name, other in match.twice]
    problems += [
        f"no rule of {config.model_type} ({config.task}) matches {name!r} {list(shapes[name])}"
        for name in match.unknown
    ]
    heads = {n: p for n, p in missing.items() if p.rule.tasks is not None}
    if not new_head or len(missing) > len(heads):
        problems += [f"missing {name!r}" for name in missing]
        if heads and len(heads) == len(missing):
            problems.append(
                f"the missing tensors are all of the head; pass task={config.task!r} and key=jax.random.key(0) to start a new one, "
                "or task='base' to load the model without it"
            )
    problems += [
        f"{name!r} has shape {list(shape)}, expected {list(want)} by config.json"
        for name, (shape, want) in match.mismatched.items()
    ]
    if problems:
        raise ValueError(
            f"{what}: {len(problems)} tensors do not fit:\n  " + "\n  ".join(problems[:200]) + _more(problems)
        )
    if dropped:
        logger.warning(
            "%s: %d tensors belong to other heads than %r and are left out: %s",
            what,
            len(dropped),
            config.task,
            ", ".join(dropped),
        )
    return Plan(
        {found[n]: places[n] for n in places if n in found},
        missing if new_head else {},
        match.tied,
        match.weights is not family(config).weights,
    )


def joined(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, with one description in place of those of each weight that the config says is quantised.

    Where PyTorch's module has the inputs of a matrix first, as GPT-2's, files of quantised matrices have them last.
    """
    if config.quantization is None:
        return dict(tensors)
    found = quantized.join(tensors, json.loads(config.quantization))
    weights = family(config).weights
    places = {name: place for name, place in weights.places(config).items() if rules.is_turned(place.rule)}
    for name, tensor in found.items():
        if isinstance(tensor, quantized.Packed) and any(s in places for s in weights.spellings(name, config)):
            found[name] = transposed(tensor)
    return found


def _more(problems: list[str]) -> str:
    return f"\n  … and {len(problems) - 200} more" if len(problems) > 200 else ""


def from_disk(tensors: Mapping[str, Any], config: Config, *, layers: str = "stacked") -> Params:
    """The tree from tensors by their names on disk, or by those of PyTorch's `state_dict`.

    Args:
        tensors: name -> array; repeated tensors of a tied head are accepted.
        config: the config.
        layers: `"stacked"`, or `"list"` for a tuple of layers. Ragged layers are always a tuple.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; all are listed.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> tensors = fm.to_disk(params, config)
        >>> sorted(tensors)[0]
        'model.embed_tokens.weight'
        >>> again = fm.from_disk(tensors, config)
        >>> bool((again["embed"]["tokens"] == params["embed"]["tokens"]).all())
        True
    """
    if config.quantization is None:
        described: Mapping[str, Any] = tensors
    else:
        lazy = {n: Tensor.lazy(n, a.dtype, a.shape, functools.partial(np.asarray, a)) for n, a in tensors.items()}
        described = joined(lazy, config)
    planned = plan({name: tuple(a.shape) for name, a in described.items()}, config, what="from_disk")
    leaves: dict[str, Any] = {}
    parts: dict[str, list[Any]] = {}
    packed: dict[rules.Rule, list[tuple[quantized.Packed, Place]]] = {}
    for name, place in planned.tensors.items():
        where = place.leaves(stacked=False)
        if isinstance(tensor := described[name], quantized.Packed):
            packed.setdefault(place.rule, []).append((tensor, place))
            continue
        for path, leaf in rules.from_disk(place.rule, tensors[name], place.sizes(config)).items():
            if place.number is None:
                leaves[where[path]] = leaf
            else:  # they come in order
                parts.setdefault(where[path], []).append(leaf)
    leaves |= {path: stack(*all_parts) for path, all_parts in parts.items()}
    for rule, members in packed.items():
        found = quantized.leaves(rule, members, members[0][1].sizes(config), stacked=False, dtype=None)
        if both := found.keys() & leaves.keys():
            raise ValueError(
                f"from_disk: experts of {min(both)!r} are quantised and others are not; dequantise all of them"
            )
        leaves |= found
    params = tree.unflatten(leaves)
    return stack_layers(params) if check_layers(layers) and not schema.is_ragged(config) else params


def check_layers(layers: str) -> bool:
    """True for `"stacked"`, False for `"list"`."""
    if layers not in ("stacked", "list"):
        raise ValueError(f"layers: expected 'stacked' or 'list', got {layers!r}")
    return layers == "stacked"


def to_disk(params: Params, config: Config, *, tied: bool = False, module: bool = False) -> dict[str, Any]:
    """The tensors by their names on disk, in the layout of PyTorch; views where the array library makes them.

    Args:
        params: the tree, stacked or a tuple of layers.
        config: the config.
        tied: also give the tensors that a tied head repeats, as PyTorch's `state_dict` does.
        module: give those of the `state_dict`, where transformers saves others.

    Raises:
        ValueError: the tree does not fit the config, or has adapters that are not merged.
    """
    check_merged("to_disk", params)
    flat = tree.flatten(params)
    stacked = tree.is_stacked(params)
    weights = family(config).weights
    if module and weights.of_module is not weights and not config.module_names and quantized.dialects_of(params):
        raise ValueError(
            f"to_disk: a module of {config.model_type} has other tensors than its files, which quantised leaves cannot become; "
            "use fm.dequantize(params) first"
        )
    weights = weights.of_module if module or config.module_names else weights
    tensors: dict[str, Any] = {}
    for name, (place, source) in weights.sources(config, flat.__contains__).items():
        where = source if stacked or place.layer is None else place.leaves(stacked=False)
        if isinstance(leaf := flat[where[place.rule.leaves[0]]], Quantized):
            parts = quantized.split(place.rule, name, leaf, place.position(stacked=stacked))
            tensors |= {part: tensor.array() for part, tensor in parts.items()}
            continue
        leaves = {path: place.part(flat[where[path]], stacked=stacked) for path in place.rule.leaves}
        numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves.values())
        tensors[name] = rules.to_disk(place.rule, leaves, np.concatenate if numpy else jnp.concatenate)
    if tied:
        repeats = {name: leaf for name, leaf in weights.repeats(config).items() if leaf in flat}
        tensors = _with_repeats(tensors, {name: flat[leaf] for name, leaf in repeats.items()}, weights)
    return tensors


def disk_names(config: Config, *, tied: bool = False, module: bool = False) -> dict[str, tuple[str, ...]]:
    """Name on disk -> the paths (unstacked form) of the leaves that lie in it, side by side if there are several.

    Args:
        config: the config.
        tied: also the names that a tied head repeats, as in `to_disk`; their leaf has an earlier name, too.
        module: those of PyTorch's `state_dict`, as in `to_disk`.

    Example:
        >>> import fmodels as fm
        >>> names = fm.disk_names(fm.models.gpt2.Config(num_layers=1, task="causal-lm"), tied=True)
        >>> names["transformer.h.0.ln_1.weight"], names["transformer.wte.weight"], names["lm_head.weight"]
        (('layers.0.attention_norm.scale',), ('embed.tokens',), ('embed.tokens',))
    """
    weights = family(config).weights
    weights = weights.of_module if module or config.module_names else weights
    names = {name: tuple(place.leaves(stacked=False).values()) for name, place in weights.places(config).items()}
    if tied:
        names = _with_repeats(names, {name: (leaf,) for name, leaf in weights.repeats(config).items()}, weights)
    return names


def tied_names(config: Config, *, module: bool = False) -> dict[str, str]:
    """Name on disk that repeats a tensor, as that of a tied head -> the name of that tensor.

    Args:
        config: the config.
        module: names of PyTorch's `state_dict`, as in `to_disk`.

    Example:
        >>> import fmodels as fm
        >>> fm.tied_names(fm.models.gpt2.Config(task="causal-lm"))
        {'lm_head.weight': 'transformer.wte.weight'}
    """
    own = disk_names(config, module=module)
    first = {leaves: name for name, leaves in reversed(own.items())}
    every = disk_names(config, tied=True, module=module)
    return {name: first[leaves] for name, leaves in every.items() if name not in own}


def _with_repeats(own: dict[str, Any], repeats: dict[str, Any], weights: rules.Weights) -> dict[str, Any]:
    """In the order of PyTorch's modules: shared tables behind the first, tied heads at the end or before their biases."""
    shared = {name: value for name, value in repeats.items() if name not in weights.tied}
    first = dict(list(own.items())[:1]) if shared else {}
    found = {**first, **shared}
    for name, value in own.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        found |= {weight: repeats[weight], name: value} if weight in repeats else {name: value}
    return {**found, **repeats}
