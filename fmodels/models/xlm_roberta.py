"""XLM-RoBERTa: RoBERTa for a hundred languages.

Source: Conneau et al. 2019; matches transformers' `modeling_xlm_roberta`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder, roberta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(roberta.Config):
    """As RoBERTa's; the defaults are those of transformers' class."""

    vocab_size: int = 30522

    model_type: ClassVar[str] = "xlm-roberta"
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        task: name.replace("Roberta", "XLMRoberta") for task, name in roberta.Config.ARCHITECTURES.items()
    }


FAMILY = _encoder.family(Config, roberta.WEIGHTS)
