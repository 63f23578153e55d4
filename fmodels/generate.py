"""`generate` and `stream`: prompts in, tokens out, in one compiled program for each bucket of lengths; `warm_up` compiles it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import programs
from fmodels.generation import constraints
from fmodels.generation.config import GenerationConfig
from fmodels.generation.options import Processor
from fmodels.generation.sample import Predicate
from fmodels.generation.strategy import Result
from fmodels.models import Config
from fmodels.prepare import Call, Generated, bucket, prepare
from fmodels.types import Array, Key, Params


def generate(
    params: Params,
    config: Config,
    tokens: Any,
    *,
    mask: Any = None,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
    decoder_tokens: Any = None,
    decoder_mask: Any = None,
    negative_tokens: Any = None,
    negative_mask: Any = None,
    processors: Sequence[Processor] = (),
    stops: Sequence[Predicate] = (),
    constraint: Any = None,
    tokenizer: Any = None,
    draft: tuple[Params, Config] | None = None,
    prefix: Generated | None = None,
    keep_cache: bool = False,
    top_logprobs: int = 0,
    experts: str | None = None,
    attention: str = "xla",
) -> Generated:
    """Continues prompts, by the strategy that the options name, as in transformers.

    Greedy and sampling; beam search and beam sampling (`num_beams`); speculation by n-grams (`prompt_lookup_num_tokens`), by
    the first layers (`assistant_early_exit`) or by a smaller model (`draft`).

    Prefill and the whole loop are one XLA program. Prompt lengths and `max_new_tokens` are rounded up to buckets, and
    options are traced, so that calls in the same buckets compile once. Padding on either side changes no token.

    Args:
        params: the tree. On CPU a tuple of layers (`fm.unstack_layers`) decodes faster than a stacked one.
        config: its config; the task must be a causal language model, or an encoder-decoder one.
        tokens: `(b t)` int prompts; of encoder-decoder models what the encoder reads.
        mask: `(b t)` bool or 0/1. If None, and the pad token (not being an end token) occurs in `tokens`, it masks
            itself, as in transformers; else all tokens are real. Windows of layers count real tokens: padding within a prompt,
            which takes room in transformers' windows, takes none here.
        max_new_tokens: goes before `options.max_new_tokens` and `options.max_length`; 20 if none of them is given.
        key: random key; needed for sampling, unused without.
        options: by Hugging Face's names, one for all rows or one for each. What it leaves None is taken from the
            checkpoint's generation_config.json (`config.generation`), then from transformers' defaults.
        decoder_tokens: `(b t)`, what the decoder of an encoder-decoder model begins with; `decoder_start_token_id` if None.
        decoder_mask: `(b t)` of them; all real if None.
        negative_tokens: `(b u)`, the text from which `guidance_scale` leads away; the last token of each prompt if None.
        negative_mask: `(b u)` of them; all real if None.
        processors: logits functions `(logits (b v), history) -> (b v)` in jax, after all others.
        stops: criteria `history -> (b) bool` in jax: rows where one is True end. See `fm.generation.History`.
        constraint: from `fm.constraints`, or one for each row (None for free rows); needs `tokenizer`.
        tokenizer: of the text, for `constraint` and `stop_strings`: a `tokenizers.Tokenizer`, a path, a list of the bytes
            of each token.
        draft: parameters and config of a smaller model that proposes tokens; what comes out does not depend on it.
        prefix: what an earlier call with `keep_cache` has returned: `tokens` go on after it, and it is not read again.
        keep_cache: whether to return the cache.
        top_logprobs: how many of the likeliest tokens of each step to return with their log-probabilities.
        experts: how a mixture runs its experts, as for `forward`.
        attention: the kernel that reads the prompt, as for `forward`. Steps have XLA's: one token with all before it makes
            few scores.

    Returns:
        A `Generated`.

    Raises:
        ValueError: an empty prompt, a row without a real token, tokens outside of the vocabulary, more tokens than
            positions, sampling without a key, options that contradict each other, a kernel that does not fit, a call from
            within `jit`.
        NotImplementedError: an option that is not supported; a text that outgrows the short rotary factors of Phi-3, beyond which
            its cache would have to be computed again.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> fm.generate(params, config, [[300, 301]], max_new_tokens=3).tokens.shape
        (1, 5)

    Source: matches transformers 5's `GenerationMixin.generate` token for token when it does not sample.
    """
    call = prepare(
        params, config, tokens, mask, max_new_tokens, key, options, decoder_tokens, decoder_mask, negative_tokens,
        negative_mask, processors, stops, constraint, tokenizer, draft, prefix, keep_cache, top_logprobs, experts, attention,
    )  # fmt: skip
    if call.guidance is not None:
        result = _with_host(call, call.guidance)
    else:
        result = _in_time(call) if call.max_time is not None else programs.whole(*call.arguments)
    return _generated(call, result)


def stream(
    params: Params,
    config: Config,
    tokens: Any,
    *,
    mask: Any = None,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
    **others: Any,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields each step's tokens `(b)` int32 as they come, until all rows have ended.

    Args:
        params: the tree.
        config: its config.
        tokens: `(b t)` int prompts.
        mask: `(b t)` of them.
        max_new_tokens: as for `generate`.
        key: random key.
        options: as for `generate`.
        others: what else `generate` takes.

    Raises:
        ValueError: what `generate` refuses; strategies that do not know a token until the end, such as beams.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> whole = fm.generate(params, config, [[300, 301]], max_new_tokens=3).tokens[0, 2:].tolist()
        >>> [int(step[0]) for step in fm.stream(params, config, [[300, 301]], max_new_tokens=3)] == whole
        True
    """
    arguments = _other_arguments("stream", others)
    call = prepare(params, config, tokens, mask, max_new_tokens, key, options, **arguments)
    if call.guidance is not None:
        raise ValueError("stream: this constraint is too large for tables; use generate")
    if call.plan.strategy not in ("sample", "dola"):
        raise ValueError(f"stream: {call.plan.strategy} does not make a token of each row at each step; use generate")

    def steps() -> Iterator[np.ndarray]:
        begun, one = time.monotonic(), jnp.asarray(1, jnp.int32)
        state, more, newest = programs.first(*call.arguments)
        while True:
            yield np.asarray(newest)
            if not more or (call.max_time is not None and time.monotonic() - begun > call.max_time):
                return
            state, more, newest = programs.steps(*call.arguments[:-1], state, one)

    return steps()


def warm_up(
    params: Params,
    config: Config,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
    **others: Any,
) -> int:
    """Compiles, ahead of time, what `generate` runs for prompts of these lengths: a program for each bucket of them.

    Nothing is computed, and `params` may be shapes alone, so it can go on while weights are loaded. Calls of `generate` that
    differ in nothing but prompts, key, and numbers in the options then find their program; where JAX has a cache on disk
    (`jax_compilation_cache_dir`), those of later processes do so, too.

    Args:
        params: the tree, or one of `jax.ShapeDtypeStruct` as `fm.abstract` gives, with the shardings that there will be.
        config: its config.
        lengths: of prompts; of encoder-decoder models of what the encoder reads.
        batch_size: rows of a call.
        max_new_tokens: as for `generate`.
        key: as for `generate`; one that is like `jax.random.key(0)` if None.
        options: as for `generate`.
        others: what else `generate` takes, but the prompts.

    Returns:
        How many programs there are.

    Raises:
        ValueError: what `generate` refuses; a constraint that the host follows step by step.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.load_config(fm.assets.TINY_LLAMA)
        >>> warm_up(fm.abstract(config), config, [5, 12, 20], max_new_tokens=3)
        2
    """
    arguments = _other_arguments("warm_up", others)
    longest: dict[int, int] = {}
    for length in lengths:
        longest[bucket(length)] = max(length, longest.get(bucket(length), 0))
    count = 0
    for length in tqdm(sorted(longest.values()), desc="compile", unit="bucket", disable=None, leave=False):
        rows = np.ones((batch_size, length), np.int32)
        key = jax.random.key(0) if key is None else key
        call = prepare(params, config, rows, np.ones_like(rows), max_new_tokens, key, options, **arguments)
        if call.guidance is not None:
            raise ValueError(
                "warm_up: this constraint is too large for tables, and is followed by the host step by step"
            )
        if call.max_time is None:
            lowered = [programs.whole.lower(*call.arguments)]
        else:
            state, *_ = programs.first.eval_shape(*call.arguments)
            step = (*call.arguments[:-1], state, jnp.asarray(STEPS_AT_ONCE, jnp.int32))
            lowered = [
                programs.first.lower(*call.arguments), programs.steps.lower(*step), programs.last.lower(*step[:-1]),
            ]  # fmt: skip
        for program in lowered:
            program.compile()
        count += len(lowered)
    return count


_OTHERS: dict[str, Any] = {
    "decoder_tokens": None, "decoder_mask": None, "negative_tokens": None, "negative_mask": None, "processors": (),
    "stops": (), "constraint": None, "tokenizer": None, "draft": None, "prefix": None, "keep_cache": False,
    "top_logprobs": 0, "experts": None, "attention": "xla",
}  # fmt: skip
"""The arguments of `generate` that `stream` and `warm_up` pass on, with their defaults."""


def _other_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - _OTHERS.keys()):
        raise TypeError(f"{name}: unknown argument {unknown[0]!r}")
    return {**_OTHERS, **given}


STEPS_AT_ONCE = 8
"""Steps between two looks at the clock, where there is a `max_time`."""


def _in_time(call: Call) -> Result:
    """The program in pieces, with a look at the clock between them."""
    assert call.max_time is not None
    begun, count = time.monotonic(), jnp.asarray(STEPS_AT_ONCE, jnp.int32)
    state, more, _ = programs.first(*call.arguments)
    while bool(more) and time.monotonic() - begun < call.max_time:
        state, more, _ = programs.steps(*call.arguments[:-1], state, count)
    return programs.last(*call.arguments[:-1], state)


def _with_host(call: Call, guidance: constraints.Guidance) -> Result:
    """A step at a time, each with the tokens that llguidance allows on the host."""
    params, config, plan, inputs, options, key = call.arguments
    vocabulary, batch = params["embed"]["tokens"].shape[0], len(call.prompt)
    rows, left = guidance.start(), int(options.max_new_tokens)
    one, state, more = jnp.asarray(1, jnp.int32), None, True
    while more:
        mask = constraints.unpack(jnp.asarray(guidance.mask(rows, [left] * batch)), vocabulary)
        now = options._replace(mask=mask)
        if state is None:
            state, _, newest = programs.first(params, config, plan, inputs, now, key)
        else:
            state, _, newest = programs.steps(params, config, plan, inputs, now, state, one)
        rows, taken = guidance.advance(rows, np.asarray(newest), [left] * batch)
        state, more = programs.correct(state, jnp.asarray(taken), options)
        left -= 1
    return programs.last(params, config, plan, inputs, options, state)


def _generated(call: Call, result: Result) -> Generated:
    rows = result.tokens.shape[0] // call.prompt.shape[0]
    prompt, present = (np.repeat(x, rows, axis=0) for x in (call.prompt, call.present))
    count = max(int(result.lengths.max()), 1)
    new = np.arange(count)[None] < np.asarray(result.lengths)[:, None]
    return Generated(
        tokens=jnp.concatenate([jnp.asarray(prompt), result.tokens[:, :count]], axis=1),
        mask=jnp.asarray(np.concatenate([present, new], axis=1)),
        lengths=result.lengths,
        logprobs=result.logprobs[:, :count],
        sequence_scores=result.sequence_scores,
        beam_indices=None if result.beam_indices is None else result.beam_indices[:, :count],
        cache=result.cache,
        outputs=_outputs(call, result, count),
    )


def _outputs(call: Call, result: Result, count: int) -> dict[str, Array]:
    """What was asked for of the first `count` new tokens, with columns of the text in the place of slots of the cache."""
    outputs = {name: value[:, :count] for name, value in result.outputs.items()}
    if (weights := outputs.get("attentions")) is not None:
        assert result.slots is not None
        present = np.repeat(call.present, weights.shape[0] // call.present.shape[0], axis=0)
        real = np.pad(present, ((0, 0), (0, count)), constant_values=True)
        slots = np.argsort(~np.asarray(result.slots), axis=1, kind="stable")  # those of the text, in its order
        index = np.take_along_axis(slots, np.where(real, real.cumsum(1) - 1, 0), axis=1)
        found = jnp.take_along_axis(weights, jnp.asarray(index)[:, None, None, None], axis=-1)
        outputs["attentions"] = jnp.where(real[:, None, None, None], found, 0)
    if (weights := outputs.get("cross_attentions")) is not None:
        outputs["cross_attentions"] = weights[..., : call.read]
    return outputs
