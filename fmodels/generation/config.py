"""`GenerationConfig`: the options of generation by Hugging Face's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

NOT_YET: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": (False,),
    "max_time": (),
    "stop_strings": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "cache_implementation": ("dynamic", "static"),
    "cache_config": (),
    "prefill_chunk_size": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "diversity_penalty": (0.0,),
    "low_memory": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "decoder_start_token_id": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "speculation_type": (),
    "assistant_ensemble_weight": (),
}
"""Options of transformers that are not here yet, with the values (besides None) at which they do nothing."""

IRRELEVANT = frozenset(
    """use_cache return_legacy_cache max_cache_len return_dict_in_generate compile_config disable_compile is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size
    assistant_lookbehind target_lookbehind _from_model_config transformers_version generation_kwargs
    trust_remote_code custom_generate continuous_batching_config""".split()
)
"""Options that change no token that we generate."""


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class GenerationConfig:
    """Options of `fm.generate`, by the names of transformers' `GenerationConfig`; None means its default.

    Attributes:
        max_new_tokens: tokens to add; goes before `max_length`.
        max_length: prompt and new tokens together.
        do_sample: sample (needs a `key`) or take the likeliest token.
        temperature: divides the logits; > 0, 1 by default.
        top_k: keep the k likeliest tokens, ties included; 50 by default when sampling, 0 for all.
        top_p: keep the smallest set of likeliest tokens with at least this probability; in (0, 1].
        min_p: keep tokens with at least this share of the likeliest one's probability; in [0, 1].
        repetition_penalty: > 0; logits of tokens that were seen are divided (if positive) or multiplied by it.
        eos_token_id: one end token or several.
        pad_token_id: fills rows after their end; the first end token if None.
        bos_token_id: kept for the file.
        extra: other options of the file, name and value; those that are not supported raise when generating.

    Raises:
        TypeError: an unknown name.
        ValueError: an impossible value.
        NotImplementedError: an option of transformers that is not here yet (raised by `generate` for a file's).

    Example:
        >>> GenerationConfig(do_sample=True, top_p=0.9).top_p
        0.9
        >>> GenerationConfig(num_beams=4)
        Traceback (most recent call last):
        NotImplementedError: GenerationConfig: num_beams=4 is not supported yet; leave it out
        >>> GenerationConfig(temprature=0.5)
        Traceback (most recent call last):
        TypeError: GenerationConfig: unknown option 'temprature'; did you mean 'temperature'?
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
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
            value = tuple(value) if name == "eos_token_id" and isinstance(value, list) else value
            if name in own:
                own[name] = value
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
            if field.name != "extra" and value is not None:
                data[field.name] = list(value) if isinstance(value, tuple) else value
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
        import difflib

        names = [field.name for field in dataclasses.fields(self)] + [*NOT_YET]
        for name, value in self.extra:
            if name in NOT_YET:
                if value is not None and value not in NOT_YET[name]:
                    raise NotImplementedError(f"{where}: {name}={value!r} is not supported yet; leave it out")
            elif name not in IRRELEVANT:
                near = difflib.get_close_matches(name, names, n=1)
                raise TypeError(f"{where}: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    def _check_values(self) -> None:
        def number(name: str, kind: type | tuple[type, ...], valid: Any, want: str) -> str | None:
            value = getattr(self, name)
            if value is None:
                return None
            good = isinstance(value, kind) and not isinstance(value, bool) and valid(value)
            return None if good else f"{name} must be {want}, got {value!r}"

        real = (int, float)
        problems = [
            number("max_new_tokens", int, lambda x: x >= 1, "an integer of at least 1"),
            number("max_length", int, lambda x: x >= 1, "an integer of at least 1"),
            number("temperature", real, lambda x: 0 < x < float("inf"), "a number above 0"),
            number("top_k", int, lambda x: x >= 0, "an integer of at least 0 (0 keeps all)"),
            number("top_p", real, lambda x: 0 < x <= 1, "in (0, 1]"),
            number("min_p", real, lambda x: 0 <= x <= 1, "in [0, 1]"),
            number("repetition_penalty", real, lambda x: 0 < x < float("inf"), "a number above 0"),
            number("pad_token_id", int, lambda x: x >= -1, "a token id"),
            number("bos_token_id", int, lambda x: True, "a token id"),
            None
            if self.do_sample in (None, True, False)
            else f"do_sample must be True or False, got {self.do_sample!r}",
            None
            if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.eos_token_ids)
            else f"eos_token_id must be a token id or a list of them, got {self.eos_token_id!r}",
        ]
        if found := [problem for problem in problems if problem]:
            raise ValueError("GenerationConfig: " + "; ".join(found))
