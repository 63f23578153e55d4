"""The names that llama.cpp gives to tensors, and the order of their rows.

Names follow from the leaf that a family's rule names, and a rule's tensor lies in GGUF as its leaf does, output axes first;
so GPT-2's weights are transposed, and tensors that have queries, keys and values of each head side by side get all queries
first; blocks of quantised matrices lie along input axes and stay whole in both. What else differs:

* in `llama` and what derives from it, the rows of queries and keys are ordered for rotary pairs that lie side by side;
* the scales of Gemma's norms have 1 added, in float32, and are rounded to multiples of 2⁻²⁴ or so by that: those of bfloat16
  are the same again if they are 0 or larger than 2⁻¹⁵, others are not bit for bit;
* all experts of a layer are one tensor, and so are the norms of all heads;
* its converter can put queries, keys and values, and the gate and up of experts, one after the other into one tensor, which
  is read and not written;
* factors of rotary frequencies are tensors, which `fmodels.dialects.gguf_config` reads; they are made from the config.

Source: gguf-py/gguf/tensor_mapping.py and conversion/*.py of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmodels.dialects.gguf_config import config_from_gguf, metadata
from fmodels.dialects.gguf_config import config_from_gguf as config
from fmodels.dialects.gguf_names import Source, name_at, parts_of, sources
from fmodels.dialects.gguf_rope import factor_tensors, is_factor_tensor
from fmodels.dialects.gguf_tokenizer import has_tokenizer, tokenizer_metadata
from fmodels.models import Config, family
from fmodels.weights import Tensor, ggml, rules
from fmodels.weights.ggml import Blocks, Turned
from fmodels.weights.rules import Place, Rule
from fmodels.weights.tensors import cast, listing

__all__ = ["config", "config_from_gguf", "metadata", "read", "with_tokenizer", "write"]

logger = logging.getLogger("fmodels")


def with_tokenizer(given: Mapping[str, Any], folder: Path, config: Config) -> dict[str, Any]:
    """The metadata of a file, with those of the folder's tokenizer if they have none.

    A tokenizer that llama.cpp has not, or that is not written yet, is left out with a warning that says why.
    """
    if "tokenizer.ggml.tokens" in given or not has_tokenizer(folder):
        return dict(given)
    try:
        return {**tokenizer_metadata(folder, config.vocab_size), **given}
    except ValueError as error:
        logger.warning("write: the GGUF file has no tokenizer, as of the one in %r: %s", str(folder), error)
        return dict(given)


def read(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """PyTorch's names and axes for the tensors of a GGUF file; names that are not known stay.

    Raises:
        ValueError: llama.cpp does not have the family; tensors have other shapes than the config says, all are listed.
    """
    weights = family(config).weights
    tensors = _apart(tensors, config)
    found: dict[str, Tensor] = {}
    used: set[str] = {name for name in tensors if is_factor_tensor(name, config)}
    fitting: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, place in {**weights.places_of_other_tasks(config), **weights.places(config)}.items():
        held = sources(place.rule, config)
        names = [name_at(source, place) for source in held]
        if not held or any(n not in tensors for n in names):
            continue
        used.update(names)
        for source, n in zip(held, names, strict=True):
            want = _shape(source, place, config)
            if (one := _with_axes(tensors[n], want)) is not None:
                fitting[n] = one
            elif place.number in (None, 0):
                problems.append(f"{n!r} has shape {list(tensors[n].shape)}, expected {list(want)}")
        if not problems:
            parts = {n: fitting[n] if place.number is None else ggml.part(fitting[n], place.number) for n in names}
            found[name] = _to_torch(name, place, held, parts, config)
    if problems:
        raise ValueError(
            f"load: {len(problems)} tensors of the GGUF file do not fit its metadata:\n  {listing(problems, sep='; ')}"
        )
    return {**found, **{name: tensor for name, tensor in tensors.items() if name not in used}}


def _apart(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors, those of `FUSED` apart where the family has them so; what does not fit stays, and is unexpected."""
    found = dict(tensors)
    fused = {name: parts for name in tensors if (parts := parts_of(name))}
    if not fused:
        return found
    places = family(config).weights.places(config).values()
    shapes = {
        name_at(source, place): _shape(source, place, config)
        for place in places
        for source in sources(place.rule, config)
    }
    for name, parts in fused.items():
        if name in shapes or any(part in tensors or part not in shapes for part in parts):
            continue
        axis = int("_exps." in name)
        ends = [0, *itertools.accumulate(shapes[part][axis] for part in parts)]
        first = shapes[parts[0]]
        if tensors[name].shape == (*first[:axis], ends[-1], *first[axis + 1 :]):
            whole = found.pop(name)
            spans = zip(parts, itertools.pairwise(ends), strict=True)
            found |= {part: ggml.some_rows(whole, part, axis, start, stop) for part, (start, stop) in spans}
    return found


def _shape(source: Source, place: Place, config: Config) -> tuple[int, ...]:
    """That of the tensor in the file, of all experts or heads."""
    size = place.sizes(config)
    shape = rules.disk_shape(source.rule, size)
    return shape if place.number is None else (size[place.rule.numbered], *shape)


def _with_axes(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor if it has the shape but for axes of 1, which llama.cpp does not tell apart; Qwen2's gates have come with one."""
    if tensor.shape == shape or [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        return tensor if tensor.shape == shape else None
    if isinstance(tensor, Blocks):
        return None
    return dataclasses.replace(tensor, shape=shape, get=lambda: tensor.array().reshape(shape))


def write(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `read`, with the tensors that llama.cpp has beside: a tied head is left out, rotary factors are added.

    Raises:
        ValueError: llama.cpp does not have the family; a tensor has another shape than the config says.
    """
    weights = family(config).weights.of_names(tensors, config)
    places, repeats = weights.places(config), weights.repeats(config)
    given: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        spellings = weights.spellings(name, config)
        if (known := next((s for s in spellings if s in places), None)) is not None:
            want = rules.disk_shape(places[known].rule, places[known].sizes(config))
            if tensor.shape != want:
                raise ValueError(
                    f"write: {name!r} has shape {list(tensor.shape)}, the config says {list(want)}; use match_config"
                )
            given[known] = tensor
        elif not any(s in repeats for s in spellings) and not weights.is_ignored(name, config):
            others[name] = tensor
    gathered: dict[str, list[Tensor]] = {}
    of_all: set[str] = set()
    for name, place in places.items():
        if name not in given:
            continue
        held = sources(place.rule, config)
        if not held:
            others[name] = given[name]
        for source in held:
            own = name_at(source, place)
            gathered.setdefault(own, []).append(_from_torch(own, place, source, given[name], config))
            of_all |= set() if place.number is None else {own}
    found = {n: _stacked(n, parts) if n in of_all else parts[0] for n, parts in gathered.items()}
    return {**found, **factor_tensors(config), **others}


@dataclasses.dataclass(frozen=True, eq=False)
class Moved(Tensor):
    """A tensor of PyTorch's that is computed from those of a GGUF file; `write` gives these back as they are.

    Attributes:
        origin: name -> tensor of the file.
        kind: the class of the config by which it was read.
    """

    origin: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    kind: type[Config] | None = None


def _to_torch(name: str, place: Place, held: list[Source], parts: Mapping[str, Tensor], config: Config) -> Tensor:
    """The tensor of PyTorch's from those of GGUF."""
    size, rule = place.sizes(config), place.rule
    straight = [_straight(source, part, size, back=True) for source, part in zip(held, parts.values(), strict=True)]
    if (moved := _in_other_order(held[0].rule, straight[0], rule, size)) is not None:
        found = dataclasses.replace(moved, name=name)
        if not held[0].shifted:
            return found
        return Moved(name, found.dtype, found.shape, found.get, origin=parts, kind=type(config))
    dtype = _common(straight)

    def get() -> np.ndarray:
        leaves: dict[str, Any] = {}
        for source, part in zip(held, straight, strict=True):
            leaves |= rules.from_disk(source.rule, part.array().astype(dtype, copy=False), size)
        return rules.to_disk(rule, leaves, np.concatenate)

    return Moved(name, dtype, rules.disk_shape(rule, size), get, origin=parts, kind=type(config))


def _from_torch(name: str, place: Place, source: Source, tensor: Tensor, config: Config) -> Tensor:
    """The tensor of GGUF, or its part of one expert or head, from that of PyTorch's in which its leaves lie."""
    if isinstance(tensor, Moved) and name in tensor.origin and tensor.kind is type(config):
        return tensor.origin[name]
    size, rule = place.sizes(config), place.rule
    moved = _in_other_order(rule, tensor, source.rule, size)
    if moved is None:

        def get() -> np.ndarray:
            leaves = rules.from_disk(rule, tensor.array(), size)
            return rules.to_disk(source.rule, leaves, np.concatenate)

        moved = Tensor.lazy(name, tensor.dtype, rules.disk_shape(source.rule, size), get)
    return _straight(source, dataclasses.replace(moved, name=name), size, back=False)


def _in_other_order(given: Rule, tensor: Tensor, wanted: Rule, size: Mapping[str, int]) -> Tensor | None:
    """A tensor of one rule as that of another where both hold the same leaves, quantised as before; None if they do not.

    That is so as long as blocks stay whole, which lie along input axes: where rows change places, and where a matrix is
    turned as a whole.
    """
    if given.leaves != wanted.leaves:
        return None
    if given.layouts == wanted.layouts:
        if given.within == wanted.within:
            return tensor

        def change(array: np.ndarray) -> np.ndarray:
            own = dict(size) | dict.fromkeys(given.layouts[0][1:], int(array.shape[-1]))  # inputs, or bytes of them
            return rules.to_disk(wanted, rules.from_disk(given, array, own), np.concatenate)

        return ggml.rows(tensor, change)
    if isinstance(tensor, Turned):
        return tensor.blocks
    return Turned.of(tensor.name, tensor) if isinstance(tensor, Blocks) and rules.is_turned(wanted) else None


def _straight(source: Source, tensor: Tensor, size: Mapping[str, int], *, back: bool) -> Tensor:
    """Between GGUF's rows and scales and ours; `back` from GGUF's."""
    if source.turned:
        pair = (size["k"] // 2, 2) if back else (2, size["k"] // 2)

        def turn(array: np.ndarray) -> np.ndarray:
            return array.reshape(-1, *pair, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

        return ggml.rows(tensor, turn)
    if source.shifted:
        wide = tensor.wide if isinstance(tensor, ggml.Widened) and tensor.wide is not None else tensor
        shape, step = tensor.shape, np.float32(-1 if back else 1)
        moved = Tensor.lazy(tensor.name, np.float32, shape, lambda: wide.array().astype(np.float32, copy=False) + step)
        if tensor.dtype == np.float32:
            return moved
        return cast(moved, tensor.dtype) if back else ggml.Widened.of(moved, tensor.dtype)
    return tensor


def _stacked(name: str, parts: list[Tensor]) -> Tensor:
    """The tensor of all experts, or heads."""
    first = parts[0]
    if all(isinstance(part, Blocks) and part.type == getattr(first, "type", "") for part in parts):
        packed = [part.packed for part in parts if isinstance(part, Blocks) and part.packed is not None]
        return Blocks.of(name, getattr(first, "type", ""), _stacked(name, packed))
    dtype = _common(parts)
    shape = (len(parts), *first.shape)
    return Tensor.lazy(name, dtype, shape, lambda: np.stack([p.array().astype(dtype, copy=False) for p in parts]))


def _common(parts: list[Tensor]) -> np.dtype:
    """The dtype of what is put together: that of all, or float32."""
    return parts[0].dtype if len({part.dtype for part in parts}) == 1 else np.dtype(np.float32)
