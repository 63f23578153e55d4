"""Which strategy the options name, by transformers' rules, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from fmodels import tree
from fmodels.generation.config import GenerationConfig
from fmodels.generation.strategy import Strategy
from fmodels.models import Config
from fmodels.schema import LM_TASKS
from fmodels.types import Params

STRATEGIES = {
    "sample": "sample.sample",
    "beams": "beams.beam_search",
    "group-beams": "group_beams.group_beam_search",
    "constrained-beams": "constrained_beams.constrained_beam_search",
    "contrastive": "contrastive.contrastive",
    "dola": "dola.dola",
    "ngrams": "speculative.by_ngrams",
    "draft": "speculative.by_draft",
}
"""Name -> file and function in `fmodels.generation`."""

BEAMS = ("beams", "group-beams", "constrained-beams")
"""Those that search, so that no row of the cache is that of a text that is returned."""

Choice = tuple[str, int, tuple[tuple[str, Any], ...], dict[str, Any]]
"""Name, rows returned for each prompt, static settings, arrays."""


def maker(name: str) -> Callable[..., Strategy]:
    """`make(model, options, *, room, sequences, processors, stops, ask, **settings) -> Strategy`, loaded now."""
    file, function = STRATEGIES[name].split(".")
    return getattr(import_module(f"fmodels.generation.{file}"), function)


def choose(
    params: Params,
    config: Config,
    rows: Sequence[GenerationConfig],
    *,
    draft: tuple[Params, Config] | None,
    vocabulary: int,
    eos: Sequence[int],
    count: int,
) -> Choice:
    """The strategy of a call.

    Raises:
        ValueError: options that contradict each other.
        NotImplementedError: a strategy that is not supported.
    """
    first = rows[0]
    sequences = first.num_return_sequences or 1
    beams = first.num_beams or 1
    if beams == 1 and sequences > 1 and not all(row.do_sample for row in rows):
        raise ValueError(
            f"generate: num_return_sequences={sequences} without sampling or beams would give {sequences} times the same; "
            "set do_sample=True or num_beams"
        )
    if beams > 1 and sequences > beams:
        raise ValueError(f"generate: num_return_sequences={sequences} is more than num_beams={beams}")
    for name in ("num_beam_groups", "force_words_ids"):
        value = getattr(first, name)
        if value not in (None, 1) and beams == 1:
            raise ValueError(f"generate: {name}={value!r} needs num_beams above 1")
    asked = _asked(first, rows, draft, beams)
    if beams > 1:
        return _beams(rows, sequences, beams, eos, vocabulary)
    if asked == "penalty_alpha":
        settings = {"top_k": min(_top_k(rows), vocabulary)}
        return "contrastive", 1, tuple(settings.items()), {"alpha": jnp.asarray(first.penalty_alpha, jnp.float32)}
    if asked == "dola_layers":
        return "dola", sequences, (("layers", _dola_layers(params, config, first)), ("hidden_states", True)), {}
    if asked == "prompt_lookup_num_tokens":
        settings = {"tokens": first.prompt_lookup_num_tokens, "size": first.max_matching_ngram_size, "ngrams": True}
        return "ngrams", sequences, tuple(settings.items()), {}
    if asked is not None:
        if draft is None:
            assert first.assistant_early_exit is not None
            draft = first_layers(params, first.assistant_early_exit), config
        _check_draft(draft, config, vocabulary)
        settings = {"tokens": first.num_assistant_tokens or ASSISTANT_TOKENS, "draft_config": draft[1]}
        return "draft", sequences, tuple(settings.items()), {"draft": draft[0]}
    return "sample", sequences, (), {}


ASSISTANT_TOKENS = 5
"""Tokens that a draft guesses at a time, where `num_assistant_tokens` does not say."""


def _asked(
    first: GenerationConfig, rows: Sequence[GenerationConfig], draft: tuple[Params, Config] | None, beams: int
) -> str | None:
    """The option that asks for a strategy other than sampling and beams, if there is one."""
    found = {
        "penalty_alpha": first.penalty_alpha is not None and first.penalty_alpha > 0 and _top_k(rows) > 1,
        "dola_layers": first.dola_layers is not None,
        "prompt_lookup_num_tokens": first.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": first.assistant_early_exit is not None,
        "draft": draft is not None,
    }
    names = [name for name, asked in found.items() if asked]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"generate: {' and '.join(names)} are different ways of decoding; choose one of them")
    if beams > 1:
        raise ValueError(f"generate: {names[0]} does not go with beams; leave num_beams={beams} out")
    if names[0] == "penalty_alpha" and any(row.do_sample for row in rows):
        raise ValueError("generate: penalty_alpha asks for contrastive search, which does not sample; leave one out")
    return names[0]


def _top_k(rows: Sequence[GenerationConfig]) -> int:
    values = {50 if row.top_k is None else row.top_k for row in rows}
    if len(values) > 1:
        raise ValueError(f"generate: with penalty_alpha, top_k must be the same for all rows; got {sorted(values)}")
    return values.pop()


def _dola_layers(params: Params, config: Config, first: GenerationConfig) -> tuple[int, ...]:
    """The candidates, by transformers' rules; it leaves out numbers of a list that are no layer before the last."""
    if config.task == "seq2seq-lm":
        raise ValueError("generate: dola_layers is for models without an encoder")
    if first.guidance_scale not in (None, 1):
        raise ValueError("generate: dola_layers contrasts with a layer, guidance_scale with a text; leave one out")
    depth = _depth(tree.get(params, "layers"))
    start = 0 if tree.has(params, "lm_head.weight") else 2 if depth > 2 else 1 if depth == 2 else 0
    layers = first.dola_layers
    if layers == "low":
        half = depth // 2 if depth <= 40 else 20
        found = (start,) if start == depth // 2 else tuple(range(start, half, 2))
    elif layers == "high":
        found = tuple(range(depth // 2 if depth <= 40 else depth - 20, depth, 2))
    else:
        assert isinstance(layers, tuple)
        found = tuple(layer for layer in layers if layer < depth)
    if not found:
        raise ValueError(f"generate: dola_layers={layers!r} leaves none of {depth} layers; give a list of layers")
    return found


def _check_draft(draft: tuple[Params, Config], config: Config, vocabulary: int) -> None:
    params, other = draft
    if other.task not in LM_TASKS or other.task == "masked-lm" or not getattr(other, "causal", True):
        raise ValueError(
            f"generate: draft is no causal language model, but a {other.model_type} for task {other.task!r}"
        )
    if (other.task == "seq2seq-lm") != (config.task == "seq2seq-lm"):
        raise ValueError("generate: model and draft must both have an encoder, or both none")
    size = params["embed"]["tokens"].shape[0]
    if size != vocabulary:
        raise ValueError(
            f"generate: the draft has a vocabulary of {size} tokens, the model of {vocabulary}; they must be the same"
        )


def first_layers(params: Params, count: int) -> Params:
    """The model of the first `count` layers of the decoder, with all else as it is.

    Raises:
        ValueError: there are not more layers than that.
    """
    path = list(tree.stacks(params))[-1]
    layers = tree.get(params, path)
    if count >= _depth(layers):
        raise ValueError(
            f"generate: assistant_early_exit={count} must be below the {_depth(layers)} layers of the model"
        )
    some = jax.tree.map(lambda x: x[:count], layers) if isinstance(layers, Mapping) else tuple(layers[:count])
    *parents, last = path.split(".")
    return {**params, parents[0]: {**params[parents[0]], last: some}} if parents else {**params, last: some}


def _depth(layers: Any) -> int:
    return jax.tree.leaves(layers)[0].shape[0] if isinstance(layers, Mapping) else len(layers)


def _beams(rows: Sequence[GenerationConfig], sequences: int, beams: int, eos: Sequence[int], vocabulary: int) -> Choice:
    """The searches with beams."""
    from fmodels.generation.phrases import compile_phrases
    from fmodels.generation.running import STOPPING

    first = rows[0]
    settings: dict[str, Any] = {"beams": beams, "ends": len(eos)}
    penalty = 1.0 if first.length_penalty is None else first.length_penalty
    arrays: dict[str, Any] = {
        "length_penalty": jnp.asarray(penalty, jnp.float32),
        "early_stopping": jnp.asarray(STOPPING[first.early_stopping or False], jnp.int32),
    }
    groups, diversity, sampled = first.num_beam_groups or 1, first.diversity_penalty or 0.0, [r.do_sample for r in rows]
    if first.force_words_ids:
        if any(sampled) or groups > 1 or diversity:
            raise ValueError(
                "generate: force_words_ids does not go with do_sample, num_beam_groups or diversity_penalty"
            )
        arrays["phrases"], settings["widest"] = compile_phrases(first.force_words_ids, vocabulary)
        return "constrained-beams", sequences, tuple(settings.items()), arrays
    if groups > 1 or diversity:
        if any(sampled):
            raise ValueError(
                "generate: groups of beams do not go with do_sample; leave num_beam_groups or do_sample out"
            )
        if groups == 1 or beams % groups:
            raise ValueError(f"generate: num_beam_groups={groups} must be above 1 and divide num_beams={beams}")
        if not diversity:
            raise ValueError("generate: without a diversity_penalty above 0 all groups of beams would be the same")
        settings["groups"], arrays["diversity_penalty"] = groups, jnp.asarray(diversity, jnp.float32)
        return "group-beams", sequences, tuple(settings.items()), arrays
    return "beams", sequences, tuple(settings.items()), arrays
