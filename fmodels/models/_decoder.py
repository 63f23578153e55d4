"""What the decoders after Llama have in common: their configs, their layers, and the names of their weights.

A layer is read off its tree: norms before the blocks, behind them or both; norms of queries and keys; gates; biases. What no
tree can say is a property of the config.

Source: Touvron et al. 2023; matches transformers' `modeling_llama` and what was copied from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fmodels import schema
from fmodels.arrays import take
from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, decoder_head, init_normal
from fmodels.models._rope import OWN_KEYS, read_rope, rotated, write_rope
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, with_slopes
from fmodels.nn.embeddings import embed
from fmodels.nn.experts import Gate, Routing, moe
from fmodels.nn.latent import latent_attention
from fmodels.nn.linear import linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm, rms_norm, rms_norm_plus_one
from fmodels.nn.positions import Rope, of_call, rope_tables, sinusoids
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import Rule, TensorFlow, Weights

NORMS: dict[str, Callable[[Params, Array, float], Array]] = {
    "rms": rms_norm,
    "rms-plus-one": rms_norm_plus_one,
    "layer": layer_norm,
}


class Kind(NamedTuple):
    """What is special about the attention of a layer.

    Attributes:
        window: how many tokens it sees, or None for all.
        rope: its rotary settings, or None for no positions.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """The config of a rotary decoder; the defaults are Llama 7B's.

    Attributes:
        attention_bias: whether queries, keys and values have biases.
        mlp_bias: whether the feed-forward block has.
        rope: rotary settings.
        sliding_window: how many tokens a layer with a window sees.
        layer_types: of each layer, `"full_attention"` or `"sliding_attention"`; None for the family's own pattern.
    """

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
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

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
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "attention_dropout"})
    norm: ClassVar[str] = "rms"
    """Which of `NORMS`."""
    parallel: ClassVar[bool] = False
    """Whether both blocks read the same input; then one norm may serve both."""
    rotary: ClassVar[bool] = True
    """Whether queries and keys are rotated."""
    interleaved: ClassVar[bool] = False
    """Whether rotary pairs lie side by side."""
    partial: ClassVar[bool] = False
    """Whether a part of each head may be rotated."""
    joint_norms: ClassVar[bool] = False
    """Whether queries, and keys, are normed over all heads together."""
    norm_first: ClassVar[bool] = True
    """Whether norms are before the blocks, and not behind the sums."""
    norm_residual: ClassVar[bool] = False
    """Whether what a block adds to is its normed input."""
    own_head_dim: ClassVar[bool] = False
    """Whether the size of a head that config.json does not say is the class's, and not that of a share."""
    own_kv_heads: ClassVar[bool] = False
    """The same of the number of key-value heads, which is else that of heads where it is by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.rotary_size(self.rope) % 2:
            raise ValueError(
                f"{self.model_type}.Config: rotary embeddings turn pairs of numbers; of head_dim={self.head_dim} "
                f"{self.rotary_size(self.rope)} would be turned, which is odd"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"{self.model_type}.Config: layer_types has {len(self.layer_types)} entries for {self.num_layers} layers"
            )
        if unknown := sorted({*(self.layer_types or ())} - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"{self.model_type}.Config: layer_types has {', '.join(unknown)}; known are full_attention and sliding_attention"
            )

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies, `rope.theta`."""
        return self.rope.theta

    def rotary_size(self, rope: Rope) -> int:
        """How many numbers of each head are rotated."""
        return rotated(self.head_dim, rope)

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """ALiBi's, of the query heads; None for none."""
        return None

    @property
    def slopes_scale(self) -> float:
        """Of what ALiBi adds to the scores."""
        return 1.0

    @property
    def slopes_rounded(self) -> bool:
        """Whether ALiBi is computed in bfloat16."""
        return False

    @property
    def sinusoidal(self) -> bool:
        """Whether sines of the positions are added to the embeddings."""
        return False

    @property
    def plain_norms(self) -> bool:
        """Whether norms are there that have no parameters."""
        return False

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows on the last layer."""
        return True

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output has a bias."""
        return self.attention_bias

    @property
    def head_bias(self) -> bool:
        """Whether the language model's head has a bias."""
        return False

    @property
    def embedding_scale(self) -> float | None:
        """Of the rows of the token table."""
        return None

    @property
    def attention_scale(self) -> float | None:
        """Of the scores; `1 / √k` if None."""
        return None

    @property
    def attention_cap(self) -> float | None:
        """The scores are squeezed between this and its negative."""
        return None

    @property
    def routing(self) -> Routing:
        """How tokens go to experts, in layers that have some."""
        return Routing(1)

    @property
    def expert_clamp(self) -> tuple[float, float] | None:
        """Of the experts' gated form, see `Gate`."""
        return None

    @property
    def residual_scale(self) -> float | None:
        """Of what each block adds."""
        return None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each layer; where config.json does not say which layers have a window, all have it."""
        types = self.layer_types or ("sliding_attention",) * self.num_layers
        rope = self.rope if self.rotary else None
        return tuple(Kind(self.sliding_window if t == "sliding_attention" else None, rope) for t in types)

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        found = tuple(kind.window for kind in self.kinds)
        return found if any(found) else None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = (data.get(cls.HF[field], getattr(cls, field)) for field in ("hidden_size", "num_heads"))
        fields["num_kv_heads"] = cls.num_kv_heads if cls.own_kv_heads or cls.num_kv_heads != cls.num_heads else heads
        if "num_key_value_heads" in data and data["num_key_value_heads"] is None:
            fields["num_kv_heads"] = heads
        fields["head_dim"] = cls.head_dim if cls.own_head_dim else hidden // heads
        if "head_dim" not in cls.HF and hidden % heads:
            names = cls.HF["hidden_size"], cls.HF["num_heads"]
            problems.append(f"{names[0]}={hidden} is not a multiple of {names[1]}={heads}")
        if cls.rotary is False:
            return set()
        fields["rope"] = read_rope(
            data,
            problems,
            head_dim=data.get("head_dim") or fields["head_dim"],
            max_positions=data.get("max_position_embeddings", cls.max_positions),
            default=cls.rope,
            partial=cls.partial,
        )
        return {*OWN_KEYS}

    def write_special(self) -> dict[str, Any]:
        return write_rope(self.rope) if self.rotary else {}


WINDOWS: Mapping[str, str] = {"sliding_window": "sliding_window", "layer_types": "layer_types"}
"""The keys of families that have windows."""

NAMES: Mapping[str, str] = {
    "embed_tokens": "embed.tokens",
    "layers.{l}.self_attn.q_proj": "layers.attention.query",
    "layers.{l}.self_attn.k_proj": "layers.attention.key",
    "layers.{l}.self_attn.v_proj": "layers.attention.value",
    "layers.{l}.self_attn.o_proj": "layers.attention.output",
    "layers.{l}.mlp.gate_proj": "layers.mlp.gate",
    "layers.{l}.mlp.up_proj": "layers.mlp.up",
    "layers.{l}.mlp.down_proj": "layers.mlp.down",
    "layers.{l}.input_layernorm": "layers.attention_norm",
    "layers.{l}.post_attention_layernorm": "layers.mlp_norm",
    "norm": "final_norm",
}
"""Llama's names on disk without `.weight`, and their leaves."""

HEAD_NORMS = {
    "layers.attention.query_norm": "layers.{l}.self_attn.q_norm",
    "layers.attention.key_norm": "layers.{l}.self_attn.k_norm",
}
"""The leaves of the norms of queries and keys, and their names."""

LAYOUTS: Mapping[str, tuple[str, str | None]] = {
    "layers.attention.query": ("(h k) d", "(h k)"),
    "layers.attention.key": ("(g k) d", "(g k)"),
    "layers.attention.value": ("(g k) d", "(g k)"),
    "layers.attention.output": ("d (h k)", None),
    "layers.attention.query_norms": ("(h k)", None),
    "layers.attention.key_norms": ("(g k)", None),
}
"""How leaves lie on disk that do not lie as they are: weight and bias."""

JOINED = ("layers.attention.query", "layers.attention.key", "layers.attention.value")
"""The leaves that several families have side by side in one tensor."""

BIASES = {
    "layers.attention.query": "attention_bias",
    "layers.attention.key": "attention_bias",
    "layers.attention.value": "attention_bias",
    "layers.attention.output": "output_bias",
    "layers.mlp.gate": "mlp_bias",
    "layers.mlp.up": "mlp_bias",
    "layers.mlp.down": "mlp_bias",
}
"""Leaf -> the property of the config that says whether it has a bias."""


def renamed(names: Mapping[str, str | None]) -> dict[str, str]:
    """Llama's names with changes, in the order of PyTorch's modules.

    Args:
        names: leaf -> its name here, or None where there is none. Leaves that Llama does not have come before the next
            that it has.
    """
    before: dict[str, list[str]] = {}
    waiting: list[str] = []
    for leaf in names:
        waiting.append(leaf)
        if leaf in NAMES.values():
            before[leaf], waiting = waiting, []
    found: dict[str, str] = {}
    for name, leaf in [*NAMES.items(), ("", "")]:
        here = {one: names[one] for one in (before.get(leaf, []) if leaf else waiting)} or {leaf: name}
        found |= {name: one for one, name in here.items() if name}
    return found


def weights(
    names: Mapping[str, str | tuple[str, ...]] = NAMES,
    *extra: Rule,
    head: str = "lm_head",
    token_classifier: str = "score",
    within: str | None = None,
    prefix: str = "model",
    question_answering: str = "transformer",
    norm_bias: bool = False,
    when: Mapping[str, str] = {},
    ignored: tuple[str, ...] = (),
    tensorflow: TensorFlow | None = None,
) -> Weights:
    """The layout map of a decoder.

    Args:
        names: name on disk, without `.weight` and the base model's prefix -> leaf, or several that lie in it side by side.
        extra: more rules.
        head: name of the language model's head.
        token_classifier: name of the head that classifies tokens.
        within: of the rules of several leaves.
        prefix: of the base model.
        question_answering: the base model's prefix in models for question answering.
        norm_bias: whether norms have biases.
        when: leaf, or name on disk, -> the property of the config that says whether it is there.
        ignored: regular expressions of names of buffers that old files have and nothing reads.
        tensorflow: about transformers' TensorFlow classes, if there were any.
    """
    rules: list[Rule] = []
    for name, leaf in names.items():
        if isinstance(leaf, tuple):
            weight, bias = (tuple(LAYOUTS[one][i] or "" for one in leaf if one in LAYOUTS) or None for i in (0, 1))
            rules.append(Rule(f"@{name}.weight", tuple(f"{one}.weight" for one in leaf), weight, within=within))
            there = BIASES[leaf[0]]
            rules.append(Rule(f"@{name}.bias", tuple(f"{one}.bias" for one in leaf), bias, within=within, when=there))
            continue
        kind = "scale" if leaf.endswith(("norm", "norms")) else "weight"
        weight, bias = LAYOUTS.get(leaf, (None, None))
        there = when.get(name, when.get(leaf))
        path = leaf if leaf in schema.TABLES else f"{leaf}.{kind}"
        rules.append(Rule(f"@{name}.weight", path, weight, when=there))
        if leaf in BIASES:
            rules.append(Rule(f"@{name}.bias", f"{leaf}.bias", bias, when=BIASES[leaf]))
        elif kind == "scale" and norm_bias:
            rules.append(Rule(f"@{name}.bias", f"{leaf}.bias", bias, when=there))
    heads = (
        Rule(f"{head}.weight", "lm_head.weight", tasks=("causal-lm",), when="untied"),
        Rule(f"{head}.bias", "lm_head.bias", tasks=("causal-lm",), when="head_bias"),
        Rule("score.weight", "classifier.weight", tasks=("sequence-classification",)),
        Rule(f"{token_classifier}.weight", "classifier.weight", tasks=("token-classification",)),
        Rule(f"{token_classifier}.bias", "classifier.bias", tasks=("token-classification",)),
        Rule("qa_outputs.weight", "classifier.weight", tasks=("question-answering",)),
        Rule("qa_outputs.bias", "classifier.bias", tasks=("question-answering",)),
    )
    return Weights(
        prefix={"": prefix, "question-answering": question_answering},
        tied={f"{head}.weight": "embed.tokens"},
        ignored=(r"rotary_emb\.inv_freq$", *ignored),
        rules=(*rules, *extra, *heads),
        tensorflow=tensorflow,
    )


def architectures(name: str, *tasks: str) -> dict[str, str]:
    """Task -> transformers' class, for a family whose classes begin with `name`: base, causal LM and those named."""
    return {task: name + CLASSES[task] for task in ("base", "causal-lm", *tasks)}


CLASSES = {
    "base": "Model",
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
"""Task -> how transformers' classes end."""
ALL = ("sequence-classification", "token-classification", "question-answering")
"""The tasks that most families have beside the first two."""


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
    experts: str | None = None,
) -> Output:
    """The model on `(b t)` tokens; see `fmodels.forward`."""
    if token_types is not None:
        raise ValueError(f"forward: {config.model_type} has no token types; leave token_types out")
    present, positions = of_call(tokens, mask, positions, cache)
    at_layer = _kinds(config, present, positions, cache)

    def norm(p: Params, x: Array) -> Array:
        return NORMS[config.norm](p, x, config.norm_eps)

    def normed(p: Params, name: str, x: Array) -> Array:
        return norm(p.get(name, {}), x) if name in p or config.plain_norms else x

    def norm_heads(p: Params, x: Array, name: str) -> Array:
        if f"{name}_norm" in p:
            return norm(p[f"{name}_norm"], x)
        if f"{name}_norms" not in p:
            return x
        scale = p[f"{name}_norms"]["scale"]
        if not config.joint_norms:
            return norm({"scale": scale}, x)
        joint = norm({"scale": scale.reshape(-1)}, x.reshape(*x.shape[:2], -1))
        return joint.reshape(x.shape)

    def residual(x: Array, y: Array) -> Array:
        return x + (y if config.residual_scale is None else y * jnp.asarray(config.residual_scale, y.dtype))

    gate = Gate(config.activation, config.expert_clamp)

    def feed(p: Params, x: Array, slot: Any) -> Any:
        if "moe" not in p:
            return mlp(p["mlp"], x, config.activation), slot
        y, logits = moe(p["moe"], x, config.routing, gate, how=experts)
        return y, slot._replace(routed=logits)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        seen, rope = at_layer(index)
        if config.slopes is not None:
            seen = with_slopes(
                seen, _slopes(config, index), positions, cache, scale=config.slopes_scale, rounded=config.slopes_rounded
            )
        before = normed(p, "attention_norm", x) if config.norm_first else x
        common: Any = {"slot": slot, "rope": rope, "interleaved": config.interleaved, "scale": config.attention_scale}
        if "latent" in p["attention"]:
            y, slot = latent_attention(p["attention"], before, seen, **common)
        else:
            y, slot = attention(p["attention"], before, seen, norm=norm_heads, cap=config.attention_cap, **common)
        y = norm(p["attention_after_norm"], y) if "attention_after_norm" in p else y
        if config.parallel:
            fed, slot = feed(p, norm(p["mlp_norm"], x) if "mlp_norm" in p else before, slot)
            return x + y + fed, slot
        x = residual(before if config.norm_residual else x, y)
        x = x if config.norm_first else normed(p, "attention_norm", x)
        before = normed(p, "mlp_norm", x) if config.norm_first else x
        y, slot = feed(p, before, slot)
        y = norm(p["mlp_after_norm"], y) if "mlp_after_norm" in p else y
        x = residual(before if config.norm_residual else x, y)
        return x if config.norm_first else normed(p, "mlp_norm", x), slot

    x = _embed(params["embed"], config, tokens, positions + config.position_offset)
    x = norm(params["embed"]["norm"], x) if "norm" in params["embed"] else x
    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep)
    hidden = normed(params, "final_norm", ran.x) if config.final_norm else ran.x
    hidden = linear(params["projection"], hidden, "btd,ed->bte") if "projection" in params else hidden
    out = decoder_head(params, config, hidden, tokens=tokens, mask=mask, cache=ran.cache, select=select)
    return ran.onto(out, hidden)


def _embed(params: Params, config: Config, tokens: Array, places: Array) -> Array:
    """The input of the first layer: rows of the tables of tokens, projected where they are smaller, and of positions."""
    x = embed({"tokens": params["tokens"]}, tokens, scale=config.embedding_scale)
    x = linear(params["projection"], x, "bte,de->btd") if "projection" in params else x
    if "positions" in params:
        x = x + take(params["positions"], places).astype(x.dtype)
    if config.sinusoidal:
        waves = sinusoids(places, x.shape[-1])
        if config.pad_token_id is not None:  # which is a row of transformers' table
            waves = jnp.where((places == config.pad_token_id)[..., None], 0, waves)
        x = x + waves.astype(x.dtype)
    return x


def _slopes(config: Config, index: Any) -> Array:
    """ALiBi's of the heads that a layer has left."""
    every = config.slopes or ()
    rows = [tuple(every[head] for head in schema.kept_heads(config, layer)) for layer in range(config.num_layers)]
    if len(set(rows)) == 1:
        return jnp.asarray(rows[0], jnp.float32)
    return jnp.asarray(rows[index] if isinstance(index, int) else jnp.asarray(rows, jnp.float32)[index], jnp.float32)


def _kinds(config: Config, present: Array, positions: Array, cache: Cache | None) -> Callable[[Any], Any]:
    """The number of a layer to whom it sees and how it rotates; the kinds of layers are computed once.

    Where no layer rotates there are no tables.
    """
    kinds = config.kinds
    keys: Any = () if cache is None else cache.keys
    slots = [x.shape[-2] for x in keys] if isinstance(keys, tuple) else [keys.shape[-2]] * len(kinds)
    slots = slots or [None] * len(kinds)
    different = list(dict.fromkeys(kinds))

    def make(kind: Kind) -> Any:
        seen = attend(present, cache, causal=True, window=kind.window, slots=slots[kinds.index(kind)])
        if len(different) > 1 and seen.old is not None:
            seen = seen._replace(old=jnp.broadcast_to(seen.old, (*seen.new.shape[:2], seen.old.shape[-1])))
        if not config.rotary:
            return seen, None
        rope = config.rope if kind.rope is None else kind.rope
        tables = rope_tables(rope, positions, config.rotary_size(rope), config.max_positions)
        if kind.rope is None:  # angles of zero
            tables = (jnp.ones_like(tables[0]), jnp.zeros_like(tables[1]))
        return seen, tables

    made = [make(kind) for kind in different]
    if len(made) == 1:
        return lambda index: made[0]
    which = [different.index(kind) for kind in kinds]

    def at_layer(index: Any) -> Any:
        if isinstance(index, int):  # layers one by one, each with a cache of its own size
            return made[which[index]]
        kind = jnp.asarray(which, jnp.int32)[index]
        return jax.tree.map(lambda *a: jnp.stack(a)[kind], *made)

    return at_layer
