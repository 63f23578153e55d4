"""BLOOM: scores that fall with the distance (ALiBi) in the place of positions, and a norm behind the embedding.

Source: BigScience Workshop 2022; matches transformers' `modeling_bloom`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import alibi_slopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """BLOOM's config; the defaults are transformers'.

    Attributes:
        norm_residual: whether what a block adds to is its normed input.
    """

    vocab_size: int = 250880
    hidden_size: int = 64
    intermediate_size: int = 256
    num_layers: int = 2
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 8
    norm_eps: float = 1e-5
    activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_residual: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    model_type: ClassVar[str] = "bloom"
    gguf: ClassVar[Gguf | None] = Gguf("bloom")
    norm: ClassVar[str] = "layer"
    rotary: ClassVar[bool] = False
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "norm_eps": "layer_norm_epsilon",
        "norm_residual": "apply_residual_connection_post_layernorm",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    }  # fmt: skip
    # slow_but_exact and pretraining_tp say in which order to sum; transformers does not read those of the last two lines.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """attention_dropout hidden_dropout classifier_dropout pretraining_tp slow_but_exact
        attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion n_inner offset_alibi seq_length
        skip_bias_add skip_bias_add_qkv""".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Bloom", *_decoder.ALL)

    @property
    def slopes(self) -> tuple[float, ...] | None:
        return tuple(alibi_slopes(self.num_heads).tolist())

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["intermediate_size"] = 4 * data.get("hidden_size", cls.hidden_size)
        return super().read_special(data, fields, problems)


AT = "h.{l}"

WEIGHTS = _decoder.weights(
    {
        "word_embeddings": "embed.tokens",
        "word_embeddings_layernorm": "embed.norm",
        f"{AT}.input_layernorm": "layers.attention_norm",
        f"{AT}.self_attention.query_key_value": _decoder.JOINED,
        f"{AT}.self_attention.dense": "layers.attention.output",
        f"{AT}.post_attention_layernorm": "layers.mlp_norm",
        f"{AT}.mlp.dense_h_to_4h": "layers.mlp.up",
        f"{AT}.mlp.dense_4h_to_h": "layers.mlp.down",
        "ln_f": "final_norm",
    },
    token_classifier="classifier",
    within="g",
    prefix="transformer",
    question_answering="transformer",
    norm_bias=True,
)

FAMILY = _decoder.family(Config, WEIGHTS)
