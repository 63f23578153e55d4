"""Gemma: Llama with scaled embeddings, norms whose scale is added to 1, and large heads.

Source: Gemma Team 2024; matches transformers' `modeling_gemma`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import TIED, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Gemma's config; the defaults are Gemma 7B's."""

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 256
    max_positions: int = 8192
    activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0

    model_type: ClassVar[str] = "gemma"
    gguf: ClassVar[Gguf | None] = Gguf("gemma", fixed=TIED)
    norm: ClassVar[str] = "rms-plus-one"
    own_head_dim: ClassVar[bool] = True
    own_kv_heads: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {**_decoder.Config.HF, "attention_bias": "attention_bias"}
    # transformers 4 wrote the second beside hidden_act, and 5 does not read it.
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"hidden_activation"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"use_bidirectional_attention": (None, False)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Gemma", *_decoder.CLASSIFIERS)

    def __post_init__(self) -> None:
        if self.activation == "gelu" and self.HF["activation"] == "hidden_act":  # which says so and means the other
            object.__setattr__(self, "activation", "gelu_pytorch_tanh")
        super().__post_init__()

    @property
    def embedding_scale(self) -> float | None:
        return math.sqrt(self.hidden_size)


WEIGHTS = _decoder.weights()

FAMILY = _decoder.family(Config, WEIGHTS)
