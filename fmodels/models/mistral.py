"""Mistral: Llama whose layers see a window.

Source: Jiang et al. 2023; matches transformers' `modeling_mistral`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.weights.rules import Flax, TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Mistral's config; the defaults are Mistral 7B's."""

    intermediate_size: int = 14336
    num_kv_heads: int = 8
    max_positions: int = 131072
    sliding_window: int | None = 4096

    model_type: ClassVar[str] = "mistral"
    gguf: ClassVar[Gguf | None] = Gguf("llama", permuted=True, factors=("llama3", "longrope"))
    HF: ClassVar[Mapping[str, str]] = {**_decoder.Config.HF, "sliding_window": "sliding_window"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Mistral", *_decoder.ALL)


WEIGHTS = _decoder.weights(
    question_answering="model",
    flax=Flax(repeats_head=True),
    tensorflow=TensorFlow(without=("token-classification", "question-answering"), tokens="embeddings", head="always"),
)

FAMILY = _decoder.family(Config, WEIGHTS)
