"""GPT-Neo: GPT-2 in which every other layer has a window, with scores that are not scaled.

Source: Black et al. 2021, GPT-Neo; matches transformers' `modeling_gpt_neo`, but for token types, which it has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder

KINDS = {"global": "full_attention", "local": "sliding_attention"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """GPT-Neo's config; the defaults are those of its 1.3B model.

    Attributes:
        attention_types: patterns of `"global"` and `"local"`, each with how often it is repeated.
    """

    vocab_size: int = 50257
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 16
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tie_word_embeddings: bool = True
    mlp_bias: bool = True
    sliding_window: int | None = 256
    attention_types: tuple[tuple[tuple[str, ...], int], ...] = ((("global", "local"), 12),)
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    model_type: ClassVar[str] = "gpt_neo"
    norm: ClassVar[str] = "layer"
    rotary: ClassVar[bool] = False
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "sliding_window": "window_size",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """attention_dropout embed_dropout resid_dropout classifier_dropout summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj""".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("GPTNeo", *_decoder.ALL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_types", tuple(KINDS.get(kind, kind) for kind in self.attention_layers))
        super().__post_init__()

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """`"global"` or `"local"` for each layer."""
        return _layers(self.attention_types)

    @property
    def output_bias(self) -> bool:
        return True

    @property
    def attention_scale(self) -> float | None:
        return 1.0

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["intermediate_size"] = 4 * data.get("hidden_size", cls.hidden_size)  # where it is null
        given = data.get("attention_types")
        types = cls.attention_types if given is None else tuple((tuple(pattern), count) for pattern, count in given)
        layers = data.get("attention_layers")  # goes before, in transformers
        fields["attention_types"] = types if layers in (None, list(_layers(types))) else ((tuple(layers), 1),)
        return {"attention_types", "attention_layers"} | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        types = [[list(pattern), count] for pattern, count in self.attention_types]
        return {"attention_types": types, "attention_layers": list(self.attention_layers)}


def _layers(types: tuple[tuple[tuple[str, ...], int], ...]) -> tuple[str, ...]:
    return tuple(kind for pattern, count in types for _ in range(count) for kind in pattern)


AT = "h.{l}"

WEIGHTS = _decoder.weights(
    {
        "wte": "embed.tokens",
        "wpe": "embed.positions",
        f"{AT}.ln_1": "layers.attention_norm",
        f"{AT}.attn.attention.k_proj": "layers.attention.key",
        f"{AT}.attn.attention.v_proj": "layers.attention.value",
        f"{AT}.attn.attention.q_proj": "layers.attention.query",
        f"{AT}.attn.attention.out_proj": "layers.attention.output",
        f"{AT}.ln_2": "layers.mlp_norm",
        f"{AT}.mlp.c_fc": "layers.mlp.up",
        f"{AT}.mlp.c_proj": "layers.mlp.down",
        "ln_f": "final_norm",
    },
    token_classifier="classifier",
    prefix="transformer",
    question_answering="transformer",
    norm_bias=True,
    ignored=(r"attn\.attention\.(bias|masked_bias)$",),  # the causal mask
)

FAMILY = _decoder.family(Config, WEIGHTS)
