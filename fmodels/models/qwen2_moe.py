"""Qwen2-MoE: Qwen2 whose layers have experts, and one that all tokens share, in place of a feed-forward block.

Source: Yang et al. 2024; matches transformers' `modeling_qwen2_moe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, _mixture
from fmodels.models._gguf import EXPERTS, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_mixture.SparseConfig):
    """Qwen2-MoE's config; the defaults are those of Qwen1.5-MoE-A2.7B.

    Attributes:
        shared_size: the shared expert's intermediate size.
        max_window_layers: of so many of the first layers, every other has one.
    """

    intermediate_size: int = 5632
    num_heads: int = 16
    num_kv_heads: int = 16
    attention_bias: bool = True
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    num_experts: int = 60
    num_experts_per_token: int = 4
    expert_size: int = 1408
    shared_size: int = 5632

    model_type: ClassVar[str] = "qwen2_moe"
    gguf: ClassVar[Gguf | None] = Gguf(
        "qwen2moe",
        fields=EXPERTS
        | {"expert_size": "expert_feed_forward_length", "shared_size": "expert_shared_feed_forward_length"},
        square=True,
    )
    own_kv_heads: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_mixture.SparseConfig.HF,
        "layer_types": "layer_types",
        "num_experts": "num_experts",
        "shared_size": "shared_expert_intermediate_size",
        "attention_bias": "qkv_bias",
        "max_window_layers": "max_window_layers",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Qwen2Moe", *_decoder.ALL)

    @property
    def output_bias(self) -> bool:
        return False

    @property
    def own_types(self) -> tuple[str, ...]:
        last = self.max_window_layers if self.use_sliding_window else 0
        return tuple("full_attention" if i % 2 or i >= last else "sliding_attention" for i in range(self.num_layers))


SHARED = {f"shared_expert.{one}_proj": f"layers.moe.shared.{one}" for one in ("gate", "up", "down")}

WEIGHTS = _mixture.weights(
    _decoder.NAMES,
    {"gate": "layers.moe.router", "experts": None, **SHARED, "shared_expert_gate": "layers.moe.shared_gate"},
    question_answering="model",
)

FAMILY = _decoder.family(Config, WEIGHTS)
