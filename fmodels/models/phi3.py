"""Phi-3: Llama with joined projections, a part of each head rotated, and long factors.

Source: Abdin et al. 2024; matches transformers' `modeling_phi3`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import WINDOW, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Phi-3's config; the defaults are Phi-3 mini's.

    Attributes:
        original_max_positions: of the training, which `rope` says too where it is of a kind that uses it.
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    head_dim: int = 96
    max_positions: int = 4096
    norm_eps: float = 1e-5
    original_max_positions: int = 4096
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000
    pad_token_id: int | None = 32000

    model_type: ClassVar[str] = "phi3"
    # llama.cpp reads the window, says so, and computes without it: texts that are longer than it have other numbers there.
    gguf: ClassVar[Gguf | None] = Gguf(
        "phi3",
        fields=WINDOW | {"original_max_positions": "rope.scaling.original_context_length"},
        square=True,
        factors=("longrope",),
    )
    partial: ClassVar[bool] = True
    rounds_up: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {**_decoder.Config.HF, "sliding_window": "sliding_window"}
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"resid_pdrop", "embd_pdrop"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), (False,)),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Phi3", *_decoder.CLASSIFIERS)

    @property
    def longest_short(self) -> int | None:
        rope = self.rope
        switches = rope.type == "longrope" and rope.short_factor != rope.long_factor
        return rope.original_max_positions if switches else None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        key = "original_max_position_embeddings"  # goes before that of rope_parameters, also where it is not given
        fields["original_max_positions"] = data.get(key, cls.original_max_positions)
        return super().read_special({**data, key: fields["original_max_positions"]}, fields, problems)

    def write_special(self) -> dict[str, Any]:
        return {**super().write_special(), "original_max_position_embeddings": self.original_max_positions}


WEIGHTS = _decoder.weights(
    {
        "embed_tokens": "embed.tokens",
        "layers.{l}.self_attn.o_proj": "layers.attention.output",
        "layers.{l}.self_attn.qkv_proj": _decoder.JOINED,
        "layers.{l}.mlp.gate_up_proj": ("layers.mlp.gate", "layers.mlp.up"),
        "layers.{l}.mlp.down_proj": "layers.mlp.down",
        "layers.{l}.input_layernorm": "layers.attention_norm",
        "layers.{l}.post_attention_layernorm": "layers.mlp_norm",
        "norm": "final_norm",
    }
)

FAMILY = _decoder.family(Config, WEIGHTS)
