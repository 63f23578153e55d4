"""mT5: T5 version 1.1 for many languages, whose hidden states are not scaled before the head.

Source: Xue et al. 2021; matches transformers' `modeling_mt5`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _seq2seq, t5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(t5.Config):
    """mT5's config; the defaults are mT5 small's."""

    vocab_size: int = 250112
    intermediate_size: int = 1024
    num_layers: int = 8
    decoder_num_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 6
    activation: str = "gelu_new"
    gated: bool = True
    scale_logits: bool = False

    model_type: ClassVar[str] = "mt5"
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {task: f"M{name}" for task, name in t5.Config.ARCHITECTURES.items()}

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        own = super().read_special(data, fields, problems)
        fields["scale_logits"] = False
        return own

    def write_special(self) -> dict[str, Any]:
        return {key: value for key, value in super().write_special().items() if key != "scale_decoder_outputs"}


FAMILY = _seq2seq.family(Config, t5.stack, t5.WEIGHTS, t5.init)
