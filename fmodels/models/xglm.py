"""XGLM: scaled embeddings, to which sines of the positions are added.

Source: Lin et al. 2021; matches transformers' `modeling_xglm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, _fairseq
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_fairseq.Config):
    """XGLM's config; the defaults are those of its 564M model.

    Attributes:
        scale_embedding: whether rows of the token table are multiplied by the root of `hidden_size`.
    """

    vocab_size: int = 256008
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 16
    activation: str = "gelu"
    scale_embedding: bool = True
    bos_token_id: int | None = 0

    model_type: ClassVar[str] = "xglm"
    HF: ClassVar[Mapping[str, str]] = {
        **_fairseq.Config.HF,
        "hidden_size": "d_model",
        "num_layers": "num_layers",
        "num_heads": "attention_heads",
        "scale_embedding": "scale_embedding",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "attention_heads",
    }  # fmt: skip
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("XGLM")

    @property
    def embedding_scale(self) -> float | None:
        return math.sqrt(self.hidden_size) if self.scale_embedding else None

    @property
    def sinusoidal(self) -> bool:
        return True


WEIGHTS = _decoder.weights(
    {
        "embed_tokens": "embed.tokens",
        **_fairseq.names("layers.{l}"),
        "layer_norm": "final_norm",
    },
    norm_bias=True,
    ignored=(r"embed_positions\.(weights|_float_tensor)$",),  # the table of sines
    tensorflow=TensorFlow(head="always"),
)

FAMILY = _decoder.family(Config, WEIGHTS)
