"""What the decoders after Llama have in common: their layers and the names of their weights; their configs are beside.

A layer is read off its tree: norms before the blocks, behind them or both; norms of queries and keys; gates; biases. What no
tree can say is a property of the config.

Source: Touvron et al. 2023; matches transformers' `modeling_llama` and what was copied from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fmodels import schema
from fmodels.arrays import take
from fmodels.models._base import Family, check_cache, decoder_head, init_normal
from fmodels.models._decoder_config import Config as Config
from fmodels.models._decoder_config import Kind as Kind
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, with_slopes
from fmodels.nn.cache import slots_of
from fmodels.nn.embeddings import embed
from fmodels.nn.experts import Gate, moe
from fmodels.nn.latent import latent_attention
from fmodels.nn.linear import linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm, rms_norm, rms_norm_plus_one
from fmodels.nn.positions import of_call, rope_tables, sinusoids
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import FLAX, Flax, Rule, TensorFlow, Weights

NORMS: dict[str, Callable[[Params, Array, float], Array]] = {
    "rms": rms_norm,
    "rms-plus-one": rms_norm_plus_one,
    "layer": layer_norm,
}


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

NORMS_AROUND = {
    "layers.attention_after_norm": "layers.{l}.post_attention_layernorm",
    "layers.mlp_norm": "layers.{l}.pre_feedforward_layernorm",
    "layers.mlp_after_norm": "layers.{l}.post_feedforward_layernorm",
}
"""The leaves of norms in families that have them on both sides of the blocks, and their names."""

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
    flax: Flax = FLAX,
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
        flax: what is special about the trees of Flax's classes.
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
        flax=flax,
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
CLASSIFIERS = ("sequence-classification", "token-classification")
ALL = (*CLASSIFIERS, "question-answering")
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
    check_cache(config, cache)
    present, positions = of_call(tokens, mask, positions, cache)
    at_layer = _kinds(config, present, positions, cache)
    slopes = None if config.slopes is None else _slopes(config, config.slopes)

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
        if slopes is not None:
            seen = with_slopes(
                seen, slopes(index), positions, cache, scale=config.slopes_scale, rounded=config.slopes_rounded
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


def _slopes(config: Config, every: tuple[float, ...]) -> Callable[[Any], Array]:
    """The number of a layer to ALiBi's slopes of the heads that it has left."""
    rows = [tuple(every[head] for head in schema.kept_heads(config, layer)) for layer in range(config.num_layers)]
    different = list(dict.fromkeys(rows))
    return layers.choose([jnp.asarray(row, jnp.float32) for row in different], [different.index(row) for row in rows])


def _kinds(config: Config, present: Array, positions: Array, cache: Cache | None) -> Callable[[Any], Any]:
    """The number of a layer to whom it sees and how it rotates; the kinds of layers are computed once.

    Where no layer rotates there are no tables.
    """
    slots = (None,) * config.num_layers if cache is None else slots_of(cache)
    kinds = config.kinds[: len(slots)]
    different = list(dict.fromkeys(kinds))

    def make(kind: Kind) -> Any:
        if config.causal:
            seen = attend(present, cache, causal=True, window=kind.window, slots=slots[kinds.index(kind)])
        else:
            seen = attend(present, causal=False, reach=None if kind.window is None else kind.window // 2)
        if len(different) > 1 and seen.old is not None:
            seen = seen._replace(old=jnp.broadcast_to(seen.old, (*seen.new.shape[:2], seen.old.shape[-1])))
        if not config.rotary:
            return seen, None
        rope = config.rope if kind.rope is None else kind.rope
        tables = rope_tables(rope, positions, config.rotary_size(rope), config.max_positions)
        if kind.rope is None:  # angles of zero
            tables = (jnp.ones_like(tables[0]), jnp.zeros_like(tables[1]))
        return seen, tables

    return layers.choose([make(kind) for kind in different], [different.index(kind) for kind in kinds])
