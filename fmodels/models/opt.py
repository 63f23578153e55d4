"""OPT: learned positions, from the third row of their table on, and ReLU.

Source: Zhang et al. 2022; matches transformers' `modeling_opt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder, _fairseq
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_fairseq.Config):
    """OPT's config; the defaults are those of its smallest model.

    Attributes:
        embedding_size: of the rows of the token table, which are projected if it is not `hidden_size`.
        norm_first: whether norms are before the blocks, and not behind the sums.
        norm_affine: whether norms have parameters.
        no_final_norm: whether the norm behind the last layer is left out, as in old files.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 12
    activation: str = "relu"
    embedding_size: int = 768  # pyright: ignore[reportIncompatibleMethodOverride]
    norm_first: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]
    norm_affine: bool = True
    no_final_norm: bool = False
    bos_token_id: int | None = 2

    model_type: ClassVar[str] = "opt"
    HF: ClassVar[Mapping[str, str]] = {
        **_fairseq.Config.HF,
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "embedding_size": "word_embed_proj_dim",
        "norm_first": "do_layer_norm_before",
        "norm_affine": "layer_norm_elementwise_affine",
        "no_final_norm": "_remove_final_layer_norm",
    }
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"learned_embeddings": (True,), "scale_embeddings": (False,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures(
        "OPT", "sequence-classification", "question-answering"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projects and self.task not in ("base", "causal-lm"):
            raise ValueError(
                f"opt.Config: word_embed_proj_dim={self.embedding_size} is not supported for {self.task}, only "
                f"hidden_size={self.hidden_size}; load it with task='base' or 'causal-lm'"
            )

    @property
    def position_size(self) -> int:
        return self.hidden_size

    @property
    def projects(self) -> bool:
        """Whether there are projections behind the token table and before the head."""
        return self.embedding_size != self.hidden_size

    @property
    def plain_norms(self) -> bool:
        return not self.norm_affine

    @property
    def final_norm(self) -> bool:
        return self.norm_first and not self.no_final_norm

    @property
    def final_affine(self) -> bool:
        """Whether the norm behind the last layer has parameters."""
        return self.final_norm and self.norm_affine

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["embedding_size"] = data.get("hidden_size", cls.hidden_size)
        fields["attention_bias"] = fields["mlp_bias"] = data.get("enable_bias", True)
        return {"enable_bias"} | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        return {**super().write_special(), "enable_bias": self.attention_bias}


WEIGHTS = _decoder.weights(
    {
        "decoder.embed_tokens": "embed.tokens",
        "decoder.embed_positions": "embed.positions",
        "decoder.project_out": "projection",
        "decoder.project_in": "embed.projection",
        "decoder.final_layer_norm": "final_norm",
        **_fairseq.names("decoder.layers.{l}"),
    },
    question_answering="model",
    norm_bias=True,
    when={
        "projection": "projects", "embed.projection": "projects", "final_norm": "final_affine",
        "layers.attention_norm": "norm_affine", "layers.mlp_norm": "norm_affine",
    },
    ignored=(r"decoder\.version$",),
    tensorflow=TensorFlow(without=("sequence-classification", "question-answering")),
)  # fmt: skip

FAMILY = _decoder.family(Config, WEIGHTS)
