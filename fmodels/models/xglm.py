"""XGLM: scaled embeddings, to which sines of the positions are added.

Source: Lin et al. 2021; matches transformers' `modeling_xglm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
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
    head_dim: int = 64
    norm_eps: float = 1e-5
    activation: str = "gelu"
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    scale_embedding: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1

    model_type: ClassVar[str] = "xglm"
    norm: ClassVar[str] = "layer"
    rotary: ClassVar[bool] = False
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "hidden_size": "d_model",
        "intermediate_size": "ffn_dim",
        "num_layers": "num_layers",
        "num_heads": "attention_heads",
        "scale_embedding": "scale_embedding",
        "activation": "activation_function",
        "initializer_range": "init_std",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "attention_heads",
    }  # fmt: skip
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset("dropout attention_dropout activation_dropout layerdrop".split())
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("XGLM")

    @property
    def embedding_scale(self) -> float | None:
        return math.sqrt(self.hidden_size) if self.scale_embedding else None

    @property
    def sinusoidal(self) -> bool:
        return True

    @property
    def position_offset(self) -> int:
        return 2


AT = "layers.{l}"

WEIGHTS = _decoder.weights(
    {
        "embed_tokens": "embed.tokens",
        f"{AT}.self_attn.k_proj": "layers.attention.key",
        f"{AT}.self_attn.v_proj": "layers.attention.value",
        f"{AT}.self_attn.q_proj": "layers.attention.query",
        f"{AT}.self_attn.out_proj": "layers.attention.output",
        f"{AT}.self_attn_layer_norm": "layers.attention_norm",
        f"{AT}.fc1": "layers.mlp.up",
        f"{AT}.fc2": "layers.mlp.down",
        f"{AT}.final_layer_norm": "layers.mlp_norm",
        "layer_norm": "final_norm",
    },
    norm_bias=True,
    ignored=(r"embed_positions\.(weights|_float_tensor)$",),  # the table of sines
    tensorflow=TensorFlow(head="always"),
)

FAMILY = _decoder.family(Config, WEIGHTS)
