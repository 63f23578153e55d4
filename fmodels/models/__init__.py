"""The families, one file each, named by Hugging Face's `model_type`."""

from __future__ import annotations

from fmodels.models import bart, bert, gpt2, llama, mt5, t5
from fmodels.models._base import Config, Family

FAMILIES: dict[str, Family] = {
    "bart": bart.FAMILY,
    "bert": bert.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "mt5": mt5.FAMILY,
    "t5": t5.FAMILY,
}
"""`model_type` -> family."""


def family(which: str | Config) -> Family:
    """The family of a `model_type` or of a config.

    Raises:
        ValueError: there is none, with the list of those that are.
    """
    name = which if isinstance(which, str) else which.model_type
    if name not in FAMILIES:
        raise ValueError(f"family: model_type {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
