"""The tensors of checkpoints byte by byte: after our load and save, and against those of a second checkpoint."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import checkpoint
from fmodels.certificate import TensorCheck
from fmodels.models import Config, family
from fmodels.types import Params
from fmodels.weights import Tensor
from fmodels.weights.methods import Packed


class Source(NamedTuple):
    """A checkpoint on disk: its place, the config as it says, and its tensors, unread."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]

    def not_finite(self) -> dict[str, tuple[int, int]]:
        """Name -> numbers of NaN and infinite elements, for the tensors that have any."""
        counts = {name: count_not_finite(tensor.array()) for name, tensor in self.tensors.items()}
        return {name: count for name, count in counts.items() if any(count)}


class Name(NamedTuple):
    """What a tensor's name in a file stands for: kind "tensor", "repeat", "buffer", "other head" or "unknown"."""

    kind: str
    canonical: str


def open_source(source: str | os.PathLike[str], task: str | None) -> Source:
    """Reads the config and the headers of a folder, a file of weights beside its config.json, or a Hub id."""
    opened = checkpoint.open_checkpoint(source, task=task)
    return Source(opened.path, opened.config, opened.tensors)


def canonical_names(names: Sequence[str], config: Config) -> dict[str, Name]:
    """Name in a file -> what it stands for; old and new spellings of one tensor have one canonical name.

    Example:
        >>> import fmodels as fm
        >>> config = fm.models.gpt2.Config(num_layers=1, task="causal-lm")
        >>> for name in canonical_names(["wte.weight", "lm_head.weight", "h.0.attn.bias"], config).values():
        ...     print(*name)
        tensor transformer.wte.weight
        repeat transformer.wte.weight
        buffer h.0.attn.bias
    """
    weights = family(config).weights.of_names(names, config)
    places, others = weights.places(config), weights.places_of_other_tasks(config)
    repeats = weights.repeats(config, every=True)
    home = {path: name for name, place in places.items() if place.layer is None for path in place.rule.leaves}
    found: dict[str, Name] = {}
    for name in names:
        spellings = weights.spellings(name, config)
        known = next((s for s in spellings if s in places), None)
        repeat = next((s for s in spellings if s in repeats), None)
        other = next((s for s in spellings if s in others), None)
        if known is not None:
            found[name] = Name("tensor", known)
        elif repeat is not None:
            found[name] = Name("repeat", home.get(repeats[repeat], name))
        elif weights.is_ignored(name, config):
            found[name] = Name("buffer", name)
        else:
            found[name] = Name("unknown", name) if other is None else Name("other head", other)
    taken = {name.canonical: raw for raw, name in found.items() if name.kind == "tensor"}
    for absent, stand_in in weights.fallbacks.items():
        if absent in places and absent not in taken and stand_in in taken:
            found[taken[stand_in]] = Name("tensor", absent)
    return found


def count_not_finite(array: np.ndarray) -> tuple[int, int]:
    """How many elements are NaN, and how many infinite.

    Example:
        >>> count_not_finite(np.array([1.0, np.nan, np.inf, -np.inf], np.float16))
        (1, 2)
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return 0, 0
    nan, inf, flat = 0, 0, array.reshape(-1)
    for start in range(0, flat.size, 1 << 22):
        part = flat[start : start + (1 << 22)]
        part = part if part.dtype in (np.float32, np.float64) else part.astype(np.float32)
        if not np.isfinite(part).all():
            nan += int(np.isnan(part).sum())
            inf += int(np.isinf(part).sum())
    return nan, inf


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """True if dtype, shape and every byte are equal."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(_bytes(a), _bytes(b))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def max_or_zero(values: np.ndarray) -> float:
    """The largest value; 0 if there is none."""
    return float(values.max()) if values.size else 0.0


def not_finite_text(name: str, nan: int, inf: int) -> str:
    """What is wrong with a tensor that has NaN or infinite values, in words."""
    return f"tensor {name!r} has {nan} NaN and {inf} infinite values"


def round_trip(source: Source, params: Params, notes: list[str]) -> tuple[list[TensorCheck], list[str]]:
    """Hashes every tensor and compares it with what our save writes of the tree that our load made."""
    names = canonical_names(list(source.tensors), source.config)
    raw = {name.canonical: file_name for file_name, name in names.items() if name.kind == "tensor"}
    checks, failures = [], []
    with tempfile.TemporaryDirectory(prefix="fmodels-verify-") as folder:
        checkpoint.save(params, source.config, folder)
        written = checkpoint.open_checkpoint(folder).tensors
        own = canonical_names(list(written), source.config)
        saved = {own[name].canonical: tensor for name, tensor in written.items()}
        total = sum(tensor.nbytes for tensor in source.tensors.values())
        with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for name, tensor in source.tensors.items():
                array, (kind, canonical) = tensor.array(), names[name]
                nan, inf = count_not_finite(array)
                if kind == "tensor":
                    back = saved.pop(canonical, None)
                    same = back is not None and _same_tensor(tensor, array, back)
                    outcome = "equal" if same else "not written" if back is None else "differs"
                    if not same:
                        failures.append(f"load and save: tensor {name!r} {outcome}")
                elif kind == "repeat":
                    outcome = f"repeats {raw.get(canonical, canonical)}, written once"
                else:
                    outcome = {"buffer": "buffer that is recomputed, left out"}.get(kind, "of another head, left out")
                    if kind != "buffer":
                        notes.append(
                            f"tensor {name!r} belongs to another head than {source.config.task!r} and is left out"
                        )
                if nan or inf:
                    failures.append(not_finite_text(name, nan, inf))
                digest = hashlib.sha256(_bytes(array).data).hexdigest()
                checks.append(TensorCheck(name, tensor.dtype.name, tensor.shape, digest, nan, inf, outcome))
                bar.update(tensor.nbytes)
        failures += [f"load and save: tensor {name!r} was written, but is not in A" for name in saved]
    return checks, failures


def _same_tensor(a: Tensor, array: np.ndarray, b: Tensor) -> bool:
    """True if dtype, shape and every byte are equal, of a quantised tensor of each part."""
    if isinstance(a, Packed) or isinstance(b, Packed):
        parts, others = (tensor.parts if isinstance(tensor, Packed) else {} for tensor in (a, b))
        return parts.keys() == others.keys() and all(same_bytes(parts[n].array(), others[n].array()) for n in parts)
    return same_bytes(array, b.array())


def against(checks: list[TensorCheck], a: Source, b: Source) -> tuple[list[TensorCheck], list[str], list[str]]:
    """The checks with what B has in their place, names that only B has, and what is wrong."""
    ours, theirs = canonical_names(list(a.tensors), a.config), canonical_names(list(b.tensors), b.config)
    kinds = ("tensor", "other head", "unknown")
    there = {name.canonical: raw for raw, name in theirs.items() if name.kind in kinds}
    here = {name.canonical for name in ours.values() if name.kind in kinds}
    unexpected = [raw for canonical, raw in there.items() if canonical not in here]
    problems, result = [], []
    for check in checks:
        kind, canonical = ours[check.name]
        if kind not in kinds:
            result.append(check._replace(other="repeated or recomputed"))
            continue
        raw = there.get(canonical)
        outcome, difference = ("missing", None) if raw is None else _relation(a.tensors[check.name], b.tensors[raw])
        if outcome not in ("equal", "equal values"):
            problems.append(f"B: tensor {check.name!r} {'is missing' if raw is None else outcome}")
        if outcome == "equal values" and raw is not None:
            outcome = f"equal values in {b.tensors[raw].dtype.name}"
        result.append(check._replace(other=outcome, difference=difference))
    problems += [f"B: tensor {name!r} is not in A" for name in unexpected]
    return result, unexpected, problems


def _relation(a: Tensor, b: Tensor) -> tuple[str, float | None]:
    """How the tensor `b` relates to `a`, and their largest absolute difference."""
    if a.shape != b.shape:
        return f"has shape {list(b.shape)} in place of {list(a.shape)}", None
    x, y = a.array(), b.array()
    if same_bytes(x, y):
        return "equal", None
    wide, other = x.astype(np.float64), y.astype(np.float64)
    difference = max_or_zero(np.abs(wide - other))
    if a.dtype != b.dtype:
        if difference == 0:
            return "equal values", 0.0
        with np.errstate(over="ignore"):
            rounded = same_bytes(x.astype(b.dtype), y)
        return f"{'is rounded to' if rounded else 'differs, in'} {b.dtype.name}, by up to {difference:.2g}", difference
    return f"differs by up to {difference:.2g} in {int((wide != other).sum()):,} of {a.size:,} elements", difference
