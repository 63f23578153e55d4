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

from fmodels.dialects.gguf_names import names, of_family
from fmodels.generation.config import GenerationConfig
from fmodels.models import FAMILIES, Config, family
from fmodels.models._rope import rotated
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

ROPE_KEYS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_positions",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
"""Key -> field of yarn's `Rope`."""

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
    rope local_rope sliding_window layer_types use_sliding_window max_window_layers sliding_window_pattern no_rope_layers
    no_rope_layer_interval""".split()
)
"""Fields that change no number of a language model, or whose meaning `kinds` has."""

ALIGNMENT = 64  # bytes: what XLA wants of an array that it takes without a copy
LONG, SHORT, FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


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
        self.read: set[str] = set()
        self.problems: list[str] = []
        self.layers = 0

    def get(self, key: str, default: Any = None) -> Any:
        """A value as one of Python's; float32 by its shortest decimals; an array whose values are all the same as that value."""
        self.read.add(key)
        value = self.metadata.get(self.prefix + key)
        if isinstance(value, np.ndarray):
            if key.endswith("pattern") and value.dtype == np.bool_:
                return tuple(value.tolist())
            if len(set(value.tolist())) != 1:
                self.problems.append(f"{self.prefix}{key} differs between layers, which is not supported")
                return default
            value = value[0]
        return default if value is None else _plain(value)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.problems.append(f"{self.prefix}{key} must be a positive integer, got {brief(value)}")
            return 1
        return value

    def real(self, key: str, default: float | None = None) -> float | None:
        value = self.get(key, default)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            self.problems.append(f"{self.prefix}{key} must be a number, got {brief(value)}")
            return default
        return None if value is None else float(value)

    def has(self, name: str) -> bool:
        return name in self.tensors or any(f"blk.{i}.{name}" in self.tensors for i in range(min(self.layers, 1024)))

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
        epsilon = self.real(_epsilon(kind))
        found |= {} if epsilon is None else {"norm_eps": epsilon}
        if epsilon is None:
            self.problems.append(f"{self.prefix}{_epsilon(kind)} is missing")
        table = self.tensors.get("token_embd.weight")
        found["vocab_size"] = table.shape[0] if table is not None and table.shape else self.size("vocab_size")
        for field, key in own.fields.items():
            self._field(kind, found, field, key)
        shown = {"tie_word_embeddings": "!output.weight", **own.shown}
        found |= {field: self.has(name.lstrip("!")) != name.startswith("!") for field, name in shown.items()}
        for field, value in own.fixed.items():
            found[field] = value(found, self.has) if callable(value) else value
        found |= self._tokens()
        if getattr(kind, "rotary", False) is not False:
            found["rope"] = self._rope(kind, found)
        if hasattr(kind, "local_rope"):
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
            found[field] = self.real(key, 0.0) if isinstance(default, float) or default is None else value
            if isinstance(default, int) and type(value) is not type(default):
                self.problems.append(f"{self.prefix}{key} must be like {default!r}, got {brief(value)}")

    def _tokens(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
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
        type_, factor = self.get("rope.scaling.type"), self.real("rope.scaling.factor")
        factor = self.real("rope.scale_linear", factor)
        original = self.get("rope.scaling.original_context_length")
        if LONG in self.tensors and SHORT in self.tensors:
            scale = self.real("rope.scaling.attn_factor", 1.0)
            parts = {"long_factor": _vector(self.tensors[LONG]), "short_factor": _vector(self.tensors[SHORT])}
            rope = Rope(type="longrope", original_max_positions=original or longest, **parts, **common)
            same = _same(_attention_factor(rope, longest), scale)
            return rope if same else dataclasses.replace(rope, attention_factor=scale)
        if FACTORS in self.tensors:
            return _from_factors(_vector(self.tensors[FACTORS]), original, longest, size, common)
        if type_ in (None, "linear", "none") and factor in (None, 0.0, 1.0):
            return Rope(**common)
        if type_ in (None, "linear"):
            return Rope(type="linear", factor=factor, **common)
        if type_ == "yarn":
            values = {field: self.get(key) for key, field in ROPE_KEYS.items()}
            values = {"original_max_positions": longest, **{f: v for f, v in values.items() if v is not None}}
            return Rope(type="yarn", **values, **common)
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
            elif isinstance(value, (np.ndarray, list, tuple, str)) or _plain(value) not in DEFAULTS[key]:
                found.append(f"{name}={brief(value)} is not supported, only {' or '.join(map(repr, DEFAULTS[key]))}")
        return found


def metadata(config: Config, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The metadata of a GGUF file with this model; what `given` has beside, such as the tokenizer, is kept in its order.

    Args:
        config: of a causal language model.
        given: metadata of a GGUF file. Without a tokenizer in it, `tokenizer.ggml.model` is `"none"`.

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
    values |= _rope_values(config)
    found: dict[str, Any] = {"general.architecture": own.architecture, "general.alignment": np.uint32(ALIGNMENT)}
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
    return {
        **found,
        "tokenizer.ggml.model": "none",
        **kept,
        **{key: v for key, v in found.items() if key != "general.alignment"},
    }


def factor_tensors(config: Config) -> dict[str, Tensor]:
    """The tensors that say how rotary frequencies are divided, by name."""
    rope = getattr(config, "rope", None)
    if rope is None or rope.type not in of_family(type(config)).factors:
        return {}
    short, long = _factors(rope, rotated(config.head_dim, rope))
    by_name = {FACTORS: short} if _is_one_row(config) else {LONG: long, SHORT: short}
    return {name: Tensor.lazy(name, np.float32, v.shape, lambda v=v: v) for name, v in by_name.items()}


def is_factor_tensor(name: str, config: Config) -> bool:
    """Whether a tensor of a file is one that `config_from_gguf` reads."""
    rope = getattr(config, "rope", None)
    return name in (LONG, SHORT, FACTORS) and rope is not None and rope.type in ("llama3", "longrope")


def _is_one_row(config: Any) -> bool:
    """Whether the frequencies of all texts are divided by the same factors, and llama.cpp can read such."""
    rope = config.rope
    if rope.type == "longrope" and "llama3" in of_family(type(config)).factors:
        return rope.short_factor == rope.long_factor and _attention_factor(rope, config.max_positions) == 1.0
    return rope.type == "llama3"


def _rope_values(config: Config) -> dict[str, Any]:
    """The keys of the rotary settings."""
    if not getattr(config, "rotary", False):
        return {}
    rope: Rope = getattr(config, "rope")  # noqa: B009
    found = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rotated(config.head_dim, rope)}
    if _is_one_row(config):
        original = rope.original_max_positions if rope.type == "llama3" else None
        return {**found, "rope.scaling.original_context_length": original}
    if rope.type in ("linear", "yarn", "longrope"):
        found |= {"rope.scaling.type": rope.type}
    if rope.type in ("linear", "yarn"):
        found |= {"rope.scaling.factor": None if rope.factor is None else float(rope.factor)}
    if rope.type in ("yarn", "longrope"):
        found |= {"rope.scaling.original_context_length": rope.original_max_positions or config.max_positions}
    if rope.type == "yarn":
        found |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    if rope.type == "longrope":
        found |= {"rope.scaling.attn_factor": _attention_factor(rope, config.max_positions)}
    if hasattr(config, "local_rope"):
        found |= {"rope.freq_base_swa": float(getattr(config, "local_rope").theta)}  # noqa: B009
    return found


def _differences(config: Config, found: Mapping[str, Any]) -> list[str]:
    """In what the config that is read back computes otherwise."""
    nothing = {name: Tensor.lazy(name, np.float32, (), lambda: np.zeros((), np.float32)) for name in names(config)}
    nothing["token_embd.weight"] = Tensor.lazy(
        "", np.float32, (config.vocab_size, config.hidden_size), lambda: np.zeros(0)
    )
    try:
        back = config_from_gguf(found, {**nothing, **factor_tensors(config)})
    except ValueError as error:
        return [str(error)]
    want, got = _meaning(config), _meaning(back)
    return [
        f"{key}: {brief(value, 200)}, llama.cpp has {brief(got.get(key), 200)}"
        for key, value in want.items()
        if not _same(value, got.get(key))
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
            None if kind.rope is None else _rope_meaning(kind.rope, config) for kind in kinds
        )
    return found


def _rope_meaning(rope: Rope, config: Config) -> tuple[Any, ...]:
    size = rotated(config.head_dim, rope)
    if rope.type in ("default", "linear", "llama3", "longrope"):
        short, long = _factors(rope, size)
        edge = None if _same(short, long) else rope.original_max_positions or config.max_positions
        factor = _attention_factor(rope, config.max_positions) if rope.type == "longrope" else 1.0
        return rope.theta, size, tuple(short.tolist()), tuple(long.tolist()), edge, factor
    if rope.type == "yarn":
        rope = dataclasses.replace(
            rope, factor=rope.factor or config.max_positions / (rope.original_max_positions or config.max_positions),
            original_max_positions=rope.original_max_positions or config.max_positions, beta_fast=rope.beta_fast or 32.0,
            beta_slow=rope.beta_slow or 1.0,
        )  # fmt: skip
    return (size, *dataclasses.astuple(dataclasses.replace(rope, partial_rotary_factor=1.0)))


def _factors(rope: Rope, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the frequencies of short and of long texts are divided by, `(size / 2)` float32."""
    if rope.type == "longrope":
        return np.asarray(rope.short_factor, np.float32), np.asarray(rope.long_factor, np.float32)
    found = np.ones(size // 2, np.float32)
    if rope.type == "linear":
        found *= np.float32(rope.factor or 1.0)
    elif rope.type == "llama3":
        assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_positions
        low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        waves = np.float32(2 * math.pi) * np.float32(rope.theta) ** exponents
        smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
        between = 1 / ((1 - smooth) / np.float32(rope.factor) + smooth)
        found = np.where(waves < original / high, 1, np.where(waves > original / low, rope.factor, between))
    return found.astype(np.float32), found.astype(np.float32)


def _from_factors(vector: tuple[float, ...], original: Any, longest: int, size: int, common: Mapping[str, Any]) -> Rope:
    """Llama 3's settings if they give these factors, else settings of longrope that have them for texts of every length."""
    rope = Rope(
        type="llama3", factor=max(vector), low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_positions=original if type(original) is int and original > 0 else 8192, **common,
    )  # fmt: skip
    if len(vector) == size // 2 and _same(tuple(_factors(rope, size)[0].tolist()), vector):
        return rope
    return Rope(
        type="longrope",
        short_factor=vector,
        long_factor=vector,
        attention_factor=1.0,
        original_max_positions=longest,
        **common,
    )


def _attention_factor(rope: Rope, max_positions: int) -> float:
    """Of longrope, as in `fmodels.nn.positions`."""
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    original = rope.original_max_positions or max_positions
    scale = rope.factor or max_positions / original
    return 1.0 if scale <= 1.0 else math.sqrt(1 + math.log(scale) / math.log(original))


def _vector(tensor: Tensor) -> tuple[float, ...]:
    if len(tensor.shape) != 1 or not 0 < tensor.size <= 2**16:
        raise ValueError(
            f"load: tensor {tensor.name!r} of the GGUF file must be a row of numbers, got {list(tensor.shape)}"
        )
    return tuple(_plain(np.float32(value)) for value in tensor.array())


def _epsilon(kind: type[Config]) -> str:
    rms = getattr(kind, "norm", "layer").startswith("rms")
    return "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon"


def _plain(value: Any) -> Any:
    """One of Python's for one of numpy's."""
    if not isinstance(value, np.generic):
        return value
    return float(str(value)) if value.dtype == np.float32 else value.item()


def _typed(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.uint32(value)
    return np.float32(value) if isinstance(value, float) else value


def _same(first: Any, second: Any) -> bool:
    """Whether numbers are those of float32; all else must be equal."""
    if isinstance(first, np.ndarray):
        return _same(tuple(first.tolist()), tuple(np.asarray(second).tolist()))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=2e-6)
    return first == second
