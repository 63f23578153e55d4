"""StarCoder2: layer norms, biases everywhere, and a window.

Source: Lozhkov et al. 2024; matches transformers' `modeling_starcoder2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import BIASES, Gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """StarCoder2's config; the defaults are transformers'."""

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_layers: int = 30
    num_heads: int = 24
    num_kv_heads: int = 2
    max_positions: int = 4096
    norm_eps: float = 1e-5
    activation: str = "gelu_pytorch_tanh"
    initializer_range: float = 0.018042
    attention_bias: bool = True
    mlp_bias: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    model_type: ClassVar[str] = "starcoder2"
    gguf: ClassVar[Gguf | None] = Gguf("starcoder2", shown=BIASES, square=True)
    norm: ClassVar[str] = "layer"
    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "norm_eps": "norm_epsilon",
        "sliding_window": "sliding_window",
    }
    # transformers reads only the dropouts of them; the published models have the others from GPTBigCode.
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | frozenset(
        """residual_dropout embedding_dropout mlp_type norm_type activation_function layer_norm_epsilon
        attention_softmax_in_fp32 scale_attention_softmax_in_fp32 scale_attn_weights""".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Starcoder2", *_decoder.CLASSIFIERS)

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["attention_bias"] = fields["mlp_bias"] = data.get("use_bias", True)
        return {"use_bias"} | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        return {**super().write_special(), "use_bias": self.attention_bias}


WEIGHTS = _decoder.weights(
    _decoder.renamed(
        {
            "layers.mlp.gate": None,
            "layers.mlp.up": "layers.{l}.mlp.c_fc",
            "layers.mlp.down": "layers.{l}.mlp.c_proj",
        }
    ),
    norm_bias=True,
)

FAMILY = _decoder.family(Config, WEIGHTS)
