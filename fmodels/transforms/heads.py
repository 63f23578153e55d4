"""Attention heads that go (`prune_heads`), that are silenced (`mask_heads`) or weighed (`scale_heads`)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from fmodels import schema, tree
from fmodels.arrays import Scaled
from fmodels.transforms import _leaves
from fmodels.transforms.stacking import unstack_layers
from fmodels.types import Array, Params

Config = TypeVar("Config", bound=Any)
Problem = tuple[type[Exception], str]


def prune_heads(params: Params, config: Config, heads: Mapping[int, Iterable[int]]) -> tuple[Params, Config]:
    """Removes attention heads: every leaf with the letter `h`, and with `g` where a group of heads goes, gets shorter.

    The pruned model computes what `mask_heads` computes, faster. Heads have their original numbers, also after an
    earlier pruning; heads that are gone already are passed over. Key-value heads shared by a group of query heads
    leave whole groups, or the same number of heads from every group that remains in the layer. Works under `jit`
    (heads are static), on numpy leaves and on optimizer state (`map_state`).

    Args:
        params: the tree, stacked or not.
        config: its config.
        heads: layer -> numbers of the heads to remove, each from 0 to `config.num_heads - 1`.

    Returns:
        `(params, config)`. A stacked tree stays stacked while all layers keep the same numbers of heads, else layers
        become a tuple. `config.pruned_heads` is the union of old and new; `config.num_heads` stays the original number.

    Raises:
        ValueError: a layer would keep no head; a group would be split unevenly; the tree does not fit the config.
        IndexError: a layer or a head is out of range; negative numbers are.
        TypeError: a number is not an integer. All problems are listed, and nothing is changed.
        NotImplementedError: there are several stacks of layers (encoder-decoders); or the others would compute something
            else without these heads: norms over all heads together (OLMo 2), numbers that all layers share (MPNet).

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=4,
        ...     head_dim=2, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> pruned, after = fm.prune_heads(params, config, {0: [1, 3]})
        >>> [layer["attention"]["query"]["weight"].shape for layer in pruned["layers"]], after.pruned_heads
        ([(2, 2, 8), (4, 2, 8)], ((0, (1, 3)),))
        >>> pruned, after = fm.prune_heads(pruned, after, {0: [1, 2], 1: [0, 1, 2]})
        >>> after.pruned_heads
        ((0, (1, 2, 3)), (1, (0, 1, 2)))

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?"; matches transformers 4.57
    `PreTrainedModel.prune_heads`. Where it differs: it checks before it changes, refuses to empty a layer, and knows
    key-value groups.
    """
    _check_one_stack("prune_heads", params)
    _check_independent(params, config)
    gone, problems = _read(params, config, heads)
    problems += [problem for layer in gone if (problem := _unprunable(config, layer, gone[layer]))]
    _raise("prune_heads", problems)
    if not any(gone.values()):
        return params, config
    before = config
    every = {
        layer: {*dict(config.pruned_heads).get(layer, ()), *gone.get(layer, ())} for layer in range(config.num_layers)
    }
    config = dataclasses.replace(
        config, pruned_heads=tuple((layer, tuple(sorted(every[layer]))) for layer in every if every[layer])
    )
    if schema.is_ragged(config):
        params = unstack_layers(params)
    kept = [_positions(before, config, layer) for layer in range(config.num_layers)]

    def prune(path: str, leaf: Any) -> Any:
        letters = schema.axes(path)
        if _leaves.is_hole(leaf):
            return leaf
        for letter in "hg":
            if letter not in letters:
                continue
            axis = letters.index(letter)
            if letters[0] == "l":
                leaf = _select_stacked(path, leaf, [k[letter] for k in kept], axis)
            else:
                leaf = _select(path, leaf, kept[_layer(path)][letter], axis)
        return leaf

    return tree.map_leaves(prune, params), config


def mask_heads(params: Params, config: Any, heads: Mapping[int, Iterable[int]]) -> Params:
    """Silences attention heads and keeps all shapes: zeros in the leaves that read heads, `attention.output.weight`.

    The twin of `prune_heads` that every other library can load: it computes the same. All heads of a layer may be
    silenced, and groups split. Works under `jit` (heads are static), on stacked and unstacked trees, on numpy leaves
    and on optimizer state (`map_state`).

    Args:
        params: the tree, stacked or not.
        config: its config.
        heads: layer -> original numbers of the heads to silence; heads that are pruned already are passed over.

    Returns:
        The tree.

    Raises:
        IndexError: a layer or a head is out of range; negative numbers are.
        TypeError: a number is not an integer. All problems are listed.
        ValueError: the tree does not fit the config.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=4,
        ...     head_dim=2, max_positions=16, task="causal-lm")
        >>> params = fm.mask_heads(fm.init(config, jax.random.key(0)), config, {0: [1]})
        >>> abs(params["layers"]["attention"]["output"]["weight"][0, 0, 1]).sum().item()
        0.0
    """
    _check_one_stack("mask_heads", params)
    gone, problems = _read(params, config, heads)
    _raise("mask_heads", problems)
    if not any(gone.values()):
        return params
    kept = [schema.kept_heads(config, layer) for layer in range(config.num_layers)]
    keep = [np.array([head not in gone.get(layer, ()) for head in kept[layer]]) for layer in range(config.num_layers)]

    def silence(leaf: Any, keep: np.ndarray) -> Any:
        # Chosen, not multiplied: 0 · inf would not be silent.
        if isinstance(leaf, Scaled):
            return dataclasses.replace(leaf, values=silence(leaf.values, keep))
        where = np.where if isinstance(leaf, np.ndarray) else jnp.where
        return where(keep, leaf, np.zeros((), leaf.dtype))

    return _map_readers("mask_heads", silence, params, keep)


def scale_heads(params: Params, mask: Array | Sequence[Array]) -> Params:
    """Multiplies each head's contribution by a number; differentiable in the numbers.

    Args:
        params: the tree, stacked or not.
        mask: `(l h)`, or one `(h)` per layer where layers differ; 1 leaves a head as it is, 0 silences it. Rows belong
            to the heads that the tree has: after pruning those that are left, in order.

    Returns:
        The tree, with the same shapes and dtypes; products are rounded once, from float32.

    Raises:
        ValueError: the shape of `mask` is not that of the tree's heads.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=4,
        ...     head_dim=2, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> halved = fm.scale_heads(params, 0.5 * jax.numpy.ones((2, 4)))
        >>> weight = lambda tree: tree["layers"]["attention"]["output"]["weight"]
        >>> bool((weight(halved) == 0.5 * weight(params)).all())
        True
    """

    def scale(leaf: Any, factor: Any) -> Any:
        if isinstance(leaf, Scaled):
            return dataclasses.replace(leaf, scale=scale(leaf.scale, factor))
        wide = np.float64 if leaf.dtype == np.float64 else np.float32
        return (leaf.astype(wide) * factor.astype(wide)).astype(leaf.dtype)

    return _map_readers("scale_heads", scale, params, mask)


def _map_readers(name: str, function: Callable[[Any, Any], Any], params: Params, mask: Any) -> Params:
    """Applies `function(leaf, factor)` to the leaves that read heads: `h` after `d`, the output axis.

    `factor` holds the numbers of `mask`, one per head (and layer), with the leaf's axes.
    """
    _check_one_stack(name, params)
    stacked = tree.is_stacked(params)
    rows = [row if hasattr(row, "astype") else np.asarray(row, np.float32) for row in mask]
    flat, factors = tree.flatten(params), {}
    for path, leaf in flat.items():
        letters = schema.axes(path)
        if _leaves.is_hole(leaf) or not _reads_heads(letters):
            continue
        axis = letters.index("h")
        layer = None if stacked else _layer(path)
        layers = leaf.shape[0] if stacked else len(params["layers"])
        mine = rows if layer is None else rows[layer : layer + 1]
        shapes = [tuple(row.shape) for row in mine]
        if len(rows) != layers or shapes != [(leaf.shape[axis],)] * len(mine):
            raise ValueError(
                f"{name}: {path!r} has {layers} layers and {leaf.shape[axis]} heads, but the mask has {len(rows)} "
                f"rows, here of shape {', '.join(map(str, dict.fromkeys(shapes))) or 'none'}; "
                "expected a mask (l h), or one (h) per layer"
            )
        if not (_leaves.is_plain(leaf) or isinstance(leaf, Scaled)):
            raise NotImplementedError(
                f"{name}: {path!r} is a {type(leaf).__name__}; use fm.dequantize(params) first (fmodels convert --dequantize)"
            )
        shape = [
            size if i == axis or letter == "l" else 1
            for i, (letter, size) in enumerate(zip(letters, leaf.shape, strict=True))
        ]
        factors[path] = (_leaves.stack(*mine) if stacked else mine[0]).reshape(shape)
    return tree.map_leaves(lambda path, leaf: function(leaf, factors[path]) if path in factors else leaf, params)


def _layer(path: str) -> int:
    layer = schema.split_layer(path)[1]
    assert layer is not None
    return layer


def _check_one_stack(name: str, params: Params) -> None:
    if "layers" not in tree.stacks(params):
        raise NotImplementedError(
            f"{name}: this model has an encoder or a decoder with layers of its own ({', '.join(tree.stacks(params))}); "
            "heads are numbered by layer only where there is one stack, as in transformers, which prunes no such model"
        )


def _check_independent(params: Params, config: Any) -> None:
    """Raises where heads that stay would compute something else than `mask_heads` leaves them."""
    reason = "" if not config.joint_norms else "norms queries and keys over all heads together"
    if shared := [path for path in tree.flatten(params) if _is_shared(path) and "h" in schema.axes(path)]:
        reason = f"has {', '.join(shared)} for the heads of all layers together"
    if reason:
        raise NotImplementedError(
            f"prune_heads: {config.model_type} {reason}, so that none can leave a layer; silence them with "
            "mask_heads (fmodels prune --mask)"
        )


def _is_shared(path: str) -> bool:
    """Whether a leaf belongs to no layer."""
    return schema.split_layer(path)[1] is None and schema.axes(path)[0] != "l"


def _reads_heads(letters: tuple[str, ...]) -> bool:
    return "h" in letters and "d" in letters[: letters.index("h")]


def _read(
    params: Params, config: Any, heads: Mapping[int, Iterable[int]]
) -> tuple[dict[int, list[int]], list[Problem]]:
    """Layer -> heads asked for that are still there, in order; and what is wrong with the numbers or the tree."""
    if not isinstance(heads, Mapping):
        return {}, [(TypeError, f"expected heads as {{layer: [head, …]}}, got {heads!r}")]
    problems: list[Problem] = []
    gone: dict[int, list[int]] = {}
    for name, numbers in heads.items():
        layer = _index(name, config.num_layers, "layer", problems)
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            problems.append((TypeError, f"layer {name!r} has {numbers!r}, expected a list of heads such as [0, 2]"))
            continue
        found = [_index(head, config.num_heads, f"layer {name}: head", problems) for head in numbers]
        if layer is not None:
            asked = {head for head in found if head is not None}
            gone[layer] = [head for head in schema.kept_heads(config, layer) if head in asked]
    return gone, problems + _misfits(params, config)


def _index(value: Any, size: int, what: str, problems: list[Problem]) -> int | None:
    number = _leaves.integer(value)
    if number is None:
        problems.append((TypeError, f"{what} {value!r} is not an integer"))
        return None
    if not 0 <= number < size:
        problems.append((IndexError, f"{what} {number} is out of range, expected 0 to {size - 1}"))
        return None
    return number


def _misfits(params: Params, config: Any) -> list[Problem]:
    """Where the tree has other numbers of heads or layers than the config, by which heads are told apart."""
    repair = "repair the config of a tree edited by hand with match_config"
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if not _leaves.is_hole(leaf)}
    for path, leaf in flat.items():
        letters = schema.axes(path)
        if not {"h", "g"} & {*letters} or _is_shared(path):
            continue
        stacked = letters[0] == "l"
        depth = leaf.shape[0] if stacked else len(params["layers"])
        if depth != config.num_layers:
            return [(ValueError, f"the tree has {depth} layers, but the config says {config.num_layers}; {repair}")]
        for layer in range(depth) if stacked else [_layer(path)]:
            for letter, count in zip("hg", schema.heads(config, layer), strict=True):
                if letter in letters and leaf.shape[letters.index(letter)] != count:
                    has = f"{leaf.shape[letters.index(letter)]} {schema.LETTERS[letter]}"
                    return [
                        (ValueError, f"{path!r} has {has}, but the config says {count} for layer {layer}; {repair}")
                    ]
    return []


def _unprunable(config: Any, layer: int, gone: list[int]) -> Problem | None:
    """Why these heads cannot leave this layer, or None."""
    before = schema.kept_heads(config, layer)
    after = [head for head in before if head not in gone]
    if gone and not after:
        return (
            ValueError,
            f"layer {layer} has {len(before)} heads and all would go; keep one, or silence them with mask_heads",
        )
    size = config.num_heads // config.num_kv_heads
    if len({*collections.Counter(head // size for head in after).values()}) > 1:
        heads, groups = schema.heads(config, layer)
        verb = "splits" if len(gone) == 1 else "split"
        return ValueError, (
            f"layer {layer} has {groups} key-value groups of {heads // groups} heads; {gone} {verb} a group unevenly. "
            "Prune whole groups or one head of each, or use mask_heads."
        )
    return None


def _raise(name: str, problems: list[Problem]) -> None:
    """Raises all problems as one error, of the gravest type among theirs."""
    if problems:
        kinds, texts = zip(*problems, strict=True)
        kind = next(kind for kind in (TypeError, IndexError, ValueError) if kind in kinds)
        raise kind(
            f"{name}: {texts[0]}" if len(texts) == 1 else f"{name}: {len(texts)} problems:\n  " + "\n  ".join(texts)
        )


def _positions(before: Any, after: Any, layer: int) -> dict[str, np.ndarray]:
    """Where along the axes `h` and `g` of the tree lie the heads and groups that remain."""
    size = before.num_heads // before.num_kv_heads
    old, new = (schema.kept_heads(config, layer) for config in (before, after))
    groups, left = sorted({head // size for head in old}), {head // size for head in new}
    return {
        "h": np.array([i for i, head in enumerate(old) if head in new]),
        "g": np.array([i for i, group in enumerate(groups) if group in left]),
    }


def _select(path: str, leaf: Any, where: np.ndarray, axis: int) -> Any:
    return leaf if len(where) == leaf.shape[axis] else _leaves.select(path, leaf, where, axis)


def _select_stacked(path: str, leaf: Any, wheres: list[np.ndarray], axis: int) -> Any:
    if all(np.array_equal(where, wheres[0]) for where in wheres):
        return _select(path, leaf, wheres[0], axis)
    return _leaves.stack(*(_select(path, _leaves.index(leaf, i), where, axis - 1) for i, where in enumerate(wheres)))
