"""`generate` and `stream`: prompts in, tokens out, in one compiled program for each bucket of lengths."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation import decode
from fmodels.generation.config import GenerationConfig
from fmodels.models import Config, family
from fmodels.schema import LM_TASKS
from fmodels.types import Array, Key, Params


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: `(b t+n)` int32: the prompt as it came, then the new tokens, pad after a row's end token; `n` is the
            largest of `lengths`.
        lengths: `(b)` int32, new tokens of each row, end token included.
        logprobs: `(b n)` float32, log-probability of each new token under the distribution that it was taken from; 0
            after the end.
    """

    tokens: Array
    lengths: Array
    logprobs: Array


def generate(
    params: Params,
    config: Config,
    tokens: Any,
    *,
    mask: Any = None,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
) -> Generated:
    """Continues prompts, greedily or by sampling.

    Prefill and the whole loop are one XLA program. Prompt lengths and `max_new_tokens` are rounded up to buckets, and
    all options are traced, so that calls in the same buckets compile once. Padding on either side changes no token.

    Args:
        params: the tree. On CPU a tuple of layers (`fm.unstack_layers`) decodes faster than a stacked one.
        config: its config; the task must be a causal language model.
        tokens: `(b t)` int prompts.
        mask: `(b t)` bool or 0/1. If None, and the pad token (not being an end token) occurs in `tokens`, it masks
            itself, as in transformers; else all tokens are real.
        max_new_tokens: goes before `options.max_new_tokens` and `options.max_length`; 20 if none of them is given.
        key: random key; needed for sampling, unused without.
        options: by Hugging Face's names, one for all rows or one for each. What it leaves None is taken from the
            checkpoint's generation_config.json (`config.generation`), then from transformers' defaults.

    Returns:
        A `Generated`.

    Raises:
        ValueError: an empty prompt, a row without a real token, tokens outside of the vocabulary, more tokens than
            positions, sampling without a key.
        NotImplementedError: an option that is not here yet.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> fm.generate(params, config, [[300, 301]], max_new_tokens=3).tokens.shape
        (1, 5)

    Source: matches transformers 5's `GenerationMixin.generate` token for token when greedy.
    """
    call = _prepare(params, config, tokens, mask, max_new_tokens, key, options)
    new, logprobs, lengths = _generate(
        params, config, call.tokens, call.mask, call.options, call.key, room=call.room, sampling=call.sampling
    )
    count = int(lengths.max())
    return Generated(jnp.concatenate([call.prompt, new[:, :count]], axis=1), lengths, logprobs[:, :count])


def stream(
    params: Params,
    config: Config,
    tokens: Any,
    *,
    mask: Any = None,
    max_new_tokens: int | None = None,
    key: Key | None = None,
    options: GenerationConfig | Sequence[GenerationConfig] | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields each step's tokens `(b)` int32 as they come, until all rows have ended.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> whole = fm.generate(params, config, [[300, 301]], max_new_tokens=3).tokens[0, 2:].tolist()
        >>> [int(step[0]) for step in fm.stream(params, config, [[300, 301]], max_new_tokens=3)] == whole
        True
    """
    call = _prepare(params, config, tokens, mask, max_new_tokens, key, options)

    def steps() -> Iterator[np.ndarray]:
        state = _start(
            params, config, call.tokens, call.mask, call.options, call.key, room=call.room, sampling=call.sampling
        )
        for left in reversed(range(call.max_new_tokens)):
            yield np.asarray(state.token)
            if left == 0 or bool(state.done.all()):
                return
            state = _step(params, config, state, call.options, sampling=call.sampling)

    return steps()


def _bind(config: Config) -> decode.Forward:
    forward = family(config).forward
    return lambda params, tokens, **inputs: forward(params, config, tokens, **inputs)


@functools.partial(jax.jit, static_argnames=("config", "room", "sampling"))
def _generate(
    params: Params,
    config: Config,
    tokens: Array,
    mask: Array,
    options: decode.Options,
    key: Key,
    *,
    room: int,
    sampling: bool,
) -> tuple[Array, Array, Array]:
    forward = _bind(config)
    slots = tokens.shape[1] + room
    state = decode.start(forward, params, tokens, mask, options, key, slots=slots, sampling=sampling)
    new, logprobs, state = decode.loop(forward, params, state, options, room=room, sampling=sampling)
    return new, logprobs, state.lengths


@functools.partial(jax.jit, static_argnames=("config", "room", "sampling"))
def _start(
    params: Params,
    config: Config,
    tokens: Array,
    mask: Array,
    options: decode.Options,
    key: Key,
    *,
    room: int,
    sampling: bool,
) -> decode.State:
    slots = tokens.shape[1] + room
    return decode.start(_bind(config), params, tokens, mask, options, key, slots=slots, sampling=sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames=("state",))
def _step(
    params: Params, config: Config, state: decode.State, options: decode.Options, *, sampling: bool
) -> decode.State:
    return decode.step(_bind(config), params, state, options, sampling=sampling)


class _Call(NamedTuple):
    """The inputs of the compiled programs, checked and rounded up to buckets."""

    prompt: Array
    tokens: Array
    mask: Array
    options: decode.Options
    key: Key
    max_new_tokens: int
    room: int
    sampling: bool


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, … that is not below `length`.

    Example:
        >>> [bucket(n) for n in (1, 17, 33, 65, 100)]
        [16, 24, 48, 96, 128]
    """
    size = 16
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _prepare(
    params: Params,
    config: Config,
    tokens: Any,
    mask: Any,
    max_new_tokens: int | None,
    key: Key | None,
    options: GenerationConfig | Sequence[GenerationConfig] | None,
) -> _Call:
    if config.task not in LM_TASKS or not getattr(config, "causal", True) or config.task == "masked-lm":
        raise ValueError(
            f"generate: expected a causal language model, got a {config.model_type} for task {config.task!r}; "
            "load it with task='causal-lm'"
            + ("" if getattr(config, "causal", True) else " and is_decoder true in config.json")
        )
    prompt, present = _check_prompt(params, tokens, mask)
    rows = _rows(config, options, prompt.shape[0])
    first = rows[0]
    eos = first.eos_token_ids or config.eos_token_ids
    pad = first.pad_token_id if first.pad_token_id is not None else config.pad_token_id
    if present is None:
        present = np.ones(prompt.shape, bool) if pad is None or pad in eos else prompt != pad
    if (empty := np.flatnonzero(~present.any(-1))).size:
        raise ValueError(f"generate: rows {empty.tolist()} of the prompt have no real token; give each at least one")
    count = _count(params, first, max_new_tokens, prompt.shape[1], int(present.sum(-1).max()))
    sampling = any(row.do_sample for row in rows)
    if sampling and key is None:
        raise ValueError("generate: sampling needs a random key; pass key=jax.random.key(0), or do_sample=False")

    width = bucket(prompt.shape[1])
    if "positions" in params["embed"]:
        width = max(prompt.shape[1], min(width, params["embed"]["positions"].shape[0]))
    left = ((0, 0), (width - prompt.shape[1], 0))

    def column(name: str, default: Any, dtype: Any) -> Array:
        values = [getattr(row, name) for row in rows]
        return jnp.asarray(np.array([default if value is None else value for value in values], dtype))

    ends = np.full(max(1, 1 << (len(eos) - 1).bit_length()) if eos else 1, -1, np.int32)
    ends[: len(eos)] = eos
    arrays = decode.Options(
        temperature=column("temperature", 1.0, np.float32),
        top_k=column("top_k", 50, np.int32),
        top_p=column("top_p", 1.0, np.float32),
        min_p=column("min_p", 0.0, np.float32),
        repetition_penalty=column("repetition_penalty", 1.0, np.float32),
        sample=column("do_sample", False, bool),
        eos=jnp.asarray(ends),
        pad=jnp.asarray(pad if pad is not None else eos[0] if eos else 0, jnp.int32),
        max_new_tokens=jnp.asarray(count, jnp.int32),
    )
    return _Call(
        prompt=jnp.asarray(prompt),
        tokens=jnp.asarray(np.pad(prompt, left)),
        mask=jnp.asarray(np.pad(present, left)),
        options=arrays,
        key=jax.random.key(0) if key is None else key,
        max_new_tokens=count,
        room=bucket(count),
        sampling=sampling,
    )


def _check_prompt(params: Params, tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        prompt = np.asarray(tokens)
    except ValueError:
        raise ValueError("generate: rows of tokens differ in length; pad them and pass mask=") from None
    if prompt.ndim != 2 or prompt.size == 0:
        raise ValueError(f"generate: tokens have shape (b t) with at least one token; got {prompt.shape}")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"generate: tokens are integers; got {prompt.dtype}")
    vocabulary = params["embed"]["tokens"].shape[0]
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"generate: tokens reach from {prompt.min()} to {prompt.max()}, outside of the vocabulary 0 … {vocabulary - 1}; "
            "see resize_embeddings"
        )
    present = None if mask is None else np.asarray(mask)
    if present is not None and present.shape != prompt.shape:
        raise ValueError(f"generate: mask has shape {present.shape}, tokens have {prompt.shape}")
    return prompt.astype(np.int32), None if present is None else present.astype(bool)


def _rows(config: Config, options: Any, batch: int) -> list[GenerationConfig]:
    """One set of options a row, with the checkpoint's own where they say nothing."""
    own = config.generation.to_hf() if config.generation is not None else {}
    given = [options] * batch if options is None or isinstance(options, GenerationConfig) else list(options)
    if len(given) != batch or any(o is not None and not isinstance(o, GenerationConfig) for o in given):
        raise ValueError(
            f"generate: options is a fm.GenerationConfig or one for each of the {batch} rows; got {type(options).__name__}"
            + (f" of {len(given)}" if isinstance(options, Sequence) else "")
        )
    rows = [GenerationConfig.from_hf({**own, **(option.to_hf() if option is not None else {})}) for option in given]
    for row in rows:
        row.require_supported("generate")
    shared = ("eos_token_id", "pad_token_id", "max_new_tokens", "max_length")
    if mixed := [name for name in shared if len({getattr(row, name) for row in rows}) > 1]:
        raise ValueError(f"generate: {', '.join(mixed)} must be the same for all rows")
    return rows


def _count(params: Params, options: GenerationConfig, max_new_tokens: int | None, length: int, real: int) -> int:
    """How many tokens to add, by transformers' rules."""
    room = params["embed"]["positions"].shape[0] - real if "positions" in params["embed"] else None
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1):
        raise ValueError(f"generate: max_new_tokens is an integer of at least 1; got {max_new_tokens!r}")
    count = max_new_tokens or options.max_new_tokens
    if count is None and options.max_length is not None:
        count = options.max_length - length
        if count < 1:
            raise ValueError(
                f"generate: the prompt has {length} tokens, max_length={options.max_length} leaves no room; raise it"
            )
    elif count is None:
        count = 20 if room is None else min(20, max(room, 1))
    if room is not None and count > room + 1:
        raise ValueError(
            f"generate: the prompt has {real} tokens and {count} are to be added, but the model has {room + real} positions; "
            "shorten the prompt or lower max_new_tokens"
        )
    if room is not None and room < 0:
        raise ValueError(f"generate: the prompt has {real} tokens, more than the {room + real} positions of the model")
    return count
