"""Logits functions that ask a Python function on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.generation.history import History
from fmodels.types import Array


@dataclasses.dataclass(frozen=True)
class PrefixAllowed:
    """For `processors=`: only the tokens that a function allows after what was said, as `prefix_allowed_tokens_fn`.

    Attributes:
        function: `(row, tokens) -> tokens that may come next`; `tokens` is the `(n,)` int32 text of the row without padding.
            `row` counts all rows, those of several beams or sequences of a prompt side by side.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> only = fm.PrefixAllowed(lambda row, tokens: [tokens[-1] + 1])
        >>> fm.generate(params, config, [[300]], max_new_tokens=3, processors=[only]).tokens.tolist()
        [[300, 301, 302, 303]]

    Source: matches transformers' `PrefixConstrainedLogitsProcessor`, which gives a prompt's number where this gives a row's.
    """

    function: Callable[[int, np.ndarray], Sequence[int]]

    def __call__(self, logits: Array, history: History) -> Array:
        shape = jax.ShapeDtypeStruct(logits.shape, np.bool_)
        ask = (history.tokens, history.start, history.end)
        allowed = jax.pure_callback(self._allowed, shape, *ask, vocabulary=logits.shape[1], vmap_method="sequential")
        return jnp.where(allowed, logits, -jnp.inf)

    def _allowed(self, tokens: Any, start: Any, end: Any, *, vocabulary: int) -> np.ndarray:
        tokens = np.asarray(tokens)
        allowed = np.zeros((len(tokens), vocabulary), bool)
        for row in range(len(tokens)):
            chosen = list(self.function(row, tokens[row, int(start[row]) : int(end[row])]))
            if not chosen:
                raise ValueError(
                    f"PrefixAllowed: the function allows no token in row {row}; it must allow at least one"
                )
            allowed[row, chosen] = True
        return allowed
