"""What the families have in common: the shape of a config, of a family, and the heads on top of a decoder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from fmodels import schema, tree
from fmodels.models._gguf import Gguf
from fmodels.nn.embeddings import lm_logits
from fmodels.nn.linear import ACTIVATIONS, linear
from fmodels.nn.positions import last_real
from fmodels.types import Array, Cache, Cross, Key, Output, Params
from fmodels.weights.methods import check_options
from fmodels.weights.rules import Weights

IRRELEVANT = frozenset(
    """_name_or_path name_or_path transformers_version use_cache return_dict return_dict_in_generate torchscript
    output_attentions output_hidden_states output_scores attn_implementation _attn_implementation
    _attn_implementation_autoset _sliding_window_pattern attn_implementation_internal experts_implementation use_bfloat16 problem_type
    finetuning_task task_specific_params tokenizer_class prefix sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id chunk_size_feed_forward gradient_checkpointing auto_map model_max_length
    do_sample early_stopping max_length min_length num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens
    output_past unsloth_fixed unsloth_version trl_version peft_version license language datasets metrics pipeline_tag
    adapters custom_pipelines eos_token_ids name sbert_ce_default_activation_function cache_implementation sentence_transformers
    transformers.js_config xla_device""".split()
)
"""Keys of a config.json that change no number that `forward` computes; they are kept and written back."""

DEFAULTS: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "is_decoder": (False,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "tie_last_hidden_states": (None,),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "tf_legacy_loss": (False,),
    "layer_types": (None,),
    "sliding_window": (None,),
    "base_model_tp_plan": (None,),
    "embedding_size": (None,),
}
"""Keys that would change the numbers, with the values at which they do not."""


COUNTS = ("num_layers", "decoder_num_layers", "num_experts")
"""Fields that say how many tensors there are."""

MOST = 2**16
"""Of their product, so that a wrong config.json does not fill the memory with names of tensors."""

SIZES = (frozenset(schema.SIZES.values()) | {f"decoder_{name}" for name in schema.SIZES.values()}) - {"num_labels"}
"""Fields that are sizes of axes."""


NULLS = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "attention_cap", "logit_cap")
"""Fields in which null says that there is none, and not that the default holds."""

NOT_NULL = ("hidden_size", "num_heads", "decoder_num_heads")
"""Sizes from which others follow; null is none."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A family's config: frozen, hashable, static under `jit`, with one spelling for all families.

    Families derive from it, give every field a default, and say how Hugging Face spells each in `HF`.

    Attributes:
        task: which head the model has, such as `"causal-lm"`; `architectures` in config.json.
        pruned_heads: `((layer, (head, …)), …)`, original numbers of the query heads that are gone.
        labels: names of the classes, or None.
        extra: keys of config.json that change no numbers, as JSON, kept for writing them back.
        generation: the checkpoint's `GenerationConfig`, or None.
        pooling: how a sentence-transformers folder pools hidden states into a vector (`"mean"`, `"cls"`, …), or None.
        normalize: whether that vector is scaled to length 1, or None.
        module_names: whether its files have the tensors of PyTorch's module where transformers saves others.
        old_names: whether its files have names that transformers gives no more, such as `LayerNorm.gamma`.
        quantization: the `quantization_config` of a quantised checkpoint, as JSON, or None.
    """

    task: str = "base"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    pruned_heads: tuple[tuple[int, tuple[int, ...]], ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)
    generation: Any = dataclasses.field(default=None, compare=False, repr=False)
    pooling: str | None = dataclasses.field(default=None, compare=False)
    normalize: bool | None = dataclasses.field(default=None, compare=False)
    module_names: bool = dataclasses.field(default=False, compare=False, repr=False)
    old_names: bool = dataclasses.field(default=False, compare=False, repr=False)
    quantization: str | None = dataclasses.field(default=None, compare=False, repr=False)

    model_type: ClassVar[str]
    HF: ClassVar[Mapping[str, str]]
    """Field -> key of config.json."""
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset()
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Other spelling of a key of config.json -> its own."""
    ARCHITECTURES: ClassVar[Mapping[str, str]]
    """Task -> class name in transformers."""
    OTHERS: ClassVar[Mapping[str, str]] = {}
    """Names of classes of old versions and of other libraries -> task."""
    gguf: ClassVar[Gguf | None] = None
    """How llama.cpp has the family, where it has it; of the class itself, not of those that derive from it."""
    norm: ClassVar[str] = "layer"
    """Of the layers: `"layer"`, or `"rms"` and what derives from it, of which only the scale is learned."""
    joint_norms: ClassVar[bool] = False
    """Whether queries, and keys, are normed over all heads together."""
    counts_columns: ClassVar[bool] = False
    """Whether positions are columns, whatever the mask."""

    def __post_init__(self) -> None:
        if self.task not in self.ARCHITECTURES:
            raise ValueError(
                f"{self.model_type}.Config: task {self.task!r} is not one of this family's: {', '.join(self.ARCHITECTURES)}"
            )
        wrong = [f for f in SIZES if not _is_size(getattr(self, f, 1))]
        if wrong:
            said = ", ".join(f"{field}={getattr(self, field)!r}" for field in wrong)
            raise ValueError(f"{self.model_type}.Config: sizes are positive integers; got {said}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{self.model_type}.Config: activation {self.activation!r} is not supported; one of {', '.join(sorted(ACTIVATIONS))}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.model_type}.Config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def embedding_size(self) -> int:
        """Of the rows of the token table, where it is not `hidden_size`."""
        return self.hidden_size

    @property
    def position_size(self) -> int:
        """Of the rows of the table of positions."""
        return self.embedding_size

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """How many tokens each layer of the decoder sees, None for all; None where all layers see all."""
        return None

    @property
    def layer_parts(self) -> Mapping[str, tuple[bool, ...]]:
        """The part of a layer, such as `"moe"` -> which layers have it, for the parts that not all need have."""
        return {}

    @property
    def logit_scale(self) -> float | None:
        """Of the logits over the vocabulary."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """The logits over the vocabulary are squeezed between this and its negative."""
        return None

    @property
    def position_offset(self) -> int:
        """Rows of the table of positions before that of the first position."""
        return 0

    @property
    def longest_short(self) -> int | None:
        """The longest text whose cache a longer one cannot go on from; None where all can."""
        return None

    @property
    def repeats_head(self) -> bool:
        """Whether PyTorch's module has a name for the weight of a tied head, beside that of the token table."""
        return True

    @property
    def untied(self) -> bool:
        return not self.tie_word_embeddings

    @property
    def reference(self) -> str:
        """Which `attn_implementation` of transformers has the family's numbers."""
        return "eager"

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads tokens with an encoder and goes on from `decoder_tokens`."""
        return False

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens, as a tuple."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, task: str | None = None) -> Self:
        """Reads a config.json, of transformers 4 or 5; `task` goes before its `architectures`.

        Raises:
            ValueError: a key is not understood, or has a value that is not supported; all are listed.
        """
        data = {cls.ALIASES.get(key, key): value for key, value in data.items()}
        fields: dict[str, Any] = {}
        extra: list[tuple[str, str]] = []
        problems: list[str] = []
        spelling = {key: field for field, key in cls.HF.items()}
        sizes = {key: field for field, key in cls.HF.items() if field in SIZES and key in data}
        sizes = {key: data[key] for key, field in sizes.items() if data[key] is not None or field in NOT_NULL}
        if wrong := [f"{key}={value!r}" for key, value in sizes.items() if not _is_size(value)]:
            raise ValueError(
                f"{cls.model_type}.Config.from_hf: sizes are positive integers; config.json says {', '.join(wrong)}"
            )
        counts = {key: data[key] for field, key in cls.HF.items() if field in COUNTS and data.get(key)}
        if math.prod(counts.values()) > MOST:
            raise ValueError(
                f"{cls.model_type}.Config.from_hf: no model has so many layers and experts; config.json says "
                + ", ".join(f"{key}={value!r}" for key, value in counts.items())
            )
        own = cls.read_special(data, fields, problems)
        for key, value in data.items():
            if key in own or key in ("model_type", "architectures", "dtype", "torch_dtype", "label2id"):
                continue
            if key in spelling:
                if value is not None or spelling[key] in NULLS:
                    fields[spelling[key]] = tuple(value) if isinstance(value, list) else value
            elif key == "id2label":
                if value:
                    labels = tuple(str(label) for _, label in sorted(value.items(), key=lambda item: int(item[0])))
                    fields["num_labels"] = len(labels)
                    fields["labels"] = None if labels == _unnamed(len(labels)) else labels
            elif key in ("num_labels", "_num_labels"):
                if not data.get("id2label") and value is not None:
                    fields["num_labels"] = value
            elif key == "pruned_heads":
                fields[key] = tuple(
                    sorted((int(l), tuple(sorted(map(int, hs)))) for l, hs in (value or {}).items() if hs)
                )
            elif key == "quantization_config" and value is not None:
                problems += [f"{key}: {problem}" for problem in check_options(value)]
                fields["quantization"] = json.dumps(value)
            elif key in cls.IRRELEVANT or key in IRRELEVANT or value in {**DEFAULTS, **cls.DEFAULTS}.get(key, ()):
                extra.append((key, json.dumps(value)))
            elif key in {**DEFAULTS, **cls.DEFAULTS}:
                supported = " or ".join(map(repr, {**DEFAULTS, **cls.DEFAULTS}[key]))
                problems.append(f"{key}={value!r} is not supported, only {supported}")
            else:
                problems.append(f"unknown key {key!r} (value {value!r})")
        if problems:
            raise ValueError(
                f"{cls.model_type}.Config.from_hf: config.json has {len(problems)} entries that would change the numbers or "
                "that are not understood:\n  "
                + "\n  ".join(problems)
                + "\nRemove a key only if you know that the model does not use it."
            )
        fields["task"] = task or cls.task_of(data.get("architectures"))
        fields["extra"] = tuple(extra)
        return cls(**fields)

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        """For families: reads keys that are more than a renaming; returns those that it dealt with."""
        return set()

    def write_special(self) -> dict[str, Any]:
        """For families: the inverse of `read_special`."""
        return {}

    @classmethod
    def task_of(cls, architectures: Any) -> str:
        """The task that a config.json names in `architectures`.

        Raises:
            ValueError: it names none, several, or one that is not supported.
        """
        known = {name: task for task, name in cls.ARCHITECTURES.items()}
        every = {**known, **cls.OTHERS}
        if not architectures:
            raise ValueError(
                f"load: config.json of this {cls.model_type} model has no 'architectures'; pass task=, one of {', '.join(known.values())}"
            )
        if not isinstance(architectures, list | tuple) or not isinstance(architectures[0], str):
            raise ValueError(f"load: 'architectures' of config.json is a list of names, got {architectures!r}")
        if architectures[0] not in every:
            raise ValueError(
                f"load: architecture {architectures[0]!r} is not supported for {cls.model_type}; supported are "
                f"{', '.join(known)}. Pass task=, one of {', '.join(known.values())}, to load it as another."
            )
        return every[architectures[0]]

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` reads back to an equal config, in the form of transformers 5."""
        data: dict[str, Any] = {"architectures": [self.ARCHITECTURES[self.task]], "model_type": self.model_type}
        for field, key in self.HF.items():
            value = getattr(self, field)
            data[key] = list(value) if isinstance(value, tuple) else value
        data.update(self.write_special())
        labels = self.labels
        if labels is not None or self.num_labels != type(self).num_labels:
            labels = labels if labels is not None and len(labels) == self.num_labels else None
            names = labels or _unnamed(self.num_labels)
            data["id2label"] = {str(i): name for i, name in enumerate(names)}
            data["label2id"] = {name: i for i, name in enumerate(names)}
        if self.pruned_heads:
            data["pruned_heads"] = {str(layer): list(gone) for layer, gone in self.pruned_heads}
        if self.quantization is not None:
            data["quantization_config"] = json.loads(self.quantization)
        for key, value in self.extra:
            data.setdefault(key, json.loads(value))
        return data


def _unnamed(count: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without names."""
    return tuple(f"LABEL_{i}" for i in range(count))


class Family(NamedTuple):
    """What a `models/<model_type>.py` exports for the registry.

    Attributes:
        config: the class of its configs.
        forward: `forward(params, config, tokens, *, …)`, as `fmodels.forward`.
        weights: its layout map.
        init: `init(config, key, *, dtype)`.
        encode: of encoder-decoder families, `encode(params, config, tokens, *, mask=None)`: runs the encoder, and gives
            the keys and values of the decoder's cross-attention; for a cache.
    """

    config: type[Config]
    forward: Callable[..., Output]
    weights: Weights
    init: Callable[..., Params]
    encode: Callable[..., Cross] | None = None


def init_normal(weights: Weights, config: Config, key: Key, dtype: Any, leaves: Any = None) -> Params:
    """Random parameters by transformers' default scheme: norms 1, biases 0, weights from N(0, initializer_range).

    Args:
        weights: the family's layout map.
        config: the family's config.
        key: random key.
        dtype: of the leaves.
        leaves: which leaves, as paths in stacked form; all that the config's model must have if None.

    Returns:
        A stacked tree, or a tuple of layers if the config's `layer_parts` or `pruned_heads` make them differ.
    """
    if leaves is None:
        # Optional leaves are what a new model has too, apart from those that exist only to keep old bytes.
        leaves = [
            *weights.leaves(config),
            *(p for p in weights.leaves(config, optional=True) if not p.endswith("spare_bias")),
        ]
    shapes = tree.flatten(schema.abstract(leaves, config, dtype))
    draws: dict[str, Array] = {}
    for subkey, (path, leaf) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        if path.endswith(".scale"):
            draws[path] = jnp.ones(leaf.shape, leaf.dtype)
        elif path.endswith("bias"):
            draws[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            normal = config.initializer_range * jax.random.normal(subkey, leaf.shape, jnp.float32)
            draws[path] = normal.astype(leaf.dtype)
    return tree.unflatten(draws)


def without(keys: Mapping[str, str], *fields: str) -> dict[str, str]:
    """A config's `HF` without some fields."""
    return {field: key for field, key in keys.items() if field not in fields}


def check_cache(config: Any, cache: Cache | None) -> None:
    """Raises a ValueError if there is a cache, and tokens see those behind them."""
    if cache is not None and not config.causal:
        raise ValueError(
            f"forward: a cache needs a causal model; this {config.model_type} is an encoder (config.causal is False)"
        )


def decoder_head(
    params: Params,
    config: Config,
    hidden: Array,
    *,
    tokens: Array,
    mask: Array | None,
    cache: Cache | None,
    select: Array | None,
) -> Output:
    """The heads that decoders have: language model, classification of the sequence or of tokens, question answering.

    Source: transformers' `GenericForSequenceClassification` and its like: a sequence is classified at its last token
    that is not `pad_token_id` (without one: at the last that `mask` shows, else at the last).
    """
    out = Output(hidden=hidden, cache=cache)
    if config.task == "base":
        return out
    if config.task in schema.LM_TASKS:
        return out._replace(logits=logits_of(params, config, hidden if select is None else at(hidden, select)[:, None]))
    logits = linear(params["classifier"], hidden).astype(jnp.float32)
    if config.task == "sequence-classification":
        if config.pad_token_id is not None:
            real = tokens != config.pad_token_id
        else:
            real = jnp.ones(tokens.shape, bool) if mask is None else mask
        logits = at(logits, last_real(real))
    return out._replace(logits=logits)


def logits_of(params: Params, config: Config, hidden: Array) -> Array:
    """The logits `(b t v)` of a causal language model for its last hidden states `(b t d)`."""
    logits = lm_logits(params, hidden)
    if config.logit_scale is not None:
        logits = logits * config.logit_scale
    return logits if config.logit_cap is None else jnp.tanh(logits / config.logit_cap) * config.logit_cap


def at(x: Array, index: Array) -> Array:
    """`x[b, index[b]]` for `(b t …)` and `(b)`."""
    return x[jnp.arange(x.shape[0]), index]
