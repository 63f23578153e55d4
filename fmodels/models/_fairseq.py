"""What OPT and XGLM have from fairseq: layer norms, biases everywhere, positions from 2 on, and names.

Source: Ott et al. 2019; matches transformers' `modeling_opt` and `modeling_xglm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """The config that both have in common."""

    head_dim: int = 64
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    pad_token_id: int | None = 1

    norm: ClassVar[str] = "layer"
    rotary: ClassVar[bool] = False
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "intermediate_size": "ffn_dim",
        "activation": "activation_function",
        "initializer_range": "init_std",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset("dropout attention_dropout activation_dropout layerdrop".split())

    @property
    def position_offset(self) -> int:
        return 2


def names(at: str) -> dict[str, str]:
    """The names of a layer's tensors, without `.weight`, and their leaves; `at` is the layer's name."""
    return {
        f"{at}.self_attn.k_proj": "layers.attention.key",
        f"{at}.self_attn.v_proj": "layers.attention.value",
        f"{at}.self_attn.q_proj": "layers.attention.query",
        f"{at}.self_attn.out_proj": "layers.attention.output",
        f"{at}.self_attn_layer_norm": "layers.attention_norm",
        f"{at}.fc1": "layers.mlp.up",
        f"{at}.fc2": "layers.mlp.down",
        f"{at}.final_layer_norm": "layers.mlp_norm",
    }
