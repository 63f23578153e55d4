"""Gemma 3, the part that reads text: norms of queries and keys, and layers with a window and a rotary base of their own.

Source: Gemma Team 2025; matches transformers' `Gemma3TextModel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder, gemma2
from fmodels.models._base import without
from fmodels.models._gguf import CAPS, TIED, WINDOW, Gguf, scaled_by
from fmodels.models._rope import TYPES, read_ropes, write_ropes
from fmodels.nn.positions import Rope

UNREAD = ("_sliding_window_pattern", "attn_logit_softcapping")
"""transformers writes the first and reads it nowhere; it hands the second to no layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    """Gemma 3's config; the defaults are transformers'.

    Attributes:
        local_rope: rotary settings of the layers with a window.
        sliding_window_pattern: every how many layers one sees everything.
        bidirectional: whether tokens see those behind them, too, as in EmbeddingGemma.
    """

    vocab_size: int = 262208
    max_positions: int = 131072
    rope: Rope = Rope(theta=1e6)
    local_rope: Rope = Rope()
    attention_cap: float | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  # none, whatever the file says
    logit_cap: float | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    sliding_window_pattern: int = 6
    bidirectional: bool = False

    model_type: ClassVar[str] = "gemma3_text"
    gguf: ClassVar[Gguf | None] = Gguf(
        "gemma3",
        fields=WINDOW | {"logit_cap": CAPS["logit_cap"], "sliding_window_pattern": "attention.sliding_window_pattern"},
        fixed=TIED | {"query_pre_attn_scalar": scaled_by(62)},
    )
    HF: ClassVar[Mapping[str, str]] = {
        **without(gemma2.Config.HF, "attention_cap"),
        "sliding_window_pattern": "sliding_window_pattern",
        "bidirectional": "use_bidirectional_attention",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = gemma2.Config.IRRELEVANT | {*UNREAD}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        **_decoder.architectures("Gemma3Text", "sequence-classification"),
        "causal-lm": "Gemma3ForCausalLM",
    }

    @property
    def own_types(self) -> tuple[str, ...]:
        return self.full_every(self.sliding_window_pattern)

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.bidirectional

    def kind(self, full: bool) -> _decoder.Kind:
        return _decoder.Kind(None, self.rope) if full else _decoder.Kind(self.sliding_window, self.local_rope)

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        own = super().read_special({**data, "rope_parameters": None, "rope_scaling": None}, fields, problems)
        fields["rope"], fields["local_rope"] = read_ropes(
            data,
            problems,
            (data.get("rope_theta") or cls.rope.theta, data.get("rope_local_base_freq") or cls.local_rope.theta),
            scaled=TYPES[:1],
            head_dim=data.get("head_dim") or fields["head_dim"],
            max_positions=data.get("max_position_embeddings", cls.max_positions),
        )
        return own | {"rope_local_base_freq"}

    def write_special(self) -> dict[str, Any]:
        return write_ropes(self.rope, self.local_rope)


WEIGHTS = _decoder.weights(_decoder.renamed(gemma2.NAMES | _decoder.HEAD_NORMS))

FAMILY = _decoder.family(Config, WEIGHTS)
