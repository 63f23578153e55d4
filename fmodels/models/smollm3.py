"""SmolLM3: Llama in which some layers know no positions.

Source: Hugging Face 2025; matches transformers' `modeling_smollm3`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """SmolLM3's config; the defaults are the 3B model's.

    Attributes:
        use_sliding_window: whether the layers without positions have a window.
        no_rope_layers: of each layer, 1 where it rotates, 0 where it does not; None for the rule of the interval.
        no_rope_layer_interval: every how many layers one does not.
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_layers: int = 36
    num_heads: int = 16
    num_kv_heads: int = 4
    max_positions: int = 32768
    tie_word_embeddings: bool = True
    rope: Rope = Rope(theta=2e6)
    use_sliding_window: bool = False
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001
    pad_token_id: int | None = 128004

    model_type: ClassVar[str] = "smollm3"
    gguf: ClassVar[Gguf | None] = Gguf("smollm3", permuted=True, factors=("llama3",))
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        **_decoder.WINDOWS,
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "use_sliding_window": "use_sliding_window",
        "no_rope_layers": "no_rope_layers",
        "no_rope_layer_interval": "no_rope_layer_interval",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"max_window_layers"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("SmolLM3", *_decoder.ALL)

    @property
    def turned(self) -> tuple[bool, ...]:
        """Of each layer, whether queries and keys are rotated."""
        if self.no_rope_layers is not None:
            return tuple(map(bool, self.no_rope_layers))
        return tuple((i + 1) % self.no_rope_layer_interval != 0 for i in range(self.num_layers))

    @property
    def own_types(self) -> tuple[str, ...]:
        full = (turn or not self.use_sliding_window for turn in self.turned)
        return tuple("full_attention" if one else "sliding_attention" for one in full)

    @property
    def kinds(self) -> tuple[_decoder.Kind, ...]:
        kinds = zip(super().kinds, self.turned, strict=True)
        return tuple(kind if turn else kind._replace(rope=None) for kind, turn in kinds)


WEIGHTS = _decoder.weights()

FAMILY = _decoder.family(Config, WEIGHTS)
