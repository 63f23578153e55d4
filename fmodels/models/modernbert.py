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
from fmodels.models import _encoder
from fmodels.models._base import Family, at, init_normal, without
from fmodels.models._encoder import CLASSES, TOKEN_CLASSES, head
from fmodels.models._rope import TYPES, read_ropes, write_ropes
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed, lm_logits
from fmodels.nn.linear import ACTIVATIONS, activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import Rope, rope_tables
from fmodels.types import NOTHING, Array, Cache, Keep, Key, Output, Params
from fmodels.weights.rules import Rule, Weights

SAME = """norm_eps layer_types local_attention norm_bias attention_bias mlp_bias decoder_bias classifier_bias classifier_activation
classifier_pooling""".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
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
        classifier_pooling: `"cls"` or `"mean"`, what a head for whole texts reads.
    """

    vocab_size: int = 50368
    intermediate_size: int = 1152
    num_layers: int = 22
    max_positions: int = 8192
    norm_eps: float = 1e-5
    period: int = 3
    layer_types: tuple[str, ...] | None = None
    local_attention: int = 128
    rope: Rope = Rope(theta=160000.0)  # pyright: ignore[reportIncompatibleMethodOverride]
    local_rope: Rope = Rope()
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"
    bos_token_id: int | None = 50281
    eos_token_id: int | tuple[int, ...] | None = 50282
    pad_token_id: int | None = 50283

    model_type: ClassVar[str] = "modernbert"
    HF: ClassVar[Mapping[str, str]] = {
        **without(_encoder.Config.HF, "num_token_types", "causal"),
        **{name: name for name in SAME},
        "activation": "hidden_activation",
        "period": "global_attn_every_n_layers",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """initializer_cutoff_factor attention_dropout embedding_dropout mlp_dropout classifier_dropout layer_norm_eps
        deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"position_embedding_type": ("absolute", "rope", None)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _encoder.architectures("ModernBert")

    def __post_init__(self) -> None:
        super().__post_init__()
        types = self.types if self.period > 0 else ()
        problems = [f"layer_types has {name!r}; known are {', '.join(TYPES)}" for name in {*types} - {*TYPES}]
        if len(types) != self.num_layers:
            problems.append(f"layer_types has {len(types)} entries for {self.num_layers} layers; {self.period=}")
        if self.classifier_pooling not in ("cls", "mean"):
            problems.append(f"classifier_pooling is {self.classifier_pooling!r}; known are cls and mean")
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
        own = super().read_special(data, fields, problems)
        whole = data.get("global_rope_theta") or cls.rope.theta
        local = data.get("local_rope_theta", cls.local_rope.theta) or whole  # null: as transformers 4 understood it
        fields["rope"], fields["local_rope"] = read_ropes(
            data,
            problems,
            (whole, local),
            scaled=TYPES,
            head_dim=fields["head_dim"],
            max_positions=data.get("max_position_embeddings", cls.max_positions),
        )
        return own | {"rope_parameters", "rope_scaling", "global_rope_theta", "local_rope_theta"}

    def write_special(self) -> dict[str, Any]:
        bases = {"global_rope_theta": self.rope.theta, "local_rope_theta": self.local_rope.theta}  # for transformers 4
        return {**write_ropes(self.rope, self.local_rope), **bases}


HEADS = ("masked-lm", *CLASSES, *TOKEN_CLASSES)
NAMES = {
    "embeddings.tok_embeddings": "embed.tokens",
    "layers.{l}.attn_norm": "layers.attention_norm",
    "layers.{l}.attn.Wqkv": ("layers.attention.query", "layers.attention.key", "layers.attention.value"),
    "layers.{l}.attn.Wo": "layers.attention.output",
    "layers.{l}.mlp_norm": "layers.mlp_norm",
    "layers.{l}.mlp.Wi": ("layers.mlp.gate", "layers.mlp.up"),
    "layers.{l}.mlp.Wo": "layers.mlp.down",
    "final_norm": "final_norm",
}
BIASES = {
    **dict.fromkeys(("layers.attention_norm", "layers.mlp_norm", "final_norm"), "norm_bias"),
    **dict.fromkeys(("layers.attention.query", "layers.attention.output"), "attention_bias"),
    **dict.fromkeys(("layers.mlp.gate", "layers.mlp.down"), "mlp_bias"),
}

WEIGHTS = Weights(
    prefix={"": "model"},
    tied={"decoder.weight": "embed.tokens"},
    rules=(
        # The first layer attends to the normed embeddings as they are: their norm is its norm.
        *_encoder.rules(NAMES, biases=BIASES, first={"layers.{l}.attn_norm": "embeddings.norm"}),
        *head("head.dense", "lm_transform.dense", *HEADS, bias="classifier_bias"),
        *head("head.norm", "lm_transform.norm", *HEADS, bias="norm_bias"),
        Rule("decoder.weight", "lm_head.weight", tasks=("masked-lm",), when="untied"),
        Rule("decoder.bias", "lm_head.bias", tasks=("masked-lm",), when="decoder_bias"),
        *head("classifier", "classifier", *HEADS[1:]),
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
    """The model on `(b t)` tokens; see `fmodels.forward`. Positions count columns."""
    present, places = _encoder.begin(params, config, tokens, mask, positions, token_types, cache)

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
    if config.classifier_pooling == "mean":
        real = present[..., None].astype(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)
    return at(hidden, jnp.argmax(present, axis=1)) if config.task == "multiple-choice" else hidden[:, 0]


def init(config: Config, key: Key, *, dtype: Any = "float32") -> Params:
    """Random parameters; transformers' standard deviations, without its cut of the normal distribution.

    Source: `ModernBertPreTrainedModel._init_weights`.
    """
    out = ("attention.output.weight", "mlp.down.weight", "lm_transform.dense.weight", "lm_head.weight")

    def scale(path: str, leaf: Any) -> Any:
        by = math.sqrt(2 * config.num_layers) if path.endswith(out) else 1.0
        by = config.initializer_range * math.sqrt(config.hidden_size) if path == "classifier.weight" else by
        return (leaf / by).astype(leaf.dtype)

    return tree.map_leaves(scale, init_normal(WEIGHTS, config, key, dtype))


FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
