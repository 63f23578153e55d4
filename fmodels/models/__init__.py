"""The families, one file each, named by Hugging Face's `model_type`; a file is loaded when its family is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmodels.models._base import Config, Family

if TYPE_CHECKING:
    from fmodels.models import albert as albert
    from fmodels.models import bart as bart
    from fmodels.models import bert as bert
    from fmodels.models import big_bird as big_bird
    from fmodels.models import bloom as bloom
    from fmodels.models import camembert as camembert
    from fmodels.models import cohere as cohere
    from fmodels.models import deberta_v2 as deberta_v2
    from fmodels.models import deepseek_v3 as deepseek_v3
    from fmodels.models import distilbert as distilbert
    from fmodels.models import electra as electra
    from fmodels.models import falcon as falcon
    from fmodels.models import gemma as gemma
    from fmodels.models import gemma2 as gemma2
    from fmodels.models import gemma3_text as gemma3_text
    from fmodels.models import gpt2 as gpt2
    from fmodels.models import gpt_neo as gpt_neo
    from fmodels.models import gpt_neox as gpt_neox
    from fmodels.models import gpt_oss as gpt_oss
    from fmodels.models import gptj as gptj
    from fmodels.models import granite as granite
    from fmodels.models import llama as llama
    from fmodels.models import mistral as mistral
    from fmodels.models import mixtral as mixtral
    from fmodels.models import modernbert as modernbert
    from fmodels.models import mpnet as mpnet
    from fmodels.models import mt5 as mt5
    from fmodels.models import nomic_bert as nomic_bert
    from fmodels.models import olmo2 as olmo2
    from fmodels.models import opt as opt
    from fmodels.models import phi as phi
    from fmodels.models import phi3 as phi3
    from fmodels.models import qwen2 as qwen2
    from fmodels.models import qwen2_moe as qwen2_moe
    from fmodels.models import qwen3 as qwen3
    from fmodels.models import qwen3_moe as qwen3_moe
    from fmodels.models import roberta as roberta
    from fmodels.models import roberta_prelayernorm as roberta_prelayernorm
    from fmodels.models import roformer as roformer
    from fmodels.models import smollm3 as smollm3
    from fmodels.models import stablelm as stablelm
    from fmodels.models import starcoder2 as starcoder2
    from fmodels.models import t5 as t5
    from fmodels.models import xglm as xglm
    from fmodels.models import xlm_roberta as xlm_roberta


class Families(MutableMapping[str, Family]):
    """`model_type` -> family, of which at first only the file is known."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._known: dict[str, str | Family] = dict(files)

    def __getitem__(self, name: str) -> Family:
        known = self._known[name]
        if isinstance(known, str):
            known = self._known[name] = _file(known).FAMILY
        return known

    def __setitem__(self, name: str, family: Family) -> None:
        self._known[name] = family

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known


FILES: dict[str, str] = {
    "albert": "albert",
    "bart": "bart",
    "bert": "bert",
    "big_bird": "big_bird",
    "bloom": "bloom",
    "camembert": "camembert",
    "cohere": "cohere",
    "deberta-v2": "deberta_v2",
    "deepseek_v3": "deepseek_v3",
    "distilbert": "distilbert",
    "electra": "electra",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt2": "gpt2",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "modernbert": "modernbert",
    "mpnet": "mpnet",
    "mt5": "mt5",
    "nomic_bert": "nomic_bert",
    "olmo2": "olmo2",
    "opt": "opt",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "roberta": "roberta",
    "roberta-prelayernorm": "roberta_prelayernorm",
    "roformer": "roformer",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "t5": "t5",
    "xglm": "xglm",
    "xlm-roberta": "xlm_roberta",
}
"""`model_type` -> file."""

FAMILIES = Families(FILES)
"""`model_type` -> family."""


def family(which: str | Config) -> Family:
    """The family of a `model_type` or of a config.

    Raises:
        ValueError: there is none, with the list of those that are.
    """
    name = getattr(which, "model_type", which)
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"family: model_type {name!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def _file(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    if name not in FILES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _file(name)
