"""Qwen2: Llama with biases of queries, keys and values; its last layers may see a window.

Source: Yang et al. 2024; matches transformers' `modeling_qwen2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Qwen2's config; the defaults are transformers'.

    Attributes:
        use_sliding_window: whether any layer has a window.
        max_window_layers: how many of the first layers have none.
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_positions: int = 32768
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    attention_bias: bool = True

    model_type: ClassVar[str] = "qwen2"
    gguf: ClassVar[Gguf | None] = Gguf("qwen2", square=True)
    own_kv_heads: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        **_decoder.WINDOWS,
        "use_sliding_window": "use_sliding_window",
        "max_window_layers": "max_window_layers",
    }
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"use_mrope": (False,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Qwen2", *_decoder.ALL)

    @property
    def output_bias(self) -> bool:
        return False

    @property
    def own_types(self) -> tuple[str, ...]:
        later = ("full_attention",) * self.max_window_layers + ("sliding_attention",) * self.num_layers
        return later[: self.num_layers]

    def kind(self, full: bool) -> _decoder.Kind:
        return super().kind(full or not self.use_sliding_window)


WEIGHTS = _decoder.weights()

FAMILY = _decoder.family(Config, WEIGHTS)
