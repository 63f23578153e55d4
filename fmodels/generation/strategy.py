"""What every way of decoding is: a state, a step, and what is read off at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """

    init: Callable[[Start], Any]
    step: Callable[[Any], Any]
    more: Callable[[Any], Array]
    finish: Callable[[Any], Result]
    newest: Callable[[Any], Array]
