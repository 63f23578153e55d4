"""The one table of axes, and what follows from it: sizes, abstract trees, checks and maps by letter.

Every parameter's axes are named by letters. A transform is an operation on a letter and knows no family: it resizes
every leaf that has a `v`, prunes every leaf that has an `h`, shards every leaf by the letters that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fmodels import tree
from fmodels.types import Params

LETTERS = {
    "b": "batch",
    "t": "query position",
    "s": "key position",
    "p": "position table",
    "n": "token types",
    "m": "distance buckets",
    "d": "hidden",
    "e": "embedding",
    "o": "position embedding",
    "h": "query heads",
    "g": "key-value heads",
    "k": "head size",
    "u": "plain part of a head",
    "w": "rotated part of a head",
    "z": "latent",
    "q": "query rank",
    "f": "intermediate",
    "x": "experts",
    "i": "expert intermediate",
    "j": "shared intermediate",
    "v": "vocabulary",
    "c": "classes",
    "y": "width of a convolution",
    "l": "layer",
}
"""The legend of the letters; those of one parameter axis each are also fields of a config (`SIZES`)."""

SIZES = {
    "p": "max_positions",
    "n": "num_token_types",
    "m": "num_buckets",
    "d": "hidden_size",
    "e": "embedding_size",
    "o": "position_size",
    "h": "num_heads",
    "g": "num_kv_heads",
    "k": "head_dim",
    "u": "plain_size",
    "w": "rope_size",
    "z": "latent_size",
    "q": "query_rank",
    "f": "intermediate_size",
    "x": "num_experts",
    "i": "expert_size",
    "j": "shared_size",
    "v": "vocab_size",
    "c": "num_labels",
    "y": "kernel_size",
    "l": "num_layers",
}
"""Letter -> the config field with its size; a stack's own, such as `decoder_num_layers`, goes before it there."""

LIKE = {"e": "d", "o": "d", "i": "f", "j": "f"}
"""Letter -> the letter whose rule of sharding, and whose size, is also its own where it has none."""

CLASSES = {
    "multiple-choice": 1, "double-heads": 1, "replaced-token-detection": 1, "next-sentence": 2, "pretraining": 2,
    "question-answering": 2,
}  # fmt: skip
"""Task -> the classes that its head has, whatever the config's `num_labels` says."""

LM_TASKS = ("causal-lm", "masked-lm", "seq2seq-lm", "pretraining", "double-heads")
"""Tasks whose head gives a logit for each token of the vocabulary."""

AXES = {
    "embed.tokens": "v e",
    "embed.positions": "p o",
    "embed.types": "n e",
    "embed.distances": "m h",
    "embed.distance_vectors": "m d",
    "embed.distance_norm.scale": "d",
    "embed.distance_norm.bias": "d",
    "embed.sinusoids": "p k",
    "embed.norm.scale": "e",
    "embed.norm.bias": "e",
    "embed.projection.weight": "d e",
    "embed.projection.bias": "d",
    "layers.attention_norm.scale": "l d",
    "layers.attention_norm.bias": "l d",
    "layers.attention.query.weight": "l h k d",
    "layers.attention.query.bias": "l h k",
    "layers.attention.query_norm.scale": "l k",
    "layers.attention.query_norm.bias": "l k",
    "layers.attention.query_norms.scale": "l h k",
    "layers.attention.key.weight": "l g k d",
    "layers.attention.key.bias": "l g k",
    "layers.attention.key_norm.scale": "l k",
    "layers.attention.key_norm.bias": "l k",
    "layers.attention.key_norms.scale": "l g k",
    "layers.attention.value.weight": "l g k d",
    "layers.attention.value.bias": "l g k",
    "layers.attention.position_query.weight": "l h k d",
    "layers.attention.position_query.bias": "l h k",
    "layers.attention.position_key.weight": "l g k d",
    "layers.attention.position_key.bias": "l g k",
    "layers.attention.output.weight": "l d h k",
    "layers.attention.output.bias": "l d",
    "layers.attention.sinks": "l h",
    "layers.attention.query.plain.weight": "l h u d",
    "layers.attention.query.turned.weight": "l h w d",
    "layers.attention.query_down.weight": "l q d",
    "layers.attention.query_down.bias": "l q",
    "layers.attention.query_down_norm.scale": "l q",
    "layers.attention.query_up.plain.weight": "l h u q",
    "layers.attention.query_up.turned.weight": "l h w q",
    "layers.attention.latent.weight": "l z d",
    "layers.attention.latent.bias": "l z",
    "layers.attention.latent_norm.scale": "l z",
    "layers.attention.turned_key.weight": "l w d",
    "layers.attention.turned_key.bias": "l w",
    "layers.attention.key_up.weight": "l h u z",
    "layers.attention.value_up.weight": "l h k z",
    "layers.attention_after_norm.scale": "l d",
    "layers.mlp_norm.scale": "l d",
    "layers.mlp_norm.bias": "l d",
    "layers.mlp_after_norm.scale": "l d",
    "layers.mlp.gate.weight": "l f d",
    "layers.mlp.gate.bias": "l f",
    "layers.mlp.up.weight": "l f d",
    "layers.mlp.up.bias": "l f",
    "layers.mlp.down.weight": "l d f",
    "layers.mlp.down.bias": "l d",
    "layers.moe.router.weight": "l x d",
    "layers.moe.router.bias": "l x",
    "layers.moe.router.choice_bias": "l x",
    "layers.moe.gate.weight": "l x i d",
    "layers.moe.gate.bias": "l x i",
    "layers.moe.up.weight": "l x i d",
    "layers.moe.up.bias": "l x i",
    "layers.moe.down.weight": "l x d i",
    "layers.moe.down.bias": "l x d",
    "layers.moe.shared.gate.weight": "l j d",
    "layers.moe.shared.up.weight": "l j d",
    "layers.moe.shared.down.weight": "l d j",
    "layers.moe.shared_gate.weight": "l d",
    "final_norm.scale": "d",
    "final_norm.bias": "d",
    "conv.weight": "d d y",
    "conv.bias": "d",
    "conv_norm.scale": "d",
    "conv_norm.bias": "d",
    "projection.weight": "e d",
    "pooler.weight": "d d",
    "pooler.bias": "d",
    "lm_transform.dense.weight": "e d",
    "lm_transform.dense.bias": "e",
    "lm_transform.norm.scale": "e",
    "lm_transform.norm.bias": "e",
    "lm_head.weight": "v e",
    "lm_head.bias": "v",
    "lm_head.spare_bias": "v",
    "head.dense.weight": "d d",
    "head.dense.bias": "d",
    "head.up.weight": "f d",
    "head.up.bias": "f",
    "head.down.weight": "d f",
    "head.down.bias": "d",
    "head.norm.scale": "d",
    "head.norm.bias": "d",
    "classifier.weight": "c d",
    "classifier.bias": "c",
}
"""Path (stacked form) -> axes, the same letters as in einsum strings and sharding rules.

The parts of encoder-decoder models have the same lines: `encoder.` and `decoder.` may stand before any of them, and
`cross_attention` for `attention`.
"""

TABLES = frozenset(path for path in AXES if path.startswith("embed.") and path.count(".") == 1)
"""Leaves that are tables of embeddings: those directly under `embed`."""


def split_layer(path: str) -> tuple[str, int | None]:
    """The path in stacked form, and the number of the layer.

    Example:
        >>> split_layer("decoder.layers.3.mlp.up.weight"), split_layer("layers.mlp.up.weight")
        (('decoder.layers.mlp.up.weight', 3), ('layers.mlp.up.weight', None))
    """
    head, found, tail = path.partition("layers.")
    number, _, rest = tail.partition(".")
    return (f"{head}{found}{rest}", int(number)) if rest and number.isdigit() else (path, None)


def with_layer(path: str, layer: int) -> str:
    """The inverse of `split_layer`.

    Example:
        >>> with_layer("decoder.layers.mlp.up.weight", 3)
        'decoder.layers.3.mlp.up.weight'
    """
    head, found, tail = path.partition("layers.")
    return f"{head}{found}{layer}.{tail}"


def stacked_path(path: str) -> str:
    """`layers.3.mlp.up.weight` -> `layers.mlp.up.weight`; other paths as they are."""
    return split_layer(path)[0]


def stack(path: str) -> str:
    """`"encoder"` or `"decoder"`, the part of the model that the path starts with, or nothing.

    Example:
        >>> stack("decoder.layers.mlp.up.weight"), stack("layers.mlp.up.weight")
        ('decoder', '')
    """
    first = path.partition(".")[0]
    return first if first in ("encoder", "decoder") else ""


def line(path: str) -> str:
    """The path, in stacked form, under which the table has the leaf.

    Example:
        >>> line("decoder.layers.3.cross_attention.query.weight")
        'layers.attention.query.weight'
    """
    return stacked_path(path).removeprefix(f"{stack(path)}.").replace(".cross_attention", ".attention")


def axes(path: str) -> tuple[str, ...]:
    """The letters of the leaf at `path`, stacked or not.

    Raises:
        KeyError: the path is not in the table.

    Example:
        >>> axes("layers.attention.query.weight")
        ('l', 'h', 'k', 'd')
        >>> axes("layers.0.attention.query.weight")
        ('h', 'k', 'd')
    """
    if line(path) not in AXES:
        raise KeyError(f"schema: {path!r} is not in the table of axes; add its line to fmodels.schema.AXES")
    letters = tuple(AXES[line(path)].split())
    return letters if split_layer(path)[1] is None else letters[1:]


def heads(config: Any, layer: int) -> tuple[int, int]:
    """`(h, g)`: query and key-value heads that layer `layer` has left after the config's `pruned_heads`.

    A group that lost all its heads is gone with its key-value head; the others have equal numbers of heads.
    """
    kept = kept_heads(config, layer)
    group = config.num_heads // config.num_kv_heads
    return len(kept), len({head // group for head in kept})


def kept_heads(config: Any, layer: int) -> tuple[int, ...]:
    """The original numbers of the query heads that layer `layer` still has, in order."""
    gone = dict(config.pruned_heads).get(layer, ())
    return tuple(head for head in range(config.num_heads) if head not in gone)


def field(config: Any, path: str, letter: str) -> str:
    """The config's field with the size of `letter` at `path`: `decoder_num_layers` where there is one, `num_layers`."""
    own = f"{stack(path)}_{SIZES[letter]}"
    if not hasattr(config, SIZES[letter]) and letter in LIKE:
        return field(config, path, LIKE[letter])
    return own if hasattr(config, own) else SIZES[letter]


def sizes(config: Any, path: str = "", layer: int | None = None) -> dict[str, int]:
    """Letter -> size, from the config, in the stack of `path`; with `layer`, the head counts of that layer."""
    fields = {letter: field(config, path, letter) for letter in SIZES}
    found = {letter: getattr(config, name) for letter, name in fields.items() if hasattr(config, name)}
    if "c" in found:
        found["c"] = CLASSES.get(config.task, found["c"])
    if "p" in found:
        found["p"] += getattr(config, "position_offset", 0)
    if layer is not None and config.pruned_heads:
        found["h"], found["g"] = heads(config, layer)
    return found


def is_ragged(config: Any) -> bool:
    """True if layers differ in their parts or in their numbers of heads, so that they cannot be stacked."""
    if any(len(set(has)) > 1 for has in parts(config).values()):
        return True
    return bool(config.pruned_heads) and len({heads(config, layer) for layer in range(config.num_layers)}) > 1


def parts(config: Any) -> Mapping[str, tuple[bool, ...]]:
    """The part of a layer, such as `"moe"` -> which layers have it, for the parts that not all need have."""
    return getattr(config, "layer_parts", {})


def layers_of(path: str, config: Any) -> list[int]:
    """The layers that have the leaf at `path`, which is in stacked form."""
    has = parts(config).get(line(path).split(".")[1])
    return [i for i in range(sizes(config, path)["l"]) if has is None or has[i]]


def paths(leaves: Iterable[str], config: Any, *, stacked: bool) -> list[str]:
    """Expands paths in stacked form to those of a tree with as many layers as the config says, stacked or not."""
    expanded: list[str] = []
    for path in leaves:
        if "l" not in axes(path):
            expanded.append(path)
        elif there := layers_of(path, config):
            expanded += [path] if stacked else [with_layer(path, i) for i in there]
    return expanded


def shape(path: str, config: Any) -> tuple[int, ...]:
    """The shape that the config gives to the leaf at `path`."""
    letters, layer = axes(path), split_layer(path)[1]
    size = sizes(config, path, 0 if "l" in letters else layer)
    return tuple(size[letter] for letter in letters)


def abstract(leaves: Iterable[str], config: Any, dtype: Any, *, stacked: bool = True) -> Params:
    """A tree of `jax.ShapeDtypeStruct` for the given leaves (paths in stacked form).

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(vocab_size=5, embedding_size=4, pruned_heads=())
        >>> abstract(["embed.tokens"], config, "float32")
        {'embed': {'tokens': ShapeDtypeStruct(shape=(5, 4), dtype=float32)}}
    """
    stacked = stacked and not is_ragged(config)
    return tree.unflatten(
        {p: jax.ShapeDtypeStruct(shape(p, config), dtype) for p in paths(leaves, config, stacked=stacked)}
    )


def check(params: Params, config: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raises one ValueError that lists everything in which `params` departs from what `config` says.

    Args:
        params: the tree, stacked or not.
        config: the family's config.
        required: paths in stacked form that must be there.
        optional: paths in stacked form that may be there.
    """
    flat = tree.flatten(params)
    stacked = tree.is_stacked(params)
    want = paths(required, config, stacked=stacked)
    may = paths(optional, config, stacked=stacked)
    problems = [f"missing {path!r}" for path in want if path not in flat]
    problems += [f"unexpected {path!r}" for path in flat if path not in {*want, *may}]
    for path in (*want, *may):
        if path in flat and tuple(flat[path].shape) != shape(path, config):
            letters = " ".join(axes(path))
            problems.append(
                f"{path!r} has shape {tuple(flat[path].shape)}, but the config says ({letters}) = {shape(path, config)}"
            )
    if problems:
        raise ValueError(
            f"check: {len(problems)} problems:\n  "
            + "\n  ".join(problems)
            + "\nUse match_config to repair the config of a tree edited by hand."
        )


def map_axes(function: Callable[[str, Any, int], Any], params: Params, letter: str) -> Params:
    """Applies `function(path, leaf, axis)` to every leaf that has the axis `letter`; others are passed through.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": {"tokens": jnp.zeros((5, 4)), "norm": {"scale": jnp.ones(4)}}}
        >>> shorter = map_axes(lambda path, leaf, axis: leaf[:3], params, "v")
        >>> shorter["embed"]["tokens"].shape, shorter["embed"]["norm"]["scale"].shape
        ((3, 4), (4,))
    """

    def apply(path: str, leaf: Any) -> Any:
        letters = axes(path)
        return function(path, leaf, letters.index(letter)) if letter in letters else leaf

    return tree.map_leaves(apply, params)


def measured(params: Params) -> dict[str, set[int]]:
    """Letter -> the sizes that the arrays of the tree have for it (one size, or more if the tree is ragged).

    Those of an encoder and a decoder are apart: `"decoder.l"`.
    """
    found: dict[str, set[int]] = {}
    for path, leaf in tree.flatten(params).items():
        for letter, size in zip(axes(path), leaf.shape, strict=True):
            found.setdefault(f"{stack(path)}.{letter}".lstrip("."), set()).add(int(size))
    for path, layers in tree.stacks(params).items():
        if not isinstance(layers, Mapping):
            found[f"{stack(path)}.l".lstrip(".")] = {len(layers)}
    return found


def partition(params: Params, mesh_axes: Mapping[str, str]) -> Params:
    """A tree of `PartitionSpec` from a rule per letter; a mesh axis is used once per leaf, by its first letter.

    A quantised leaf has one for each of its parts.

    Args:
        params: a tree of arrays or of `ShapeDtypeStruct`.
        mesh_axes: letter -> mesh axis, such as `{"h": "model", "g": "model", "f": "model", "v": "model"}`; that of `d` is
            also that of `e` and `o`, and that of `f` that of experts' and shared ones, unless they have their own.

    Example:
        >>> import jax
        >>> params = {"embed": {"tokens": jax.ShapeDtypeStruct((8, 4), "float32")}}
        >>> partition(params, {"v": "model"})["embed"]["tokens"]
        P('model', None)
    """
    mesh_axes = {**{letter: mesh_axes[other] for letter, other in LIKE.items() if other in mesh_axes}, **mesh_axes}

    def spec(path: str, leaf: Any) -> Any:
        used: set[str] = set()
        names: list[str | None] = []
        for letter in axes(path):
            name = mesh_axes.get(letter)
            names.append(None if name in used else name)
            if name is not None:
                used.add(name)
        return leaf.partition(names) if hasattr(leaf, "partition") else PartitionSpec(*names)

    return tree.map_leaves(spec, params)
