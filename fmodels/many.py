"""`generate_many`: any number of prompts through a fixed number of rows, each refilled when it has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import programs
from fmodels.generation.config import GenerationConfig
from fmodels.generation.options import Processor
from fmodels.generation.sample import Predicate
from fmodels.generation.sampling import row_keys
from fmodels.low_rank import check_rows
from fmodels.models import Config
from fmodels.prepare import Call, bucket, prepare
from fmodels.programs import Inputs
from fmodels.types import Key, Params

REFILL = 4
"""As soon as one in so many rows has ended, these are refilled: prompts are read together, and few rows wait for it."""


class Continuation(NamedTuple):
    """What was made of one prompt.

    Attributes:
        tokens: `(n)` int32 new tokens, the end token included.
        logprobs: `(n)` float32, as in `Generated`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray


def generate_many(
    params: Params,
    config: Config,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
    batch_size: int = 16,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    constraint: Any = None,
    tokenizer: Any = None,
    experts: str | None = None,
    attention: str = "xla",
) -> list[Continuation]:
    """Continues thousands of prompts of any length, greedily or by sampling.

    `batch_size` rows are decoded together. A row that ends gives its place to the next prompt, the longest first, so that no
    row waits for another and little is padded. What a prompt becomes does not depend on the others, nor on `batch_size`. A
    progress bar is shown on terminals.

    Args:
        params: the tree.
        config: its config.
        prompts: token ids, without padding; for encoder-decoder models what the encoder reads.
        max_new_tokens: as for `generate`; for all prompts.
        key: random key; needed for sampling.
        options: one for all prompts or one for each.
        batch_size: rows that are decoded together.
        processors: as for `generate`.
        stops: as for `generate`.
        constraint: as for `generate`, one or one for each prompt.
        tokenizer: as for `generate`.
        experts: as for `generate`.
        attention: as for `generate`.

    Returns:
        A `Continuation` for each prompt, in their order.

    Raises:
        ValueError: what `generate` refuses; an empty prompt, named by its number; beams and other strategies.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> [len(c.tokens) for c in fm.generate_many(params, config, [[300], [301, 302]], max_new_tokens=3)]
        [3, 3]
    """
    if batch_size < 1:
        raise ValueError(f"generate_many: batch_size is at least 1; got {batch_size}")
    check_rows("generate_many", params, None)
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise ValueError(f"generate_many: prompts {empty} have no tokens; give each at least one")
    if not rows:
        return []
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):  # some encoders count columns, so what they read is padded on the right
        place = slice(len(row)) if config.task == "seq2seq-lm" else slice(width - len(row), None)
        tokens[i, place], mask[i, place] = row, True
    call = prepare(
        params, config, tokens, mask, max_new_tokens, key, options, None, None, None, None, processors, stops,
        constraint, tokenizer, None, None, False, 0, experts, attention,
    )  # fmt: skip
    if call.plan.strategy != "sample" or call.plan.sequences > 1 or call.plan.guided or call.max_time or call.guidance:
        raise ValueError(
            "generate_many: only greedy decoding and sampling of one sequence a prompt; use generate for the rest"
        )
    return _run(call, np.array([len(row) for row in rows]), min(batch_size, len(rows)))


def _run(call: Call, lengths: np.ndarray, batch: int) -> list[Continuation]:
    params, config, plan, inputs, options, key = call.arguments
    plan = dataclasses.replace(plan, keep_cache=False)
    keys = row_keys(key, len(lengths))
    pending = list(np.argsort(-lengths, kind="stable"))
    owner = np.full(batch, -1)
    found: dict[int, Continuation] = {}
    place = np.zeros(batch, np.int32)
    state = programs.vacant(params, config, plan, _some(inputs, place), options.take(jnp.asarray(place)), keys[place])
    refill = max(1, batch // REFILL)
    nothing = Inputs(inputs.tokens[:0], inputs.mask[:0])
    with tqdm(total=len(lengths), desc="generate", unit="prompt", disable=None, leave=False) as bar:
        while len(found) < len(lengths):
            free = np.flatnonzero(owner < 0)
            while pending and len(free):
                size = bucket(int(lengths[pending[0]]))
                group = [i for i in pending[: min(refill, len(free))] if bucket(int(lengths[i])) == size]
                pending = pending[len(group) :]
                owner[free[: len(group)]] = group
                spare = refill - len(group)  # always so many rows: one program for each bucket of lengths
                ids = np.array([*group, *[group[-1]] * spare], np.int32)
                places = np.array([*free[: len(group)], *[batch] * spare], np.int32)
                free = free[len(group) :]
                state = programs.admit(
                    params, config, plan, _some(inputs, ids, size), options.take(jnp.asarray(ids)), keys[ids], state,
                    jnp.asarray(places),
                )  # fmt: skip
            place = np.maximum(owner, 0).astype(np.int32)
            running = options.take(jnp.asarray(place))
            ended = min(batch, int((owner < 0).sum()) + refill) if pending else batch
            state = programs.until(params, config, plan, nothing, running, state, jnp.asarray(ended, jnp.int32))
            done = np.flatnonzero(np.asarray(state.done) & (owner >= 0))
            result = jax.device_get(programs.last(params, config, plan, nothing, running, state))
            for row in done:
                n = int(result.lengths[row])
                found[int(owner[row])] = Continuation(result.tokens[row, :n].copy(), result.logprobs[row, :n].copy())
            owner[done] = -1
            bar.update(len(done))
    return [found[i] for i in range(len(lengths))]


def _some(inputs: Inputs, ids: np.ndarray, width: int | None = None) -> Inputs:
    """The prompts with these numbers, as wide as the longest of their bucket."""
    first = 0 if width is None or inputs.encoder_tokens is not None else max(0, inputs.tokens.shape[1] - width)
    encoder, real = (x if x is None else x[ids, :width] for x in (inputs.encoder_tokens, inputs.encoder_mask))
    return Inputs(inputs.tokens[ids, first:], inputs.mask[ids, first:], encoder_tokens=encoder, encoder_mask=real)
