"""GPT-J: both blocks read one layer norm, and of each head the first numbers are rotated, in pairs side by side.

Source: Wang and Komatsuzaki 2021; matches transformers' `modeling_gptj`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.nn.positions import Rope
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """GPT-J's config; the defaults are GPT-J 6B's.

    Attributes:
        rotary_dim: how many numbers of each head are rotated.
    """

    vocab_size: int = 50400
    intermediate_size: int = 16384
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 256
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    mlp_bias: bool = True
    rotary_dim: int = 64
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    model_type: ClassVar[str] = "gptj"
    norm: ClassVar[str] = "layer"
    parallel: ClassVar[bool] = True
    interleaved: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "n_positions",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "rotary_dim": "rotary_dim",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }  # fmt: skip
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout summary_proj_to_labels
        summary_type summary_use_proj""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rotary": (True,), "scale_attn_weights": (True,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures(
        "GPTJ", "sequence-classification", "question-answering"
    )

    def rotary_size(self, rope: Rope) -> int:
        return self.rotary_dim

    @property
    def head_bias(self) -> bool:
        return True

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = data.get("n_embd", cls.hidden_size), data.get("n_head", cls.num_heads)
        if hidden % heads:
            problems.append(f"n_embd={hidden} is not a multiple of n_head={heads}")
        if data.get("rotary_dim", cls.rotary_dim) is None:
            problems.append("rotary_dim=null is not supported, only a number")
            return set()
        fields |= {"num_kv_heads": heads, "head_dim": hidden // heads}
        fields["intermediate_size"] = 4 * hidden  # where n_inner is null
        return set()

    def write_special(self) -> dict[str, Any]:
        return {}


AT = "h.{l}"

WEIGHTS = _decoder.weights(
    {
        "wte": "embed.tokens",
        f"{AT}.ln_1": "layers.attention_norm",
        f"{AT}.attn.k_proj": "layers.attention.key",
        f"{AT}.attn.v_proj": "layers.attention.value",
        f"{AT}.attn.q_proj": "layers.attention.query",
        f"{AT}.attn.out_proj": "layers.attention.output",
        f"{AT}.mlp.fc_in": "layers.mlp.up",
        f"{AT}.mlp.fc_out": "layers.mlp.down",
        "ln_f": "final_norm",
    },
    prefix="transformer",
    norm_bias=True,
    ignored=(r"attn\.(bias|masked_bias)$",),  # the causal mask
    tensorflow=TensorFlow(head="always"),
)

FAMILY = _decoder.family(Config, WEIGHTS)
