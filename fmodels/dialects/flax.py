"""The names of transformers 4's Flax classes: keys joined by "/", `kernel` for a matrix, with its axes in reverse.

The rules are those by which transformers converted its own PyTorch checkpoints, for all families: a table of embeddings is
`embedding`, the scale of a layer norm is `scale` and that of a root-mean-square norm stays `weight`, what is called `weight`
beside is a `kernel`, and everything else keeps its name. What departs from them a family states in its layout map
(`fmodels.weights.rules.Flax`).

Source: transformers 4.57.6, `modeling_flax_pytorch_utils.py` and `models/*/modeling_flax_*.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmodels import schema
from fmodels.models import Config, family
from fmodels.weights import Tensor
from fmodels.weights.rules import Weights

RENAMED = ("kernel", "embedding", "scale")
"""What Flax calls PyTorch's `weight`."""


def read(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors of PyTorch's files from those of a Flax tree, whose keys are joined by "/" or, as in safetensors, by dots.

    A tensor that Flax has once, and PyTorch under several names, is there under all of them; one that Flax computes is
    computed. A head that config.json ties and a tree has nevertheless (Llama's) stays: whoever loads it compares.

    Example:
        >>> import numpy as np
        >>> from fmodels.models import gpt2
        >>> config = gpt2.Config(vocab_size=5, hidden_size=4, num_layers=1)
        >>> tree = {name: Tensor.lazy(name, np.int8, (4, 16), lambda: np.ones((4, 16), np.int8)) for name in
        ...         ["h/0/mlp/c_proj/kernel", "h/0/of/nobody"]}
        >>> {name: tensor.shape for name, tensor in read(tree, config).items()}
        {'h.0.mlp.c_proj.weight': (16, 4), 'h/0/of/nobody': (4, 16)}
    """
    weights = _weights(config)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, dot, last = name.replace("/", ".").rpartition(".")
        own = stem + dot + ("weight" if last in RENAMED else last)
        found |= {own: _view(tensor, own, last)} if _last(own, config) == last else {name: tensor}
    places = weights.places(config)
    for one, others in _spelled(weights.flax.joined, config).items():
        found |= {
            n: dataclasses.replace(found[one], name=n)
            for n in others
            if one in found and n in places and n not in found
        }
    for name, compute in _spelled(weights.flax.computed, config).items():
        if name in places and name not in found and found:
            dtype = next(iter(found.values())).dtype
            table = compute(config).astype(dtype)
            found[name] = Tensor.lazy(name, dtype, table.shape, lambda table=table: table)
    return found


def write(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `read`: the tensors of a Flax tree, sorted by their keys as JAX sorts them.

    Of a head's bias that PyTorch has twice, Flax has the one that PyTorch reads.

    Raises:
        ValueError: the model has something that Flax's class has not, or several tensors that Flax has as one differ, which
            turns out when the array is asked for.

    Example:
        >>> import numpy as np
        >>> from fmodels.models import gpt2
        >>> config = gpt2.Config(vocab_size=5, hidden_size=4, num_layers=1)
        >>> files = {name: Tensor.lazy(name, np.int8, (4,), lambda: np.ones(4, np.int8)) for name in
        ...          ["h.0.ln_1.weight", "h.0.ln_1.bias"]}
        >>> list(write(files, config))
        ['h/0/ln_1/bias', 'h/0/ln_1/scale']
    """
    weights = _weights(config)
    places = weights.places(config)
    tensors = dict(tensors)
    if lacking := [what for name, what in weights.flax.lacks.items() if getattr(config, name)]:
        raise ValueError(
            f"write: transformers' Flax class of {config.model_type} does not have {', '.join(lacking)}; use safetensors"
        )
    for name, compute in _spelled(weights.flax.computed, config).items():
        if name in tensors and not _same(tensors[name].array(), compute(config).astype(tensors[name].dtype)):
            raise ValueError(
                f"write: {name!r} is not the table that transformers' Flax class computes; use safetensors"
            )
        tensors.pop(name, None)
    for one, others in _spelled(weights.flax.joined, config).items():
        parts = {name: tensors.pop(name) for name in others if name in tensors and one in places}
        if parts:
            tensors[one] = _joined(one, parts)
    if weights.flax.repeats_head:
        tables = {path: name for name, place in places.items() for path in place.rule.leaves}
        for name, path in weights.repeats(config).items():
            if tables.get(path) in tensors and name not in tensors:
                tensors[name] = tensors[tables[path]]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        last = _last(name, config)
        if last is None:
            found[name] = tensor
        else:
            own = "/".join([*name.split(".")[:-1], last])
            found[own] = _view(tensor, own, last)
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def _weights(config: Config) -> Weights:
    weights = family(config).weights
    return weights.of_module if config.module_names else weights


def _spelled(names: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Names, or what hangs on them, with the prefix of the base model in the place of `@`."""
    prefix = _weights(config).base_prefix(config.task)

    def spell(value: Any) -> Any:
        return value.replace("@", prefix) if isinstance(value, str) else value

    return {
        spell(name): tuple(map(spell, value)) if isinstance(value, tuple) else value for name, value in names.items()
    }


@functools.lru_cache(maxsize=8)
def _kinds(config: Config) -> dict[str, str]:
    """Name in PyTorch's files or module -> the last key in Flax's tree, for the tensors of all tasks."""
    own = family(config).weights
    found: dict[str, str] = {}
    for weights in (own, own.of_module):
        for name, path in weights.repeats(config, every=True).items():
            found[name] = _key(name, "lm_head.weight" if name in weights.tied else path, config)
        for name, place in (weights.places_of_other_tasks(config) | weights.places(config)).items():
            found[name] = _key(name, place.rule.leaves[0], config)
    return found


def _key(name: str, path: str, config: Config) -> str:
    """The last key of a tensor whose leaf, or one of whose leaves, has this path."""
    last = name.rpartition(".")[2]
    if last != "weight":
        return last
    if schema.line(path) in schema.TABLES:
        return "embedding"
    if path.endswith(".scale"):
        return "scale" if config.norm == "layer" else "weight"
    return "kernel"


def _last(name: str, config: Config) -> str | None:
    """The last key of a tensor by its name in PyTorch's files, None if no rule knows it."""
    kinds = _kinds(config)
    if name in kinds:
        return kinds[name]
    return next((kinds[s] for s in _weights(config).spellings(name, config) if s in kinds), None)


def _view(tensor: Tensor, name: str, last: str) -> Tensor:
    """The tensor under another name, a kernel with its axes in reverse."""
    if last != "kernel":
        return dataclasses.replace(tensor, name=name)
    return Tensor.lazy(name, tensor.dtype, tensor.shape[::-1], lambda: tensor.array().T)


def _joined(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The one tensor that Flax has for several."""
    first, *others = parts.values()

    def get() -> Any:
        array = first.array()
        if different := [other.name for other in others if not _same(other.array(), array)]:
            raise ValueError(
                f"write: {different[0]!r} differs from {first.name!r}, and Flax has one of them; use safetensors"
            )
        return array

    return dataclasses.replace(first, name=name) if not others else Tensor.lazy(name, first.dtype, first.shape, get)


def _same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
