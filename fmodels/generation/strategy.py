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
            cache with room for `slots` tokens. `want` is `hidden_states=True` and the like.
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


class Result(NamedTuple):
    """What a strategy has made, a row for each sequence that is returned.

    Attributes:
        tokens: `(r n)` int32 new tokens, pad after the end.
        lengths: `(r)` int32, new tokens with the end token.
        logprobs: `(r n)` float32; 0 after the end.
        sequence_scores: `(r)` float32, of beams.
        beam_indices: `(r n)` int32, of beams: the row of each token's logits, -1 after the end.
        cache: keys and values of all tokens but each row's last.
        outputs: what was asked for, by name.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    sequence_scores: Array | None = None
    beam_indices: Array | None = None
    cache: Cache | None = None
    outputs: dict[str, Array] = {}  # noqa: RUF012  a default that nothing writes to


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
    begin: Callable[[Start], tuple[Any, Output]],
    advance: Callable[[Any], tuple[Any, Output]],
    choose: Callable[[Any, Output], Any],
    more: Callable[[Any], Array],
    finish: Callable[[Any], Result],
    newest: Callable[[Any], Array],
) -> Strategy:
    """The strategy that makes the same choice after the prompt as after each step of the model.

    Choosing takes longer to compile than a small model does: `run` has one copy of it.

    Args:
        begin: `Start` to a state without new tokens, and the model's output of the prompt in the form of `advance`.
        advance: a state to the same with the newest tokens read, and the model's output.
        choose: what is read and the model's output to a state with another token.
        more: as in `Strategy`.
        finish: likewise.
        newest: likewise.
    """

    def run(start: Start) -> Any:
        def one(carry: tuple[Array, Any, Output]) -> tuple[Array, Any, Output]:
            state = choose(*carry[1:])
            go = more(state)
            # A loop that runs once or not at all: XLA's CPU backend copies a whole cache for a branch.
            _, state, out = jax.lax.while_loop(
                lambda carry: carry[0], lambda carry: (~carry[0], *advance(carry[1])), (go, state, carry[2])
            )
            return go, state, out

        return jax.lax.while_loop(lambda carry: carry[0], one, (jnp.ones((), bool), *begin(start)))[1]

    return Strategy(
        lambda start: choose(*begin(start)), lambda state: choose(*advance(state)), more, finish, newest, run
    )


def empty(shapes: dict[str, Any]) -> dict[str, Array]:
    """Zeros of these shapes and dtypes."""
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
