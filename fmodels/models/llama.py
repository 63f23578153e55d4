"""Llama: rotary positions, grouped-query attention, gated feed-forward, root-mean-square norms.

Source: Touvron et al. 2023; matches transformers' `modeling_llama`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, decoder_head, init_normal
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import rms_norm
from fmodels.nn.positions import Rope, of_call, rope_tables
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import Rule, Weights

ROPE_KEYS = {
    "rope_type": "type",
    "rope_theta": "theta",
    "original_max_position_embeddings": "original_max_positions",
    **{
        name: name
        for name in (
            "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor "
            "low_freq_factor high_freq_factor partial_rotary_factor"
        ).split()
    },
}
"""transformers' key -> field of `Rope`."""

ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""Type -> the keys that it cannot do without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Llama's config; the defaults are Llama 7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    max_positions: int = 2048
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    model_type: ClassVar[str] = "llama"
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "initializer_range": "initializer_range",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "attention_dropout"})
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "LlamaModel",
        "causal-lm": "LlamaForCausalLM",
        "sequence-classification": "LlamaForSequenceClassification",
        "token-classification": "LlamaForTokenClassification",
        "question-answering": "LlamaForQuestionAnswering",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"llama.Config: rotary embeddings turn pairs of numbers; head_dim={self.head_dim} is odd")

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies, `rope.theta`."""
        return self.rope.theta

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = data.get("hidden_size", cls.hidden_size), data.get("num_attention_heads", cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=hidden // heads)
        fields["rope"] = read_rope(
            data, fields, problems, max_positions=data.get("max_position_embeddings", cls.max_positions)
        )
        return {
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "partial_rotary_factor",
            "original_max_position_embeddings",
        }

    def write_special(self) -> dict[str, Any]:
        return write_rope(self.rope)


def read_rope(data: Mapping[str, Any], fields: dict[str, Any], problems: list[str], *, max_positions: int) -> Rope:
    """Rotary settings from a config.json of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    found = {key: value for key, value in given.items() if key != "type" and value is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_NEEDS:
        problems.append(f"rope_type={kind!r} is not supported, only {', '.join(ROPE_NEEDS)}")
        return Rope()
    for key in ("rope_theta", "partial_rotary_factor"):
        if data.get(key) is not None:
            found.setdefault(key, data[key])
    if data.get("original_max_position_embeddings") is not None:
        found["original_max_position_embeddings"] = data["original_max_position_embeddings"]
    elif kind in ("yarn", "longrope", "llama3"):
        found.setdefault("original_max_position_embeddings", max_positions)
    problems += [
        f"rope parameter {key!r} (value {value!r}) is not understood"
        for key, value in found.items()
        if key not in ROPE_KEYS
    ]
    problems += [f"rope_type={kind!r} needs {key!r}" for key in ROPE_NEEDS[kind] if key not in found]
    if kind != "proportional" and found.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(
            f"partial_rotary_factor={found['partial_rotary_factor']!r} with rope_type={kind!r} is not supported"
        )
    size = (data.get("head_dim") or fields["head_dim"]) // 2
    for key in ("short_factor", "long_factor"):
        if key in found and len(found[key]) != size:
            problems.append(
                f"rope parameter {key!r} has {len(found[key])} numbers, expected {size}, half of the head size"
            )
    values: dict[str, Any] = {field: found[key] for key, field in ROPE_KEYS.items() if key in found}
    values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
    return Rope(**{**values, "type": kind})


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, and beside it what transformers 4 reads."""
    values = {key: getattr(rope, field) for key, field in ROPE_KEYS.items()}
    parameters = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if key == "rope_type" or value != getattr(Rope(), ROPE_KEYS[key]) or key == "rope_theta"
    }
    scaling = (
        None if rope.type == "default" else {key: value for key, value in parameters.items() if key != "rope_theta"}
    )
    return {"rope_parameters": parameters, "rope_theta": rope.theta, "rope_scaling": scaling}


WEIGHTS = Weights(
    prefix={"": "model", "question-answering": "transformer"},
    tied={"lm_head.weight": "embed.tokens"},
    ignored=(r"rotary_emb\.inv_freq$",),
    rules=(
        Rule("@embed_tokens.weight", "embed.tokens"),
        Rule("@layers.{l}.self_attn.q_proj.weight", "layers.attention.query.weight", "(h k) d"),
        Rule("@layers.{l}.self_attn.q_proj.bias", "layers.attention.query.bias", "(h k)", when="attention_bias"),
        Rule("@layers.{l}.self_attn.k_proj.weight", "layers.attention.key.weight", "(g k) d"),
        Rule("@layers.{l}.self_attn.k_proj.bias", "layers.attention.key.bias", "(g k)", when="attention_bias"),
        Rule("@layers.{l}.self_attn.v_proj.weight", "layers.attention.value.weight", "(g k) d"),
        Rule("@layers.{l}.self_attn.v_proj.bias", "layers.attention.value.bias", "(g k)", when="attention_bias"),
        Rule("@layers.{l}.self_attn.o_proj.weight", "layers.attention.output.weight", "d (h k)"),
        Rule("@layers.{l}.self_attn.o_proj.bias", "layers.attention.output.bias", when="attention_bias"),
        Rule("@layers.{l}.mlp.gate_proj.weight", "layers.mlp.gate.weight"),
        Rule("@layers.{l}.mlp.gate_proj.bias", "layers.mlp.gate.bias", when="mlp_bias"),
        Rule("@layers.{l}.mlp.up_proj.weight", "layers.mlp.up.weight"),
        Rule("@layers.{l}.mlp.up_proj.bias", "layers.mlp.up.bias", when="mlp_bias"),
        Rule("@layers.{l}.mlp.down_proj.weight", "layers.mlp.down.weight"),
        Rule("@layers.{l}.mlp.down_proj.bias", "layers.mlp.down.bias", when="mlp_bias"),
        Rule("@layers.{l}.input_layernorm.weight", "layers.attention_norm.scale"),
        Rule("@layers.{l}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
        Rule("@norm.weight", "final_norm.scale"),
        Rule("lm_head.weight", "lm_head.weight", tasks=("causal-lm",), when="untied"),
        Rule("score.weight", "classifier.weight", tasks=("sequence-classification", "token-classification")),
        Rule("score.bias", "classifier.bias", tasks=("token-classification",)),
        Rule("qa_outputs.weight", "classifier.weight", tasks=("question-answering",)),
        Rule("qa_outputs.bias", "classifier.bias", tasks=("question-answering",)),
    ),
)


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    mask: Array | None = None,
    positions: Array | None = None,
    token_types: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """Llama on `(b t)` tokens; see `fmodels.forward`."""
    if token_types is not None:
        raise ValueError("forward: llama has no token types; leave token_types out")
    present, positions = of_call(tokens, mask, positions, cache)
    seen = attend(present, cache, causal=True)
    rope = rope_tables(config.rope, positions, config.head_dim, config.max_positions)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y, slot = attention(
            p["attention"], rms_norm(p["attention_norm"], x, config.norm_eps), seen, slot=slot, rope=rope
        )
        x = x + y
        return x + mlp(p["mlp"], rms_norm(p["mlp_norm"], x, config.norm_eps), config.activation), slot

    x = embed(params["embed"], tokens)
    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep)
    hidden = rms_norm(params["final_norm"], ran.x, config.norm_eps)
    out = decoder_head(params, config, hidden, tokens=tokens, mask=mask, cache=ran.cache, select=select)
    return ran.onto(out, hidden)


init = functools.partial(init_normal, WEIGHTS)

FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
