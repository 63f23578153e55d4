"""What every way of decoding is: a state, a step, and what is read off at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.generation.history import History
from fmodels.types import Array, Cache, Key, Output


class Model(NamedTuple):
    """A language model with its parameters bound.

    Attributes:
        prefill: `(tokens (b t), mask (b t), slots, **want) -> Output`: logits `(b 1 v)` at each row's last token, and a
            cache with room for `slots` tokens. `want` is `keep=Keep(…)`.
        decode: `(tokens (b t), positions (b t), cache, mask=None, **want) -> Output`: logits `(b t v)`.
        head: hidden states `(b t d)` to logits `(b t v)`, without the final norm.
        max_positions: size of the table of positions, or None.
    """

    prefill: Callable[..., Output]
    decode: Callable[..., Output]
    head: Callable[[Array], Array]
    max_positions: int | None = None


class Start(NamedTuple):
    """What a strategy begins with, a row for each prompt.

    Attributes:
        out: of the prefill; `out.logits` `(b 1 v)`, `out.cache`, `out.hidden` `(b t d)`.
        history: of the prompts.
        key: random key.
    """

    out: Output
    history: History
    key: Key


class Next(NamedTuple):
    """What the model says of each row's next token.

    Attributes:
        logits: `(b v)` float32.
        layers: what is kept of the layers at the newest token, by name, as `by_token` without `t`.
    """

    logits: Array
    layers: dict[str, Array]

    def repeat(self, count: int) -> Next:
        """Each row `count` times, side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self)


def last(out: Output, slots: int) -> Next:
    """After the last token of an output `(b t …)`; `slots` as in `by_token`."""
    assert out.logits is not None
    return Next(out.logits[:, -1], {name: x[:, -1] for name, x in by_token(out, slots).items()})


def by_token(out: Output, slots: int) -> dict[str, Array]:
    """What an output keeps of the layers: `hidden_states` `(b t l+1 d)`, `attentions` and `cross_attentions` `(b t l h s)`.

    Args:
        out: of the model.
        slots: of the cache; the prefill may have seen only the first of them.
    """
    found: dict[str, Array] = {}
    if out.hidden_states is not None:
        found["hidden_states"] = jnp.moveaxis(out.hidden_states, 0, 2)
    if out.attentions is not None:
        weights = jnp.moveaxis(out.attentions, (3, 0), (1, 2))
        found["attentions"] = jnp.pad(weights, [(0, 0)] * 4 + [(0, slots - weights.shape[-1])])
    if out.cross_attentions is not None:
        found["cross_attentions"] = jnp.moveaxis(out.cross_attentions, (3, 0), (1, 2))
    return found


class Result(NamedTuple):
    """What a strategy has made, a row for each sequence that is returned.

    Attributes:
        tokens: `(r n)` int32 new tokens, pad after the end.
        lengths: `(r)` int32, new tokens with the end token.
        logprobs: `(r n)` float32; 0 after the end.
        sequence_scores: `(r)` float32, of beams.
        beam_indices: `(r n)` int32, of beams: the row of each token's logits, -1 after the end.
        cache: keys and values of all tokens but each row's last.
        outputs: what was asked for, by name, a row for each row of the model; the last axis of `attentions` are slots.
        slots: `(m s)` bool, of each row of the model: which slots of the cache hold the text.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    sequence_scores: Array | None = None
    beam_indices: Array | None = None
    cache: Cache | None = None
    outputs: dict[str, Array] = {}  # noqa: RUF012  a default that nothing writes to
    slots: Array | None = None


class Strategy(NamedTuple):
    """A way of decoding, bound to a model and its options.

    Attributes:
        init: `Start` to the first state, with the first token chosen.
        step: a state to the next.
        more: whether a state wants another step, `()` bool.
        finish: the last state to a `Result`.
        newest: the tokens that the last step has added, for streaming: `(b)` int32.
        run: `Start` to the last state.
    """

    init: Callable[[Start], Any]
    step: Callable[[Any], Any]
    more: Callable[[Any], Array]
    finish: Callable[[Any], Result]
    newest: Callable[[Any], Array]
    run: Callable[[Start], Any]


def by_steps(
    init: Callable[[Start], Any],
    step: Callable[[Any], Any],
    more: Callable[[Any], Array],
    finish: Callable[[Any], Result],
    newest: Callable[[Any], Array],
) -> Strategy:
    """The strategy that takes steps after the first state until it wants no more; arguments as in `Strategy`."""
    return Strategy(init, step, more, finish, newest, lambda start: jax.lax.while_loop(more, step, init(start)))


def by_choices(
    begin: Callable[[Start], tuple[Any, Next]],
    advance: Callable[[Any], tuple[Any, Next]],
    choose: Callable[[Any, Next], Any],
    more: Callable[[Any], Array],
    finish: Callable[[Any], Result],
    newest: Callable[[Any], Array],
    *,
    keeps: bool,
) -> Strategy:
    """The strategy that makes the same choice after the prompt as after each step of the model.

    Choosing takes longer to compile than a small model does: `run` has one copy of it.

    Args:
        begin: `Start` to a state without new tokens, and what the model says after the prompt.
        advance: a state to the same with the newest tokens read, and what the model says.
        choose: what is read and what the model says to a state with another token.
        more: as in `Strategy`.
        finish: likewise.
        newest: likewise.
        keeps: whether a state has room for what is kept of each token; that of `begin` need not have it yet.
    """

    def prompt(start: Start) -> tuple[Any, Next]:
        state, said = begin(start)
        return (_complete(state, jax.eval_shape(choose, state, said)) if keeps else state), said

    def run(start: Start) -> Any:
        def one(carry: tuple[Array, Any, Next]) -> tuple[Array, Any, Next]:
            state = choose(*carry[1:])
            go = more(state)
            # A loop that runs once or not at all: XLA's CPU backend copies a whole cache for a branch.
            _, state, out = jax.lax.while_loop(
                lambda carry: carry[0], lambda carry: (~carry[0], *advance(carry[1])), (go, state, carry[2])
            )
            return go, state, out

        return jax.lax.while_loop(lambda carry: carry[0], one, (jnp.ones((), bool), *prompt(start)))[1]

    return Strategy(
        lambda start: choose(*prompt(start)), lambda state: choose(*advance(state)), more, finish, newest, run
    )


def _complete(state: Any, shapes: Any) -> Any:
    """The state with zeros for those arrays of `shapes` that it does not have."""
    there = dict(jax.tree_util.tree_leaves_with_path(state))

    def fill(path: Any, x: Any) -> Array:
        return there[path] if path in there else jnp.zeros(x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
