"""T5: an encoder and a decoder with biases by distance in place of positions, and root-mean-square norms.

Source: Raffel et al. 2020, Shazeer 2020 (version 1.1, gated); matches transformers' `modeling_t5`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels import tree
from fmodels.models import _seq2seq
from fmodels.models._base import init_normal
from fmodels.models._encoder import head
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, cross_attention, with_distances
from fmodels.nn.embeddings import embed
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import rms_norm
from fmodels.types import NOTHING, Array, Cache, Cross, Keep, Key, Output, Params
from fmodels.weights.rules import Rule, TensorFlow, Weights

SAME = """vocab_size num_layers num_heads bos_token_id eos_token_id pad_token_id decoder_start_token_id
tie_word_embeddings""".split()
DECODER = ("base", "seq2seq-lm", "sequence-classification", "question-answering")
"""Tasks whose models have a decoder beside the encoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_seq2seq.Config):
    """T5's config; the defaults are T5 small's.

    Attributes:
        gated: whether the feed-forward blocks have a gate (`feed_forward_proj` "gated-…").
        scale_logits: whether hidden states are divided by √d before the head, as in version 1.0.
        num_buckets: of distances.
        max_distance: from which on all distances share a bucket.
        max_positions: of texts in training; the model has no table of positions.
    """

    vocab_size: int = 32128
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 6
    decoder_num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    max_positions: int = 512
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    scale_logits: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    initializer_range: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    decoder_start_token_id: int = 0

    model_type: ClassVar[str] = "t5"
    norm: ClassVar[str] = "rms"
    HF: ClassVar[Mapping[str, str]] = {
        **{name: name for name in SAME},
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "decoder_num_layers": "num_decoder_layers",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_factor",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv",
    }  # fmt: skip
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"dropout_rate", "classifier_dropout", "n_positions"})
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "T5Model",
        "seq2seq-lm": "T5ForConditionalGeneration",
        "encoder": "T5EncoderModel",
        "sequence-classification": "T5ForSequenceClassification",
        "token-classification": "T5ForTokenClassification",
        "question-answering": "T5ForQuestionAnswering",
    }
    OTHERS: ClassVar[Mapping[str, str]] = {"T5WithLMHeadModel": "seq2seq-lm"}
    ONE_PART: ClassVar[Mapping[str, str]] = {"encoder": "encoder", "token-classification": "encoder"}
    SHIFTS: ClassVar[tuple[str, ...]] = ("sequence-classification", "question-answering")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"{self.model_type}.Config: expected at least 4 buckets and a max_distance above half of their number, "
                f"got num_buckets={self.num_buckets}, max_distance={self.max_distance}"
            )

    @property
    def hidden_scale(self) -> float | None:
        return self.hidden_size**-0.5 if self.scale_logits else None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["num_kv_heads"] = data.get("num_heads", cls.num_heads)
        fields["decoder_num_layers"] = data.get("num_layers", cls.num_layers)
        fields["max_positions"] = data.get("n_positions", cls.max_positions)
        *gated, act = data.get("feed_forward_proj", "gated-gelu" if cls.gated else "relu").split("-")
        if gated not in ([], ["gated"]):
            problems.append(f"feed_forward_proj={data['feed_forward_proj']!r} is neither 'gated-…' nor one word")
        act = "gelu_new" if gated and act == "gelu" else act
        fields["gated"] = data.get("is_gated_act", bool(gated))
        fields["activation"] = data.get("dense_act_fn", act)
        # As in transformers 5: files of version 1.1 say that their head is not tied, and it is not scaled.
        fields["scale_logits"] = data.get("scale_decoder_outputs", data.get("tie_word_embeddings") is not False)
        own = {"feed_forward_proj", "is_gated_act", "dense_act_fn", "scale_decoder_outputs"}
        return own | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        act = {"gelu_new": "gelu"}.get(self.activation, self.activation) if self.gated else self.activation
        return {
            "feed_forward_proj": f"gated-{act}" if self.gated else act,
            "is_gated_act": self.gated,
            "dense_act_fn": self.activation,
            "scale_decoder_outputs": self.scale_logits,
            **super().write_special(),
        }


def _rules(part: str, blocks: Mapping[str, str], tasks: tuple[str, ...] | None) -> list[Rule]:
    """Of a stack whose layers have these blocks, PyTorch's name -> leaf."""
    rules: list[Rule] = []
    for i, (name, leaf) in enumerate(blocks.items()):
        at, to = f"@{part}.block.{{l}}.layer.{i}", f"{part}.layers.{leaf}"
        if leaf == "mlp":
            rules += [
                Rule(f"{at}.{name}.wi.weight", f"{to}.up.weight", tasks=tasks, when="!gated"),
                Rule(f"{at}.{name}.wi_0.weight", f"{to}.gate.weight", tasks=tasks, when="gated"),
                Rule(f"{at}.{name}.wi_1.weight", f"{to}.up.weight", tasks=tasks, when="gated"),
                Rule(f"{at}.{name}.wo.weight", f"{to}.down.weight", tasks=tasks),
            ]
        else:
            rules += [
                Rule(f"{at}.{name}.q.weight", f"{to}.query.weight", "(h k) d", tasks=tasks),
                Rule(f"{at}.{name}.k.weight", f"{to}.key.weight", "(g k) d", tasks=tasks),
                Rule(f"{at}.{name}.v.weight", f"{to}.value.weight", "(g k) d", tasks=tasks),
                Rule(f"{at}.{name}.o.weight", f"{to}.output.weight", "d (h k)", tasks=tasks),
            ]
        if name == "SelfAttention":  # the first layer's serves all
            first = at.replace("{l}", "0")
            rules.append(Rule(f"{first}.{name}.relative_attention_bias.weight", f"{part}.embed.distances", tasks=tasks))
        rules.append(Rule(f"{at}.layer_norm.weight", f"{to}_norm.scale", tasks=tasks))
    rules.append(Rule(f"@{part}.final_layer_norm.weight", f"{part}.final_norm.scale", tasks=tasks))
    return rules


SELF, CROSS, MLP = {"SelfAttention": "attention"}, {"EncDecAttention": "cross_attention"}, {"DenseReluDense": "mlp"}

WEIGHTS = Weights(
    prefix={"": "", "sequence-classification": "transformer", "token-classification": "transformer"},
    tied={"lm_head.weight": "embed.tokens"},
    shared=(
        Rule("@encoder.embed_tokens.weight", "embed.tokens"),
        Rule("@decoder.embed_tokens.weight", "embed.tokens", tasks=DECODER),
    ),
    ignored=(r"EncDecAttention\.relative_attention_bias\.weight$",),
    tensorflow=TensorFlow(
        without=("sequence-classification", "token-classification", "question-answering"),
        tokens="embeddings",
        head="untied",
        outside=("shared",),
        holds={"encoder": "^shared/", "decoder": "^shared/"},
    ),
    rules=(
        Rule("@shared.weight", "embed.tokens"),
        *_rules("encoder", SELF | MLP, None),
        *_rules("decoder", SELF | CROSS | MLP, DECODER),
        # Optional: a file may say that its head is not tied and have none, which is then the table of tokens.
        Rule("lm_head.weight", "lm_head.weight", tasks=("seq2seq-lm",), when="untied", optional=True),
        *head("classification_head.dense", "pooler", "sequence-classification"),
        *head("classification_head.out_proj", "classifier", "sequence-classification"),
        *head("classifier", "classifier", "token-classification"),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
)


def stack(
    params: Params,
    config: Config,
    part: str,
    tokens: Array,
    present: Array,
    *,
    positions: Array | None = None,
    cache: Cache | None = None,
    cross: Cross | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """The encoder or the decoder on `(b t)` tokens."""
    if positions is not None:
        raise ValueError(
            f"forward: {config.model_type} has no positions but distances between columns; leave positions out"
        )
    if cache is not None and part == "encoder":
        raise ValueError(f"forward: a cache is for a decoder; {config.model_type} of task {config.task!r} has none")
    own, causal = params[part], part == "decoder"
    table, seen = own["embed"]["distances"], attend(present, cache, causal=causal)
    seen = with_distances(seen, table, cache, causal=causal, max_distance=config.max_distance)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y = rms_norm(p["attention_norm"], x, config.norm_eps)
        y, slot = attention(p["attention"], y, seen, slot=slot, scale=1.0)
        x = x + y
        if cross is not None:
            y = rms_norm(p["cross_attention_norm"], x, config.norm_eps)
            y, slot = cross_attention(p["cross_attention"], y, p["cross"], cross.mask, slot=slot, scale=1.0)
            x = x + y
        return x + mlp(p["mlp"], rms_norm(p["mlp_norm"], x, config.norm_eps), config.activation), slot

    blocks = own["layers"] if cross is None else layers.with_cross(own["layers"], cross)
    ran = layers.run(layer, blocks, embed(params["embed"], tokens), cache, present, keep=keep)
    hidden = rms_norm(own["final_norm"], ran.x, config.norm_eps)
    return ran.onto(Output(hidden=hidden, cache=ran.cache), hidden)


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters, each matrix by the sizes of its inputs, as in transformers' `T5PreTrainedModel`."""
    d, inner = config.hidden_size, config.num_heads * config.head_dim
    spread = {
        "tokens": 1.0,
        "query": (d * config.head_dim) ** -0.5,
        "output": inner**-0.5,
        "down": config.intermediate_size**-0.5,
        "lm_head": 1.0,
        "classifier": 1.0 if config.task == "token-classification" else d**-0.5,
    }

    def scale(path: str, leaf: Any) -> Any:
        *_, parent, last = path.split(".")
        if last == "scale":
            return leaf * jnp.asarray(config.initializer_range, leaf.dtype)
        return leaf * jnp.asarray(spread.get(last, spread.get(parent, d**-0.5)), leaf.dtype)

    return tree.map_leaves(scale, init_normal(WEIGHTS, config, key, dtype))


FAMILY = _seq2seq.family(Config, stack, WEIGHTS, init)
