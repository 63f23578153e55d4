"""StableLM: Llama with layer norms, and a part of each head rotated.

Source: Bellagente et al. 2024; matches transformers' `modeling_stablelm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """StableLM's config; the defaults are transformers'.

    Attributes:
        parallel: whether both blocks read the same input, behind one norm.
        qk_norm: whether queries and keys are normed, each head by a norm of its own.
    """

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    head_dim: int = 80
    max_positions: int = 4096
    norm_eps: float = 1e-5
    rope: Rope = Rope(partial_rotary_factor=0.25)
    parallel: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    qk_norm: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0

    model_type: ClassVar[str] = "stablelm"
    gguf: ClassVar[Gguf | None] = Gguf(
        "stablelm",
        square=True,
        shown={"attention_bias": "attn_q.bias", "parallel": "!ffn_norm.weight", "qk_norm": "attn_q_norm.weight"},
    )
    own_kv_heads: ClassVar[bool] = True
    norm: ClassVar[str] = "layer"
    partial: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "norm_eps": "layer_norm_eps",
        "attention_bias": "use_qkv_bias",
        "parallel": "use_parallel_residual",
        "qk_norm": "qk_layernorm",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"hidden_dropout"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("StableLm", *_decoder.CLASSIFIERS)

    @property
    def output_bias(self) -> bool:
        return False

    @property
    def serial(self) -> bool:
        """Whether the feed-forward block has a norm of its own."""
        return not self.parallel


HEAD_NORMS = (
    ("q_layernorm.norms.{h}", "layers.attention.query_norms.scale"),
    ("k_layernorm.norms.{g}", "layers.attention.key_norms.scale"),
)
"""Names of the norms of a head, and their leaves."""

WEIGHTS = _decoder.weights(
    _decoder.NAMES,
    *(Rule(f"@layers.{{l}}.self_attn.{name}.weight", leaf, when="qk_norm") for name, leaf in HEAD_NORMS),
    norm_bias=True,
    when={"layers.mlp_norm": "serial"},
)

FAMILY = _decoder.family(Config, WEIGHTS)
