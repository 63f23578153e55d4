"""The conversion certificate: that a checkpoint survives us to the byte, and that every framework computes the same.

Two kinds of evidence. *Bytes*: a hash of every tensor, its equality after our load and save, and with a second
checkpoint. *Numbers*: hidden states of every layer, logits and gradients of the same weights in JAX, in the PyTorch and
TensorFlow wrappers, and in transformers, whose own reader reads the folder. The first place that departs from its bound
is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import checkpoint, hub, tree
from fmodels.api import CHOICE_TASKS, forward
from fmodels.layout import to_disk
from fmodels.models import Config, family
from fmodels.text import size, table
from fmodels.transforms.casting import cast
from fmodels.transforms.counting import num_parameters
from fmodels.transforms.stacking import unstack_layers
from fmodels.types import Array, Output, Params
from fmodels.weights import Tensor, read_file, read_folder

FRAMEWORKS = ("torch", "tensorflow", "transformers")
LABELS = {"torch": "PyTorch wrapper", "tensorflow": "TensorFlow wrapper", "transformers": "transformers"}
LENGTH = 12
"""Tokens in a row of the random input."""
FLOOR = 1e-2
"""A gradient smaller than this part of the median tensor's is measured against that part: it may be but rounding."""


class TensorCheck(NamedTuple):
    """One tensor of the first checkpoint.

    Attributes:
        name: as in its file.
        dtype: as in its file.
        shape: as in its file.
        sha256: of its bytes in row-major order, in hexadecimal digits.
        nan: how many of its elements are NaN.
        inf: how many are infinite.
        saved: what came back after our load and save: "equal", or what became of it.
        other: the same tensor of the second checkpoint: "equal", or how it differs; None without a second one.
        difference: the largest absolute difference to it; None where there is none to compare, or equal bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    nan: int
    inf: int
    saved: str
    other: str | None = None
    difference: float | None = None


class Comparison(NamedTuple):
    """What one way to compute the model says about the reference.

    Attributes:
        name: which way.
        status: "pass", "fail", "not installed", "not asked for" or "not possible".
        places: place ("embeddings", "layer 0", …, "logits") -> its largest departure from the reference.
        gradients: tensor's name -> largest difference of the gradient, relative to that tensor's largest.
        first: the first place, or the worst gradient, that departs from its bound.
        note: what else is to be said.
    """

    name: str
    status: str
    places: Mapping[str, float] = {}
    gradients: Mapping[str, float] = {}
    first: str | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `verify` found.

    Attributes:
        a: the first checkpoint.
        b: the second, or None.
        model: its type, task and sizes, as pairs.
        sha256: one hash of all names, dtypes, shapes and hashes of the tensors of `a`.
        tensors: one check for each tensor of `a`.
        unexpected: names of tensors that `b` has and `a` has not.
        comparisons: one for each way to compute the model.
        failures: everything that is wrong, in words; empty if the certificate is good.
        notes: everything else that a reader must know.
        versions: package -> version, or None if it is not installed.
        settings: seed, bounds and shape of the input, as pairs.
    """

    a: str
    b: str | None
    model: Mapping[str, Any]
    sha256: str
    tensors: tuple[TensorCheck, ...]
    unexpected: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return not self.failures

    def to_json(self) -> str:
        """Everything, as JSON; numbers that JSON does not have are text ("nan")."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["tensors"] = [tensor._asdict() for tensor in self.tensors]
        data["comparisons"] = [comparison._asdict() for comparison in self.comparisons]
        return json.dumps(_plain({"ok": self.ok, **data}), indent=2)

    def to_table(self, *, tensors: bool = False) -> str:
        """For people.

        Args:
            tensors: list every tensor with its hash, not only those with something to say.
        """
        parts = [self._head(), self._bytes(tensors), self._numbers()]
        if self.notes:
            parts.append("\n".join(f"note: {note}" for note in self.notes))
        if self.failures:
            parts.append("\n".join(f"FAILED: {failure}" for failure in self.failures))
        return "\n\n".join(part for part in parts if part)

    def _head(self) -> str:
        m, s = self.model, self.settings
        rows = [
            ["conversion certificate", "PASS" if self.ok else f"FAIL ({len(self.failures)})"],
            ["A", self.a],
            *([["B", self.b]] if self.b is not None else []),
            ["model", f"{m['model_type']}, {m['task']}, {m['num_layers']} layers, {m['parameters']:,} parameters, "
                      f"{size(m['bytes'])} of {', '.join(m['dtypes'])}"],
            ["sha256 of A", self.sha256],
            ["input", f"random tokens {tuple(s['shape'])}, seed {s['seed']}, computed in {s['computed_in']}"],
            ["bounds", f"outputs {s['tolerance']:g} of max(1, |reference|), "
                       f"gradients {s['gradient_tolerance']:g} of each tensor's largest"],
            ["versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in self.versions.items())],
        ]  # fmt: skip
        return table(rows)

    def _bytes(self, every: bool) -> str:
        count = len(self.tensors)
        saved = sum(tensor.saved == "equal" for tensor in self.tensors)
        lines = [f"tensors of A: {count}, {saved} of them equal to the byte after load and save"]
        if self.b is not None:
            equal = sum(tensor.other == "equal" for tensor in self.tensors)
            lines.append(f"tensors of A in B: {equal} of {count} equal to the byte, {len(self.unexpected)} in B only")
        shown = [tensor for tensor in self.tensors if every or _remarkable(tensor)]
        rows = [
            [
                t.name, t.dtype, list(t.shape), t.sha256[:16],
                f"{t.nan} NaN, {t.inf} Inf" if t.nan or t.inf else "finite",
                t.saved, *([t.other] if self.b is not None else []),
            ]
            for t in (shown if every else shown[:40])
        ]  # fmt: skip
        if rows:
            header = [
                "tensor",
                "dtype",
                "shape",
                "sha256",
                "values",
                "load and save",
                *(["B"] if self.b is not None else []),
            ]
            lines.append(table(rows, header))
        if not every and len(shown) > 40:
            lines.append(f"… and {len(shown) - 40} more")
        return "\n".join(lines)

    def _numbers(self) -> str:
        ran = [c for c in self.comparisons if c.places or c.gradients]
        rest = [c for c in self.comparisons if c not in ran]
        lines = []
        if ran:
            places = list(dict.fromkeys(place for c in ran for place in c.places))
            rows = [[place, *(_number(c.places.get(place)) for c in ran)] for place in places]
            if any(c.gradients for c in ran):
                rows.append(
                    ["gradients", *(_number(_worst(c.gradients.values()) if c.gradients else None) for c in ran)]
                )
            rows.append(["", *(c.status for c in ran)])
            lines.append(table(rows, ["departure from JAX", *(c.name for c in ran)], right=range(1, len(ran) + 1)))
        lines += [f"{c.name}: {c.status}" + (f": {c.note}" if c.note else "") for c in rest]
        lines += [f"{c.name}: {c.note}" for c in ran if c.note]
        return "\n".join(lines)


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    *,
    task: str | None = None,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
    gradients: bool = True,
    outputs_only: bool = False,
    frameworks: Sequence[str] = FRAMEWORKS,
    seed: int = 0,
) -> Certificate:
    """Checks a checkpoint, or that two are the same model.

    Everything is computed in float32, to which bfloat16 and float16 weights are cast exactly, so that the bounds mean
    the same for all checkpoints. The reference is `fm.forward` on the stacked tree. Padded places are not compared.

    A departure is `|x - reference| / max(1, |reference|)` for each element of the outputs. Of a hidden state, which the
    next norm takes as a whole, it is measured against the largest element of its vector: the sum of the residual stream
    has values of several hundred in trained models, whose rounding is the error of their small neighbours.

    Args:
        a: a folder, a file of weights beside its config.json, or a Hub id.
        b: another that should be the same model.
        task: as in `fm.load`.
        tolerance: bound of the departure of hidden states and outputs.
        gradient_tolerance: bound of the difference of gradients, relative to each tensor's largest.
        gradients: compare gradients too, of a random linear function of the outputs.
        outputs_only: tensors of `b` that differ are reported, but are no failure.
        frameworks: which to compare with, of "torch", "tensorflow", "transformers".
        seed: of the random input.

    Returns:
        A `Certificate`; failed checks are in its `failures`, not raised.

    Raises:
        ValueError: `a` or the files of `b` cannot be read; an unknown framework.
        OSError: they are not there.

    Example:
        >>> import fmodels as fm
        >>> certificate = verify(fm.assets.TINY_LLAMA, frameworks=(), gradients=False)
        >>> certificate.ok, certificate.tensors[0].saved
        (True, 'equal')
    """
    if unknown := [name for name in frameworks if name not in FRAMEWORKS]:
        raise ValueError(f"verify: unknown frameworks {unknown}; choose from {', '.join(FRAMEWORKS)}")
    notes: list[str] = []
    first, second = _open(a, task), None if b is None else _open(b, task)
    params, config = checkpoint.load(first.folder, task=task)
    first = first._replace(config=config)
    checks, failures = _round_trip(first, params, notes)
    unexpected: list[str] = []
    not_finite: dict[str, tuple[int, int]] = {}
    if second is not None:
        checks, unexpected, problems = _against(checks, first, second)
        (notes if outputs_only else failures).extend(problems)
        not_finite = second.not_finite()
        failures += [f"B: {_not_finite(name, *counts)}" for name, counts in not_finite.items()]
    finite = not any(check.nan or check.inf for check in checks)

    computed = cast(params, "float32")
    other, other_error = None, ""
    if second is not None:
        try:
            other = checkpoint.load(second.folder, task=task, dtype="float32")
        except (ValueError, NotImplementedError) as error:
            other_error = str(error)
    given = _inputs(params, config, seed, None if other is None else other[0])
    comparisons, reference = _compare_all(
        computed, config, first.folder, given,
        gradients=gradients, frameworks=frameworks, finite=finite, tolerances=(tolerance, gradient_tolerance),
    )  # fmt: skip
    if second is not None:
        usable = None if not_finite else reference
        comparisons.append(_compare_b(usable, other, other_error, given, tolerance))
    failures += [f"{c.name}: {c.note if c.first is None else _departure(c)}" for c in comparisons if c.status == "fail"]
    if not finite:
        notes.append("weights are not finite, so nothing was computed with them")
    dtypes = sorted({check.dtype for check in checks if not check.saved.startswith("buffer")})
    if any(dtype != "float32" for dtype in dtypes):
        notes.append(
            f"weights of {', '.join(dtypes)} were cast to float32 before anything was computed{_exactly(dtypes)}"
        )
    digest = hashlib.sha256("\n".join(f"{c.name} {c.dtype} {c.shape} {c.sha256}" for c in sorted(checks)).encode())
    return Certificate(
        a=str(a),
        b=None if b is None else str(b),
        model={
            "model_type": config.model_type, "task": config.task, "num_layers": config.num_layers,
            "parameters": num_parameters(params), "bytes": sum(t.nbytes for t in first.tensors.values()),
            "dtypes": dtypes,
        },
        sha256=digest.hexdigest(),
        tensors=tuple(checks),
        unexpected=tuple(unexpected),
        comparisons=tuple(comparisons),
        failures=tuple(failures),
        notes=tuple(notes),
        versions=_versions(),
        settings={
            "seed": seed, "shape": list(given.tokens.shape), "computed_in": "float32", "tolerance": tolerance,
            "gradient_tolerance": gradient_tolerance, "gradients": gradients, "outputs_only": outputs_only,
        },
    )  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------


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


def _open(source: str | os.PathLike[str], task: str | None) -> Source:
    folder = hub.resolve(source)
    config = checkpoint.load_config(folder, task=task)
    tensors, _ = read_folder(folder) if folder.is_dir() else read_file(folder)
    return Source(folder, config, tensors)


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
    weights = family(config).weights
    places, others = weights.places(config), weights.places_of_other_tasks(config)
    home = {path: name for name, place in places.items() if place.layer is None for path in place.rule.leaves}
    found: dict[str, Name] = {}
    for name in names:
        spellings = weights.spellings(name, config)
        known = next((s for s in spellings if s in places), None)
        repeat = next((s for s in spellings if s in weights.tied and config.tie_word_embeddings), None)
        other = next((s for s in spellings if s in others), None)
        if known is not None:
            found[name] = Name("tensor", known)
        elif repeat is not None:
            found[name] = Name("repeat", home.get(weights.tied[repeat], name))
        elif weights.is_ignored(name):
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


def _not_finite(name: str, nan: int, inf: int) -> str:
    return f"tensor {name!r} has {nan} NaN and {inf} infinite values"


def _remarkable(tensor: TensorCheck) -> bool:
    return bool(tensor.nan or tensor.inf) or tensor.saved != "equal" or tensor.other not in (None, "equal")


def _round_trip(source: Source, params: Params, notes: list[str]) -> tuple[list[TensorCheck], list[str]]:
    """Hashes every tensor and compares it with what our save writes of the tree that our load made."""
    names = canonical_names(list(source.tensors), source.config)
    raw = {name.canonical: file_name for file_name, name in names.items() if name.kind == "tensor"}
    checks, failures = [], []
    with tempfile.TemporaryDirectory(prefix="fmodels-verify-") as folder:
        checkpoint.save(params, source.config, folder)
        saved, _ = read_folder(folder)
        total = sum(tensor.nbytes for tensor in source.tensors.values())
        with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for name, tensor in source.tensors.items():
                array, (kind, canonical) = tensor.array(), names[name]
                nan, inf = count_not_finite(array)
                if kind == "tensor":
                    back = saved.pop(canonical, None)
                    same = back is not None and same_bytes(array, back.array())
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
                    failures.append(_not_finite(name, nan, inf))
                digest = hashlib.sha256(_bytes(array).data).hexdigest()
                checks.append(TensorCheck(name, tensor.dtype.name, tensor.shape, digest, nan, inf, outcome))
                bar.update(tensor.nbytes)
        failures += [f"load and save: tensor {name!r} was written, but is not in A" for name in saved]
    return checks, failures


def _against(checks: list[TensorCheck], a: Source, b: Source) -> tuple[list[TensorCheck], list[str], list[str]]:
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
    difference = _largest(np.abs(wide - other))
    if a.dtype != b.dtype:
        if difference == 0:
            return "equal values", 0.0
        with np.errstate(over="ignore"):
            rounded = same_bytes(x.astype(b.dtype), y)
        return f"{'is rounded to' if rounded else 'differs, in'} {b.dtype.name}, by up to {difference:.2g}", difference
    return f"differs by up to {difference:.2g} in {int((wide != other).sum()):,} of {a.size:,} elements", difference


# --- numbers ----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """The random input: `tokens`, `mask`, `token_types` (or None), and a random weight for every output's elements."""

    tokens: np.ndarray
    mask: np.ndarray
    token_types: np.ndarray | None
    seed: int

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """What the output `name` is multiplied with before everything is summed to the loss; 0 at padded places."""
        random = np.random.default_rng([self.seed, *name.encode()])
        weight = random.standard_normal(shape).astype(np.float32)
        return np.where(self.where(shape), weight, np.float32(0))

    def where(self, shape: tuple[int, ...]) -> np.ndarray:
        """True at the elements that are compared: all but padded places."""
        if len(shape) > self.mask.ndim and shape[: self.mask.ndim] == self.mask.shape:
            return np.broadcast_to(self.mask.reshape(self.mask.shape + (1,) * (len(shape) - self.mask.ndim)), shape)
        return np.ones(shape, bool)


class Result(NamedTuple):
    """What one way to compute the model gives: outputs by the names of `fm.Output`, gradients by names on disk."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    note: str = ""


HEADS = ("logits", "sequence_logits")
FIELDS = ("hidden_states", "hidden", "pooled", *HEADS)


def _inputs(params: Params, config: Config, seed: int, other: Params | None) -> Given:
    """Two rows of random tokens, the second padded on the right, which all frameworks understand alike."""
    random = np.random.default_rng(seed)
    tables = [p["embed"] for p in (params, other) if p is not None]
    vocabulary = min(table["tokens"].shape[0] for table in tables)
    length = min([LENGTH, *(table["positions"].shape[0] for table in tables if "positions" in table)])
    pad = config.pad_token_id if config.pad_token_id is not None and 0 <= config.pad_token_id < vocabulary else None
    # Without a pad token transformers classifies sequences one at a time.
    rows = 1 if config.task == "sequence-classification" and pad is None else 2
    shape = (rows, 3, length) if config.task in CHOICE_TASKS else (rows, length)
    mask = np.ones(shape, bool)
    mask[1:, ..., length - length // 4 :] = False
    tokens = random.integers(0, vocabulary, shape)
    if pad is not None and vocabulary > 1:
        tokens = np.where(tokens == pad, (pad + 1) % vocabulary, tokens)
    tokens = np.where(mask, tokens, 0 if pad is None else pad).astype(np.int32)
    types = [table["types"].shape[0] for table in tables if "types" in table]
    token_types = random.integers(0, min(types), shape).astype(np.int32) if types else None
    return Given(tokens, mask, token_types, seed)


def _chosen(names: Sequence[str]) -> list[str]:
    """The outputs that make the loss: the heads' if there are any, else the hidden states and the pooler's."""
    heads = [name for name in HEADS if name in names]
    return heads or [name for name in ("hidden", "pooled") if name in names]


def _run_jax(params: Params, config: Config, given: Given, *, gradients: bool) -> Result:
    def run(params: Params) -> Output:
        types = None if given.token_types is None else jnp.asarray(given.token_types)
        mask = jnp.asarray(given.mask)
        return forward(params, config, jnp.asarray(given.tokens), mask=mask, token_types=types, hidden_states=True)

    def loss(params: Params) -> tuple[Array, Output]:
        out = run(params)
        fields = {name: value for name, value in out._asdict().items() if value is not None}
        weighted = [jnp.sum(fields[name] * given.weight(name, fields[name].shape)) for name in _chosen(list(fields))]
        return sum(weighted, jnp.float32(0)), out

    if gradients:
        found, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        named = {name: np.asarray(value) for name, value in to_disk(found, config).items()}
    else:
        out, named = run(params), {}
    return Result({f: np.asarray(getattr(out, f)) for f in FIELDS if getattr(out, f) is not None}, named)


def _run_torch(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    import torch

    from interop.torch import TorchModel

    module = TorchModel(params, config)
    tensors = {name: torch.tensor(value) for name, value in given._asdict().items() if isinstance(value, np.ndarray)}
    with torch.set_grad_enabled(gradients):
        out = module(**tensors, hidden_states=True)
        outputs = {name: getattr(out, name) for name in FIELDS if getattr(out, name, None) is not None}
        return _finish_torch(module, outputs, given, gradients=gradients)


def _finish_torch(module: Any, outputs: dict[str, Any], given: Given, *, gradients: bool, note: str = "") -> Result:
    """The outputs and, after the backward pass, the gradients of a `torch.nn.Module`."""
    import torch

    named: dict[str, np.ndarray] = {}
    if gradients:
        weights = {
            name: torch.tensor(given.weight(name, tuple(outputs[name].shape))) for name in _chosen(list(outputs))
        }
        torch.stack([(outputs[name] * weight).sum() for name, weight in weights.items()]).sum().backward()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            gradient = parameter.grad
            named[name] = np.zeros(tuple(parameter.shape), np.float32) if gradient is None else gradient.numpy()
    return Result({name: value.detach().numpy() for name, value in outputs.items()}, named, note)


def _run_tensorflow(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from interop.tensorflow import TFModel

    module = TFModel(params, config)
    tensors = {name: tf.constant(value) for name, value in given._asdict().items() if isinstance(value, np.ndarray)}
    with tf.GradientTape() as tape:
        out = module(**tensors)
        outputs = {name: getattr(out, name) for name in FIELDS if getattr(out, name, None) is not None}
        chosen = {name: outputs[name] for name in _chosen(list(outputs))}
        weighted = [tf.reduce_sum(x * given.weight(name, tuple(x.shape))) for name, x in chosen.items()]
        loss = tf.add_n(weighted)
    named: dict[str, np.ndarray] = {}
    if gradients:
        variables = dict(module.named_variables)
        found = tape.gradient(loss, list(variables.values()), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        named = {name: tf.convert_to_tensor(g).numpy() for name, g in zip(variables, found, strict=True)}
    note = "gives no inner layers; what it gives is compared"
    return Result({name: value.numpy() for name, value in outputs.items()}, named, note)


def _run_transformers(params: Params, config: Config, folder: Path, given: Given, *, gradients: bool) -> Result:
    import torch

    model, note = read_with_transformers(params, config, folder)
    inputs = {"input_ids": torch.tensor(given.tokens).long(), "attention_mask": torch.tensor(given.mask).long()}
    if given.token_types is not None:
        inputs["token_type_ids"] = torch.tensor(given.token_types).long()
    if config.task == "double-heads":
        inputs["mc_token_ids"] = torch.tensor(np.where(given.mask, np.arange(given.mask.shape[-1]), 0).argmax(-1))
    model.config.use_cache = False
    with torch.set_grad_enabled(gradients):
        outputs = _transformers_outputs(model(**inputs, output_hidden_states=True, return_dict=True))
        return _finish_torch(model, outputs, given, gradients=gradients, note=note)


def _transformers_outputs(out: Any) -> dict[str, Any]:
    """By the names of `fm.Output`."""
    import torch

    states = out.hidden_states  # GPT-2's last is by choices already, where there are choices
    found = {"hidden_states": torch.stack([state.reshape(states[0].shape) for state in states])}
    if out.get("last_hidden_state") is not None:
        found["hidden"] = out.last_hidden_state
    if out.get("pooler_output") is not None:
        found["pooled"] = out.pooler_output
    if out.get("start_logits") is not None:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], dim=-1)
    names = {
        "logits": "logits",
        "prediction_logits": "logits",
        "seq_relationship_logits": "sequence_logits",
        "mc_logits": "sequence_logits",
    }
    found |= {ours: out[theirs] for theirs, ours in names.items() if out.get(theirs) is not None}
    return found


def read_with_transformers(params: Params, config: Config, folder: Path) -> tuple[Any, str]:
    """The model of transformers itself in float32, read from the folder by its own reader where it can be; and a note.

    Raises:
        ImportError: torch or transformers is not installed.
        NotImplementedError: transformers has no such model (with pruned heads).
    """
    from interop.transformers import to_transformers

    if config.pruned_heads:
        raise NotImplementedError(
            "transformers 5 cannot represent pruned heads; mask_heads computes the same in full shapes"
        )

    with _quiet():
        model = to_transformers(params, config)
        if not folder.is_dir():
            return model.eval(), "its weights were handed over, as A is not a folder"
        # transformers reads config.json and the weights by itself: nothing of ours is between the disk and its numbers.
        kind: Any = type(model)
        read = kind.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    return read.eval(), "read the folder by itself"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars of others off the terminal; what they wrote is shown if they fail."""
    sink = io.StringIO()
    with contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        yield


RUNNERS: dict[str, Callable[..., Result]] = {
    "torch": _run_torch,
    "tensorflow": _run_tensorflow,
    "transformers": _run_transformers,
}


def _compare_all(
    params: Params,
    config: Config,
    folder: Path,
    given: Given,
    *,
    gradients: bool,
    frameworks: Sequence[str],
    finite: bool,
    tolerances: tuple[float, float],
) -> tuple[list[Comparison], Result | None]:
    """The reference against the unstacked tree and every framework; and the reference itself."""
    stacked = tree.is_stacked(params)
    unstacked_name = "JAX, unstacked"
    missing = {name for name in FRAMEWORKS if not _installed(name)}
    reasons = {name: ("not asked for", "") for name in FRAMEWORKS if name not in frameworks}
    reasons |= {
        name: ("not installed", f"pip install 'fmodels[{name}]'")
        for name in missing & set(frameworks) - {"transformers"}
    }
    if "transformers" in frameworks and missing & {"transformers", "torch"}:
        reasons["transformers"] = ("not installed", "pip install transformers torch")
    if not finite:
        skipped = ("not possible", "the weights are not finite")
        reasons |= {name: skipped for name in FRAMEWORKS if name not in reasons}
        unstacked = Comparison(unstacked_name, skipped[0], note=skipped[1])
        return [unstacked, *(_not_run(name, reasons) for name in FRAMEWORKS)], None
    reference = _run_jax(params, config, given, gradients=gradients)
    found = []
    if stacked:
        try:
            found.append(
                _compare(
                    unstacked_name,
                    reference,
                    _run_jax(unstack_layers(params), config, given, gradients=gradients),
                    given,
                    *tolerances,
                )
            )
        except Exception as error:
            found.append(Comparison(unstacked_name, "fail", note=_brief(error)))
    else:
        found.append(
            Comparison(
                "JAX, stacked",
                "not possible",
                note="layers differ in their numbers of heads; the reference is unstacked",
            )
        )
    for name in FRAMEWORKS:
        if name in reasons:
            found.append(_not_run(name, reasons))
            continue
        try:
            result = RUNNERS[name](params, config, folder, given, gradients=gradients)
            found.append(_compare(LABELS[name], reference, result, given, *tolerances))
        except NotImplementedError as error:
            found.append(Comparison(LABELS[name], "not possible", note=_brief(error)))
        except Exception as error:  # whatever a framework raises is a finding, and the others are still to be run
            found.append(Comparison(LABELS[name], "fail", note=_brief(error)))
    return found, reference


def _compare_b(
    reference: Result | None,
    other: tuple[Params, Config] | None,
    error: str,
    given: Given,
    tolerance: float,
) -> Comparison:
    """The outputs of A, None if its or B's weights are not finite, against those of B, both in stacked JAX."""
    if other is None:
        return Comparison("B", "fail", note=f"cannot be loaded: {error}")
    if reference is None:
        return Comparison("B", "not possible", note="the weights are not finite")
    return _compare("B", reference, _run_jax(*other, given, gradients=False), given, tolerance, math.inf)


def _compare(
    name: str, reference: Result, result: Result, given: Given, tolerance: float, gradient_tolerance: float
) -> Comparison:
    """Where `result` departs from `reference`, place by place."""
    places: dict[str, float] = {}
    problems: list[str] = []
    shapes: list[str] = []
    for field in FIELDS:
        want, got = reference.outputs.get(field), result.outputs.get(field)
        if want is None or got is None:
            continue
        if field == "hidden_states":
            labels = _labels(len(want))
            if len(want) != len(got):
                shapes.append(f"has {len(got) - 1} layers in place of {len(want) - 1}")
            pairs = list(zip(labels, want, got, strict=False))
        elif field == "hidden" and "hidden_states" in reference.outputs and "hidden_states" in result.outputs:
            continue  # the last of them
        else:
            label = {"hidden": _labels(len(reference.outputs["hidden_states"]))[-1]}.get(field, field.replace("_", " "))
            pairs = [(label, want, got)]
        for label, x, y in pairs:
            if given.mask.ndim == 3 and field == "hidden_states":  # of choices, which lie side by side in the batch
                x, y = (z.reshape(*given.mask.shape, z.shape[-1]) if z.ndim == 3 else z for z in (x, y))
            if x.shape != y.shape:
                shapes.append(f"{label} has shape {list(y.shape)} in place of {list(x.shape)}")
                continue
            places[label] = departure(y, x, given.where(x.shape), vectors=field in ("hidden_states", "hidden"))
    # A head that one side lacks, not one that a framework names otherwise.
    lacking = [field for field in HEADS if (field in reference.outputs) != (field in result.outputs)]
    shapes += [
        f"has {'no' if field in reference.outputs else 'additional'} {field.replace('_', ' ')}" for field in lacking
    ]
    problems += [place for place, value in places.items() if not value <= tolerance]
    gradients = _gradients(reference.gradients, result.gradients) if result.gradients else {}
    absent = [n for n in reference.gradients if n not in result.gradients] if result.gradients else []
    shapes += [f"gives no gradient of {n}" for n in absent]
    bad = [n for n, value in gradients.items() if not value <= gradient_tolerance]
    first = problems[0] if problems else None
    if first is None and bad:
        first = f"gradient of {max(bad, key=lambda n: math.inf if math.isnan(gradients[n]) else gradients[n])}"
    note = "; ".join([*shapes, *filter(None, [result.note])])
    status = "fail" if problems or bad or shapes or not places else "pass"
    return Comparison(name, status, places, gradients, first, note)


def departure(got: np.ndarray, want: np.ndarray, where: np.ndarray, *, vectors: bool = False) -> float:
    """The largest `|got - want| / max(1, |want|)` where `where`; NaN if either has one there.

    Args:
        got: what is measured.
        want: the reference.
        where: of the same shape, True at what is compared.
        vectors: measure against the largest element of each vector (of the last axis), not against each element.

    Example:
        >>> departure(np.array([1.5, 9.0]), np.array([1.0, 10.0]), np.array([False, True]))
        0.1
        >>> departure(np.array([1.5, 10.0]), np.array([1.0, 10.0]), np.array([True, True]), vectors=True)
        0.05
    """
    x, y = got.astype(np.float64), want.astype(np.float64)
    scale = np.abs(y).max(-1, keepdims=True) if vectors and y.size else np.abs(y)
    return _largest((np.abs(x - y) / np.maximum(1, scale))[where])


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if values.size else 0.0


def _gradients(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> dict[str, float]:
    largest = {name: _largest(np.abs(value)) for name, value in want.items()}
    typical = FLOOR * float(np.median([value for value in largest.values() if value > 0] or [1.0]))
    found = {}
    for name in want:
        if name not in got:
            continue
        if got[name].shape != want[name].shape:
            found[name] = math.nan
            continue
        difference = np.abs(got[name].astype(np.float64) - want[name].astype(np.float64))
        found[name] = _largest(difference) / max(largest[name], typical)
    return found


def _labels(count: int) -> list[str]:
    """The names of hidden states: the last layer's comes with the final norm, if the model has one."""
    return ["embeddings", *(f"layer {i}" for i in range(count - 1))]


def _departure(c: Comparison) -> str:
    assert c.first is not None
    if c.first.startswith("gradient of "):
        value = c.gradients[c.first.removeprefix("gradient of ")]
        return f"{c.first} departs, by {value:.2g} of its largest"
    return f"the first place that departs from its bound is {c.first}, by {c.places[c.first]:.2g}" + (
        f" ({c.note})" if c.note else ""
    )


def _not_run(name: str, reasons: Mapping[str, tuple[str, str]]) -> Comparison:
    status, note = reasons[name]
    return Comparison(LABELS[name], status, note=note)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError):
        return False


def _versions() -> dict[str, str | None]:
    import fmodels

    found: dict[str, str | None] = {"fmodels": fmodels.__version__, "jax": jax.__version__, "numpy": np.__version__}
    for name in FRAMEWORKS:
        version = None
        for package in (name, f"{name}-cpu"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = version or importlib.metadata.version(package)
        found[name] = version if _installed(name) else None
    return found


def _exactly(dtypes: Sequence[str]) -> str:
    return ", which rounds float64" if "float64" in dtypes else ", exactly"


def _brief(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else text[:499] + "…"


def _worst(values: Any) -> float:
    values = list(values)
    return math.nan if any(math.isnan(v) for v in values) else max(values, default=0.0)


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _plain(value: Any) -> Any:
    """For JSON: tuples as lists, numbers that JSON lacks as text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
