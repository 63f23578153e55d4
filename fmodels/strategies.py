"""Which strategy the options name, by transformers' rules, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from fmodels.generation.beams import beam_search
from fmodels.generation.config import GenerationConfig
from fmodels.generation.running import STOPPING
from fmodels.generation.sample import sample
from fmodels.generation.strategy import Strategy
from fmodels.models import Config
from fmodels.types import Params

STRATEGIES: dict[str, Callable[..., Strategy]] = {"sample": sample, "beams": beam_search}
"""Name -> `make(model, options, *, room, sequences, processors, stops, ask, **settings) -> Strategy`."""

Choice = tuple[str, int, tuple[tuple[str, Any], ...], dict[str, Any]]
"""Name, rows returned for each prompt, static settings, arrays."""


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
    if beams > 1:
        return _beams(first, sequences, beams, eos)
    return "sample", sequences, (), {}


def _beams(options: GenerationConfig, sequences: int, beams: int, eos: Sequence[int]) -> Choice:
    """The searches with beams."""
    settings: dict[str, Any] = {"beams": beams, "ends": len(eos)}
    penalty = 1.0 if options.length_penalty is None else options.length_penalty
    arrays = {
        "length_penalty": jnp.asarray(penalty, jnp.float32),
        "early_stopping": jnp.asarray(STOPPING[options.early_stopping or False], jnp.int32),
    }
    return "beams", sequences, tuple(settings.items()), arrays
