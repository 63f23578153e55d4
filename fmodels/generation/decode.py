"""The state of a generation and its two moves, `start` and `step`; `generate` loops over them, `stream` yields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import logits as rules
from fmodels.nn.cache import init_cache
from fmodels.nn.positions import from_mask, last_real
from fmodels.types import Array, Cache, Key, Output, Params

Forward = Callable[..., Output]
"""A family's forward with its config bound: `forward(params, tokens, mask=, positions=, cache=, select=)`."""


class Options(NamedTuple):
    """The options as arrays, so that other values need no other program.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: `(b)`.
        sample: `(b)` bool, whether the row samples or takes the likeliest token.
        eos: `(e)` int32, the end tokens, filled up with -1.
        pad: `()` int32, what rows emit after their end.
        max_new_tokens: `()` int32.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    sample: Array
    eos: Array
    pad: Array
    max_new_tokens: Array


class State(NamedTuple):
    """What a step needs and returns.

    Attributes:
        token: `(b)` int32, the newest token of each row.
        logprob: `(b)` float32, its log-probability after all processing.
        position: `(b)` int32, where `token` stands.
        done: `(b)` bool, rows that have ended.
        lengths: `(b)` int32, new tokens so far, end token included.
        steps: `()` int32, steps so far.
        seen: `(b v)` bool, tokens of the prompt and those generated.
        cache: keys and values of all tokens before `token`.
        key: random key of the next step.
    """

    token: Array
    logprob: Array
    position: Array
    done: Array
    lengths: Array
    steps: Array
    seen: Array
    cache: Cache
    key: Key


def start(
    forward: Forward,
    params: Params,
    tokens: Array,
    mask: Array,
    options: Options,
    key: Key,
    *,
    slots: int,
    sampling: bool,
) -> State:
    """Reads the prompts and chooses the first new token of each row.

    Args:
        forward: the family's forward with its config bound.
        params: the tree.
        tokens: `(b t)` int32 prompts.
        mask: `(b t)` bool.
        options: arrays.
        key: random key.
        slots: room of the cache, for the prompt and all new tokens; static.
        sampling: whether any row samples; static.
    """
    batch, length = tokens.shape
    out = forward(
        params,
        tokens,
        mask=mask,
        positions=from_mask(mask),
        cache=init_cache(params, batch, length),
        select=last_real(mask),
    )
    assert out.logits is not None and out.cache is not None
    rows = jnp.arange(batch)[:, None]
    seen = jnp.zeros((batch, out.logits.shape[-1]), bool).at[rows, tokens].max(mask)
    state = State(
        token=jnp.zeros(batch, jnp.int32),
        logprob=jnp.zeros(batch, jnp.float32),
        position=mask.sum(-1, dtype=jnp.int32) - 1,
        done=jnp.zeros(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        seen=seen,
        cache=_grow(out.cache, slots),
        key=key,
    )
    return _choose(state, out.logits[:, 0], options, sampling)


def step(forward: Forward, params: Params, state: State, options: Options, *, sampling: bool) -> State:
    """Reads the newest token of each row and chooses the next."""
    out = forward(
        params,
        state.token[:, None],
        mask=jnp.ones((state.token.shape[0], 1), bool),
        positions=state.position[:, None],
        cache=state.cache,
    )
    assert out.logits is not None and out.cache is not None
    return _choose(state._replace(cache=out.cache), out.logits[:, 0], options, sampling)


def _grow(cache: Cache, slots: int) -> Cache:
    """A cache with room for `slots`: the prompt attends only to itself, not to the room for what is to come."""
    more = slots - cache.mask.shape[1]

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

    keys, values = jax.tree.map(pad, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, mask=jnp.pad(cache.mask, [(0, 0), (0, more)]))


def process(logits: Array, seen: Array, options: Options, *, sampling: bool) -> Array:
    """All logits functions in transformers' order; those for sampling leave rows that do not sample alone."""
    logits = rules.repetition_penalty(logits, seen, options.repetition_penalty)
    if not sampling:
        return logits
    warped = rules.temperature(logits, options.temperature)
    warped = rules.top_k(warped, options.top_k)
    warped = rules.top_p(warped, options.top_p)
    warped = rules.min_p(warped, options.min_p)
    return jnp.where(options.sample[:, None], warped, logits)


def _choose(state: State, logits: Array, options: Options, sampling: bool) -> State:
    batch = logits.shape[0]
    logits = process(logits, state.seen, options, sampling=sampling)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = state.key
    if sampling:
        key, now = jax.random.split(key)
        # A key for each row: what a row draws does not depend on the others.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(now, jnp.arange(batch))
        drawn = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        token = jnp.where(options.sample, drawn, token)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]
    token = jnp.where(state.done, options.pad, token)
    ended = (token[:, None] == options.eos[None, :]).any(-1)
    return state._replace(
        token=token,
        logprob=jnp.where(state.done, 0.0, logprob),
        position=state.position + 1,
        done=state.done | ended,
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        steps=state.steps + 1,
        seen=state.seen.at[jnp.arange(batch), token].max(~state.done),
        key=key,
    )


def loop(
    forward: Forward, params: Params, state: State, options: Options, *, room: int, sampling: bool
) -> tuple[Array, Array, State]:
    """Steps until every row has ended or `max_new_tokens` are there.

    Returns:
        Tokens `(b room)` int32 and their log-probabilities, of which the first `state.steps` columns are written, and
        the last state.
    """
    batch = state.token.shape[0]
    zero = jnp.zeros((), jnp.int32)

    def put(buffer: Array, column: Array, count: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, column[:, None], (zero, count))

    def more(carry: Any) -> Array:
        state = carry[2]
        return (state.steps < options.max_new_tokens) & ~state.done.all()

    def body(carry: Any) -> Any:
        tokens, logprobs, state = carry
        count = state.steps
        state = step(forward, params, state, options, sampling=sampling)
        return put(tokens, state.token, count), put(logprobs, state.logprob, count), state

    tokens = put(jnp.full((batch, room), options.pad, jnp.int32), state.token, zero)
    logprobs = put(jnp.zeros((batch, room), jnp.float32), state.logprob, zero)
    return jax.lax.while_loop(more, body, (tokens, logprobs, state))
