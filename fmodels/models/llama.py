"""Llama: rotary positions, grouped-query attention, gated feed-forward, root-mean-square norms.

Source: Touvron et al. 2023; matches transformers' `modeling_llama`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import BIASES, Gguf
from fmodels.weights.rules import Flax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Llama's config; the defaults are Llama 7B's."""

    model_type: ClassVar[str] = "llama"
    gguf: ClassVar[Gguf | None] = Gguf("llama", permuted=True, shown=BIASES, factors=("llama3", "longrope"))
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"max_sequence_length", "is_llama_config"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Llama", *_decoder.ALL)
    OTHERS: ClassVar[Mapping[str, str]] = {"LLaMAForCausalLM": "causal-lm"}


WEIGHTS = _decoder.weights(flax=Flax(repeats_head=True))

FAMILY = _decoder.family(Config, WEIGHTS)
