"""Qwen3: Qwen2 without biases, with norms of queries and keys.

Source: Yang et al. 2025; matches transformers' `modeling_qwen3`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, qwen2
from fmodels.models._gguf import Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(qwen2.Config):
    """Qwen3's config; the defaults are transformers'."""

    attention_bias: bool = False

    model_type: ClassVar[str] = "qwen3"
    gguf: ClassVar[Gguf | None] = Gguf("qwen3")
    own_head_dim: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {**qwen2.Config.HF, "attention_bias": "attention_bias"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Qwen3", *_decoder.ALL)

    @property
    def output_bias(self) -> bool:
        return self.attention_bias


WEIGHTS = _decoder.weights(_decoder.renamed(_decoder.HEAD_NORMS))

FAMILY = _decoder.family(Config, WEIGHTS)
