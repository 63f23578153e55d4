"""The compiled programs behind `generate` and `stream`: a model is bound, a strategy is made, its steps are run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation import history as said
from fmodels.generation.options import Options, Processor
from fmodels.generation.sample import NOTHING, Ask, Predicate, is_end
from fmodels.generation.strategy import Model, Result, Start, Strategy
from fmodels.models import Config, family
from fmodels.models._base import logits_of
from fmodels.nn import kernels
from fmodels.nn.cache import grow, init_cache, put_rows, rings, set_rows
from fmodels.nn.positions import from_mask
from fmodels.strategies import maker
from fmodels.types import Array, Cache, Key, Output, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static in a program: another plan is another program.

    Attributes:
        strategy: its name in `strategies.STRATEGIES`.
        room: columns for new tokens.
        sequences: rows that are returned for each prompt.
        settings: static settings of the strategy, by name. `ngrams` makes the history know of n-grams, `hidden_states` the
            prefill return them, `draft_config` binds the parameters `draft` in `Inputs.extra`.
        processors: logits functions of the user's.
        stops: stopping criteria of the user's.
        ask: what to keep of each step.
        chunk: tokens of the prompt that are read at a time, or None.
        guided: whether a second text is read along.
        keep_cache: whether the cache is returned.
        quantized: whether keys and values are kept in 8 bits.
        experts: how experts are run, in models that have some; None for the platform's own way.
        attention: the kernel that reads prompts.
    """

    strategy: str = "sample"
    room: int
    sequences: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    processors: tuple[Processor, ...] = ()
    stops: tuple[Predicate, ...] = ()
    ask: Ask = NOTHING
    chunk: int | None = None
    guided: bool = False
    keep_cache: bool = False
    quantized: bool = False
    experts: str | None = None
    attention: str = "xla"


class Inputs(NamedTuple):
    """The arrays of a call, in buckets; padding on the left.

    Attributes:
        tokens: `(b t)` int32, of the decoder.
        mask: `(b t)` bool.
        text: tokens and mask of all that was said, where `tokens` go on after a cache.
        encoder_tokens, encoder_mask: `(b c)`, of encoder-decoder models.
        cache: what was read before, continued.
        other_tokens, other_mask: `(b u)`, the second text under guidance.
        guidance: `()` float32, its scale.
        extra: arrays of the strategy's own, by name.
    """

    tokens: Array
    mask: Array
    text: tuple[Array, Array] | None = None
    encoder_tokens: Array | None = None
    encoder_mask: Array | None = None
    cache: Cache | None = None
    other_tokens: Array | None = None
    other_mask: Array | None = None
    guidance: Array | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012  a default that nothing writes to


def bind(params: Params, config: Config, plan: Plan, inputs: Inputs) -> Model:
    """The model with its parameters, and with what the encoder has read."""
    forward, encode = family(config).forward, getattr(family(config), "encode", None)
    cross = None
    if inputs.encoder_tokens is not None and encode is not None:
        with kernels.using(plan.attention):
            cross = encode(params, config, inputs.encoder_tokens, mask=inputs.encoder_mask)
    experts = {} if plan.experts is None or not hasattr(config, "num_experts") else {"experts": plan.experts}

    def run(tokens: Array, mask: Array | None, positions: Array, cache: Cache, **want: Any) -> Output:
        if cache.cross is None:
            return forward(params, config, tokens, mask=mask, positions=positions, cache=cache, **experts, **want)
        if "positions" in params["decoder"].get("embed", params["embed"]):  # else it counts distances
            want["positions"] = positions
        return forward(params, config, None, decoder_tokens=tokens, decoder_mask=mask, cache=cache, **want)

    # Guesses are taken back, and the token that contrastive search has read at the end.
    ahead = dict(plan.settings).get("tokens", int(plan.strategy == "contrastive"))

    def prefill(tokens: Array, mask: Array, slots: int, *, before: Cache | None = None, **want: Any) -> Output:
        chunk = plan.chunk
        if chunk is not None and tokens.shape[1] > chunk and tokens.shape[1] % chunk:  # whole chunks
            more = -tokens.shape[1] % chunk
            tokens, mask = (jnp.pad(x, ((0, 0), (more, 0))) for x in (tokens, mask))
            out = prefill(tokens, mask, slots + more, before=before, **want)
            return out if out.hidden is None else out._replace(hidden=out.hidden[:, more:])
        batch, width = tokens.shape
        columns = slots if before is None else before.mask.shape[1] + slots
        sizes = rings(params, config, columns, ahead=ahead)
        if before is not None:
            cache = grow(before, columns, sizes)
        elif chunk is None:  # the prompt attends to itself alone, not to the room for what is to come
            cache = init_cache(params, batch, width, quantized=plan.quantized)._replace(cross=cross)
        else:
            cache = init_cache(params, batch, slots, quantized=plan.quantized, config=config, ahead=ahead)
            cache = cache._replace(cross=cross)
        positions = from_mask(mask) + cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
        last = jnp.full(batch, (chunk or width) - 1, jnp.int32)
        if chunk is None or width <= chunk:
            out = run(tokens, mask, positions, cache, select=jnp.full(batch, width - 1, jnp.int32), **want)
        else:
            parts = jax.tree.map(
                lambda x: x.reshape(batch, width // chunk, chunk).swapaxes(0, 1), (tokens, mask, positions)
            )

            def read(cache: Cache, part: Any) -> tuple[Cache, Output]:
                out = run(part[0], part[1], part[2], cache, select=last, **want)
                assert out.cache is not None
                return out.cache, out._replace(cache=None)

            cache, outs = jax.lax.scan(read, cache, parts)
            out = jax.tree.map(lambda x: x[-1], outs)._replace(cache=cache)
            if outs.hidden is not None:
                out = out._replace(hidden=outs.hidden.swapaxes(0, 1).reshape(batch, width, -1))
        assert out.cache is not None
        return out._replace(cache=grow(out.cache, columns, sizes))

    def decode(tokens: Array, positions: Array, cache: Cache, mask: Array | None = None, **want: Any) -> Output:
        return run(tokens, mask, positions, cache, **want)

    def head(hidden: Array) -> Array:
        return logits_of(params, config, hidden)

    table = params["embed"].get("positions")

    def prefill_by_kernel(*args: Any, **want: Any) -> Output:
        with kernels.using(plan.attention):
            return prefill(*args, **want)

    model = Model(prefill_by_kernel, decode, head, None if table is None else table.shape[0])
    return _guided(model, inputs) if plan.guided else model


def _guided(model: Model, inputs: Inputs) -> Model:
    """Classifier-free guidance: `scale · (log p - log q) + log q`, where `q` reads the second text instead of the prompt.

    Source: Ho and Salimans 2022; Sanchez et al. 2023; matches transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor`.
    """
    assert inputs.other_tokens is not None and inputs.other_mask is not None and inputs.guidance is not None
    scale = inputs.guidance
    other_tokens, other_mask = inputs.other_tokens, inputs.other_mask

    def mix(out: Output, other: Output) -> Output:
        assert out.logits is not None and other.logits is not None and out.cache is not None
        p, q = (jax.nn.log_softmax(x, axis=-1) for x in (out.logits, other.logits))
        return out._replace(logits=scale * (p - q) + q, cache=out.cache._replace(other=other.cache))

    def prefill(tokens: Array, mask: Array, slots: int, **want: Any) -> Output:
        more = slots - tokens.shape[1] + other_tokens.shape[1]
        return mix(model.prefill(tokens, mask, slots, **want), model.prefill(other_tokens, other_mask, more))

    def decode(tokens: Array, positions: Array, cache: Cache, mask: Array | None = None, **want: Any) -> Output:
        other = cache.other
        assert other is not None
        there = other.mask.sum(-1, keepdims=True, dtype=jnp.int32) + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return mix(
            model.decode(tokens, positions, cache._replace(other=None), mask=mask, **want),
            model.decode(tokens, there, other, mask=mask),
        )

    return Model(prefill, decode, model.head, model.max_positions)


def _start(
    params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, key: Key
) -> tuple[Strategy, Start]:
    """The strategy and what the model has read of the prompts."""
    model = bind(params, config, plan, inputs)
    strategy = _strategy(model, options, plan, inputs)
    slots = inputs.tokens.shape[1] + plan.room
    want: dict[str, Any] = {"before": inputs.cache} if inputs.cache is not None else {}
    states = plan.ask.hidden_states or dict(plan.settings).get("hidden_states", False)
    want["keep"] = plan.ask.keep._replace(hidden_states=states)
    out = model.prefill(inputs.tokens, inputs.mask, slots, **want)
    assert out.logits is not None
    text = (inputs.tokens, inputs.mask) if inputs.text is None else inputs.text
    context = None
    if options.context:
        context = text
        if inputs.encoder_tokens is not None:
            whole = jnp.ones(inputs.encoder_tokens.shape, bool) if inputs.encoder_mask is None else inputs.encoder_mask
            context = (inputs.encoder_tokens, whole)
    history = said.begin(
        *text,
        out.logits.shape[-1],
        room=plan.room,
        pad=options.pad,
        ngrams=options.ngrams or dict(plan.settings).get("ngrams", False),
        context=context,
        automata=options.automata,
    )
    return strategy, Start(out, history, key)


def _strategy(model: Model, options: Options, plan: Plan, inputs: Inputs) -> Strategy:
    settings = {name: value for name, value in plan.settings if name not in ("ngrams", "hidden_states")} | inputs.extra
    if "draft_config" in settings:
        alone = dataclasses.replace(plan, guided=False)
        settings["draft"] = bind(settings["draft"], settings.pop("draft_config"), alone, inputs)
    return maker(plan.strategy)(
        model,
        options,
        room=plan.room,
        sequences=plan.sequences,
        processors=plan.processors,
        stops=plan.stops,
        ask=plan.ask,
        **settings,
    )


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def whole(params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, key: Key) -> Result:
    """Prefill and all steps, as one program."""
    strategy, start = _start(params, config, plan, inputs, options, key)
    return _kept(strategy.finish(strategy.run(start)), plan)


def _kept(result: Result, plan: Plan) -> Result:
    return result if plan.keep_cache else result._replace(cache=None)


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def first(params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, key: Key) -> Any:
    """Prefill and the first step: the state, whether it wants another, and its newest tokens."""
    strategy, start = _start(params, config, plan, inputs, options, key)
    state = strategy.init(start)
    return state, strategy.more(state), strategy.newest(state)


@functools.partial(jax.jit, static_argnames=("config", "plan"), donate_argnames=("state",))
def steps(
    params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, state: Any, count: Array
) -> Any:
    """At most `count` more steps."""
    strategy = _strategy(bind(params, config, plan, inputs), options, plan, inputs)

    def more(carry: Any) -> Array:
        return strategy.more(carry[0]) & (carry[1] < count)

    def step(carry: Any) -> Any:
        return strategy.step(carry[0]), carry[1] + 1

    state, _ = jax.lax.while_loop(more, step, (state, jnp.zeros((), jnp.int32)))
    return state, strategy.more(state), strategy.newest(state)


@functools.partial(jax.jit, donate_argnames=("state",))
def correct(state: Any, token: Array, options: Options) -> tuple[Any, Array]:
    """A state of the strategy `sample` whose newest tokens are `token` `(b)`, and whether it wants another step."""
    changed = token != state.token
    history = state.history
    rows, column = jnp.arange(token.shape[0]), history.end - 1
    column = jnp.where(changed, column, history.tokens.shape[1])
    history = history._replace(
        tokens=history.tokens.at[rows, column].set(token, mode="drop"), seen=history.seen.at[rows, token].max(changed)
    )
    ended = is_end(token, options.eos) | (history.new >= options.max_new_tokens)
    done = jnp.where(changed, ended, state.done)
    return state._replace(history=history, token=token, done=done), ~done.all()


@functools.partial(jax.jit, static_argnames=("config", "plan"), donate_argnames=("state",))
def admit(
    params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, keys: Key, state: Any, rows: Array
) -> Any:
    """A running state of the strategy `sample` with new prompts in the places `rows` `(n)`.

    Args:
        params: the tree.
        config: its config.
        plan: of the running state.
        inputs: the `n` new prompts.
        options: of these.
        keys: `(n)` random keys.
        state: the running state, from `vacant`.
        rows: numbers beyond the last row are dropped.
    """
    strategy, start = _start(params, config, plan, inputs, options, keys)
    new = strategy.init(start)
    rest, new_rest = ((s.history, s.token, s.done, s.logprobs, s.keys, s.kept) for s in (state, new))
    merged = jax.tree.map(lambda x, y: set_rows(x, y, rows), rest, new_rest)
    names = ("history", "token", "done", "logprobs", "keys", "kept")
    return state._replace(cache=put_rows(state.cache, new.cache, rows), **dict(zip(names, merged, strict=True)))


def vacant(params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, keys: Key) -> Any:
    """A state for as many rows as `inputs` has, of which none is taken: each counts as ended."""
    shapes = jax.eval_shape(
        functools.partial(first, config=config, plan=plan), params, inputs=inputs, options=options, key=keys
    )[0]
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(keys=None))
    batch = keys.shape[0]
    cache = state.cache._replace(length=jnp.zeros(batch, jnp.int32))
    return state._replace(done=jnp.ones(batch, bool), keys=keys, cache=cache)


@functools.partial(jax.jit, static_argnames=("config", "plan"), donate_argnames=("state",))
def until(
    params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, state: Any, ended: Array
) -> Any:
    """Steps until so many rows have ended, those that had before included."""
    strategy = _strategy(bind(params, config, plan, inputs), options, plan, inputs)
    return jax.lax.while_loop(lambda state: state.done.sum(dtype=jnp.int32) < ended, strategy.step, state)


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def last(params: Params, config: Config, plan: Plan, inputs: Inputs, options: Options, state: Any) -> Result:
    """What a state has made."""
    return _kept(_strategy(bind(params, config, plan, inputs), options, plan, inputs).finish(state), plan)


def compile_count() -> int:
    """How many programs of generation this process has compiled (or traced) so far.

    Example:
        >>> isinstance(compile_count(), int)
        True
    """
    programs: tuple[Any, ...] = (whole, first, steps, last, admit, until)
    return sum(program._cache_size() for program in programs)
