"""Constraints that no table can hold, followed on the host by llguidance, a step at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmodels.generation.constraints.vocabulary import Vocabulary, read_vocabulary
from fmodels.types import Array

if TYPE_CHECKING:
    from fmodels.generation.constraints.constraint import Constraint

HORIZON = 1024
"""With more tokens left than this, a text is taken for one that can be completed."""


class _Stage(NamedTuple):
    """How a completion is searched: with which tokens, by which signs two states count as one, and for how long.

    Attributes:
        narrow: only tokens that end JSON values, or all of one byte.
        careful: states are the same if their last three masks are and what was read last, letters and digits aside; else
            if their masks are.
        width: states that are kept at each token.
        effort: tokens that are tried, some ten microseconds each.
    """

    narrow: bool
    careful: bool
    width: int
    effort: int


_STAGES = (
    _Stage(narrow=True, careful=False, width=24, effort=20_000),
    _Stage(narrow=True, careful=True, width=48, effort=10_000),
    _Stage(narrow=False, careful=False, width=256, effort=30_000),
    _Stage(narrow=False, careful=True, width=512, effort=60_000),
)
_NARROW = [b'"', b"}", b"]", *(bytes([c]) for c in b"0123456789nta:, -/.@{[")]


class Row(NamedTuple):
    """The state of a row.

    Attributes:
        matcher: llguidance's, never changed in place; None without a constraint and after the end token.
        plan: tokens that complete the text, the end token included; None if none are known.
    """

    matcher: Any
    plan: tuple[int, ...] | None


class Guidance:
    """The constraints of a batch, for a loop that asks the host at each step.

    Args:
        constraints: one for each row, None for rows without; any, small ones too.
        vocabulary: a `Vocabulary`, or what `read_vocabulary` takes.
        end_tokens: ids that end a text, at least one.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: a constraint that llguidance does not take, or no end token.

    Example:
        >>> from fmodels.generation.constraints import json_schema
        >>> words = Guidance([json_schema({"type": "array"})], [b"[", b"]", b"1", b",", b"x", None], [5])
        >>> state, chosen = words.start(), []
        >>> for token, left in zip([0, 2, 3, 3, 3], [6, 5, 4, 3, 2]):  # the last two are not allowed
        ...     state, tokens = words.advance(state, [token], [left])
        ...     chosen += tokens.tolist()
        >>> chosen
        [0, 2, 3, 2, 1]
    """

    def __init__(self, constraints: Sequence[Constraint | None], vocabulary: Any, end_tokens: Iterable[int]):
        self.vocabulary = read_vocabulary(vocabulary)
        self.ends = tuple(sorted({int(i) for i in end_tokens if i >= 0}))
        if not self.ends or self.ends[-1] >= len(self.vocabulary):
            raise ValueError(f"Guidance: expected at least one end token below {len(self.vocabulary)}, got {self.ends}")
        self._first = {c: self._begin(c) for c in dict.fromkeys(constraints) if c is not None}
        self.constraints = tuple(constraints)

    def _begin(self, constraint: Constraint) -> Any:
        import llguidance

        matcher = llguidance.LLMatcher(_tokenizer(self.vocabulary, self.ends), constraint.grammar(), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise ValueError(f"Guidance: llguidance cannot follow {constraint}: {reason}")
        return matcher

    def start(self) -> tuple[Row, ...]:
        """The state before the first token."""
        plans = {c: self._search(matcher) for c, matcher in self._first.items()}
        return tuple(
            Row(None, None) if c is None else Row(self._first[c].deep_copy(), plans[c]) for c in self.constraints
        )

    def require_room(self, state: Sequence[Row], max_new_tokens: int) -> None:
        """Raises if `max_new_tokens` are too few for some row to complete its text.

        Raises:
            ValueError: it names the rows.
        """
        short = [i for i, row in enumerate(state) if row.matcher is not None and len(row.plan or ()) > max_new_tokens]
        unknown = [i for i, row in enumerate(state) if row.matcher is not None and row.plan is None]
        if unknown:
            raise ValueError(
                f"generate: no text that fulfils the constraints of rows {unknown} was found; make them simpler"
            )
        if short:
            most = max(len(state[i].plan or ()) for i in short)
            raise ValueError(
                f"generate: rows {short} need up to {most} tokens, the end token included, to fulfil their constraints; "
                f"raise max_new_tokens, which is {max_new_tokens}"
            )

    def mask(self, state: Sequence[Row], left: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Which tokens may come next, a bit each, `(b ceil(v/32))` int32; see `unpack`.

        Args:
            state: of the rows.
            left: `(b)`, how many tokens may still come, this one and the end token included. A row that needs them all for
                its known completion is bound to it.
        """
        masks = np.full((len(state), -(-len(self.vocabulary) // 32)), -1, np.int32)
        for i, row in enumerate(state):
            if row.matcher is None:
                continue
            if left is not None and row.plan is not None and len(row.plan) >= int(left[i]):
                masks[i] = 0
                masks[i].view(np.uint8)[row.plan[0] // 8] = 1 << (row.plan[0] % 8)
            else:
                masks[i].view(np.uint8)[:] = np.frombuffer(row.matcher.compute_bitmask(), np.uint8)[
                    : masks.shape[1] * 4
                ]
        return masks

    def advance(
        self, state: Sequence[Row], tokens: Sequence[int] | np.ndarray, left: Sequence[int] | np.ndarray | None = None
    ) -> tuple[tuple[Row, ...], np.ndarray]:
        """The state after a token of each row, and the tokens that were taken.

        Args:
            state: of the rows; it stays as it is.
            tokens: `(b)`, what was chosen.
            left: `(b)` as in `mask`. With it, a token that is not allowed or leaves too few tokens to complete the text is
                replaced by the first of the row's known completion; the last of `left` is then always an end token.

        Returns:
            The state, and `(b)` int32, which may differ from `tokens` where `left` is given.

        Raises:
            ValueError: without `left`, a token that is not allowed.
        """
        rows, taken = [], np.array(tokens, np.int32)
        for i, row in enumerate(state):
            room = None if left is None else int(left[i]) - 1
            new = self._advance(row, int(taken[i]), room)
            if new is None and room is not None and row.plan is not None:
                taken[i] = row.plan[0]
                new = self._advance(row, row.plan[0], room)
            if new is None:
                raise ValueError(f"Guidance: token {int(taken[i])} of row {i} is not allowed by {self.constraints[i]}")
            rows.append(new)
        return tuple(rows), taken

    def _advance(self, row: Row, token: int, room: int | None) -> Row | None:
        """The row after a token; None if it is not allowed, or is not completed by `room` more."""
        if row.matcher is None:
            return row
        if token in self.ends:
            return Row(None, None) if row.matcher.is_accepting() else None
        matcher = row.matcher.deep_copy()
        if matcher.validate_tokens([token]) != 1 or not matcher.consume_token(token):
            return None
        if room is None or room > HORIZON:
            return Row(matcher, None)
        old, known = row.plan or (), len(self.vocabulary.tokens[token] or b"")
        # What completed the text before often still does, or its rest behind as many tokens as this one has bytes.
        first = 1 if old[:1] == (token,) else 0
        rests = (old[skip:] for skip in range(first, min(known, len(old)) + 1))
        plan = next((rest for rest in rests if self._completes(matcher, rest)), None) or self._search(matcher)
        if plan is None:
            return None
        if len(plan) > room and (found := self._search(matcher)) is not None:
            plan = min(plan, found, key=len)
        return Row(matcher, plan) if len(plan) <= room else None

    def _completes(self, matcher: Any, plan: Sequence[int]) -> bool:
        """Whether a known completion, of the state before for example, also completes this one."""
        if not plan:
            return False
        trial, body = matcher.deep_copy(), list(plan[:-1])
        return trial.validate_tokens(body) == len(body) and trial.consume_tokens(body) and trial.is_accepting()

    def _search(self, matcher: Any) -> tuple[int, ...] | None:
        """Tokens that complete a text, nearly as few as there are; None if the search finds none."""
        return next((plan for stage in _STAGES if (plan := self._search_stage(matcher, stage))), None)

    def _search_stage(self, matcher: Any, stage: _Stage) -> tuple[int, ...] | None:
        """The search level by level, where states that look the same count as one."""
        candidates = _candidates(self.vocabulary, stage.narrow)
        level: list[tuple[tuple[int, ...], tuple[Any, ...], Any]] = [((), (), matcher)]
        steps = 0
        while level and steps < stage.effort:
            below: dict[Any, tuple[tuple[int, ...], tuple[Any, ...], Any]] = {}
            for tokens, trace, at in level:
                if at.is_accepting():
                    return (*tokens, self.ends[0])
                for token in self._options(at, candidates):
                    trial = at.deep_copy()
                    steps += 1
                    if not trial.consume_token(token):
                        continue
                    look: tuple[Any, ...] = (trial.compute_bitmask(),)
                    if stage.careful:
                        text = self.vocabulary.tokens[token] or b""
                        look = (*trace[-2:], (look[0], b"" if text.isalnum() else text))
                    below.setdefault(look, ((*tokens, token), look, trial))
            level = list(below.values())[: stage.width]
        return None

    def _options(self, matcher: Any, candidates: Sequence[int]) -> list[int]:
        """The candidates that are allowed, or some other tokens that are."""
        bits = np.frombuffer(matcher.deep_copy().compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(self.vocabulary)]
        options = [token for token in candidates if allowed[token]]
        return options or [token for token in np.flatnonzero(allowed)[:8].tolist() if token not in self.ends]


def unpack(masks: Any, size: int) -> Array:
    """Bit masks `(b ceil(v/32))` int32 as `(b v)` bool, on the device.

    Example:
        >>> unpack(np.array([[5]], np.int32), 4).tolist()
        [[True, False, True, False]]
    """
    words = jnp.asarray(masks)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=words.dtype)[None, None, :]) & 1
    return bits.reshape(words.shape[0], -1)[:, :size] == 1


@functools.lru_cache(maxsize=16)
def _candidates(vocabulary: Vocabulary, narrow: bool) -> list[int]:
    """Tokens of one byte that the search for a completion tries: those that end JSON values, or all that are printable."""
    wanted = _NARROW if narrow else [bytes([c]) for c in range(256)]
    index = {token: i for i, token in enumerate(vocabulary.tokens) if token is not None and len(token) == 1}
    return [index[token] for token in wanted if token in index]


@functools.lru_cache(maxsize=8)
def _tokenizer(vocabulary: Vocabulary, ends: tuple[int, ...]) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "Guidance: a constraint this large needs llguidance: pip install 'fmodels[constraints]'"
        ) from None
    wrapper = llguidance.TokenizerWrapper(_Greedy(vocabulary, ends))
    return llguidance.LLTokenizer(wrapper, eos_token=list(ends))


class _Greedy:
    """What llguidance asks of a tokenizer: the bytes of the tokens, and how a text that is forced is cut into them."""

    def __init__(self, vocabulary: Vocabulary, ends: tuple[int, ...]):
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.tokens = [b"" if token is None or i in ends else token for i, token in enumerate(vocabulary.tokens)]
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]
        self._index = {token: i for i, token in enumerate(self.tokens) if token}
        self._longest = max(map(len, self.tokens), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest tokens from the left on."""
        rest = text.encode() if isinstance(text, str) else text
        ids = []
        while rest:
            length = next((n for n in range(min(self._longest, len(rest)), 0, -1) if rest[:n] in self._index), 0)
            if not length:
                break
            ids.append(self._index[rest[:length]])
            rest = rest[length:]
        return ids
