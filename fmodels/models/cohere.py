"""Command R: both blocks read one layer norm, and rotary pairs lie side by side.

Source: Cohere 2024; matches transformers' `modeling_cohere`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import TIED, Gguf
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Command R's config; the defaults are transformers'.

    Attributes:
        logit_scale: factor of the logits.
        use_qk_norm: whether queries and keys are normed.
    """

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_layers: int = 40
    num_heads: int = 64
    num_kv_heads: int = 64
    max_positions: int = 8192
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope: Rope = Rope(theta=5e5)
    logit_scale: float | None = 0.0625  # pyright: ignore[reportIncompatibleMethodOverride]
    use_qk_norm: bool = False
    bos_token_id: int | None = 5
    eos_token_id: int | tuple[int, ...] | None = 255001
    pad_token_id: int | None = 0

    model_type: ClassVar[str] = "cohere"
    gguf: ClassVar[Gguf | None] = Gguf(
        "command-r",
        square=True,
        fields={"logit_scale": "logit_scale"},
        fixed=TIED | {"use_qk_norm": lambda fields, has: fields["num_layers"] >= 64},
    )
    norm: ClassVar[str] = "layer"
    parallel: ClassVar[bool] = True
    interleaved: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "attention_bias": "attention_bias",
        "norm_eps": "layer_norm_eps",
        "logit_scale": "logit_scale",
        "use_qk_norm": "use_qk_norm",
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Cohere")


WEIGHTS = _decoder.weights(
    _decoder.renamed({"layers.mlp_norm": None}),
    Rule("@layers.{l}.self_attn.q_norm.weight", "layers.attention.query_norms.scale", when="use_qk_norm"),
    Rule("@layers.{l}.self_attn.k_norm.weight", "layers.attention.key_norms.scale", when="use_qk_norm"),
)

FAMILY = _decoder.family(Config, WEIGHTS)
