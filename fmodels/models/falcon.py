"""Falcon: both blocks read one norm, or each its own, or one follows the other; positions are rotary or ALiBi's.

Source: Almazrouei et al. 2023; matches transformers' `modeling_falcon`. Of models with ALiBi it matches what transformers
computes by default (`attn_implementation="sdpa"`): its `"eager"` adds ALiBi twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.models._gguf import Gguf
from fmodels.models._rope import write_rope
from fmodels.nn.positions import alibi_slopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """Falcon's config; the defaults are Falcon 7B's.

    Attributes:
        alibi: whether positions are ALiBi's and not rotary.
        parallel: whether both blocks read the same input.
        multi_query: whether all heads share one key-value head; without `grouped`.
        grouped: whether there are as many key-value heads as `num_kv_heads` says; `new_decoder_architecture`.
        num_norms: of a layer whose blocks are parallel; two are only with `grouped`.
    """

    vocab_size: int = 65024
    hidden_size: int = 4544
    intermediate_size: int = 18176
    num_layers: int = 32
    num_heads: int = 71
    num_kv_heads: int = 1
    head_dim: int = 64
    norm_eps: float = 1e-5
    activation: str = "gelu"
    tie_word_embeddings: bool = True
    alibi: bool = False
    parallel: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]
    multi_query: bool = True
    grouped: bool = False
    num_norms: int | None = None
    bos_token_id: int | None = 11
    eos_token_id: int | tuple[int, ...] | None = 11

    model_type: ClassVar[str] = "falcon"
    gguf: ClassVar[Gguf | None] = Gguf(
        "falcon",
        fixed={
            "grouped": lambda fields, has: fields["num_kv_heads"] > 1 or has("attn_norm_2.weight"),
            "num_norms": lambda fields, has: (
                2 if has("attn_norm_2.weight") else 1 if fields["num_kv_heads"] > 1 else None
            ),
        },
        names={"h.{l}.ln_attn": "blk.{l}.attn_norm_2", "h.{l}.ln_mlp": "blk.{l}.attn_norm"},
    )
    norm: ClassVar[str] = "layer"
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "alibi": "alibi",
        "parallel": "parallel_attn",
        "multi_query": "multi_query",
        "grouped": "new_decoder_architecture",
        "num_norms": "num_ln_in_parallel_attn",
        "activation": "activation",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"n_embed": "hidden_size"}
    # transformers does not read those of the second line.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """attention_dropout hidden_dropout classifier_dropout
        apply_residual_connection_post_layernorm ff_factor""".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Falcon", *_decoder.ALL)

    @property
    def rotary(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.alibi

    @property
    def reference(self) -> str:
        return "sdpa" if self.alibi else "eager"

    @property
    def slopes(self) -> tuple[float, ...] | None:
        return tuple(alibi_slopes(self.num_heads).tolist()) if self.alibi else None

    @property
    def slopes_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def slopes_rounded(self) -> bool:
        return True

    @property
    def two_norms(self) -> bool:
        """Whether each of two parallel blocks has its norm."""
        return self.grouped and self.num_norms == 2

    @property
    def serial(self) -> bool:
        """Whether the feed-forward block follows on attention."""
        return not self.parallel

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        def flag(field: str) -> bool:
            return bool(data.get(cls.HF[field], getattr(cls, field)))

        done = super().read_special(data, fields, problems)
        heads, groups = data.get("num_attention_heads", cls.num_heads), data.get("num_kv_heads")
        grouped, norms = flag("grouped"), data.get("num_ln_in_parallel_attn")
        fields["num_norms"] = 2 if grouped and norms is None else norms
        fields["num_kv_heads"] = 1 if flag("multi_query") and not grouped else groups or heads
        fields["intermediate_size"] = 4 * data.get("hidden_size", cls.hidden_size)  # where it is null
        fields["attention_bias"] = fields["mlp_bias"] = bool(data.get("bias", False))
        if grouped and not flag("parallel"):
            problems.append("parallel_attn=false with new_decoder_architecture=true is not supported")
        if norms not in (None, 1, 2) or (norms == 2 and not grouped):
            problems.append(
                f"num_ln_in_parallel_attn={norms!r} with new_decoder_architecture={grouped} is not supported"
            )
        if not grouped and not flag("multi_query") and groups not in (None, heads):
            problems.append(f"num_kv_heads={groups!r} with multi_query=false is not supported, only {heads}")
        return {"num_kv_heads", "bias"} | done

    def write_special(self) -> dict[str, Any]:
        groups = self.num_kv_heads if self.grouped else self.num_heads
        return {**write_rope(self.rope), "num_kv_heads": groups, "bias": self.attention_bias}


AT = "h.{l}"

WEIGHTS = _decoder.weights(
    {
        "word_embeddings": "embed.tokens",
        f"{AT}.self_attention.query_key_value": _decoder.JOINED,
        f"{AT}.self_attention.dense": "layers.attention.output",
        f"{AT}.mlp.dense_h_to_4h": "layers.mlp.up",
        f"{AT}.mlp.dense_4h_to_h": "layers.mlp.down",
        f"{AT}.post_attention_layernorm": "layers.mlp_norm",
        f"{AT}.input_layernorm": "layers.attention_norm",
        f"{AT}.ln_attn": "layers.attention_norm",
        f"{AT}.ln_mlp": "layers.mlp_norm",
        "ln_f": "final_norm",
    },
    token_classifier="classifier",
    within="g",
    prefix="transformer",
    question_answering="transformer",
    norm_bias=True,
    when={
        f"{AT}.post_attention_layernorm": "serial", f"{AT}.input_layernorm": "!two_norms", f"{AT}.ln_attn": "two_norms",
        f"{AT}.ln_mlp": "two_norms",
    },
)  # fmt: skip

FAMILY = _decoder.family(Config, WEIGHTS)
