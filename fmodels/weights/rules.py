"""The invertible layout map: for each tensor on disk, which leaf it is and how its axes lie there.

A family states a list of `Rule`s. From it follow the names and shapes of files, PyTorch's `state_dict`, and the way
back: `to_disk(from_disk(x)) == x`, bit for bit, because the only operations are reshape, transpose and split.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fmodels import schema


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor on disk.

    Attributes:
        name: its name, `{l}` for the layer number, `{x}` for that of an expert which has a tensor of its own, `{h}` and `{g}`
            for that of such a query or key-value head, a leading `@` for the prefix of the base model.
        leaf: the path of its leaf, or several paths of leaves that lie side by side in it.
        layout: the axes on disk, such as `"(h k) d"`; the leaf's own if None. With several leaves, one layout each.
        along: the axis of the tensor along which several leaves lie side by side.
        within: a letter of that axis: they lie side by side within each of its places, as `g` where the rows of a key-value
            head are those of its queries, its key and its value.
        tasks: the tasks whose models have it; all if None.
        when: a config field that must be truthy for it to exist; `!field` for falsy.
        optional: it may be absent, and then so is the leaf.
        buffer: PyTorch's module has it as a buffer, which is saved but not trained.
        first: its name in the first layer, where that is another.
    """

    name: str
    leaf: str | tuple[str, ...]
    layout: str | tuple[str, ...] | None = None
    along: int = 0
    within: str | None = None
    tasks: tuple[str, ...] | None = None
    when: str | None = None
    optional: bool = False
    buffer: bool = False
    first: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.leaf,) if isinstance(self.leaf, str) else self.leaf

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """Per leaf, the groups of letters of each axis on disk: `"(h k) d"` -> `("hk", "d")`."""
        if self.layout is None:
            return tuple(self.letters(leaf) for leaf in self.leaves)
        layouts = (self.layout,) if isinstance(self.layout, str) else self.layout
        return tuple(_groups(layout) for layout in layouts)

    @property
    def numbered(self) -> str:
        """The letter of the experts, or heads, that have a tensor each; empty if there are none."""
        return next((letter for letter in "xhg" if f"{{{letter}}}" in self.name), "")

    def letters(self, leaf: str) -> tuple[str, ...]:
        """The axes of the part of a leaf that lies in one tensor: without the layer's, and that of `numbered`."""
        return _letters(leaf, "l" + self.numbered)

    def applies(self, config: Any) -> bool:
        """True if a model with this config has the tensor."""
        if self.tasks is not None and config.task not in self.tasks:
            return False
        if self.when is None:
            return True
        return not getattr(config, self.when[1:]) if self.when.startswith("!") else bool(getattr(config, self.when))


@functools.cache
def _groups(layout: str) -> tuple[str, ...]:
    return tuple(group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\S+", layout))


@functools.cache
def _letters(leaf: str, numbered: str) -> tuple[str, ...]:
    return tuple(letter for letter in schema.axes(leaf) if letter not in numbered)


def _axis_order(letters: Iterable[str], groups: Iterable[str]) -> tuple[int, ...]:
    """The transposition from the disk's letters to the leaf's; letters that repeat are taken in order."""
    disk = list("".join(groups))
    order = []
    for letter in letters:
        order.append(disk.index(letter))
        disk[order[-1]] = ""
    return tuple(order)


def is_same_order(rule: Rule) -> bool:
    """True if the tensor on disk is its leaf but for a reshape."""
    if not isinstance(rule.leaf, str):
        return False
    order = _axis_order(rule.letters(rule.leaf), rule.layouts[0])
    return order == tuple(range(len(order)))


def is_turned(rule: Rule) -> bool:
    """True if the tensor on disk is a matrix with its leaves' input axes before their output axes."""
    laid = [(*groups, "".join(rule.letters(leaf))) for leaf, groups in zip(rule.leaves, rule.layouts, strict=True)]
    return all(len(one) == 3 and one[1] + one[0] == one[2] != one[0] + one[1] for one in laid)


def disk_shape(rule: Rule, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape on disk for the given size of each letter."""
    shapes = [[_product(size[letter] for letter in group) for group in groups] for groups in rule.layouts]
    shape = shapes[0]
    shape[rule.along] = sum(part[rule.along] for part in shapes) if len(shapes) > 1 else shape[rule.along]
    return tuple(shape)


def from_disk(rule: Rule, tensor: Any, size: Mapping[str, int]) -> dict[str, Any]:
    """The leaves of one layer, or their parts of one expert, from the tensor on disk; views where the array library makes them.

    Args:
        rule: the tensor's rule.
        tensor: any array with `reshape`, `transpose` and slicing: numpy, jax (traced or not).
        size: letter -> size, to split grouped axes.
    """
    layouts = [(leaf, groups, rule.letters(leaf)) for leaf, groups in zip(rule.leaves, rule.layouts, strict=True)]
    return _apart(tensor, layouts, size, rule.along, rule.within)


def _apart(
    tensor: Any,
    layouts: list[tuple[str, tuple[str, ...], tuple[str, ...]]],
    size: Mapping[str, int],
    axis: int,
    within: str | None,
) -> dict[str, Any]:
    """Leaf -> its part of a tensor, for the leaves that lie side by side along an axis, each with its groups and letters."""
    leaves: dict[str, Any] = {}
    offset, along = 0, axis
    if within is not None:
        tensor = _split(tensor, axis, size[within])
        axis += 1
    for leaf, groups, letters in layouts:
        part = tensor
        if len(layouts) > 1:
            width = _product(size[letter] for letter in groups[along])
            width = width if within is None else width // size[within]
            part = tensor[(slice(None),) * axis + (slice(offset, offset + width),)]
            offset += width
        part = part.reshape([size[letter] for group in groups for letter in group])
        order = _axis_order(letters, groups)
        leaves[leaf] = part if order == tuple(range(len(order))) else part.transpose(order)
    return leaves


def outputs_first(rule: Rule, matrix: Any) -> Any:
    """A matrix on disk, `(out, in)` whichever way it lies there; of experts `(x, out, in)`."""
    experts = len(rule.layouts[0]) - 2
    return (
        matrix
        if _is_output(rule.letters(rule.leaves[0])[experts:], rule.layouts[0][experts])
        else matrix.swapaxes(-1, -2)
    )


def _is_output(letters: tuple[str, ...], group: str) -> bool:
    """Whether a group of letters on disk are the first of the leaf's."""
    return sorted(letters[: len(group)]) == sorted(group)


def low_rank_from_disk(
    rule: Rule, size: Mapping[str, int], a: Any, b: Any, rows: Any = None, columns: Any = None
) -> dict[str, tuple[Any, Any, Any, Any]]:
    """What a product `b a` that is added to a matrix on disk, `(out, in)` whichever way it lies there, is for its leaves.

    Args:
        rule: the matrix's rule.
        size: letter -> size.
        a: `(r, in)`; of experts in one tensor `(x r, in)`.
        b: `(out, r)`; of experts `(out, r x)`.
        rows: `(out)`, a number for each output, or None.
        columns: `(in)`, a number for each input, or None; not of experts.

    Returns:
        Leaf -> `(r i)`, `(o r)`, `(o)` or None and `(i)` or None, where `o` are the leaf's first axes, of outputs, and `i`
        the others; of experts `(x r i)` and `(x o r)`. Leaves side by side have the same first factor.

    Raises:
        ValueError: the tensor is no matrix, or the shapes do not fit.

    Source: PEFT's `lora.Linear`, and `lora.ParamWrapper` for experts.
    """
    shape, experts = disk_shape(rule, size), rule.layouts[0][:-2]
    if len(shape) < 2 or experts not in ((), ("x",)):
        raise ValueError(f"a tensor of shape {list(shape)} is not a matrix")
    each: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    inner, out = {}, 0
    for leaf, groups in zip(rule.leaves, rule.layouts, strict=True):
        first, second = groups[len(experts) :]
        letters = rule.letters(leaf)[len(experts) :]
        out = 0 if _is_output(letters, first) else 1
        outputs, inputs = (first, second) if out == 0 else (second, first)
        each.append((leaf, (outputs,), letters[: len(outputs)]))
        inner[leaf] = inputs, letters[len(outputs) :]
    *_, one, two = shape
    count = size["x"] if experts else 1
    rank = b.shape[-1] // count
    want = [(rank * count, (two, one)[out]), ((one, two)[out], rank * count)]
    if [tuple(a.shape), tuple(b.shape)] != want or not rank:
        raise ValueError(
            f"factors of shapes {list(a.shape)} and {list(b.shape)}, expected {list(want[0])} and {list(want[1])}"
        )
    for vector, length in ((rows, b.shape[0]), (columns, a.shape[1])):
        if vector is not None and tuple(vector.shape) != (length,):
            raise ValueError(f"a vector of shape {list(vector.shape)} beside them, expected {[length]}")
    size = {**size, "r": rank}
    a = a.reshape(count, rank, -1) if experts else a
    b = b.reshape(-1, rank, count) if experts else b
    wide = [(leaf, (*groups, "r", *experts), (*experts, *letters, "r")) for leaf, groups, letters in each]
    second = _apart(b, wide, size, 0, rule.within)
    third = {} if rows is None else _apart(rows, each, size, 0, rule.within)
    found: dict[str, tuple[Any, Any, Any, Any]] = {}
    for leaf, (inputs, letters) in inner.items():
        alone = [(leaf, (*experts, "r", inputs), (*experts, "r", *letters))]
        first = _apart(a, alone, size, 0, None)[leaf]
        fourth = None if columns is None else _apart(columns, [(leaf, (inputs,), letters)], size, 0, None)[leaf]
        found[leaf] = first, second[leaf], third.get(leaf), fourth
    return found


def to_disk(rule: Rule, leaves: Mapping[str, Any], concatenate: Callable[..., Any]) -> Any:
    """The inverse of `from_disk`; sizes are read from the arrays.

    Args:
        rule: the tensor's rule.
        leaves: path (stacked form) -> this layer's leaf, or its part of one expert.
        concatenate: `np.concatenate` or `jnp.concatenate`, called as `concatenate(parts, axis)`.
    """
    parts = []
    for leaf, groups in zip(rule.leaves, rule.layouts, strict=True):
        array = leaves[leaf]
        order = _axis_order(rule.letters(leaf), groups)
        inverse = tuple(order.index(i) for i in range(len(order)))
        array = array if inverse == tuple(range(len(order))) else array.transpose(inverse)
        shape, axis = [], 0
        for group in groups:
            shape.append(_product(array.shape[axis : axis + len(group)]))
            axis += len(group)
        parts.append(array.reshape(shape))
    if len(parts) == 1:
        return parts[0]
    if rule.within is None:
        return concatenate(parts, rule.along)
    leaf = next(leaf for leaf in rule.leaves if rule.within in rule.letters(leaf))
    count = leaves[leaf].shape[rule.letters(leaf).index(rule.within)]
    whole = concatenate([_split(part, rule.along, count) for part in parts], rule.along + 1)
    return whole.reshape([*whole.shape[: rule.along], -1, *whole.shape[rule.along + 2 :]])


def _split(array: Any, axis: int, count: int) -> Any:
    """The array with an axis split in two, the first of `count` places."""
    return array.reshape([*array.shape[:axis], count, array.shape[axis] // count, *array.shape[axis + 1 :]])


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


class Place(NamedTuple):
    """Where a tensor on disk belongs: its rule, its layer (None outside of them), and the number of its own expert or head."""

    rule: Rule
    layer: int | None
    number: int | None = None

    def sizes(self, config: Any) -> dict[str, int]:
        """Letter -> size there."""
        return schema.sizes(config, self.rule.leaves[0], self.layer)

    def leaves(self, *, stacked: bool) -> dict[str, str]:
        """Stacked path -> path in the tree, for the leaves of the rule."""
        if stacked or self.layer is None:
            return {leaf: leaf for leaf in self.rule.leaves}
        return {leaf: schema.with_layer(leaf, self.layer) for leaf in self.rule.leaves}

    def position(self, *, stacked: bool) -> tuple[int, ...]:
        """Of this place in a leaf of the tree: the layer, where layers are stacked, and the expert or head."""
        return tuple(i for i in (self.layer if stacked else None, self.number) if i is not None)

    def part(self, leaf: Any, *, stacked: bool) -> Any:
        """What lies here of a leaf of the tree."""
        index = self.position(stacked=stacked)
        return leaf[index] if index else leaf


@dataclasses.dataclass(frozen=True)
class Flax:
    """How the trees of transformers' Flax classes differ from what the names and axes of PyTorch's files let expect.

    Attributes:
        joined: name on disk -> the names of tensors that Flax has as this one, which must be equal. A leading `@` as in rules.
        computed: name on disk -> function of the config that computes the tensor, which Flax has not.
        repeats_head: whether a tied head has its weight in the tree.
        lacks: property of the config -> what Flax's classes do not have, in models where it is true.
    """

    joined: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    computed: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    repeats_head: bool = False
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)


FLAX = Flax()
"""Trees in which nothing is special."""


@dataclasses.dataclass(frozen=True)
class TensorFlow:
    """What the rules do not say about transformers' TensorFlow classes; read by `fmodels.dialects.tensorflow`.

    Names are of variables without the model's part and `:0`, such as `bert/pooler/dense/kernel`.

    Attributes:
        without: tasks for which transformers has a class of PyTorch, and none of TensorFlow.
        tokens: how the name of the token table ends.
        head: when the head over the vocabulary has a variable of its own: `"never"`, `"untied"` or `"always"`.
        names: regular expression -> replacement, for the names that follow from the rules.
        conv1d: regular expression of the affine maps with input axes first in PyTorch, too, and a bias `(1, n)`.
        unread: name of a variable that nothing reads -> the one of which it is a copy.
        outside: names' first parts that stand in place of the model's part, too.
        holds: layer of the model -> regular expression of the names of other layers that it holds, too.
        bare: task -> layer without variables that transformers misses if the file does not name it.
        original: regular expression -> replacement, from PyTorch's names to those of the family's first checkpoints, which
            were TensorFlow's.
    """

    without: tuple[str, ...] = ()
    tokens: str = "weight"
    head: str = "never"
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    conv1d: str | None = None
    unread: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outside: tuple[str, ...] = ()
    holds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bare: Mapping[str, str] = dataclasses.field(default_factory=dict)
    original: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """A family's layout map.

    Attributes:
        rules: every tensor of every task.
        prefix: task -> the base model's prefix on disk; the entry `""` is for the tasks not named. The base task
            has none.
        tied: name on disk -> path of the leaf that it repeats when the head is tied; such tensors are not written.
        shared: as `tied`, for rules of tensors that repeat a leaf whenever their `when` says so, in models of their
            `tasks`.
        renames: end of a name in old files -> what it is now.
        ignored: regular expressions of names of buffers that the computation does not read; `{l}` is the layer after the last.
        fallbacks: name -> the name that is read in its place when it is absent.
        stand_ins: optional leaf -> the leaf that is written in its place when it is absent.
        module: the map of PyTorch's module, `state_dict`, where transformers saves other tensors than it has; files of
            either form are read.
        flax: what is special about Flax's trees.
        tensorflow: about transformers' TensorFlow classes, if there were any.
    """

    rules: tuple[Rule, ...]
    prefix: Mapping[str, str]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared: tuple[Rule, ...] = ()
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    fallbacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stand_ins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    module: Weights | None = None
    flax: Flax = FLAX
    tensorflow: TensorFlow | None = None

    @property
    def of_module(self) -> Weights:
        """The map of PyTorch's module."""
        return self if self.module is None else self.module

    def of_names(self, names: Iterable[str], config: Any) -> Weights:
        """The map, of the files' and the module's, that knows more of the names of a file."""
        if self.module is None:
            return self
        names = list(names)

        def known(weights: Weights) -> int:
            all_names = {**weights.places(config), **weights.places_of_other_tasks(config)}.keys()
            all_names |= weights.repeats(config, every=True).keys()
            return sum(any(s in all_names for s in weights.spellings(name, config)) for name in names)

        return max(self, self.module, key=known)

    def base_prefix(self, task: str) -> str:
        """What `@` stands for: the prefix with its dot, or nothing for a base model saved by itself."""
        prefix = self.prefix.get(task, self.prefix[""])
        return "" if task == "base" or not prefix else prefix + "."

    def repeats(self, config: Any, *, every: bool = False) -> dict[str, str]:
        """Name on disk -> path of the leaf that it repeats; PyTorch has such tensors, `save` does not write them.

        Args:
            config: the config.
            every: also those that only models of other tasks have.
        """
        has_head = every or (config.task in schema.LM_TASKS and config.repeats_head)
        tied = self.tied if config.tie_word_embeddings and has_head else {}
        rules = (dataclasses.replace(rule, tasks=None) if every else rule for rule in self.shared)
        prefix = self.base_prefix(config.task)
        return {**tied, **{r.name.replace("@", prefix): r.leaves[0] for r in rules if r.applies(config)}}

    def leaves(self, config: Any, *, optional: bool = False) -> list[str]:
        """The paths, in stacked form, of the leaves that a model with this config must (or, `optional`, may) have."""
        rules = [r for r in self.rules if r.applies(config) and r.optional == optional]
        return list(dict.fromkeys(leaf for rule in rules for leaf in rule.leaves))

    def buffers(self, config: Any) -> frozenset[str]:
        """The names that PyTorch's module has as buffers."""
        return frozenset(name for name, place in self.places(config).items() if place.rule.buffer)

    def places(self, config: Any) -> dict[str, Place]:
        """Name on disk -> its place, for every tensor of a model with this config."""
        return self._places([rule for rule in self.rules if rule.applies(config)], config)

    def places_of_other_tasks(self, config: Any) -> dict[str, Place]:
        """As `places`, for the tensors that only models of other tasks have."""
        rules = [r for r in self.rules if r.tasks is not None and config.task not in r.tasks]
        return self._places(rules, config)

    def sources(self, config: Any, has: Callable[[str], bool]) -> dict[str, tuple[Place, dict[str, str]]]:
        """Name on disk -> its place and, for each leaf of its rule, the leaf (stacked form) that is written there.

        Args:
            config: the config.
            has: whether the tree has a leaf outside of the layers; optional tensors that it lacks are left out.
        """
        found: dict[str, tuple[Place, dict[str, str]]] = {}
        for name, place in self.places(config).items():
            rule = place.rule
            leaves = {p: p if not rule.optional or has(p) else self.stand_ins.get(p) for p in rule.leaves}
            if all(leaves.values()):
                found[name] = (place, {p: q for p, q in leaves.items() if q is not None})
        return found

    def _places(self, rules: Iterable[Rule], config: Any) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for rule in rules:
            prefix = self.base_prefix(config.task)
            name = rule.name.replace("@", prefix)
            if "{l}" not in name:
                places[name] = Place(rule, None)
                continue
            letter = rule.numbered
            for i in schema.layers_of(rule.leaves[0], config):
                at = name.replace("{l}", str(i))
                if i == 0 and rule.first is not None:
                    at = rule.first.replace("@", prefix)
                numbers = range(schema.sizes(config, rule.leaves[0], i)[letter]) if letter else [None]
                places.update({at.replace(f"{{{letter}}}", str(j)): Place(rule, i, j) for j in numbers})
        return places

    def spellings(self, name: str, config: Any) -> list[str]:
        """The names that `name` may stand for: itself, its modern form, each with the base prefix put on or off."""
        modern = _with_end(name, self.renames)
        prefix = self.base_prefix(config.task)
        found = [name, modern]
        for one in (name, modern):
            found += [one.removeprefix(f"{p}.") for p in self.prefix.values() if one.startswith(f"{p}.")]
        return list(dict.fromkeys([*found, *(prefix + one for one in found)]))

    def are_old(self, names: Iterable[str]) -> bool:
        """Whether some of the names are spelled as in old files."""
        return any(_with_end(name, self.renames) != name for name in names)

    def old_name(self, name: str) -> str:
        """How old files spell a name."""
        return _with_end(name, {new: old for old, new in self.renames.items()})

    def is_ignored(self, name: str, config: Any) -> bool:
        """True for the buffers that old checkpoints carry and nothing reads."""
        patterns = (pattern.replace("{l}", str(config.num_layers)) for pattern in self.ignored)
        return any(re.search(pattern, name) for pattern in patterns)


def _with_end(name: str, ends: Mapping[str, str]) -> str:
    """The name with another end, if it has one of these."""
    return next((name.removesuffix(end) + other for end, other in ends.items() if name.endswith(end)), name)
