"""What the encoders after BERT have in common: their configs, their layers, and their heads.

Source: Devlin et al. 2018; matches transformers' `modeling_bert` and what was copied from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fmodels import schema
from fmodels.arrays import take
from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, at, check_cache, init_normal, without
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, with_distances
from fmodels.nn.embeddings import embed, lm_logits
from fmodels.nn.linear import activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import Rope, columns, of_call, rope_tables
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import FLAX, Flax, Rule, TensorFlow, Weights

LM = ("masked-lm", "causal-lm", "pretraining")
CLASSES = ("sequence-classification", "multiple-choice")
TOKEN_CLASSES = ("token-classification", "question-answering")
BUCKETS = 32
"""Of distances, whatever the size of their table is, as in MPNet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """The config of an encoder; the defaults are BERT base's.

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
    pre_norm: ClassVar[bool] = False
    """Whether norms stand before the blocks, with one more at the end."""

    @property
    def padding_index(self) -> int | None:
        """The token that takes no position, where positions do not count columns; its number is also their offset."""
        return None

    @property
    def counts_columns(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.padding_index is None

    @property
    def position_offset(self) -> int:
        return 0 if self.padding_index is None else self.padding_index + 1

    @property
    def rope(self) -> Rope | None:
        """Rotary settings, where the angles do not lie in the file."""
        return None

    @property
    def pooler_activation(self) -> str:
        """Of what a head makes of the first token."""
        return "tanh"

    @property
    def lm_activation(self) -> str:
        """Of the transformation before a language model's head."""
        return self.activation

    @property
    def summary(self) -> str:
        """Whether a head reads the `first` token or, without a pooler, the `last` column."""
        return "first"

    @property
    def order(self) -> tuple[int, ...] | None:
        """Which layer is applied at each step, where that is not each of them once."""
        return None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        keys = cls.HF["hidden_size"], cls.HF["num_heads"]
        hidden, heads = data.get(keys[0], cls.hidden_size), data.get(keys[1], cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=hidden // heads)
        if hidden % heads:
            problems.append(f"{keys[0]}={hidden} is not a multiple of {keys[1]}={heads}")
        return set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedConfig(Config):
    """The config of an encoder whose tokens count from the row after that of padding, as in fairseq.

    `max_positions` are those that a text can take: the table has `position_offset` rows more, which
    `max_position_embeddings` counts.
    """

    max_positions: int = 510
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    HF: ClassVar[Mapping[str, str]] = without(Config.HF, "max_positions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_index is None:
            raise ValueError(f"{self.model_type}.Config: positions are counted from pad_token_id, which is None")

    @property
    def padding_index(self) -> int | None:
        return self.pad_token_id

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        pad = data.get("pad_token_id", cls.pad_token_id)
        if pad is not None:  # else the config says what is wrong
            rows = data.get("max_position_embeddings", 512)
            fields["max_positions"] = rows - cls(task="base", pad_token_id=pad).position_offset
        return {"max_position_embeddings"} | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        return {"max_position_embeddings": self.max_positions + self.position_offset, **super().write_special()}


ENDINGS = {
    "base": "Model",
    "masked-lm": "ForMaskedLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "multiple-choice": "ForMultipleChoice",
}
"""Task -> how transformers' class ends, of the tasks that most encoders have."""


def architectures(name: str) -> dict[str, str]:
    """Task -> transformers' class, for a family whose classes begin with `name`."""
    return {task: name + ending for task, ending in ENDINGS.items()}


def rules(
    names: Mapping[str, str | tuple[str, ...]],
    *,
    when: Mapping[str, str] = {},
    biases: Mapping[str, str | None] = {},
    first: Mapping[str, str] = {},
) -> tuple[Rule, ...]:
    """The rules of the base model's affine maps, norms and tables.

    Args:
        names: name on disk, without `.weight` and the base model's prefix -> leaf, or several that lie in it side by side.
        when: leaf, or the first of several -> the property of the config that says whether it is there.
        biases: leaf, or the first of several -> the property of the config that says whether it has a bias, None for never.
        first: name -> that in the first layer, where it is another.
    """
    found: list[Rule] = []
    for name, leaf in names.items():
        leaves = (leaf,) if isinstance(leaf, str) else leaf
        if leaves[0] in schema.TABLES:
            found.append(Rule(f"@{name}.weight", leaf, when=when.get(leaves[0])))
            continue
        there = (when.get(leaves[0]), biases.get(leaves[0], when.get(leaves[0], "")))
        kinds = ["scale" if leaves[0].endswith("norm") else "weight", "bias"][: 1 if there[1] is None else 2]
        for i, kind in enumerate(kinds):
            suffix, paths = ("weight", "bias")[i], tuple(f"{one}.{kind}" for one in leaves)
            found.append(
                Rule(
                    f"@{name}.{suffix}",
                    paths[0] if isinstance(leaf, str) else paths,
                    tuple(LAYOUTS[one][i] for one in leaves if one in LAYOUTS) or None,
                    when=there[i] or None,
                    first=f"@{first[name]}.{suffix}" if name in first else None,
                )
            )
    return tuple(found)


LAYOUTS = {
    "layers.attention.query": ("(h k) d", "(h k)"),
    "layers.attention.key": ("(g k) d", "(g k)"),
    "layers.attention.value": ("(g k) d", "(g k)"),
    "layers.attention.output": ("d (h k)", "d"),
    "layers.attention.position_query": ("(h k) d", "(h k)"),
    "layers.attention.position_key": ("(g k) d", "(g k)"),
}
"""How the projections lie on disk: weight and bias."""

EMBEDDINGS = {
    "embeddings.word_embeddings": "embed.tokens",
    "embeddings.position_embeddings": "embed.positions",
    "embeddings.token_type_embeddings": "embed.types",
    "embeddings.LayerNorm": "embed.norm",
}
"""BERT's names before the layers."""

LAYER = {
    "encoder.layer.{l}.attention.self.query": "layers.attention.query",
    "encoder.layer.{l}.attention.self.key": "layers.attention.key",
    "encoder.layer.{l}.attention.self.value": "layers.attention.value",
    "encoder.layer.{l}.attention.output.dense": "layers.attention.output",
    "encoder.layer.{l}.attention.output.LayerNorm": "layers.attention_norm",
    "encoder.layer.{l}.intermediate.dense": "layers.mlp.up",
    "encoder.layer.{l}.output.dense": "layers.mlp.down",
    "encoder.layer.{l}.output.LayerNorm": "layers.mlp_norm",
}
"""BERT's names in a layer."""


def head(
    name: str, leaf: str, *tasks: str, optional: bool = False, bias: bool | str = True, when: str | None = None
) -> tuple[Rule, ...]:
    """The rules of an affine map or a norm of these tasks' heads.

    Args:
        name: on disk, without `.weight`.
        leaf: its path.
        tasks: whose models have it.
        optional: whether they may lack it.
        bias: whether it has a bias, or the property of the config that says so.
        when: the property of the config that says whether it is there.
    """
    kind = "scale" if leaf.endswith("norm") else "weight"
    weight = Rule(f"{name}.weight", f"{leaf}.{kind}", tasks=tasks, optional=optional, when=when)
    if not bias:
        return (weight,)
    there = bias if isinstance(bias, str) else when
    return weight, Rule(f"{name}.bias", f"{leaf}.bias", tasks=tasks, optional=optional, when=there)


def pooler(name: str, *tasks: str) -> tuple[Rule, ...]:
    """The rules of a pooler that models of these tasks have, and base models may have."""
    return head(name, "pooler", *tasks) + head(name, "pooler", "base", optional=True)


def lm_head(
    dense: str, norm: str, decoder: str, bias: str, *tasks: str, norm_first: bool = False, when: str | None = None,
    tied: str = "tie_word_embeddings",
) -> tuple[Rule, ...]:  # fmt: skip
    """The rules of a language model's head whose bias has a name of its own beside the decoder's.

    Untied, transformers 5 has two biases and reads only the decoder's; the other is kept for its bytes. `when` and `tied`
    are the properties of the config that say whether the head is there, and whether it is there and tied.
    """
    transform = (
        head(dense, "lm_transform.dense", *tasks, when=when),
        head(norm, "lm_transform.norm", *tasks, when=when),
    )
    first, second = reversed(transform) if norm_first else transform
    return (
        *first,
        *second,
        Rule(bias, "lm_head.bias", tasks=tasks, when=tied),
        Rule(f"{decoder}.weight", "lm_head.weight", tasks=tasks, when="untied"),
        Rule(f"{decoder}.bias", "lm_head.bias", tasks=tasks, when="untied"),
        Rule(bias, "lm_head.spare_bias", tasks=tasks, when="untied", optional=True),
    )


def weights(
    prefix: str,
    rules: tuple[Rule, ...],
    *,
    decoder: str,
    bias: str = "",
    ignored: tuple[str, ...] = (),
    flax: Flax = FLAX,
    tensorflow: TensorFlow | None = None,
) -> Weights:
    """The layout map; a language model's head has its weight in `decoder`, and its bias there too or, apart, in `bias`."""
    tied = {f"{decoder}.weight": "embed.tokens"} | ({f"{decoder}.bias": "lm_head.bias"} if bias else {})
    return Weights(
        prefix={"": prefix},
        tied=tied,
        renames={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        ignored=(r"embeddings\.(position_ids|token_type_ids)$", *ignored),
        fallbacks={f"{decoder}.bias": bias} if bias else {},
        stand_ins={"lm_head.spare_bias": "lm_head.bias"} if bias else {},
        rules=rules,
        flax=dataclasses.replace(flax, joined={bias: (f"{decoder}.bias",)} if bias else {}),
        tensorflow=tensorflow,
    )


def family(config: type[Config], weights: Weights) -> Family:
    """The family with this layout map."""
    return Family(config, forward, weights, functools.partial(init_normal, weights))


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
    """The model on `(b t)` tokens; see `fmodels.forward`. Positions count columns, or tokens that are not padding."""
    present, places = begin(params, config, tokens, mask, positions, token_types, cache)
    seen = attend(present, cache, causal=config.causal)
    if "distances" in params["embed"]:
        table = params["embed"]["distances"]
        seen = with_distances(seen, table, cache, causal=config.causal, max_distance=128, count=BUCKETS)

    rope = None if config.rope is None else rope_tables(config.rope, places, config.head_dim, config.max_positions)
    table = "sinusoids" in params["embed"]
    if table:
        angles = take(jax.lax.stop_gradient(params["embed"]["sinusoids"]), places).astype(jnp.float32)
        sines, cosines = jnp.split(angles, 2, axis=-1)
        rope = cosines, sines

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        if config.pre_norm:
            y, slot = attention(p["attention"], layer_norm(p["attention_norm"], x, config.norm_eps), seen, slot=slot)
            x = x + y
            return x + mlp(p["mlp"], layer_norm(p["mlp_norm"], x, config.norm_eps), config.activation), slot
        y, slot = attention(p["attention"], x, seen, slot=slot, rope=rope, interleaved=table)
        x = layer_norm(p["attention_norm"], x + y, config.norm_eps)
        return layer_norm(p["mlp_norm"], x + mlp(p["mlp"], x, config.activation), config.norm_eps), slot

    x = embed(params["embed"], tokens, places + config.position_offset, token_types)
    x = layer_norm(params["embed"]["norm"], x, config.norm_eps)
    if "projection" in params["embed"]:
        x = linear(params["embed"]["projection"], x, "bte,de->btd")
    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep, order=config.order)
    hidden = layer_norm(params["final_norm"], ran.x, config.norm_eps) if config.pre_norm else ran.x
    return ran.onto(head_output(params, config, Output(hidden=hidden, cache=ran.cache), select), hidden)


def begin(
    params: Params, config: Config, tokens: Array, mask: Array | None, positions: Array | None, token_types: Array | None,
    cache: Cache | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Which tokens of a call are real, and their positions; raises where the model does not take what it is given."""
    check_cache(config, cache)
    if token_types is not None and "types" not in params["embed"]:
        raise ValueError(f"forward: {config.model_type} has no token types; leave token_types out")
    return of_call(tokens, mask, _places(config, tokens, cache) if positions is None else positions, cache)


def _places(config: Config, tokens: Array, cache: Cache | None) -> Array:
    """The default positions `(b t)`; -1 is that of padding."""
    if config.padding_index is None:
        return columns(tokens, cache)
    real = tokens != config.padding_index
    before = 0 if cache is None else cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
    return jnp.where(real, jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1 + before, -1)


def head_output(params: Params, config: Config, out: Output, select: Array | None) -> Output:
    """The output with what the head of the task makes of `out.hidden`."""
    hidden = out.hidden
    assert hidden is not None
    if config.task == "replaced-token-detection":
        x = activation(config.activation)(linear(params["pooler"], hidden, "btd,ed->bte"))
        return out._replace(logits=linear(params["classifier"], x)[..., 0].astype(jnp.float32))
    if "pooler" in params:
        vector = linear(params["pooler"], hidden[:, 0], "bd,ed->be")
        out = out._replace(pooled=activation(config.pooler_activation)(vector))
    if config.task in LM:
        chosen = hidden if select is None else at(hidden, select)[:, None]
        transform = params["lm_transform"]
        x = activation(config.lm_activation)(linear(transform["dense"], chosen, "btd,ed->bte"))
        out = out._replace(logits=lm_logits(params, layer_norm(transform["norm"], x, config.norm_eps)))
    if config.task in TOKEN_CLASSES:
        return out._replace(logits=linear(params["classifier"], hidden).astype(jnp.float32))
    if "classifier" not in params:
        return out
    vector = hidden[:, -1] if out.pooled is None and config.summary == "last" else out.pooled
    assert vector is not None
    logits = linear(params["classifier"], vector, "bd,cd->bc").astype(jnp.float32)
    return out._replace(sequence_logits=logits) if config.task == "pretraining" else out._replace(logits=logits)
