"""Which tensors an adapter of PEFT has, by the names of its files, and what each is to a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmodels import layout, schema, tree
from fmodels.adapter_config import AdapterConfig
from fmodels.arrays import plain
from fmodels.models import Config, family
from fmodels.types import Params
from fmodels.weights import rules
from fmodels.weights.rules import Place, Weights

PREFIX = "base_model.model."
"""What PEFT puts before PyTorch's names."""
LINEAR = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
TABLE = {"a": ".lora_embedding_A", "b": ".lora_embedding_B", "magnitude": LINEAR["magnitude"]}
"""Ends of the names of the tensors that belong to an adapted module, matrix or table."""
OPTIONAL = {"bias": "lora_bias", "magnitude": "use_dora"}
"""Part of an adapted module -> the option with which an adapter has it."""
ROWS = ".token_adapter"
"""What comes between the name of a table and those of the rows that belong to the adapter."""

OWN_TABLES = ("embed_positions", "rel_embeddings")
"""Ends of the names of tables that transformers reads in ways of its own, which PEFT's adapters of tables do not know: from
position 2 on (OPT, BART), as a whole (DeBERTa)."""


class Role(NamedTuple):
    """What a tensor of an adapter is.

    Attributes:
        part: `"a"`, `"b"`, `"bias"` or `"magnitude"` of an adapted module; `"whole"` for a tensor in place of the model's; `"rows"`
            for some of its rows; `"base"` for what is the model's own; `"copy"` of another of the adapter, transposed;
            `"unused"`.
        name: PyTorch's name of the model's tensor; of a copy, the other's name.
        module: the name by which ranks and scales are found.
        required: whether each such adapter has it.
        table: whether the tensor is a table of embeddings, of which PEFT stores the factors transposed.
    """

    part: str
    name: str
    module: str
    required: bool = True
    table: bool = False


class Model(NamedTuple):
    """PyTorch's names of a model.

    Attributes:
        places: name -> place.
        tied: name -> the leaf that it repeats.
        modules: module -> `"linear"`, `"head"` of the language model, `"table"`, or `"other"`.
        embedding: the module of the token table.
    """

    places: dict[str, Place]
    tied: dict[str, str]
    modules: dict[str, str]
    embedding: str


def model(config: Config) -> Model:
    """The names of a model's tensors and modules in PyTorch."""
    weights = family(config).weights.of_module
    places, tied = weights.places(config), weights.repeats(config)
    modules: dict[str, str] = {}
    embedding = ""
    for name, (path, *_) in layout.disk_names(config, tied=True, module=True).items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, "other")
        if kind == "weight":
            modules[module] = _kind(schema.stacked_path(path), module, weights)
            embedding = embedding or (module if path == "embed.tokens" else "")
    return Model(places, tied, modules, embedding)


class Base:
    """The tensors of a model by PyTorch's names, one at a time."""

    def __init__(self, params: Params, config: Config):
        self.flat, self.stacked, self.config = tree.flatten(params), tree.is_stacked(params), config
        names = model(config)
        self.places = names.places
        self.same = {
            name: next(n for n, p in names.places.items() if p.rule.leaf == leaf) for name, leaf in names.tied.items()
        }

    def place(self, name: str) -> Place:
        return self.places[self.same.get(name, name)]

    def has(self, name: str) -> bool:
        """Whether the tree has it; optional tensors may be missing."""
        place = self.place(name)
        return not place.rule.optional or all(p in self.flat for p in place.leaves(stacked=self.stacked).values())

    def tensor(self, name: str) -> Any:
        """As it lies on disk."""
        place = self.place(name)
        where = place.leaves(stacked=self.stacked)
        leaves = {path: place.part(plain(self.flat[where[path]]), stacked=self.stacked) for path in place.rule.leaves}
        return rules.to_disk(place.rule, leaves, jnp.concatenate)

    def matrix(self, name: str) -> Any:
        """With its outputs first."""
        return rules.outputs_first(self.place(name).rule, self.tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of `matrix`."""
        place = self.place(name)
        shape = rules.disk_shape(place.rule, place.sizes(self.config))
        return rules.outputs_first(place.rule, np.broadcast_to(np.zeros((), np.int8), shape)).shape


def _kind(path: str, module: str, weights: Weights) -> str:
    if f"{module}.weight" in weights.tied or path == "lm_head.weight":
        return "head"
    line = schema.line(path)
    if line in schema.TABLES:
        return "other" if module.endswith(OWN_TABLES) else "table"
    matrix = line.endswith(".weight") and "y" not in schema.axes(line) and "x" not in schema.axes(line)
    return "linear" if matrix else "other"


def roles(config: Config, adapter: AdapterConfig) -> dict[str, Role]:
    """Name in PEFT's files -> what the tensor is, for all tensors that an adapter of a model may have.

    Raises:
        ValueError: modules that cannot be adapted, all listed.
    """
    names = model(config)
    problems: list[str] = []
    targets = adapter.targets(names.modules)
    options = {part: bool(getattr(adapter, option)) for part, option in OPTIONAL.items()}
    found: dict[str, Role] = {}
    for module in targets:
        name, kind = f"{module}.weight", names.modules[module]
        tied, copies = _tied(names, name), _copies(names, adapter, module)
        if kind == "other":
            problems.append(f"{module!r} is neither a matrix nor a table of embeddings that PEFT can adapt")
        elif kind == "table" and options["bias"]:
            problems.append(f"{OPTIONAL['bias']} for {module!r}, a table of embeddings, is not supported")
        elif tied and not copies:
            other = "gives the two other factors" if adapter.ties_factors else "adapts one of them"
            problems.append(f"{module!r} is tied to {', '.join(map(repr, tied))}, and PEFT {other}")
        else:
            ends = TABLE if kind == "table" else LINEAR
            for part, end in ends.items():
                if options.get(part, True):
                    found[module + end] = Role(part, name, module, table=kind == "table")
            found[f"{module}.base_layer.weight"] = Role("base", name, module, required=False)
            found |= copies
    found |= _parameters(names, adapter, problems)
    saved = adapter.saved({name.rpartition(".")[0] for name in (*names.places, *names.tied)})
    tokens = adapter.tokens(names.modules, names.embedding)
    for name in (*names.places, *names.tied):
        module, _, kind = name.rpartition(".")
        if module in saved:
            found[name] = Role("whole", name, module)
            found[f"{module}.original_module.{kind}"] = Role("unused", name, module, required=False)
            if tied := _tied(names, name):
                problems.append(
                    f"{module!r} is tied to {', '.join(map(repr, tied))}, and in PEFT the adapter's own is not"
                )
        elif kind == "bias" and (adapter.bias == "all" or (adapter.bias == "lora_only" and module in targets)):
            at = f"{module}.base_layer" if module in targets else module
            found[f"{at}.bias"] = Role("whole", name, module, required=name not in names.tied)
        elif names.modules.get(module) in ("table", "head"):  # saved where the vocabulary was resized
            for at in ("", ".base_layer", f"{ROWS}.base_layer"):
                found.setdefault(f"{module}{at}.{kind}", Role("base", name, module, required=False))
    for module in tokens:
        if f"{module}.weight" in names.tied and names.embedding in tokens and tokens[module] != tokens[names.embedding]:
            problems.append(f"{module!r} is tied to {names.embedding!r} and has other trainable_token_indices")
        elif f"{module}.weight" in names.places:
            found[f"{module}{ROWS}.trainable_tokens_delta"] = Role("rows", f"{module}.weight", module)
        elif names.embedding not in tokens:
            problems.append(f"{module!r} is tied to {names.embedding!r}, whose trainable_token_indices are not given")
    if problems:
        raise ValueError(
            f"add_adapter: {len(problems)} modules of {config.model_type} cannot be adapted:\n  "
            + "\n  ".join(problems)
            + "\nA tied head is given a table of its own by `params, config = fm.untie(params, config)`."
        )
    return {PREFIX + name: role for name, role in found.items()}


def _tied(names: Model, name: str) -> list[str]:
    """The modules whose tensors are the same as this."""
    leaf = names.tied.get(name) or (names.places[name].rule.leaf if name in names.places else None)
    others = [other for other, path in names.tied.items() if path == leaf]
    others += [other for other, place in names.places.items() if others and place.rule.leaf == leaf]
    return [other.rpartition(".")[0] for other in others if other != name]


def _copies(names: Model, adapter: AdapterConfig, module: str) -> dict[str, Role]:
    """The roles of a table's factors in the tied head, with `ensure_weight_tying`; nothing where PEFT's head is not the same.

    Source: PEFT's `LoraModel._create_and_replace`. DoRA has the lengths of rows in the head, and of columns in the table.
    """
    heads = _tied(names, f"{module}.weight") if module == names.embedding and adapter.ties_factors else []
    same = all(names.modules[head] == "head" and adapter.scale(head) == adapter.scale(module) for head in heads)
    if adapter.use_dora or not same:
        return {}
    pairs = {LINEAR["a"]: TABLE["b"], LINEAR["b"]: TABLE["a"]}
    return {
        head + end: Role("copy", module + other, module, required=False)
        for head in heads
        for end, other in pairs.items()
    }


def _parameters(names: Model, adapter: AdapterConfig, problems: list[str]) -> dict[str, Role]:
    """The roles of factors of `target_parameters`: of a module's several, the last one's are outermost.

    Source: PEFT's `_inject_parameters` and `ParamWrapper`.
    """
    wanted = adapter.target_parameters or ()
    modules: dict[str, list[str]] = {}
    for name in names.places:
        if name in wanted or any(name.endswith(f".{end}") for end in wanted):
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    if modules and (adapter.use_dora or adapter.lora_bias or adapter.fan_in_fan_out):
        problems.append("use_dora, lora_bias and fan_in_fan_out are not for target_parameters")
    found: dict[str, Role] = {}
    for module, inner in modules.items():
        for depth, name in enumerate(reversed(inner)):
            for part in ("a", "b"):
                at = module + ".base_layer" * depth + LINEAR[part]
                found[at] = Role(part, name, name)
    return found
