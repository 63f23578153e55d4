"""What a certificate holds, and how it is written: as JSON, and as a table for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fmodels.text import size, table


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


def _remarkable(tensor: TensorCheck) -> bool:
    return bool(tensor.nan or tensor.inf) or tensor.saved != "equal" or tensor.other not in (None, "equal")


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
