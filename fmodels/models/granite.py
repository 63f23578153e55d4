"""Granite: Llama with factors of embeddings, scores, residuals and logits.

Source: IBM 2024; matches transformers' `modeling_granite`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import BIASES, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Granite's config; the defaults are transformers'.

    Attributes:
        embedding_multiplier, attention_multiplier, residual_multiplier: factors.
        logits_scaling: the logits are divided by it.
    """

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    model_type: ClassVar[str] = "granite"
    gguf: ClassVar[Gguf | None] = Gguf(
        "granite",
        permuted=True,
        shown=BIASES,
        factors=("llama3",),
        fields={
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    )
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "embedding_multiplier": "embedding_multiplier",
        "attention_multiplier": "attention_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logits_scaling",
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Granite")

    @property
    def embedding_scale(self) -> float | None:
        return self.embedding_multiplier

    @property
    def attention_scale(self) -> float | None:
        return self.attention_multiplier

    @property
    def residual_scale(self) -> float | None:
        return self.residual_multiplier

    @property
    def logit_scale(self) -> float | None:
        return 1.0 / self.logits_scaling


WEIGHTS = _decoder.weights()

FAMILY = _decoder.family(Config, WEIGHTS)
