"""The families, one file each, named by Hugging Face's `model_type`; a file is loaded when its family is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmodels.models._base import Config, Family

if TYPE_CHECKING:
    from fmodels.models import bart as bart
    from fmodels.models import bert as bert
    from fmodels.models import gpt2 as gpt2
    from fmodels.models import llama as llama
    from fmodels.models import mt5 as mt5
    from fmodels.models import t5 as t5

FAMILIES: dict[str, str] = {
    "bart": "bart",
    "bert": "bert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mt5": "mt5",
    "t5": "t5",
}
"""`model_type` -> file."""


def family(which: str | Config) -> Family:
    """The family of a `model_type` or of a config.

    Raises:
        ValueError: there is none, with the list of those that are.
    """
    name = which if isinstance(which, str) else which.model_type
    if name not in FAMILIES:
        raise ValueError(f"family: model_type {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return _file(FAMILIES[name]).FAMILY


def _file(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    if name not in FAMILIES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _file(name)
