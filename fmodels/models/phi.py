"""Phi: both blocks read one layer norm, and a part of each head is rotated.

Source: Gunasekar et al. 2023; Li et al. 2023; matches transformers' `modeling_phi`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Phi's config; the defaults are Phi-1's.

    Attributes:
        qk_norm: whether queries and keys are normed.
    """

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 24
    head_dim: int = 64
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rope: Rope = Rope(partial_rotary_factor=0.5)

    model_type: ClassVar[str] = "phi"
    gguf: ClassVar[Gguf | None] = Gguf("phi2", square=True)
    norm: ClassVar[str] = "layer"
    parallel: ClassVar[bool] = True
    partial: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "norm_eps": "layer_norm_eps",
        "qk_norm": "qk_layernorm",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"resid_pdrop", "embd_pdrop"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Phi", *_decoder.CLASSIFIERS)

    @property
    def head_bias(self) -> bool:
        return True


AT = "layers.{l}"

WEIGHTS = _decoder.weights(
    {
        "embed_tokens": "embed.tokens",
        f"{AT}.self_attn.q_proj": "layers.attention.query",
        f"{AT}.self_attn.k_proj": "layers.attention.key",
        f"{AT}.self_attn.v_proj": "layers.attention.value",
        f"{AT}.self_attn.dense": "layers.attention.output",
        f"{AT}.self_attn.q_layernorm": "layers.attention.query_norm",
        f"{AT}.self_attn.k_layernorm": "layers.attention.key_norm",
        f"{AT}.mlp.fc1": "layers.mlp.up",
        f"{AT}.mlp.fc2": "layers.mlp.down",
        f"{AT}.input_layernorm": "layers.attention_norm",
        "final_layernorm": "final_norm",
    },
    norm_bias=True,
    when={"layers.attention.query_norm": "qk_norm", "layers.attention.key_norm": "qk_norm"},
)

FAMILY = _decoder.family(Config, WEIGHTS)
