"""Dotted paths over nested dicts: `"layers.attention.query.weight"`, or `"layers.3.attention…"` when unstacked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fmodels.types import Params


def flatten(params: Params) -> dict[str, Any]:
    """Returns every leaf under its dotted path, in the tree's own order.

    Example:
        >>> flatten({"embed": {"tokens": 1}, "layers": ({"norm": 2}, {"norm": 3})})
        {'embed.tokens': 1, 'layers.0.norm': 2, 'layers.1.norm': 3}
    """
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping):
            items = node.items()
        elif isinstance(node, list | tuple) and not hasattr(node, "_fields"):
            items = enumerate(node)
        else:
            flat[prefix] = node
            return
        for name, child in items:
            walk(f"{prefix}.{name}" if prefix else str(name), child)

    walk("", params)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`; a node whose names are 0, 1, 2, … becomes a tuple, one where some of them lack does not.

    Example:
        >>> unflatten({"embed.tokens": 1, "layers.0.norm": 2, "layers.1.norm": 3})
        {'embed': {'tokens': 1}, 'layers': ({'norm': 2}, {'norm': 3})}
        >>> unflatten({"layers.1.lora": 2})
        {'layers': {'1': {'lora': 2}}}
    """
    root: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = root
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf

    def tuples(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        children = {name: tuples(child) for name, child in node.items()}
        numbers = [str(i) for i in range(len(children))]
        return tuple(children[i] for i in numbers) if children and children.keys() == set(numbers) else children

    return tuples(root)


def get(params: Params, path: str) -> Any:
    """Returns the leaf or subtree at `path`.

    Raises:
        KeyError: there is nothing at `path`; the message names the nearest path that exists.

    Example:
        >>> get({"embed": {"tokens": 7}}, "embed.tokens")
        7
        >>> get({"embed": {"tokens": 7}}, "embed.token")
        Traceback (most recent call last):
        KeyError: "tree.get: no 'embed.token' in the tree; the nearest path is 'embed.tokens'"
    """
    node: Any = params
    for name in path.split("."):
        try:
            node = node[int(name)] if isinstance(node, list | tuple) else node[name]
        except (KeyError, IndexError, TypeError, ValueError):
            near = difflib.get_close_matches(path, flatten(params), n=1, cutoff=0.0)
            hint = f"; the nearest path is {near[0]!r}" if near else ""
            raise KeyError(f"tree.get: no {path!r} in the tree{hint}") from None
    return node


def has(params: Params, path: str) -> bool:
    """True if there is a leaf or a subtree at `path`."""
    try:
        get(params, path)
    except KeyError:
        return False
    return True


def update(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Returns a new tree with the leaves at the given paths replaced or added; other leaves are shared.

    Example:
        >>> update({"embed": {"tokens": 1}}, {"lm_head.weight": 2})
        {'embed': {'tokens': 1}, 'lm_head': {'weight': 2}}
    """
    return unflatten({**flatten(params), **leaves})


def remove(params: Params, *paths: str) -> Params:
    """Returns a new tree without the leaves and subtrees at `paths` (missing ones are passed over).

    Example:
        >>> remove({"embed": {"tokens": 1}, "lm_head": {"weight": 2}}, "lm_head")
        {'embed': {'tokens': 1}}
    """
    gone = tuple(f"{path}." for path in paths)
    return unflatten({p: leaf for p, leaf in flatten(params).items() if not f"{p}.".startswith(gone)})


def map_leaves(function: Callable[[str, Any], Any], params: Params) -> Params:
    """Applies `function(path, leaf)` to every leaf.

    Example:
        >>> map_leaves(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}})
        {'a': {'b': 'a.b=1'}}
    """
    return unflatten({path: function(path, leaf) for path, leaf in flatten(params).items()})


def stacks(params: Params) -> dict[str, Any]:
    """Path -> layers, of each stack that the tree has: `layers`, or `encoder.layers` and `decoder.layers`.

    Raises:
        KeyError: there is none.

    Example:
        >>> stacks({"encoder": {"layers": ({"up": 1},)}, "decoder": {"layers": {"up": 2}}})
        {'encoder.layers': ({'up': 1},), 'decoder.layers': {'up': 2}}
    """
    found = {f"{name}.layers": params[name]["layers"] for name in ("encoder", "decoder") if name in params}
    return found or {"layers": get(params, "layers")}


def is_stacked(params: Params) -> bool:
    """True if the layers are one dict of stacked leaves, False if they are a sequence of trees, in any stack."""
    return all(isinstance(layers, Mapping) for layers in stacks(params).values())
