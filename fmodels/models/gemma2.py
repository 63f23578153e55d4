"""Gemma 2: Gemma with norms on both sides of each block, squeezed scores and logits, and a window in every other layer.

Source: Gemma Team 2024; matches transformers' `modeling_gemma2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, gemma
from fmodels.models._gguf import CAPS, TIED, WINDOW, Gguf, scaled_by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gemma.Config):
    """Gemma 2's config; the defaults are those of its 2B model.

    Attributes:
        query_pre_attn_scalar: the scores are divided by its root.
        attention_cap: of the scores.
        logit_cap: of the logits.
    """

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_layers: int = 26
    num_heads: int = 8
    num_kv_heads: int = 4
    sliding_window: int | None = 4096
    query_pre_attn_scalar: int = 256
    attention_cap: float | None = 50.0  # pyright: ignore[reportIncompatibleMethodOverride]
    logit_cap: float | None = 30.0  # pyright: ignore[reportIncompatibleMethodOverride]

    model_type: ClassVar[str] = "gemma2"
    gguf: ClassVar[Gguf | None] = Gguf(
        "gemma2", fields=WINDOW | CAPS, fixed=TIED | {"query_pre_attn_scalar": scaled_by(46)}
    )
    period: ClassVar[int] = 2
    HF: ClassVar[Mapping[str, str]] = {
        **gemma.Config.HF,
        **_decoder.WINDOWS,
        "activation": "hidden_activation",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "attention_cap": "attn_logit_softcapping",
        "logit_cap": "final_logit_softcapping",
    }
    # sliding_window_size repeats sliding_window, and transformers does not read it.
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"hidden_act", "sliding_window_size"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Gemma2", *_decoder.CLASSIFIERS)

    @property
    def attention_scale(self) -> float | None:
        return self.query_pre_attn_scalar**-0.5


WEIGHTS = _decoder.weights(_decoder.renamed(_decoder.NORMS_AROUND))

FAMILY = _decoder.family(Config, WEIGHTS)
