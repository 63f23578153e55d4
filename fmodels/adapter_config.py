"""What `adapter_config.json` says: which modules of a model are adapted, and how."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

IRRELEVANT = frozenset(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout megatron_core
    qalora_group_size runtime_config eva_config merge_weights""".split()
)
"""Keys that change no number that a trained adapter computes; they are kept and written back."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_lora": (None,),
    "megatron_config": (None,),
    "loftq_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "arrow_config": (None, {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None, []),
}
"""Keys that would change the numbers, with the values at which they do not."""

ALL_LINEAR = "all-linear"

BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter's config, with PEFT's names: which modules are adapted, and how.

    Attributes:
        r: the rank.
        lora_alpha: what is added is scaled by `lora_alpha / r`.
        target_modules: names of modules, or ends of names such as `"q_proj"`; a regular expression for whole names; or
            `"all-linear"` for all matrices but the head.
        exclude_modules: names, ends of names or a regular expression of modules that are not adapted.
        target_parameters: names, or ends of names, of tensors that are no module's `weight`, as those of experts.
        rank_pattern: pairs of a regular expression for an end of a module's name, and its rank.
        alpha_pattern: pairs likewise, for `lora_alpha`.
        layers_to_transform: the numbers of the layers that are adapted; all if None.
        layers_pattern: the name of the list of layers, where the first number in a module's name is not its layer's.
        use_rslora: what is added is scaled by `lora_alpha / √r`.
        use_dora: the lengths of rows are apart from their directions; of tables of embeddings those of columns.
        lora_bias: whether the second factor has a bias, which is scaled and added with the product.
        fan_in_fan_out: whether PyTorch's matrices have their inputs first, as GPT-2's; the tensors of an adapter do not
            depend on it.
        bias: which biases are the adapter's own: `"none"`, `"all"`, or `"lora_only"` for those of adapted modules.
        modules_to_save: names of modules that the adapter has whole, or ends of them, even in the middle of a word.
        trainable_token_indices: numbers of tokens whose embeddings are the adapter's own; or pairs of a module's name and
            such numbers.
        init_lora_weights: how a new adapter begins: True, `"gaussian"`, or False for one that changes the model. Trained ones
            may have begun otherwise.
        ensure_weight_tying: whether tied modules have one adapter; of `target_modules`, `embed_tokens` and `lm_head` alone.
        data: the keys of the file as JSON, for writing them back.

    Source: PEFT's `LoraConfig`.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[Any, ...] | None = None
    init_lora_weights: bool | str = True
    ensure_weight_tying: bool = False
    data: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # lists and dicts of users become what can be hashed
            object.__setattr__(self, field.name, _freeze(getattr(self, field.name)))
        kinds = [(f.name, getattr(self, f.name), KINDS[f.name]) for f in dataclasses.fields(self) if f.name in KINDS]
        problems = [f"{name}={value!r} is not {what}" for name, value, (what, check) in kinds if not check(value)]
        if problems:
            raise ValueError(f"AdapterConfig: {'; '.join(problems)}")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias={self.bias!r} is not one of 'none', 'all', 'lora_only'")
        if not isinstance(self.init_lora_weights, bool | str) or self.init_lora_weights not in BEGINNINGS:
            problems.append(
                f"init_lora_weights={self.init_lora_weights!r} is not supported, only {', '.join(map(repr, BEGINNINGS))}; with "
                "others PEFT changes the base model (path_initial_model_for_weight_conversion gives an adapter of the old one)"
            )
        if self.lora_bias and (self.use_dora or self.init_lora_weights not in (True, False)):
            problems.append("lora_bias=True is neither for use_dora nor for init_lora_weights but True and False")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            problems.append("layers_to_transform is for a list of target_modules")
        for pattern in self._patterns():
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(f"{pattern!r} is not a regular expression: {error}")
        if problems:
            raise ValueError(f"AdapterConfig: {'; '.join(problems)}")

    def _patterns(self) -> list[str]:
        wholes = [self.target_modules, self.exclude_modules]
        found = [pattern for pattern in wholes if isinstance(pattern, str)]
        found += [pattern for pattern, _ in (*self.rank_pattern, *self.alpha_pattern)]
        return [*found, *(self.modules_to_save or ()), *_several(self.layers_pattern)]

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> Self:
        """Reads an adapter_config.json.

        Raises:
            ValueError: a key is not understood, or has a value that is not supported; all are listed.
        """
        if (kind := data.get("peft_type")) != "LORA":
            raise ValueError(
                f"load_adapter: peft_type={kind!r} is not supported, only 'LORA'; if PEFT's merge_and_unload can put the adapter "
                "into the model, save that and load it"
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"data"}
        problems = []
        for key, value in data.items():
            if key in NEUTRAL and value not in NEUTRAL[key]:
                problems.append(f"{key}={value!r} is not supported, only {' or '.join(map(repr, NEUTRAL[key]))}")
            elif key not in {*names, *IRRELEVANT, *NEUTRAL, "peft_type"}:
                problems.append(f"unknown key {key!r} (value {value!r})")
        if problems:
            raise ValueError(
                f"load_adapter: adapter_config.json has {len(problems)} entries that would change the numbers or that are not "
                "understood:\n  " + "\n  ".join(problems)
            )
        fields: dict[str, Any] = {
            key: value for key, value in data.items() if key in names and not (value is None and key in DEFAULTS)
        }
        return cls(**fields, data=tuple((key, json.dumps(value)) for key, value in data.items()))

    def to_peft(self) -> dict[str, Any]:
        """The adapter_config.json that `from_peft` reads back to an equal config."""
        data = {key: json.loads(value) for key, value in self.data} or {"peft_type": "LORA", "task_type": None}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "data" or (field.name in data and _freeze(data[field.name]) == value):
                continue
            if self.data and field.name not in data and value == field.default:
                continue
            data[field.name] = _thaw(field.name, value)
        return data

    def scale(self, name: str) -> float:
        """What the product of the factors of a module, or a parameter, is multiplied with."""
        alpha = _by_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(self.rank(name)) if self.use_rslora else self.rank(name))

    def rank(self, name: str) -> int:
        """The rank of a module or parameter."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def targets(self, modules: Mapping[str, str]) -> list[str]:
        """The modules that are adapted.

        Args:
            modules: module -> `"linear"`, `"head"`, `"table"` or `"other"`.

        Source: PEFT's `check_target_module_exists` and `_maybe_include_all_linear_layers`.
        """
        found = [name for name in modules if not self._is_excluded(name)]
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            last = None
            if "head" not in modules.values() and self.task_type == "SEQ_CLS":
                last = next((name for name in ("score", "classifier") if name in modules), None)
            return [name for name in found if modules[name] == "linear" and name != last]
        if isinstance(self.target_modules, str):
            return [name for name in found if re.fullmatch(self.target_modules, name)]
        wanted = self.target_modules or ()
        return [n for n in found if n in wanted or (_ends(n, wanted) and self._is_in_layers(n))]

    @property
    def ties_factors(self) -> bool:
        """Whether a head that is tied to the adapted table of tokens has the table's factors.

        Source: PEFT's `_check_tied_modules`, which knows no other names of the two.
        """
        names, wanted = ("embed_tokens", "lm_head"), self.target_modules or ()
        if isinstance(wanted, str):
            return self.ensure_weight_tying and any(re.fullmatch(wanted, name) for name in names)
        return self.ensure_weight_tying and any(name.rpartition(".")[2] in names for name in wanted)

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task, as the file says."""
        return json.loads(dict(self.data).get("task_type", "null"))

    def saved(self, modules: Iterable[str]) -> list[str]:
        """The modules that the adapter has whole, or that lie in such a one.

        Source: PEFT's `_set_trainable`, for which `"input_layernorm"` ends with `"norm"`.
        """
        ends = self.modules_to_save or ()
        return [
            m
            for m in modules
            if any(stem.endswith(ends) for stem in itertools.accumulate(m.split("."), "{}.{}".format))
        ]

    def _is_excluded(self, name: str) -> bool:
        if isinstance(self.exclude_modules, str):
            excluded = bool(self.exclude_modules) and re.fullmatch(self.exclude_modules, name) is not None
        else:
            excluded = _ends(name, self.exclude_modules or ())
        return excluded or any(_is_inside(name, saved) for saved in self.modules_to_save or ())

    def _is_in_layers(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = [p for p in _several(self.layers_pattern) if p]
        regexes = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next((m for m in (re.match(regex, name) for regex in regexes) if m), None)
        return match is not None and int(match["idx"]) in (layers if isinstance(layers, tuple) else (layers,))

    def tokens(self, modules: Mapping[str, str], embedding: str) -> dict[str, tuple[int, ...]]:
        """Module -> the tokens whose rows are the adapter's own.

        Args:
            modules: as for `targets`.
            embedding: the module of the token table.
        """
        indices = self.trainable_token_indices
        if indices is None:
            return {}
        if all(isinstance(index, int) for index in indices):
            return {embedding: indices}
        return {m: tuple(numbers) for name, numbers in indices for m in modules if m == name or m.endswith(f".{name}")}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _pair(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) == 2 and _is_text(value[0]) and check(value[1])


def _any(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(check(value) for check in checks)


TEXTS = ("a text, a list of texts or null", _any(_is_text, _all(_is_text)))
FLAG = ("true or false", lambda value: isinstance(value, bool))
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "target_modules": TEXTS,
    "exclude_modules": TEXTS,
    "target_parameters": ("a list of texts or null", _any(_all(_is_text))),
    "rank_pattern": ("a mapping to positive integers", _all(_pair(_is_rank))),
    "alpha_pattern": ("a mapping to numbers", _all(_pair(_is_number))),
    "layers_to_transform": ("an integer, a list of integers or null", _any(_is_count, _all(_is_count))),
    "layers_pattern": TEXTS,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "modules_to_save": ("a list of texts or null", _any(_all(_is_text))),
    "trainable_token_indices": (
        "a list of integers, a mapping to such lists or null",
        _any(_all(_is_count), _all(_pair(_all(_is_count)))),
    ),
    "ensure_weight_tying": FLAG,
}
"""Field -> what its value is, in words and as a check."""

DEFAULTS = frozenset(field.name for field in dataclasses.fields(AdapterConfig) if field.default is not None)
"""Fields in which null stands for the default."""


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_inside(name: str, module: str) -> bool:
    """Whether a module is that of `modules_to_save`, or inside of it."""
    return re.match(rf"(^|.*\.){module}($|\..*)", name) is not None


def _by_pattern(patterns: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
    """Source: PEFT's `get_pattern_key`."""
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _several(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _freeze(item)) for key, item in value.items())
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple | set | frozenset) else value


def _thaw(name: str, value: Any) -> Any:
    """The JSON of a field."""
    pairs = isinstance(value, tuple) and all(isinstance(item, tuple) for item in value)
    if name in ("rank_pattern", "alpha_pattern") or (name == "trainable_token_indices" and value and pairs):
        return {key: list(item) if isinstance(item, tuple) else item for key, item in value}
    return list(value) if isinstance(value, tuple) else value
