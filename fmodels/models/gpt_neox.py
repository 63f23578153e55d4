"""GPT-NeoX: layer norms, a part of each head rotated, and queries, keys and values of a head side by side in one tensor.

Source: Black et al. 2022; matches transformers' `modeling_gpt_neox`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._base import without
from fmodels.models._gguf import Gguf
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Weights

OLD = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
"""Keys of transformers 4 -> those that other families have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """GPT-NeoX's config; the defaults are GPT-NeoX 20B's.

    Attributes:
        parallel: whether both blocks read the same input, each behind its own norm.
    """

    vocab_size: int = 50432
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_layers: int = 44
    num_heads: int = 64
    num_kv_heads: int = 64
    head_dim: int = 96
    norm_eps: float = 1e-5
    activation: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    rope: Rope = Rope(partial_rotary_factor=0.25)
    parallel: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]
    bos_token_id: int | None = 0

    model_type: ClassVar[str] = "gpt_neox"
    gguf: ClassVar[Gguf | None] = Gguf("gptneox", fields={"parallel": "use_parallel_residual"})
    norm: ClassVar[str] = "layer"
    partial: ClassVar[bool] = True
    rounds_up: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **without(_decoder.Config.HF, "num_kv_heads", "head_dim"),
        "norm_eps": "layer_norm_eps",
        "attention_bias": "attention_bias",
        "parallel": "use_parallel_residual",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """is_decoder attention_dropout hidden_dropout classifier_dropout attention_probs_dropout_prob
        hidden_dropout_prob num_steps""".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("GPTNeoX", *_decoder.ALL)

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        data = {**data, **{new: data[old] for old, new in OLD.items() if old in data}}
        return {*super().read_special(data, fields, problems), *OLD}

    def write_special(self) -> dict[str, Any]:
        old = {"rotary_pct": self.rope.partial_rotary_factor, "rotary_emb_base": self.rope.theta}
        return {**super().write_special(), **old}


AT = "layers.{l}"


def weights(head: str, module: Weights | None = None) -> Weights:
    """The layout map with this name of the language model's head."""
    found = _decoder.weights(
        {
            "embed_in": "embed.tokens",
            f"{AT}.input_layernorm": "layers.attention_norm",
            f"{AT}.post_attention_layernorm": "layers.mlp_norm",
            f"{AT}.attention.query_key_value": _decoder.JOINED,
            f"{AT}.attention.dense": "layers.attention.output",
            f"{AT}.mlp.dense_h_to_4h": "layers.mlp.up",
            f"{AT}.mlp.dense_4h_to_h": "layers.mlp.down",
            "final_layer_norm": "final_norm",
        },
        head=head,
        token_classifier="classifier",
        within="g",
        prefix="gpt_neox",
        question_answering="gpt_neox",
        norm_bias=True,
        ignored=(r"attention\.(bias|masked_bias)$",),  # the causal mask
    )
    return dataclasses.replace(found, module=module)


WEIGHTS = weights("embed_out", weights("lm_head"))

FAMILY = _decoder.family(Config, WEIGHTS)
