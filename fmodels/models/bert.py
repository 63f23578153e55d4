"""BERT: learned positions and token types, layer norms after the blocks, a pooler, and all of its heads.

Source: Devlin et al. 2018; matches transformers' `modeling_bert`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, at, init_normal
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed, lm_logits
from fmodels.nn.linear import activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import columns, of_call
from fmodels.types import Array, Cache, Output, Params
from fmodels.weights.rules import Rule, Weights

LM = ("masked-lm", "causal-lm", "pretraining")
POOLED = ("next-sentence", "pretraining", "sequence-classification", "multiple-choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """BERT's config; the defaults are BERT base's.

    Attributes:
        causal: whether a token sees only those before it (`is_decoder`).
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    max_positions: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    causal: bool = False
    pad_token_id: int | None = 0

    model_type: ClassVar[str] = "bert"
    counts_columns: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "activation": "hidden_act",
        "max_positions": "max_position_embeddings",
        "num_token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "initializer_range": "initializer_range",
        "causal": "is_decoder",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """attention_probs_dropout_prob hidden_dropout_prob classifier_dropout directionality pooler_fc_size
        pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"position_embedding_type": ("absolute", None)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "BertModel",
        "masked-lm": "BertForMaskedLM",
        "causal-lm": "BertLMHeadModel",
        "pretraining": "BertForPreTraining",
        "next-sentence": "BertForNextSentencePrediction",
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "multiple-choice": "BertForMultipleChoice",
    }

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = data.get("hidden_size", cls.hidden_size), data.get("num_attention_heads", cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=hidden // heads)
        if hidden % heads:
            problems.append(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        return set()


WEIGHTS = Weights(
    prefix={"": "bert"},
    tied={"cls.predictions.decoder.weight": "embed.tokens", "cls.predictions.decoder.bias": "lm_head.bias"},
    renames={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    ignored=(r"embeddings\.(position_ids|token_type_ids)$",),
    fallbacks={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    stand_ins={"lm_head.spare_bias": "lm_head.bias"},
    rules=(
        Rule("@embeddings.word_embeddings.weight", "embed.tokens"),
        Rule("@embeddings.position_embeddings.weight", "embed.positions"),
        Rule("@embeddings.token_type_embeddings.weight", "embed.types"),
        Rule("@embeddings.LayerNorm.weight", "embed.norm.scale"),
        Rule("@embeddings.LayerNorm.bias", "embed.norm.bias"),
        Rule("@encoder.layer.{l}.attention.self.query.weight", "layers.attention.query.weight", "(h k) d"),
        Rule("@encoder.layer.{l}.attention.self.query.bias", "layers.attention.query.bias", "(h k)"),
        Rule("@encoder.layer.{l}.attention.self.key.weight", "layers.attention.key.weight", "(g k) d"),
        Rule("@encoder.layer.{l}.attention.self.key.bias", "layers.attention.key.bias", "(g k)"),
        Rule("@encoder.layer.{l}.attention.self.value.weight", "layers.attention.value.weight", "(g k) d"),
        Rule("@encoder.layer.{l}.attention.self.value.bias", "layers.attention.value.bias", "(g k)"),
        Rule("@encoder.layer.{l}.attention.output.dense.weight", "layers.attention.output.weight", "d (h k)"),
        Rule("@encoder.layer.{l}.attention.output.dense.bias", "layers.attention.output.bias"),
        Rule("@encoder.layer.{l}.attention.output.LayerNorm.weight", "layers.attention_norm.scale"),
        Rule("@encoder.layer.{l}.attention.output.LayerNorm.bias", "layers.attention_norm.bias"),
        Rule("@encoder.layer.{l}.intermediate.dense.weight", "layers.mlp.up.weight"),
        Rule("@encoder.layer.{l}.intermediate.dense.bias", "layers.mlp.up.bias"),
        Rule("@encoder.layer.{l}.output.dense.weight", "layers.mlp.down.weight"),
        Rule("@encoder.layer.{l}.output.dense.bias", "layers.mlp.down.bias"),
        Rule("@encoder.layer.{l}.output.LayerNorm.weight", "layers.mlp_norm.scale"),
        Rule("@encoder.layer.{l}.output.LayerNorm.bias", "layers.mlp_norm.bias"),
        Rule("@pooler.dense.weight", "pooler.weight", tasks=POOLED),
        Rule("@pooler.dense.bias", "pooler.bias", tasks=POOLED),
        Rule("@pooler.dense.weight", "pooler.weight", tasks=("base",), optional=True),
        Rule("@pooler.dense.bias", "pooler.bias", tasks=("base",), optional=True),
        Rule("cls.predictions.transform.dense.weight", "lm_transform.dense.weight", tasks=LM),
        Rule("cls.predictions.transform.dense.bias", "lm_transform.dense.bias", tasks=LM),
        Rule("cls.predictions.transform.LayerNorm.weight", "lm_transform.norm.scale", tasks=LM),
        Rule("cls.predictions.transform.LayerNorm.bias", "lm_transform.norm.bias", tasks=LM),
        Rule("cls.predictions.bias", "lm_head.bias", tasks=LM, when="tie_word_embeddings"),
        # Untied, transformers 5 has two biases and reads only the decoder's; the other is kept for its bytes.
        Rule("cls.predictions.decoder.weight", "lm_head.weight", tasks=LM, when="untied"),
        Rule("cls.predictions.decoder.bias", "lm_head.bias", tasks=LM, when="untied"),
        Rule("cls.predictions.bias", "lm_head.spare_bias", tasks=LM, when="untied", optional=True),
        Rule("cls.seq_relationship.weight", "classifier.weight", tasks=("next-sentence", "pretraining")),
        Rule("cls.seq_relationship.bias", "classifier.bias", tasks=("next-sentence", "pretraining")),
        Rule(
            "classifier.weight",
            "classifier.weight",
            tasks=("sequence-classification", "token-classification", "multiple-choice"),
        ),
        Rule(
            "classifier.bias",
            "classifier.bias",
            tasks=("sequence-classification", "token-classification", "multiple-choice"),
        ),
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
    hidden_states: bool = False,
) -> Output:
    """BERT on `(b t)` tokens; see `fmodels.forward`. Positions count columns, whatever the mask, as in transformers."""
    if cache is not None and not config.causal:
        raise ValueError("forward: a cache needs a causal model; this BERT is an encoder (config.causal is False)")
    present, positions = of_call(tokens, mask, columns(tokens, cache) if positions is None else positions, cache)
    seen = attend(present, cache, causal=config.causal)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y, slot = attention(p["attention"], x, seen, slot=slot)
        x = layer_norm(p["attention_norm"], x + y, config.norm_eps)
        return layer_norm(p["mlp_norm"], x + mlp(p["mlp"], x, config.activation), config.norm_eps), slot

    x = layer_norm(params["embed"]["norm"], embed(params["embed"], tokens, positions, token_types), config.norm_eps)
    hidden, cache, inputs = layers.run(layer, params["layers"], x, cache, present, collect=hidden_states)
    out = _head(params, config, Output(hidden=hidden, cache=cache), select)
    return out if inputs is None else out._replace(hidden_states=jnp.concatenate([inputs, hidden[None]]))


def _head(params: Params, config: Config, out: Output, select: Array | None) -> Output:
    hidden = out.hidden
    assert hidden is not None
    if "pooler" in params:
        out = out._replace(pooled=jnp.tanh(linear(params["pooler"], hidden[:, 0], "bd,ed->be")))
    if config.task in LM:
        chosen = hidden if select is None else at(hidden, select)[:, None]
        transformed = activation(config.activation)(linear(params["lm_transform"]["dense"], chosen, "btd,ed->bte"))
        out = out._replace(
            logits=lm_logits(params, layer_norm(params["lm_transform"]["norm"], transformed, config.norm_eps))
        )
    if config.task in POOLED:
        assert out.pooled is not None
        logits = linear(params["classifier"], out.pooled, "bd,cd->bc").astype(jnp.float32)
        return out._replace(sequence_logits=logits) if config.task == "pretraining" else out._replace(logits=logits)
    if config.task in ("token-classification", "question-answering"):
        return out._replace(logits=linear(params["classifier"], hidden).astype(jnp.float32))
    return out


init = functools.partial(init_normal, WEIGHTS)

FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
