"""The variables of transformers' TensorFlow classes, which live in `tf_model.h5` and in safetensors of format `tf`.

A variable is called `tf_bert_for_masked_lm/bert/encoder/layer_._0/output/dense/kernel:0`: the class, the path of its layer,
and what it is. Names follow from the family's rules: a leaf is a table (`embeddings`), the scale of a layer norm (`gamma`),
of another norm (`weight`), its bias (`beta`), or an affine map (`kernel`, all axes reversed); what does not follow is the
family's `TensorFlow`.
Source: transformers 4.57.6, `modeling_tf_pytorch_utils` and the classes themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fmodels import schema
from fmodels.models import Config, family
from fmodels.weights import Tensor
from fmodels.weights.rules import Place, TensorFlow, Weights
from fmodels.weights.tensors import listing


class Variable(NamedTuple):
    """What a variable is.

    Attributes:
        name: of the tensor in PyTorch's files.
        reverse: whether its axes are those of PyTorch's in reverse.
        lift: whether it has an axis of size 1 before PyTorch's.
    """

    name: str
    reverse: bool
    lift: bool


def read(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors of variables under the names, and with the axes, of PyTorch's files; names that are not known stay.

    Args:
        tensors: by the variables' names, with the part of the model or, as in shards and safetensors, without.
        config: of the model.

    Returns:
        Lazy tensors.

    Example:
        >>> import fmodels as fm, numpy as np
        >>> config = fm.models.gpt2.Config()
        >>> tensor = Tensor.lazy("", np.float32, (1, 2304), lambda: np.zeros((1, 2304), np.float32))
        >>> {name: x.shape for name, x in read({"gpt2/transformer/h_._0/attn/c_attn/bias:0": tensor}, config).items()}
        {'h.0.attn.c_attn.bias': (2304,)}
    """
    about = family(config).weights.tensorflow or TensorFlow()
    known = {_plain(name): variable for name, variable in _variables(config, every=True).items()}
    unread = {_plain(name): _plain(copied) for name, copied in about.unread.items()}
    found: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removesuffix(":0")
        spellings = [_plain(short), _plain(short.partition("/")[2])]
        if (copied := next((unread[s] for s in spellings if s in unread), None)) is not None:
            copies[known[copied].name] = to_torch(tensor, known[copied])
            continue
        variable = next((known[s] for s in spellings if s in known), None)
        if variable is None or variable.name in found:
            found[name] = tensor
        else:
            found[variable.name] = to_torch(tensor, variable)
    found = copies | found  # a copy counts where the variable itself is not there
    for head, source in _tied(config).items():
        if about.head == "always" and head in found and source in found and config.tie_word_embeddings:
            found[source] = _compared(found[source], found.pop(head), head)
    return found


def write(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `read`, under the names that the variables of transformers' class have.

    They come in the order of PyTorch's modules, which is not always that of the class; transformers reads them by name.

    Args:
        tensors: by the names of PyTorch's files.
        config: of the model.

    Raises:
        ValueError: transformers has no such class, or the class has no variable for a tensor.

    Example:
        >>> import fmodels as fm, numpy as np
        >>> config = fm.models.gpt2.Config()
        >>> tensor = Tensor.lazy("", np.float32, (50257, 768), lambda: np.zeros((50257, 768), np.float32))
        >>> list(write({"wte.weight": tensor}, config))
        ['tfgpt2_model/transformer/wte/embeddings:0']
    """
    about, weights = _about(config), family(config).weights
    variables, places, tied = _variables(config), weights.places(config), _tied(config)
    own = {next((s for s in weights.spellings(name, config) if s in places), name): name for name in tensors}
    found: dict[str, Tensor] = {}
    for name, variable in variables.items():
        source = variable.name if variable.name in own else tied.get(variable.name)
        if source in own:
            found[name] = from_torch(tensors[own[source]], variable)
    placed = {variable.name for variable in variables.values()} | set(weights.repeats(config))
    if unplaced := [name for name in own if name not in placed and not weights.is_ignored(name, config)]:
        raise ValueError(
            f"save: transformers' {_class(config)} has no variables for {len(unplaced)} tensors: {listing(unplaced)}; "
            "use another format"
        )
    found |= {name: found[copied] for name, copied in about.unread.items() if copied in found}
    return {_full(name, config): tensor for name, tensor in found.items()}


def metadata(config: Config, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """For `tf_model.h5`: the layers of the model, with the names of the variables that each holds; some hold the same.

    Args:
        config: of the model.
        given: metadata of such a file, of which all else is kept.
    """
    about = _about(config)
    names = [*_variables(config)]
    names += [name for name, copied in about.unread.items() if copied in names]
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(re.split(r"[/.]", name)[0], []).append(name)
    for layer in layers.keys() & about.holds.keys():
        layers[layer] += [name for name in names if re.search(about.holds[layer], name) and name not in layers[layer]]
    full = {layer: [_full(name, config) for name in members] for layer, members in layers.items()}
    full |= {layer: [] for task, layer in about.bare.items() if task == config.task}
    return {**(given or {}), "layers": full}


def _about(config: Config) -> TensorFlow:
    about = family(config).weights.tensorflow
    if about is None or config.task in about.without:
        raise ValueError(
            f"save: transformers had no class {_class(config)}, whose variables a TensorFlow file has; use another format"
        )
    return about


def _class(config: Config) -> str:
    return "TF" + config.ARCHITECTURES[config.task]


def _variables(config: Config, *, every: bool = False) -> dict[str, Variable]:
    """Name without the model's part -> what the variable is, in the order of the rules, layer by layer.

    Args:
        config: of the model.
        every: also those that only models of other tasks have.
    """
    weights = family(config).weights
    about = weights.tensorflow or TensorFlow()
    places = weights.places(config)
    places = weights.places_of_other_tasks(config) | places if every else places
    starts: dict[str, int] = {}  # part of the model -> the place of its first layer

    def order(item: tuple[int, tuple[str, Place]]) -> tuple[int, int]:
        number, (_, place) = item
        if place.layer is None:
            return number, 0
        return starts.setdefault(schema.stack(place.rule.leaves[0]), number), place.layer

    variables: dict[str, Variable] = {}
    for _, (name, place) in sorted(enumerate(places.items()), key=order):
        if place.rule.leaves[0] != "lm_head.weight" or about.head != "never":
            own, variable = _variable(name, place, weights, about)
            variables[own] = variable
    if about.head == "always" and config.task in schema.LM_TASKS:
        for name in weights.tied:
            own = f"{name.removesuffix('.weight').replace('.', '/')}/kernel"
            variables[own] = Variable(name, reverse=True, lift=False)
    return variables


def _variable(name: str, place: Place, weights: Weights, about: TensorFlow) -> tuple[str, Variable]:
    """The variable's name without the model's part, and what it is."""
    rule = place.rule
    prefix = weights.prefix[""]
    path = rule.name.replace("@", prefix and f"{prefix}.").replace("{l}", str(place.layer))
    *parts, last = re.split(r"\.(?!\d)", path)
    parts = [part if part.startswith("layers.") else re.sub(r"\.(\d+)$", r"_._\1", part) for part in parts]
    flat = about.conv1d is not None and re.search(about.conv1d, "/".join(parts)) is not None
    leaf, _, kind = rule.leaves[0].rpartition(".")
    biased = any(f"{leaf}.bias" in other.leaves for other in weights.rules)
    if last == "weight" and kind == "scale":
        last = "gamma" if biased else "weight"
    elif last == "weight" and kind == "weight":
        last = "weight" if flat else "kernel"
    elif last == "weight":
        last = about.tokens if kind == "tokens" else "embeddings"
    elif last == "bias" and leaf.endswith("norm"):
        last = "beta"
    own = "/".join([*parts, last])
    for pattern, replacement in about.names.items():
        own = re.sub(pattern, replacement, own)
    return own, Variable(name, last == "kernel", flat and last == "bias")


def _tied(config: Config) -> dict[str, str]:
    """PyTorch's name of a tensor that repeats another, if its head is tied -> that of the other."""
    weights = family(config).weights
    leaves = {place.rule.leaves[0]: name for name, place in weights.places(config).items() if place.layer is None}
    return {name: leaves[leaf] for name, leaf in {**weights.tied, **weights.repeats(config)}.items() if leaf in leaves}


def _compared(tensor: Tensor, head: Tensor, name: str) -> Tensor:
    """The tensor, of which the head must be a copy when it is asked for."""

    def get() -> np.ndarray:
        array = tensor.array()
        if not np.array_equal(array, head.array()):
            raise ValueError(
                f"load: {name!r} differs from the table of tokens, to which config.json ties it; TensorFlow's class has both: "
                "set tie_word_embeddings to false in config.json"
            )
        return array

    return Tensor.lazy(tensor.name, tensor.dtype, tensor.shape, get)


def _plain(name: str) -> str:
    """The name in the one spelling under which it is looked up: without the marks of heads, tables always alike."""
    name = re.sub(r"(^|/)[^/]*___", r"\1", name)
    return re.sub(r"[/.]weight$", "/embeddings", name)


def _full(name: str, config: Config) -> str:
    """The name with the model's part, and the number of the output, as TensorFlow has it."""
    first, _, rest = name.partition("/")
    if not rest:
        return f"{name}:0"
    return f"{first if first in _about(config).outside else _scope(_class(config))}/{name}:0"


@functools.cache
def _scope(class_name: str) -> str:
    """What Keras calls a model of that class.

    Example:
        >>> _scope("TFBertForMaskedLM"), _scope("TFGPT2LMHeadModel")
        ('tf_bert_for_masked_lm', 'tfgpt2lm_head_model')
    """
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", class_name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def to_torch(tensor: Tensor, variable: Variable) -> Tensor:
    """PyTorch's tensor of a variable's, lazily."""
    lifted = variable.lift and len(tensor.shape) == 2 and tensor.shape[0] == 1
    return _view(tensor, variable.name, tensor.shape[lifted:], variable.reverse)


def from_torch(tensor: Tensor, variable: Variable) -> Tensor:
    """The inverse of `to_torch`."""
    return _view(tensor, variable.name, (1,) * variable.lift + tensor.shape, variable.reverse)


def _view(tensor: Tensor, name: str, shape: tuple[int, ...], reverse: bool) -> Tensor:
    """The tensor with another shape, then perhaps with its axes in reverse; where it lies in a file, it stays there."""
    if reverse:
        return Tensor.lazy(name, tensor.dtype, shape[::-1], lambda: tensor.array().reshape(shape).T)
    if tensor.file is not None:
        return Tensor.in_file(name, tensor.dtype, shape, tensor.file, tensor.offset)
    return Tensor.lazy(name, tensor.dtype, shape, lambda: tensor.array().reshape(shape))
