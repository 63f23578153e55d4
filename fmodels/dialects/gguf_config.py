"""The metadata of a GGUF file, and our config.

A config goes into a file only if what is read back from there computes the same numbers; what llama.cpp has built in
(activations, which layers have a window, …) is the family's default or stated in its file as `Gguf`.

Source: gguf-py/gguf/constants.py, conversion/*.py and src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmodels.dialects.gguf_names import names, of_family, parts_of
from fmodels.dialects.gguf_rope import (
    FACTORS,
    LONG,
    SHORT,
    attention_factor,
    factor_tensors,
    factors_of,
    from_factors,
    plain,
    rope_meaning,
    rope_values,
    same,
)
from fmodels.generation.config import GenerationConfig
from fmodels.models import FAMILIES, Config, family
from fmodels.nn.positions import Rope
from fmodels.weights import Tensor
from fmodels.weights.tensors import brief

SIZES = {
    "max_positions": "context_length",
    "hidden_size": "embedding_length",
    "num_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
}
"""Field -> key that every file has."""

TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""The tokens that end a text, for llama.cpp."""

IRRELEVANT = ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size", "pooling_type")
"""Keys that change no number."""

DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (8.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.alpha": (0.0,),
    "use_parallel_residual": (True, False),
}
"""Keys that would change the numbers, with the values at which they do not, where nothing else reads them."""

FREE = frozenset(
    """task initializer_range num_labels labels router_aux_loss_coef summary_type summary_activation multi_query
    rope local_rope sliding_window layer_types use_sliding_window max_window_layers period no_rope_layers
    no_rope_layer_interval""".split()
)
"""Fields that change no number of a language model, or whose meaning `kinds` has."""


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], *, task: str | None = None) -> Config:
    """The config of the model in a GGUF file.

    Args:
        metadata: as `fmodels.weights.gguf.read` gives them.
        tensors: the file's; which biases and heads there are, and factors of rotary frequencies, is said by them alone.
        task: `"causal-lm"` if None.

    Raises:
        ValueError: another architecture, keys that are missing, or that say what is not supported; all are listed.
    """
    architecture = metadata.get("general.architecture")
    kinds = [family(name).config for name in FAMILIES]
    kinds = [kind for kind in kinds if (own := vars(kind).get("gguf")) and own.architecture == architecture]
    if not kinds:
        known = {own.architecture for name in FAMILIES if (own := vars(family(name).config).get("gguf"))}
        raise ValueError(
            f"load: general.architecture {brief(architecture)} of the GGUF file is not supported; supported are "
            f"{', '.join(sorted(known))}"
        )
    reader = _Reader(metadata, str(architecture), tensors)
    mixed = bool(reader.get("expert_count", 0))
    kind = next((one for one in kinds if ("num_experts" in of_family(one).fields) == mixed), kinds[0])
    fields = reader.fields(kind)
    problems = reader.problems + reader.left()
    if not problems:
        try:
            return kind(**fields, task=task or "causal-lm")
        except ValueError as error:
            problems = [str(error)]
    raise ValueError(
        f"load: the metadata of the GGUF file say {len(problems)} things that are not supported:\n  "
        + "\n  ".join(problems)
    )


class _Reader:
    """Reads the keys of an architecture, and knows which it has read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Tensor]):
        self.metadata, self.prefix, self.tensors = metadata, f"{architecture}.", tensors
        self.names = {*tensors, *(part for name in tensors for part in parts_of(name))}
        self.read: set[str] = set()
        self.problems: list[str] = []
        self.layers = 0

    def get(self, key: str, default: Any = None) -> Any:
        """A value as one of Python's; float32 by its shortest decimals; an array whose values are all the same as that value."""
        self.read.add(key)
        value = self.metadata.get(self.prefix + key)
        if isinstance(value, (list, tuple)):
            self.problems.append(f"{self.prefix}{key} must be one value, got {brief(value)}")
            return default
        if isinstance(value, np.ndarray):
            if key.endswith("pattern") and value.dtype == np.bool_:
                return tuple(value.tolist())
            if len(set(value.ravel().tolist())) != 1:
                self.problems.append(f"{self.prefix}{key} differs between layers, which is not supported")
                return default
            value = value.ravel()[0]
        return default if value is None else plain(value)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.problems.append(f"{self.prefix}{key} must be a positive integer, got {brief(value)}")
            return 1
        return value

    def real(self, key: str, default: float | None = None, *, positive: bool = True) -> float | None:
        value = self.get(key, default)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
            self.problems.append(f"{self.prefix}{key} must be a{' positive' * positive} number, got {brief(value)}")
            return default
        return float(value)

    def has(self, name: str) -> bool:
        return name in self.names or any(f"blk.{i}.{name}" in self.names for i in range(min(self.layers, 1024)))

    def fields(self, kind: type[Config]) -> dict[str, Any]:
        """The fields of the config."""
        own = of_family(kind)
        found: dict[str, Any] = {field: self.size(key) for field, key in SIZES.items()}
        self.layers = found["num_layers"]
        heads, hidden = found["num_heads"], found["hidden_size"]
        found["num_kv_heads"] = self.size("attention.head_count_kv", heads)
        found["head_dim"] = self.size("attention.key_length", max(hidden // heads, 1))
        if self.size("attention.value_length", found["head_dim"]) != found["head_dim"]:
            self.problems.append(f"{self.prefix}attention.value_length is not that of keys, which is not supported")
        if own.square and found["head_dim"] * heads != hidden:
            self.problems.append(
                f"{self.prefix}attention.key_length={found['head_dim']} of {heads} heads must make "
                f"embedding_length={hidden} together, as llama.cpp has them"
            )
        if self.get(_epsilon(kind)) is None:
            self.problems.append(f"{self.prefix}{_epsilon(kind)} is missing")
        found["norm_eps"] = self.real(_epsilon(kind), 1e-6)
        if self.layers > len(self.tensors):
            self.problems.append(f"{self.prefix}block_count={self.layers}, the file has {len(self.tensors)} tensors")
        table = self.tensors.get("token_embd.weight")
        found["vocab_size"] = table.shape[0] if table is not None and table.shape else self.size("vocab_size")
        for field, key in own.fields.items():
            self._field(kind, found, field, key)
        self._check_experts(found)
        shown = {"tie_word_embeddings": "!output.weight", **own.shown}
        found |= {field: self.has(name.lstrip("!")) != name.startswith("!") for field, name in shown.items()}
        for field, value in own.fixed.items():
            found[field] = value(found, self.has) if callable(value) else value
        found |= self._tokens()
        if getattr(kind, "rotary", False) is not False:
            found["rope"] = self._rope(kind, found)
        if getattr(kind, "local_rope", None) is not None:
            found["local_rope"] = Rope(theta=self.real("rope.freq_base_swa", 10000.0) or 10000.0)
        return found

    def _field(self, kind: type[Config], found: dict[str, Any], field: str, key: str) -> None:
        """A field that has a key of its own; one that is left out is the family's default."""
        default = next(one.default for one in dataclasses.fields(kind) if one.name == field)
        value = self.get(key)
        if isinstance(value, tuple):
            found["layer_types"] = tuple("sliding_attention" if local else "full_attention" for local in value)
        elif field == "sliding_window":
            found[field] = self.size(key) if value else None
        elif value is not None:
            found[field] = (
                self.real(key, 1.0, positive=False) if isinstance(default, float) or default is None else value
            )
            if isinstance(default, int) and type(value) is not type(default):
                self.problems.append(f"{self.prefix}{key} must be like {default!r}, got {brief(value)}")

    def _check_experts(self, found: Mapping[str, Any]) -> None:
        """Their number is that of the tensors, before a name is made for each."""
        for name, tensor in self.tensors.items():
            if name.endswith("_exps.weight") and tensor.shape[:1] != (found.get("num_experts", 0),):
                self.problems.append(
                    f"{name!r} has shape {list(tensor.shape)}, expert_count={found.get('num_experts', 0)}"
                )
                return
        if "num_experts" in found and not self.has("ffn_up_exps.weight"):
            self.problems.append(f"{self.prefix}expert_count={found['num_experts']}, the file has no experts")

    def _tokens(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in {*TOKENS.values(), *ENDS}:
            if not isinstance(self.metadata.get(key, np.uint32(0)), np.integer):
                self.problems.append(f"{key} must be the number of a token, got {brief(self.metadata[key])}")
        for field, key in TOKENS.items():
            value = self.metadata.get(key)
            found[field] = int(value) if isinstance(value, np.integer) else None
        ends = [self.metadata.get(key) for key in ENDS]
        ends = tuple(dict.fromkeys(int(end) for end in ends if isinstance(end, np.integer)))
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
        found["generation"] = GenerationConfig.from_hf(
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in found.items()
                if value is not None
            }
        )
        return found

    def _rope(self, kind: type[Config], found: Mapping[str, Any]) -> Rope:
        head, longest = found["head_dim"], found["max_positions"]
        size = self.size("rope.dimension_count", head)
        if size > head or (size != head and not getattr(kind, "partial", False)):
            self.problems.append(f"{self.prefix}rope.dimension_count={size} of head_dim={head} is not supported")
        share = size / head if int(head * (size / head)) == size else (size + 0.5) / head
        common: dict[str, Any] = {"theta": self.real("rope.freq_base", 10000.0), "partial_rotary_factor": share}
        type_, key = self.get("rope.scaling.type"), "rope.scaling.original_context_length"
        factor = self.real("rope.scale_linear", self.real("rope.scaling.factor", positive=False), positive=False)
        original = None if self.get(key) is None else max(self.size(key), 2)
        if LONG in self.tensors and SHORT in self.tensors:
            scale = self.real("rope.scaling.attn_factor", 1.0)
            long, short = (factors_of(self.tensors[name], size // 2) for name in (LONG, SHORT))
            rope = Rope(
                type="longrope",
                short_factor=short,
                long_factor=long,
                original_max_positions=original or longest,
                **common,
            )
            usual = same(attention_factor(rope, longest), scale)
            return rope if usual else dataclasses.replace(rope, attention_factor=scale)
        if FACTORS in self.tensors:
            return from_factors(factors_of(self.tensors[FACTORS], size // 2), original, longest, size, common)
        if type_ in (None, "linear", "none") and factor in (None, 0.0, 1.0):
            return Rope(**common)
        if factor is not None and factor < 0:
            self.problems.append(f"{self.prefix}rope.scaling.factor={factor} must be positive")
        elif type_ in (None, "linear"):
            return Rope(type="linear", factor=factor, **common)
        elif type_ == "yarn":
            fast, slow = (self.real(f"rope.scaling.yarn_beta_{name}") for name in ("fast", "slow"))
            values = {"original_max_positions": original or longest, "beta_fast": fast, "beta_slow": slow}
            return Rope(type="yarn", factor=factor, **values, **common)
        self.problems.append(f"{self.prefix}rope.scaling.type {brief(type_)} with a factor {factor} is not supported")
        return Rope(**common)

    def left(self) -> list[str]:
        """What nothing has read and what is not at its default."""
        found: list[str] = []
        for name, value in self.metadata.items():
            key = name.removeprefix(self.prefix)
            if key == name or key in self.read or key in IRRELEVANT:
                continue
            if key not in DEFAULTS:
                found.append(f"unknown key {name!r} (value {brief(value)})")
            elif isinstance(value, (np.ndarray, list, tuple, str)) or plain(value) not in DEFAULTS[key]:
                found.append(f"{name}={brief(value)} is not supported, only {' or '.join(map(repr, DEFAULTS[key]))}")
        return found


def metadata(config: Config, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The metadata of a GGUF file with this model; what `given` has beside, such as the tokenizer, is kept in its order.

    Args:
        config: of a causal language model.
        given: metadata of a GGUF file, or of a tokenizer. Without a tokenizer in it, `tokenizer.ggml.model` is `"none"`.

    Raises:
        ValueError: llama.cpp would compute other numbers than the config says; all differences are listed.
    """
    own = of_family(type(config))
    if config.task != "causal-lm":
        raise ValueError(
            f"write: GGUF files are written of models with task='causal-lm', this has task={config.task!r}"
        )
    values: dict[str, Any] = {key: getattr(config, field) for field, key in SIZES.items()}
    values |= {
        "vocab_size": config.vocab_size, "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, _epsilon(type(config)): config.norm_eps,
    }  # fmt: skip
    values |= {key: getattr(config, field) for field, key in own.fields.items()}
    values |= rope_values(config)
    found: dict[str, Any] = {"general.architecture": own.architecture}
    found |= {f"{own.architecture}.{key}": _typed(value) for key, value in values.items() if value is not None}
    ends = dict(zip(ENDS, config.eos_token_ids, strict=False))
    tokens = {TOKENS["bos_token_id"]: config.bos_token_id, **ends, TOKENS["pad_token_id"]: config.pad_token_id}
    found |= {key: np.uint32(value) for key, value in tokens.items() if value is not None}
    if differences := _differences(config, found):
        raise ValueError(
            f"write: a GGUF file of architecture {own.architecture!r} cannot say {len(differences)} things of this "
            f"{config.model_type} model:\n  " + "\n  ".join(differences) + "\nSave it in another format."
        )
    kept = {key: value for key, value in (given or {}).items() if not key.startswith(f"{own.architecture}.")}
    # What `given` knows better: where a tokenizer puts a start token, it is its own.
    first = {TOKENS["bos_token_id"]} if kept.get("tokenizer.ggml.add_bos_token") else set()
    return {
        **found,
        "tokenizer.ggml.model": "none",
        **kept,
        **{key: value for key, value in found.items() if key not in kept.keys() & first},
    }


def _differences(config: Config, found: Mapping[str, Any]) -> list[str]:
    """In what the config that is read back computes otherwise."""
    rows = {"token_embd.weight": config.vocab_size}  # of the shapes, what is read
    experts = getattr(config, "num_experts", 1)
    nothing = {n: Tensor.lazy(n, np.float32, (rows.get(n, experts),), lambda: np.zeros(0)) for n in names(config)}
    try:
        back = config_from_gguf(found, {**nothing, **factor_tensors(config)})
    except ValueError as error:
        return [str(error)]
    want, got = _meaning(config), _meaning(back)
    return [
        f"{key}: {brief(value, 200)}, llama.cpp has {brief(got.get(key), 200)}"
        for key, value in want.items()
        if not same(value, got.get(key))
    ]


def _meaning(config: Config) -> dict[str, Any]:
    """What decides on the numbers, in a form that is the same for the same numbers."""
    fields = [one.name for one in dataclasses.fields(config) if one.compare and one.name not in FREE]
    found = {name: getattr(config, name) for name in fields}
    found["eos_token_id"] = config.eos_token_ids
    kinds = getattr(config, "kinds", None)
    if kinds is not None:
        windows = [
            None if kind.window is None or kind.window >= config.max_positions else kind.window for kind in kinds
        ]
        found["windows of the layers"] = tuple(windows)
        found["rotary settings of the layers"] = tuple(
            None if kind.rope is None else rope_meaning(kind.rope, config) for kind in kinds
        )
    return found


def _epsilon(kind: type[Config]) -> str:
    rms = getattr(kind, "norm", "layer").startswith("rms")
    return "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"


def _typed(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.uint32(value)
    return np.float32(value) if isinstance(value, float) else value
