"""The conversion certificate: that a checkpoint survives us to the byte, and that every framework computes the same.

Two kinds of evidence. *Bytes*: a hash of every tensor, its equality after our load and save, and with a second
checkpoint. *Numbers*: hidden states of every layer, logits and gradients of the same weights in JAX, in the PyTorch and
TensorFlow wrappers, and in transformers, whose own reader reads the folder. The first place that departs from its bound
is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from fmodels import checkpoint, tree
from fmodels.bytewise import against, max_or_zero, not_finite_text, open_source, round_trip
from fmodels.certificate import Certificate, Comparison
from fmodels.models import Config
from fmodels.runs import FIELDS, HEADS, RUNNERS, Given, Result, random_input, run_jax
from fmodels.transforms.casting import cast
from fmodels.transforms.counting import num_parameters
from fmodels.transforms.dequantizing import dequantize
from fmodels.transforms.stacking import unstack_layers
from fmodels.types import Params
from fmodels.weights.methods import Packed

FRAMEWORKS = ("torch", "tensorflow", "transformers")
LABELS = {"torch": "PyTorch wrapper", "tensorflow": "TensorFlow wrapper", "transformers": "transformers"}
FLOOR = 1e-2
"""A gradient smaller than this part of the median tensor's is measured against that part: it may be but rounding."""


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
    first, second = open_source(a, task), None if b is None else open_source(b, task)
    params, config = checkpoint.load(first.folder, task=task)
    first = first._replace(config=config)
    checks, failures = round_trip(first, params, notes)
    unexpected: list[str] = []
    not_finite: dict[str, tuple[int, int]] = {}
    if second is not None:
        checks, unexpected, problems = against(checks, first, second)
        (notes if outputs_only else failures).extend(problems)
        not_finite = second.not_finite()
        failures += [f"B: {not_finite_text(name, *counts)}" for name, counts in not_finite.items()]
    finite = not any(check.nan or check.inf for check in checks)

    computed = cast(dequantize(params), "float32")
    other, other_error = None, ""
    if second is not None:
        try:
            theirs, other_config = checkpoint.load(second.folder, task=task)
            other = cast(dequantize(theirs), "float32"), other_config
        except (ValueError, NotImplementedError) as error:
            other_error = str(error)
    given = random_input(params, config, seed, None if other is None else other[0])
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
    if count := sum(isinstance(tensor, Packed) for tensor in first.tensors.values()):
        notes.append(f"{count} tensors are quantised: dtypes, hashes and outputs are of the arrays that they stand for")
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
    reference = run_jax(params, config, given, gradients=gradients)
    found = []
    if stacked:
        try:
            found.append(
                _compare(
                    unstacked_name,
                    reference,
                    run_jax(unstack_layers(params), config, given, gradients=gradients),
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
                note="layers differ in their parts or their numbers of heads; the reference is unstacked",
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
    return _compare("B", reference, run_jax(*other, given, gradients=False), given, tolerance, math.inf)


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
    return max_or_zero((np.abs(x - y) / np.maximum(1, scale))[where])


def _gradients(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> dict[str, float]:
    largest = {name: max_or_zero(np.abs(value)) for name, value in want.items()}
    typical = FLOOR * float(np.median([value for value in largest.values() if value > 0] or [1.0]))
    found = {}
    for name in want:
        if name not in got:
            continue
        if got[name].shape != want[name].shape:
            found[name] = math.nan
            continue
        difference = np.abs(got[name].astype(np.float64) - want[name].astype(np.float64))
        found[name] = max_or_zero(difference) / max(largest[name], typical)
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
