"""Pure functions of logits, with a parameter for each row; the names and the order are transformers'.

Each takes `(b v)` float32 logits and returns them with the dropped tokens at `-inf`. Those that look at what was said
take a `History`. Those that cut the tail of a distribution are in `sampling`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from fmodels.generation.history import History
from fmodels.types import Array


class Bias(NamedTuple):
    """Sequences of tokens whose last one gets a bias where the others came before it.

    Attributes:
        tokens: `(n w)` int32, filled up with -1 on the left.
        values: `(n)` float32.
    """

    tokens: Array
    values: Array


def sequence_bias(logits: Array, history: History, bias: Bias) -> Array:
    """Adds `bias.values` to the last token of each sequence that the row could complete now.

    Source: matches transformers' `SequenceBiasLogitsProcessor` and, with `-inf`, `NoBadWordsLogitsProcessor`: a sequence
    that is longer than the row is left alone.
    """
    n, width = bias.tokens.shape
    before, last = bias.tokens[:, :-1], bias.tokens[:, -1]
    columns = history.end[:, None] + jnp.arange(-(width - 1), 0, dtype=jnp.int32)[None]
    real = columns >= history.start[:, None]
    said = jnp.where(real, jnp.take_along_axis(history.tokens, jnp.maximum(columns, 0), axis=1), -2)
    fits = ((before[None] == -1) | (before[None] == said[:, None])).all(-1)
    size = (bias.tokens >= 0).sum(-1)
    fits = fits & ((size[None] <= history.length[:, None]) | (size[None] == 1)) & (size[None] > 0)
    rows = jnp.arange(logits.shape[0])[:, None]
    added = jnp.zeros_like(logits).at[rows, jnp.broadcast_to(last[None], (logits.shape[0], n))]
    return logits + added.add(jnp.where(fits, bias.values[None], 0.0))


def repetition_penalty(logits: Array, seen: Array, penalty: Array) -> Array:
    """Divides positive and multiplies negative logits of the tokens that were seen.

    Args:
        logits: `(b v)`.
        seen: `(b v)` bool, tokens of the prompt and those generated.
        penalty: `(b)`; 1 changes nothing.

    Source: Keskar et al. 2019; matches transformers 5's `RepetitionPenaltyLogitsProcessor`, which counts no padding.
    """
    penalized = jnp.where(logits < 0, logits * penalty[:, None], logits / penalty[:, None])
    return jnp.where(seen, penalized, logits)


def encoder_repetition_penalty(logits: Array, history: History, penalty: Array) -> Array:
    """Multiplies positive and divides negative logits of the tokens of the context: above 1, what was read is likelier.

    Source: matches transformers' `EncoderRepetitionPenaltyLogitsProcessor`.
    """
    assert history.context is not None
    rows = jnp.arange(logits.shape[0])[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, history.context.tokens].max(history.context.mask)
    return repetition_penalty(logits, seen, 1.0 / penalty)


def no_repeat_ngram(logits: Array, history: History, size: Array) -> Array:
    """Drops each token that would complete an n-gram of the row's own.

    Args:
        logits: `(b v)`.
        history: with `match`.
        size: `(b)` int32, the n; 0 drops nothing.

    Source: Paulus et al. 2018; matches transformers' `NoRepeatNGramLogitsProcessor`.
    """
    assert history.match is not None
    column = jnp.arange(history.tokens.shape[1])[None]
    inside = (column >= history.start[:, None]) & (column < history.end[:, None])
    return _drop_after(logits, history.tokens, history.match, inside, size)


def encoder_no_repeat_ngram(logits: Array, history: History, size: Array) -> Array:
    """Drops each token that would complete an n-gram of the context.

    Source: matches transformers' `EncoderNoRepeatNGramLogitsProcessor`.
    """
    assert history.context is not None
    return _drop_after(logits, history.context.tokens, history.context.match, history.context.mask, size)


def _drop_after(logits: Array, tokens: Array, match: Array, inside: Array, size: Array) -> Array:
    banned = inside & (match >= size[:, None] - 1) & (size[:, None] > 0)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.where(jnp.zeros(logits.shape, bool).at[rows, tokens].max(banned), -jnp.inf, logits)


def drop(logits: Array, tokens: Array, where: Array) -> Array:
    """Drops `tokens` `(n)` (-1 is none) in the rows `where` `(b)`."""
    banned = jnp.zeros(logits.shape[1], bool).at[jnp.where(tokens < 0, logits.shape[1], tokens)].set(True, mode="drop")
    return jnp.where(where[:, None] & banned[None], -jnp.inf, logits)


def force(logits: Array, tokens: Array, where: Array) -> Array:
    """Leaves only `tokens` `(n)`, at 0, in the rows `where` `(b)`.

    Source: matches transformers' `ForcedBOSTokenLogitsProcessor` and `ForcedEOSTokenLogitsProcessor`.
    """
    chosen = jnp.zeros(logits.shape[1], bool).at[jnp.where(tokens < 0, logits.shape[1], tokens)].set(True, mode="drop")
    return jnp.where(where[:, None], jnp.where(chosen[None], 0.0, -jnp.inf), logits)


def exponential_decay_length(logits: Array, new: Array, eos: Array, start: Array, factor: Array) -> Array:
    """Raises the end tokens by `|logit| · (factor^(new - start) - 1)` once a row has more than `start` new tokens.

    Source: matches transformers' `ExponentialDecayLengthPenalty`.
    """
    over = (new - start).astype(jnp.float32)
    growth = jnp.where(over > 0, jnp.power(factor, jnp.maximum(over, 0.0)) - 1.0, 0.0)
    ends = jnp.zeros(logits.shape[1], bool).at[jnp.where(eos < 0, logits.shape[1], eos)].set(True, mode="drop")
    return jnp.where(ends[None] & (over > 0)[:, None], logits + jnp.abs(logits) * growth[:, None], logits)


def remove_invalid(logits: Array, where: Array) -> Array:
    """Replaces NaN by 0 and infinities by the largest finite numbers in the rows `where` `(b)`.

    Source: matches transformers' `InfNanRemoveLogitsProcessor`.
    """
    finite = jnp.nan_to_num(logits, nan=0.0, posinf=jnp.finfo(jnp.float32).max, neginf=jnp.finfo(jnp.float32).min)
    return jnp.where(where[:, None], finite, logits)
