"""StableLM: Llama with layer norms, and a part of each head rotated.

Source: Bellagente et al. 2024; matches transformers' `modeling_stablelm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """StableLM's config; the defaults are transformers'.

    Attributes:
        parallel: whether both blocks read the same input, behind one norm.
    """

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    head_dim: int = 80
    max_positions: int = 4096
    norm_eps: float = 1e-5
    rope: Rope = Rope(partial_rotary_factor=0.25)
    parallel: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0

    model_type: ClassVar[str] = "stablelm"
    gguf: ClassVar[Gguf | None] = Gguf(
        "stablelm", shown={"attention_bias": "attn_q.bias", "parallel": "!ffn_norm.weight"}, square=True
    )
    own_kv_heads: ClassVar[bool] = True
    norm: ClassVar[str] = "layer"
    partial: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "norm_eps": "layer_norm_eps",
        "attention_bias": "use_qkv_bias",
        "parallel": "use_parallel_residual",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"hidden_dropout"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"qk_layernorm": (False,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures(
        "StableLm", "sequence-classification", "token-classification"
    )

    @property
    def output_bias(self) -> bool:
        return False

    @property
    def serial(self) -> bool:
        """Whether the feed-forward block has a norm of its own."""
        return not self.parallel


WEIGHTS = _decoder.weights(norm_bias=True, when={"layers.mlp_norm": "serial"})

FAMILY = _decoder.family(Config, WEIGHTS)
