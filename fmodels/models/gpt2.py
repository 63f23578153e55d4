"""GPT-2: learned positions, layer norms before the blocks, a tied head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; matches transformers'
`modeling_gpt2`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels import tree
from fmodels.arrays import take
from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, at, decoder_head, init_normal
from fmodels.models._gguf import Gguf
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed
from fmodels.nn.linear import activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import last_real, of_call
from fmodels.types import NOTHING, Array, Cache, Keep, Key, Output, Params
from fmodels.weights.rules import Rule, TensorFlow, Weights

ATTENTION = tuple(f"layers.attention.{name}" for name in ("query", "key", "value"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """GPT-2's config; the defaults are GPT-2 small's."""

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    scale_attention: bool = True
    scale_attention_by_inverse_layer: bool = False
    summary_type: str = "cls_index"
    summary_activation: str | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    model_type: ClassVar[str] = "gpt2"
    gguf: ClassVar[Gguf | None] = Gguf("gpt2")
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "n_positions",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "scale_attention": "scale_attn_weights",
        "scale_attention_by_inverse_layer": "scale_attn_by_inverse_layer_idx",
        "summary_type": "summary_type",
        "summary_activation": "summary_activation",
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
        """n_ctx n_special predict_special_tokens attn_pdrop embd_pdrop resid_pdrop summary_first_dropout
        reorder_and_upcast_attn""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "summary_use_proj": (True,),
        "summary_proj_to_labels": (True,),
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "GPT2Model",
        "causal-lm": "GPT2LMHeadModel",
        "double-heads": "GPT2DoubleHeadsModel",
        "sequence-classification": "GPT2ForSequenceClassification",
        "token-classification": "GPT2ForTokenClassification",
        "question-answering": "GPT2ForQuestionAnswering",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "double-heads" and self.summary_type != "cls_index":
            raise ValueError(
                f"gpt2.Config: summary_type={self.summary_type!r} is not supported, only 'cls_index': with choices side by "
                "side transformers takes the others along the axis of the choices"
            )

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = data.get("n_embd", cls.hidden_size), data.get("n_head", cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=hidden // heads, intermediate_size=4 * hidden)
        if hidden % heads:
            problems.append(f"n_embd={hidden} is not a multiple of n_head={heads}")
        return set()


WEIGHTS = Weights(
    prefix={"": "transformer"},
    tied={"lm_head.weight": "embed.tokens"},
    ignored=(r"\.attn\.(bias|masked_bias)$",),
    tensorflow=TensorFlow(
        without=("token-classification", "question-answering"), tokens="embeddings", conv1d=r"/c_(attn|proj|fc)$"
    ),
    rules=(
        Rule("@wte.weight", "embed.tokens"),
        Rule("@wpe.weight", "embed.positions"),
        Rule("@h.{l}.ln_1.weight", "layers.attention_norm.scale"),
        Rule("@h.{l}.ln_1.bias", "layers.attention_norm.bias"),
        Rule(
            "@h.{l}.attn.c_attn.weight",
            tuple(f"{n}.weight" for n in ATTENTION),
            ("d (h k)", "d (g k)", "d (g k)"),
            along=1,
        ),
        Rule("@h.{l}.attn.c_attn.bias", tuple(f"{n}.bias" for n in ATTENTION), ("(h k)", "(g k)", "(g k)")),
        Rule("@h.{l}.attn.c_proj.weight", "layers.attention.output.weight", "(h k) d"),
        Rule("@h.{l}.attn.c_proj.bias", "layers.attention.output.bias"),
        Rule("@h.{l}.ln_2.weight", "layers.mlp_norm.scale"),
        Rule("@h.{l}.ln_2.bias", "layers.mlp_norm.bias"),
        Rule("@h.{l}.mlp.c_fc.weight", "layers.mlp.up.weight", "d f"),
        Rule("@h.{l}.mlp.c_fc.bias", "layers.mlp.up.bias"),
        Rule("@h.{l}.mlp.c_proj.weight", "layers.mlp.down.weight", "f d"),
        Rule("@h.{l}.mlp.c_proj.bias", "layers.mlp.down.bias"),
        Rule("@ln_f.weight", "final_norm.scale"),
        Rule("@ln_f.bias", "final_norm.bias"),
        Rule("lm_head.weight", "lm_head.weight", tasks=("causal-lm", "double-heads"), when="untied"),
        Rule("multiple_choice_head.summary.weight", "classifier.weight", tasks=("double-heads",)),
        Rule("multiple_choice_head.summary.bias", "classifier.bias", tasks=("double-heads",)),
        Rule("score.weight", "classifier.weight", tasks=("sequence-classification",)),
        Rule("classifier.weight", "classifier.weight", tasks=("token-classification",)),
        Rule("classifier.bias", "classifier.bias", tasks=("token-classification",)),
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
    """GPT-2 on `(b t)` tokens; see `fmodels.forward`. Token types are rows of the token table, as in transformers."""
    present, positions = of_call(tokens, mask, positions, cache)
    seen = attend(present, cache, causal=True)

    x = embed(params["embed"], tokens, positions)
    if token_types is not None:
        x = x + take(params["embed"]["tokens"], token_types)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        scale = jnp.float32(1 / math.sqrt(config.head_dim) if config.scale_attention else 1.0)
        if config.scale_attention_by_inverse_layer:
            scale = scale / (jnp.asarray(index, jnp.float32) + 1)
        y, slot = attention(
            p["attention"], layer_norm(p["attention_norm"], x, config.norm_eps), seen, slot=slot, scale=scale
        )
        x = x + y
        return x + mlp(p["mlp"], layer_norm(p["mlp_norm"], x, config.norm_eps), config.activation), slot

    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep)
    hidden = layer_norm(params["final_norm"], ran.x, config.norm_eps)
    out = decoder_head(params, config, hidden, tokens=tokens, mask=mask, cache=ran.cache, select=select)
    if config.task == "double-heads":
        out = out._replace(sequence_logits=_summary(params, config, hidden, mask))
    return ran.onto(out, hidden)


def _summary(params: Params, config: Config, hidden: Array, mask: Array | None) -> Array:
    """The second head's logit per sequence `(b)`; where transformers wants `mc_token_ids`, the last real token is read.

    Source: transformers' `GPT2SequenceSummary`.
    """
    last = jnp.full(hidden.shape[:1], hidden.shape[1] - 1) if mask is None else last_real(mask)
    vector = at(hidden, last)
    logits = linear(params["classifier"], vector, "bd,cd->bc")[:, 0].astype(jnp.float32)
    return activation(config.summary_activation)(logits) if config.summary_activation else logits


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters; the outputs into the residual stream are scaled by `1 / sqrt(2 l)`, as OpenAI did."""
    params = init_normal(WEIGHTS, config, key, dtype)

    def scale(path: str, leaf: Any) -> Any:
        residual = path.endswith(("attention.output.weight", "mlp.down.weight"))
        return (leaf / math.sqrt(2 * config.num_layers)).astype(leaf.dtype) if residual else leaf

    return tree.map_leaves(scale, params)


FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
