"""Gemma 3, the part that reads text: norms of queries and keys, and layers with a window and a rotary base of their own.

Source: Gemma Team 2025; matches transformers' `Gemma3TextModel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, gemma2
from fmodels.models._base import without
from fmodels.models._gguf import CAPS, TIED, WINDOW, Gguf, scaled_by
from fmodels.nn.positions import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    """Gemma 3's config; the defaults are transformers'.

    Attributes:
        bidirectional: whether tokens see those behind them, too, as in EmbeddingGemma.
    """

    vocab_size: int = 262208
    max_positions: int = 131072
    rope: Rope = Rope(theta=1e6)
    local_rope: Rope = Rope()  # pyright: ignore[reportIncompatibleVariableOverride]
    attention_cap: float | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  # none, whatever the file says
    logit_cap: float | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    period: int = 6  # pyright: ignore[reportIncompatibleVariableOverride]
    bidirectional: bool = False

    model_type: ClassVar[str] = "gemma3_text"
    gguf: ClassVar[Gguf | None] = Gguf(
        "gemma3",
        fields=WINDOW | {"logit_cap": CAPS["logit_cap"], "period": "attention.sliding_window_pattern"},
        fixed=TIED | {"query_pre_attn_scalar": scaled_by(62)},
    )
    HF: ClassVar[Mapping[str, str]] = {
        **without(gemma2.Config.HF, "attention_cap"),
        "period": "sliding_window_pattern",
        "bidirectional": "use_bidirectional_attention",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = gemma2.Config.IRRELEVANT | {"attn_logit_softcapping"}  # of no layer
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        **_decoder.architectures("Gemma3Text", "sequence-classification"),
        "causal-lm": "Gemma3ForCausalLM",
    }

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.bidirectional


WEIGHTS = _decoder.weights(_decoder.renamed(_decoder.NORMS_AROUND | _decoder.HEAD_NORMS))

FAMILY = _decoder.family(Config, WEIGHTS)
