"""OLMo 2: norms behind the blocks, and of all queries and all keys together.

Source: OLMo Team 2024; matches transformers' `modeling_olmo2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """OLMo 2's config; the defaults are transformers'."""

    vocab_size: int = 50304
    norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50279
    pad_token_id: int | None = 1

    model_type: ClassVar[str] = "olmo2"
    gguf: ClassVar[Gguf | None] = Gguf("olmo2", square=True)
    joint_norms: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {**_decoder.Config.HF, "attention_bias": "attention_bias"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Olmo2", "sequence-classification")


WEIGHTS = _decoder.weights(
    _decoder.renamed(
        {
            "layers.attention.query_norms": "layers.{l}.self_attn.q_norm",
            "layers.attention.key_norms": "layers.{l}.self_attn.k_norm",
            "layers.attention_norm": None,
            **_decoder.NORMS_AROUND,
            "layers.mlp_norm": None,
        }
    )
)

FAMILY = _decoder.family(Config, WEIGHTS)
