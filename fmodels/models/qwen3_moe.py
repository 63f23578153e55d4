"""Qwen3-MoE: Qwen3 whose layers have experts in place of a feed-forward block.

Source: Yang et al. 2025; matches transformers' `modeling_qwen3_moe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, _mixture
from fmodels.models._gguf import EXPERTS, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_mixture.SparseConfig):
    """Qwen3-MoE's config; the defaults are transformers'."""

    intermediate_size: int = 6144
    num_kv_heads: int = 4
    head_dim: int = 64
    sliding_window: int | None = 4096
    num_experts: int = 128
    num_experts_per_token: int = 8

    model_type: ClassVar[str] = "qwen3_moe"
    gguf: ClassVar[Gguf | None] = Gguf(
        "qwen3moe", fields=EXPERTS | {"expert_size": "expert_feed_forward_length"}, fixed={"renormalise": True}
    )
    HF: ClassVar[Mapping[str, str]] = {**_mixture.SparseConfig.HF, "attention_bias": "attention_bias"}
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    IRRELEVANT: ClassVar[frozenset[str]] = _mixture.SparseConfig.IRRELEVANT | {"max_window_layers"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Qwen3Moe", *_decoder.ALL)

    @property
    def kinds(self) -> tuple[_decoder.Kind, ...]:
        window = self.sliding_window if self.use_sliding_window else None
        return (_decoder.Kind(window, self.rope),) * self.num_layers


WEIGHTS = _mixture.weights(_decoder.renamed(_decoder.HEAD_NORMS), {"experts": None, "gate": "layers.moe.router"})

FAMILY = _decoder.family(Config, WEIGHTS)
