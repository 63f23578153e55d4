"""ModernBERT: rotary positions, gated blocks with norms before them, and layers that see only their neighbourhood.

Source: Warner et al. 2024; matches transformers' `modeling_modernbert`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels import tree
from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, at, init_normal
from fmodels.models._rope import read_rope, rope_parameters
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed, lm_logits
from fmodels.nn.linear import ACTIVATIONS, activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import Rope, columns, of_call, rope_tables
from fmodels.types import NOTHING, Array, Cache, Keep, Key, Output, Params
from fmodels.weights.rules import Rule, Weights

TYPES = ("full_attention", "sliding_attention")
CLASSES = ("sequence-classification", "multiple-choice")
TOKEN_CLASSES = ("token-classification", "question-answering")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """ModernBERT's config; the defaults are ModernBERT base's.

    Attributes:
        period: every how many layers one sees everything, where `layer_types` does not say it.
        layer_types: of each layer, `"full_attention"` or `"sliding_attention"`.
        local_attention: how many tokens a layer of the second type sees around each: half of them, rounded down, on each
            side.
        rope: rotary settings of the layers that see everything.
        local_rope: of the others.
        norm_bias: whether norms have biases; likewise `attention_bias`, `mlp_bias` and, of the vocabulary, `decoder_bias`.
        classifier_bias: whether the transformation before the heads has a bias.
        classifier_activation: of that transformation.
        pooling_of_head: `"cls"` or `"mean"`, what a head for whole texts reads (`classifier_pooling`).
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_layers: int = 22
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    max_positions: int = 8192
    norm_eps: float = 1e-5
    activation: str = "gelu"
    period: int = 3
    layer_types: tuple[str, ...] | None = None
    local_attention: int = 128
    rope: Rope = Rope(theta=160000.0)
    local_rope: Rope = Rope()
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    pooling_of_head: str = "cls"
    bos_token_id: int | None = 50281
    eos_token_id: int | tuple[int, ...] | None = 50282
    pad_token_id: int | None = 50283

    model_type: ClassVar[str] = "modernbert"
    counts_columns: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "activation": "hidden_activation",
        "max_positions": "max_position_embeddings",
        "norm_eps": "norm_eps",
        "initializer_range": "initializer_range",
        "period": "global_attn_every_n_layers",
        "layer_types": "layer_types",
        "local_attention": "local_attention",
        "norm_bias": "norm_bias",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "decoder_bias": "decoder_bias",
        "classifier_bias": "classifier_bias",
        "classifier_activation": "classifier_activation",
        "pooling_of_head": "classifier_pooling",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """initializer_cutoff_factor attention_dropout embedding_dropout mlp_dropout classifier_dropout layer_norm_eps
        deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"position_embedding_type": ("absolute", "rope", None)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "ModernBertModel",
        "masked-lm": "ModernBertForMaskedLM",
        "sequence-classification": "ModernBertForSequenceClassification",
        "token-classification": "ModernBertForTokenClassification",
        "question-answering": "ModernBertForQuestionAnswering",
        "multiple-choice": "ModernBertForMultipleChoice",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [f"layer_types has {name!r}; known are {', '.join(TYPES)}" for name in {*self.types} - {*TYPES}]
        if len(self.types) != self.num_layers:
            problems.append(f"layer_types has {len(self.types)} entries for {self.num_layers} layers")
        if self.pooling_of_head not in ("cls", "mean"):
            problems.append(f"classifier_pooling is {self.pooling_of_head!r}; known are cls and mean")
        if self.classifier_activation not in ACTIVATIONS:
            problems.append(f"classifier_activation {self.classifier_activation!r} is not supported")
        if self.head_dim % 2:
            problems.append(f"rotary embeddings turn pairs of numbers; head_dim={self.head_dim} is odd")
        if problems:
            raise ValueError(f"modernbert.Config: {'; '.join(problems)}")

    @property
    def types(self) -> tuple[str, ...]:
        """Of each layer."""
        return self.layer_types or tuple(TYPES[i % self.period > 0] for i in range(self.num_layers))

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = data.get("hidden_size", cls.hidden_size), data.get("num_attention_heads", cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=hidden // heads)
        if hidden % heads:
            problems.append(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        given, scaling = data.get("rope_parameters") or {}, data.get("rope_scaling") or {}
        known = " and ".join(TYPES)
        problems += [f"rope_parameters has {name!r}, known are {known}" for name in given if name not in TYPES]
        whole = data.get("global_rope_theta", cls.rope.theta)
        local = data.get("local_rope_theta", cls.local_rope.theta)
        bases = {"rope": whole, "local_rope": whole if local is None else local}
        for name, (field, theta) in zip(TYPES, bases.items(), strict=True):
            fields[field] = read_rope(
                {"rope_theta": theta, "rope_parameters": {**(given.get(name) or {}), **scaling}},
                problems,
                head_dim=fields["head_dim"],
                max_positions=data.get("max_position_embeddings", cls.max_positions),
            )
        return {"rope_parameters", "rope_scaling", "global_rope_theta", "local_rope_theta"}

    def write_special(self) -> dict[str, Any]:
        ropes = zip(TYPES, (self.rope, self.local_rope), strict=True)
        return {
            "rope_parameters": {name: rope_parameters(rope) for name, rope in ropes},
            "global_rope_theta": self.rope.theta,  # this and the next for transformers 4
            "local_rope_theta": self.local_rope.theta,
        }


def _affine(name: str, leaf: str, layout: str | None = None, *, bias: str, tasks: Any = None) -> tuple[Rule, ...]:
    """The rules of an affine map or a norm; `bias` is the config's field that says whether it has one."""
    kind = "scale" if leaf.endswith("norm") else "weight"
    return (
        Rule(f"{name}.weight", f"{leaf}.{kind}", layout, tasks=tasks),
        Rule(f"{name}.bias", f"{leaf}.bias", tasks=tasks, when=bias),
    )


QKV = ("layers.attention.query", "layers.attention.key", "layers.attention.value")
GATED = ("layers.mlp.gate", "layers.mlp.up")
HEADS = ("masked-lm", *CLASSES, *TOKEN_CLASSES)

WEIGHTS = Weights(
    prefix={"": "model"},
    tied={"decoder.weight": "embed.tokens"},
    rules=(
        Rule("@embeddings.tok_embeddings.weight", "embed.tokens"),
        # The first layer attends to the normed embeddings as they are: their norm is its norm.
        Rule("@layers.{l}.attn_norm.weight", "layers.attention_norm.scale", first="@embeddings.norm.weight"),
        Rule(
            "@layers.{l}.attn_norm.bias", "layers.attention_norm.bias", first="@embeddings.norm.bias", when="norm_bias"
        ),
        Rule(
            "@layers.{l}.attn.Wqkv.weight", tuple(f"{leaf}.weight" for leaf in QKV), ("(h k) d", "(g k) d", "(g k) d")
        ),
        Rule(
            "@layers.{l}.attn.Wqkv.bias", tuple(f"{leaf}.bias" for leaf in QKV), ("(h k)", "(g k)", "(g k)"),
            when="attention_bias",
        ),
        *_affine("@layers.{l}.attn.Wo", "layers.attention.output", "d (h k)", bias="attention_bias"),
        *_affine("@layers.{l}.mlp_norm", "layers.mlp_norm", bias="norm_bias"),
        Rule("@layers.{l}.mlp.Wi.weight", tuple(f"{leaf}.weight" for leaf in GATED)),
        Rule("@layers.{l}.mlp.Wi.bias", tuple(f"{leaf}.bias" for leaf in GATED), when="mlp_bias"),
        *_affine("@layers.{l}.mlp.Wo", "layers.mlp.down", bias="mlp_bias"),
        *_affine("@final_norm", "final_norm", bias="norm_bias"),
        *_affine("head.dense", "lm_transform.dense", bias="classifier_bias", tasks=HEADS),
        *_affine("head.norm", "lm_transform.norm", bias="norm_bias", tasks=HEADS),
        Rule("decoder.weight", "lm_head.weight", tasks=("masked-lm",), when="untied"),
        Rule("decoder.bias", "lm_head.bias", tasks=("masked-lm",), when="decoder_bias"),
        Rule("classifier.weight", "classifier.weight", tasks=HEADS[1:]),
        Rule("classifier.bias", "classifier.bias", tasks=HEADS[1:]),
    ),
)  # fmt: skip


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
    """The model on `(b t)` tokens; see `fmodels.forward`. Positions count columns."""
    if cache is not None:
        raise ValueError("forward: a cache needs a causal model; modernbert is an encoder")
    if token_types is not None:
        raise ValueError("forward: modernbert has no token types; leave token_types out")
    present, places = of_call(tokens, mask, columns(tokens, None) if positions is None else positions, None)

    def kind(reach: int | None, rope: Rope) -> Any:
        seen = attend(present, causal=False, reach=reach)
        return seen, rope_tables(rope, places, config.head_dim, config.max_positions)

    kinds = [kind(None, config.rope), kind(config.local_attention // 2, config.local_rope)]
    at_layer = layers.choose(kinds, [TYPES.index(name) for name in config.types])

    def norm(p: Params, x: Array) -> Array:
        return layer_norm(p, x, config.norm_eps)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        seen, rope = at_layer(index)
        before = jnp.where(index == 0, x, norm(p["attention_norm"], x))
        y, slot = attention(p["attention"], before, seen, slot=slot, rope=rope)
        x = x + y
        return x + mlp(p["mlp"], norm(p["mlp_norm"], x), config.activation), slot

    x = norm(layers.first(params["layers"])["attention_norm"], embed(params["embed"], tokens))
    ran = layers.run(layer, params["layers"], x, keep=keep)
    hidden = norm(params["final_norm"], ran.x)
    out = ran.onto(Output(hidden=hidden), hidden)
    if config.task == "base":
        return out
    x = hidden if select is None or config.task != "masked-lm" else at(hidden, select)[:, None]
    if config.task in CLASSES:
        x = _pool(config, hidden, present)[:, None]
    transform = params["lm_transform"]
    x = norm(transform["norm"], activation(config.classifier_activation)(linear(transform["dense"], x, "btd,ed->bte")))
    if config.task == "masked-lm":
        return out._replace(logits=lm_logits(params, x))
    logits = linear(params["classifier"], x).astype(jnp.float32)
    return out._replace(logits=logits[:, 0] if config.task in CLASSES else logits)


def _pool(config: Config, hidden: Array, present: Array) -> Array:
    """What a head for whole texts reads, `(b d)`: the mean of the real tokens, or the first token.

    For choices transformers takes the first that is real, else that of the first column.
    """
    if config.pooling_of_head == "mean":
        real = present[..., None].astype(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)
    return at(hidden, jnp.argmax(present, axis=1)) if config.task == "multiple-choice" else hidden[:, 0]


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters; transformers' standard deviations, without its cut of the normal distribution.

    Source: `ModernBertPreTrainedModel._init_weights`.
    """
    params = init_normal(WEIGHTS, config, key, dtype)
    out = ("attention.output.weight", "mlp.down.weight", "lm_transform.dense.weight", "lm_head.weight")

    def scale(path: str, leaf: Any) -> Any:
        if path.endswith(out):
            return (leaf / math.sqrt(2 * config.num_layers)).astype(leaf.dtype)
        if path == "classifier.weight":
            return (leaf / (config.initializer_range * math.sqrt(config.hidden_size))).astype(leaf.dtype)
        return leaf

    return tree.map_leaves(scale, params)


FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
