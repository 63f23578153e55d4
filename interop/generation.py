"""`generate` of the wrappers: what transformers calls its arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import fmodels as fm
from interop.loading import generation_options

NAMES = {
    "decoder_input_ids": "decoder_tokens",
    "decoder_attention_mask": "decoder_mask",
    "negative_prompt_ids": "negative_tokens",
    "negative_prompt_attention_mask": "negative_mask",
}
"""transformers' name of an input beside the prompts -> ours."""
OTHERS = ("processors", "stops", "constraint", "tokenizer", "draft", "experts", "attention")
"""Arguments of `fm.generate` that are given on."""
REPLACED = {
    "logits_processor": "processors=, functions in jax",
    "prefix_allowed_tokens_fn": "processors=[fm.PrefixAllowed(function)]",
    "stopping_criteria": "stops=, functions in jax",
    "assistant_model": "draft=(params, config) of the smaller model",
    "streamer": "fm.stream(model.params, model.config, …)",
    "synced_gpus": "one call of each process",
    "custom_generate": "an option of fm.GenerationConfig: no code of a checkpoint ever runs",
}
"""Arguments of transformers of which only None, False and nothing are possible, and what to write instead."""


class GeneratedDict(NamedTuple):
    """What `generate` returns with `return_dict_in_generate=True`, by transformers' names; None is what was not asked for.

    Attributes:
        sequences: prompts and new tokens.
        sequences_scores: `(b)`, of beams.
        scores: with `output_scores`, `(b v)` of each step; of beams a row for each beam.
        logits: with `output_logits`, likewise.
        beam_indices: `(b n)`, of beams.
        lengths: `(b)`, new tokens of each row.
        logprobs: `(b n)`, of each new token.
        hidden_states: with `output_hidden_states`, in one piece: as `fm.Generated.outputs` has it, as the others.
        attentions: with `output_attentions`.
        cross_attentions: with `output_attentions`, of encoder-decoder models.
    """

    sequences: Any
    sequences_scores: Any = None
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
    beam_indices: Any = None
    lengths: Any = None
    logprobs: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None


def generate(
    params: fm.Params,
    config: Any,
    inputs: Mapping[str, Any],
    to_tensor: Callable[[np.ndarray], Any],
    *,
    max_new_tokens: int | None,
    generation_config: Any,
    key: Any,
    options: dict[str, Any],
) -> tuple[Any, GeneratedDict | None]:
    """The tokens, and all else if `return_dict_in_generate` asks for it.

    Args:
        params: the tree.
        config: its config.
        inputs: `tokens` and `mask`, as arrays.
        to_tensor: makes a tensor of an array of numpy.
        max_new_tokens: as for `fm.generate`.
        generation_config: `fm.GenerationConfig` or transformers'; `options` go before it.
        key: as for `fm.generate`.
        options: by the names of `fm.GenerationConfig`, of `NAMES` and `OTHERS`, and what `REPLACED` lists.

    Raises:
        TypeError: an unknown option, or what `REPLACED` lists.
    """
    for name, instead in REPLACED.items():
        value = options.pop(name, None)
        if value is not None and value is not False and value != []:
            raise TypeError(f"generate: {name} is of PyTorch's loop, this is one program of JAX; pass {instead}")
    whole = options.pop("return_dict_in_generate", getattr(generation_config, "return_dict_in_generate", None))
    arrays = {ours: options.pop(name) for name, ours in NAMES.items() if name in options}
    arrays |= {name: options.pop(name) for name in NAMES.values() if name in options}
    others = {name: options.pop(name) for name in OTHERS if name in options}
    if "tokenizer" in others:  # of transformers, around one of tokenizers
        others["tokenizer"] = getattr(others["tokenizer"], "backend_tokenizer", others["tokenizer"])
    base = None if generation_config is None else generation_options(generation_config)
    new = fm.GenerationConfig(**options)
    out = fm.generate(
        params,
        config,
        **inputs,
        **{name: np.asarray(array) for name, array in arrays.items() if array is not None},
        **others,
        max_new_tokens=max_new_tokens,
        key=key,
        options=new if base is None else base.replace(**new.to_hf()),
    )
    tokens = to_tensor(np.array(out.tokens))
    if not whole:
        return tokens, None
    found = {"sequences_scores": out.sequence_scores, "lengths": out.lengths, "logprobs": out.logprobs}
    found |= {"beam_indices": out.beam_indices, **out.outputs}
    made = {name: to_tensor(np.array(array)) for name, array in found.items() if array is not None}
    steps = {
        name: tuple(made[name][:, i] for i in range(out.logprobs.shape[1]))
        for name in ("scores", "logits")
        if name in made
    }
    return tokens, GeneratedDict(**{"sequences": tokens, **made, **steps})
