"""`GenerationConfig`: the options of generation by Hugging Face's names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Self

NOT_HERE: dict[str, tuple[Any, ...]] = {
    "cache_config": (),
    "forced_decoder_ids": (),
    "token_healing": (False,),
    "low_memory": (False,),
    "use_mtp": (False,),
    "speculation_type": (),
    "assistant_ensemble_weight": (),
    "constraints": (),
}
"""Options of transformers that are not supported, with the values (besides None) at which they do nothing."""

INSTEAD = {
    "constraints": "pass phrases as force_words_ids, or constraint=fm.constraints… to generate",
    "forced_decoder_ids": "put the tokens into decoder_tokens",
    "token_healing": "leave off the last token of the prompt and pass a constraint",
    "low_memory": "leave it out: one candidate at a time changes no token",
}
"""What to write for some of them."""

IRRELEVANT = frozenset(
    """use_cache return_legacy_cache max_cache_len return_dict_in_generate compile_config disable_compile is_assistant
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    _from_model_config transformers_version generation_kwargs trust_remote_code custom_generate
    continuous_batching_config""".split()
)
"""Options that change no token that we generate."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda x: _is_int(x) and x >= least


def _is_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_int(i) and i >= 0 for i in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(_is_ids(word) and word for word in value)


def _is_phrases(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all((_is_ids(phrase) and phrase) or _is_words(phrase) for phrase in value)
    )


def _is_biases(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(
            isinstance(pair, tuple) and len(pair) == 2 and _is_ids(pair[0]) and pair[0] and _is_real(pair[1])
            for pair in value
        )
    )


_BOOL = (lambda x: isinstance(x, bool), "True or False")
_AT_LEAST_0 = (_whole(0), "an integer of at least 0")
_AT_LEAST_1 = (_whole(1), "an integer of at least 1")
_TOKEN = (_whole(0), "a token id")
_TOKENS = (lambda x: _whole(0)(x) or (_is_ids(x) and x), "a token id or a list of them")
_IDS = (_is_ids, "a list of token ids")
_ABOVE_0 = (lambda x: _is_real(x) and 0 < x < float("inf"), "a number above 0")
_UNIT = (lambda x: _is_real(x) and 0 < x <= 1, "in (0, 1]")
_SHARE = (lambda x: _is_real(x) and 0 <= x < 1, "in [0, 1)")

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _AT_LEAST_1,
    "max_length": _AT_LEAST_1,
    "min_length": _AT_LEAST_0,
    "min_new_tokens": _AT_LEAST_0,
    "max_time": _ABOVE_0,
    "stop_strings": (
        lambda x: isinstance(x, tuple) and len(x) > 0 and all(isinstance(s, str) and s for s in x),
        "a string or a list of strings",
    ),
    "do_sample": _BOOL,
    "num_beams": _AT_LEAST_1,
    "num_beam_groups": _AT_LEAST_1,
    "num_return_sequences": _AT_LEAST_1,
    "early_stopping": (lambda x: isinstance(x, bool) or x == "never", 'True, False or "never"'),
    "length_penalty": (_is_real, "a number"),
    "diversity_penalty": (lambda x: _is_real(x) and x >= 0, "a number of at least 0"),
    "force_words_ids": (
        _is_phrases,
        "a list of phrases, each a list of token ids, or of lists of which one must occur",
    ),
    "penalty_alpha": (lambda x: _is_real(x) and 0 <= x <= 1, "in [0, 1]"),
    "dola_layers": (
        lambda x: x in ("low", "high") or (_is_ids(x) and len(x) > 0),
        '"low", "high" or a list of layers',
    ),
    "prompt_lookup_num_tokens": _AT_LEAST_1,
    "max_matching_ngram_size": _AT_LEAST_1,
    "num_assistant_tokens": _AT_LEAST_1,
    "assistant_early_exit": _AT_LEAST_1,
    "temperature": _ABOVE_0,
    "top_h": _UNIT,
    "top_k": (_whole(0), "an integer of at least 0 (0 keeps all)"),
    "top_p": _UNIT,
    "min_p": (lambda x: _is_real(x) and 0 <= x <= 1, "in [0, 1]"),
    "typical_p": _UNIT,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "repetition_penalty": _ABOVE_0,
    "encoder_repetition_penalty": _ABOVE_0,
    "no_repeat_ngram_size": _AT_LEAST_0,
    "encoder_no_repeat_ngram_size": _AT_LEAST_0,
    "bad_words_ids": (_is_words, "a list of lists of token ids"),
    "sequence_bias": (_is_biases, "a dict from tuples of token ids to numbers, or a list of such pairs"),
    "renormalize_logits": _BOOL,
    "remove_invalid_values": _BOOL,
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _TOKENS,
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "exponential_decay_length_penalty": (
        lambda x: isinstance(x, tuple) and len(x) == 2 and _whole(0)(x[0]) and _ABOVE_0[0](x[1]),
        "a pair: new tokens from which on, and a factor above 0",
    ),
    "guidance_scale": (_is_real, "a number"),
    "watermarking_config": (lambda x: isinstance(x, tuple), "a dict"),
    "cache_implementation": (
        lambda x: x in ("dynamic", "static", "quantized"),
        '"dynamic", "static" (which are the same here) or "quantized" (8 bits)',
    ),
    "prefill_chunk_size": _AT_LEAST_1,
    "output_scores": _BOOL,
    "output_logits": _BOOL,
    "output_hidden_states": _BOOL,
    "output_attentions": _BOOL,
    "decoder_start_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": (_whole(-1), "a token id"),
    "bos_token_id": (_is_int, "a token id"),
}
"""Option -> whether a value is possible, and what it must be."""


_EMPTY_IS_NONE = ("bad_words_ids", "sequence_bias", "force_words_ids", "stop_strings")


def _freeze(value: Any) -> Any:
    """Lists and dicts as tuples, so that a config can be hashed."""
    if isinstance(value, Mapping):
        return tuple((_freeze(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class GenerationConfig:
    """Options of `fm.generate`, by the names of transformers' `GenerationConfig`; None means its default.

    Attributes:
        max_new_tokens: tokens to add; goes before `max_length`.
        max_length: prompt and new tokens together.
        min_length, min_new_tokens: no end token before so many tokens in all, so many new ones.
        max_time: seconds after which generation stops.
        stop_strings: a row ends where one of them is complete; `generate` then needs a `tokenizer`.
        do_sample: sample (needs a `key`) or take the likeliest token.
        num_beams: beams of a beam search; 1 for none.
        num_beam_groups, diversity_penalty: diverse beam search.
        num_return_sequences: rows returned for each prompt.
        early_stopping: of beams: `True` stops with `num_beams` hypotheses, `False` by a heuristic, `"never"` when none can
            become better.
        length_penalty: exponent of the length by which a beam's score is divided.
        force_words_ids: phrases that the beams must contain.
        penalty_alpha: contrastive search, with `top_k` candidates.
        dola_layers: DoLa: layers to contrast with the last.
        prompt_lookup_num_tokens, max_matching_ngram_size: speculation by n-grams of the text itself.
        num_assistant_tokens, assistant_early_exit: speculation by a draft model, by the first layers.
        temperature: divides the logits; > 0, 1 by default.
        top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: cuts when sampling; `top_k` is 50 by default.
        repetition_penalty: > 0; logits of tokens that were seen are divided (if positive) or multiplied by it.
        encoder_repetition_penalty: the reverse for tokens of the encoder's input, or of the prompt.
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: no n-gram of the row, of the encoder's input occurs again.
        bad_words_ids, sequence_bias: sequences that are forbidden, or get a bias.
        renormalize_logits, remove_invalid_values: after, before all else.
        forced_bos_token_id, forced_eos_token_id: the token after a first one; the last token at `max_new_tokens`.
        suppress_tokens, begin_suppress_tokens: never, not as the first new token.
        exponential_decay_length_penalty: from which new token on ends become likelier, and how fast.
        guidance_scale: classifier-free guidance.
        watermarking_config: of a watermark.
        cache_implementation: `"quantized"` keeps keys and values in 8 bits.
        prefill_chunk_size: tokens of a prompt that are read at a time.
        output_scores, output_logits, output_hidden_states, output_attentions: kept in `Generated.outputs`.
        decoder_start_token_id: of encoder-decoder models.
        eos_token_id: one end token or several.
        pad_token_id: fills rows after their end; the first end token if None.
        bos_token_id: kept for the file.
        extra: other options of the file, name and value; those that are not supported raise when generating.

    Raises:
        TypeError: an unknown name.
        ValueError: an impossible value.
        NotImplementedError: an option of transformers that is not supported (raised by `generate` for a file's).

    Example:
        >>> GenerationConfig(do_sample=True, top_p=0.9).top_p
        0.9
        >>> GenerationConfig(token_healing=True)
        Traceback (most recent call last):
        NotImplementedError: GenerationConfig: token_healing=True is not supported; leave off the last token of the prompt ...
        >>> GenerationConfig(temprature=0.5)
        Traceback (most recent call last):
        TypeError: GenerationConfig: unknown option 'temprature'; did you mean 'temperature'?
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: tuple[str, ...] | None = None
    do_sample: bool | None = None
    num_beams: int | None = None
    num_beam_groups: int | None = None
    num_return_sequences: int | None = None
    early_stopping: bool | str | None = None
    length_penalty: float | None = None
    diversity_penalty: float | None = None
    force_words_ids: tuple[Any, ...] | None = None
    penalty_alpha: float | None = None
    dola_layers: str | tuple[int, ...] | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int | None = None
    assistant_early_exit: int | None = None
    temperature: float | None = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    guidance_scale: float | None = None
    watermarking_config: tuple[tuple[str, Any], ...] | None = None
    cache_implementation: str | None = None
    prefill_chunk_size: int | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_hidden_states: bool | None = None
    output_attentions: bool | None = None
    decoder_start_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def __init__(self, **options: Any) -> None:
        self._fill(options)
        self.require_supported("GenerationConfig")

    def _fill(self, options: Mapping[str, Any]) -> None:
        own = {field.name: field.default for field in dataclasses.fields(self) if field.name != "extra"}
        extra = []
        for name, value in options.items():
            if name in own:
                value = (value,) if name == "stop_strings" and isinstance(value, str) else _freeze(value)
                own[name] = None if value == () and name in _EMPTY_IS_NONE else value
            else:
                extra.append((name, value))
        for name, value in own.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "extra", tuple(extra))
        self._check_values()

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """Reads a generation_config.json; options that are not supported are kept, and raise when generating."""
        self = object.__new__(cls)
        self._fill(data)
        return self

    def to_hf(self) -> dict[str, Any]:
        """The generation_config.json that `from_hf` reads back to an equal object."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "watermarking_config" and value is not None:
                data[field.name] = {key: _thaw(item) for key, item in value}
            elif field.name != "extra" and value is not None:
                data[field.name] = _thaw(value)
        return {**data, **dict(self.extra)}

    def replace(self, **options: Any) -> Self:
        """A copy with other options."""
        return type(self).from_hf({**self.to_hf(), **options})

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def require_supported(self, where: str) -> None:
        """Raises for the first option in `extra` that would change the tokens."""
        names = [field.name for field in dataclasses.fields(self)] + [*NOT_HERE]
        for name, value in self.extra:
            if name in NOT_HERE:
                if value is not None and value not in NOT_HERE[name]:
                    instead = INSTEAD.get(name, "leave it out")
                    raise NotImplementedError(f"{where}: {name}={value!r} is not supported; {instead}")
            elif name not in IRRELEVANT:
                near = difflib.get_close_matches(name, names, n=1)
                raise TypeError(f"{where}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    def _check_values(self) -> None:
        problems = [
            f"{name} must be {want}, got {value!r}"
            for name, (possible, want) in CHECKS.items()
            if (value := getattr(self, name)) is not None and not possible(value)
        ]
        if problems:
            raise ValueError("GenerationConfig: " + "; ".join(problems))
