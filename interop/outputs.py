"""What the outputs of the wrappers have in common with those of transformers' models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def to_tuple(out: Any, fields: Iterable[str]) -> tuple[Any, ...]:
    """What is there, in this order; of a model with a head without `hidden` and `pooled`, as in transformers."""
    headless = {"hidden", "pooled", "encoder_hidden"} if out.logits is not None else set[str]()
    values = (getattr(out, field) for field in fields if field not in headless)
    return tuple(value for value in values if value is not None)


def item(out: Any, key: Any) -> Any:
    """`out["logits"]` is `out.logits`, and `out[0]` is the first of `out.to_tuple()`.

    Raises:
        KeyError: there is nothing of this name.
    """
    if not isinstance(key, str):
        return out.to_tuple()[key]
    if getattr(out, key, None) is None:
        raise KeyError(f"{type(out).__name__}: there is no {key!r}")
    return getattr(out, key)
