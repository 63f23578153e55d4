"""Pure functions of logits, with a parameter for each row.

Each takes `(b v)` float32 logits and arrays `(b)`, and returns logits with the dropped tokens at `-inf`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmodels.types import Array


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


def temperature(logits: Array, value: Array) -> Array:
    """`logits / value`."""
    return logits / value[:, None]


def top_k(logits: Array, k: Array) -> Array:
    """Keeps the `k` likeliest tokens, and those equal to the last of them; 0 keeps all.

    Source: Fan et al. 2018; matches transformers' `TopKLogitsWarper`.
    """
    vocabulary = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.clip(jnp.where(k == 0, vocabulary, k), 1, vocabulary) - 1
    threshold = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def top_p(logits: Array, p: Array) -> Array:
    """Keeps the smallest set of likeliest tokens whose probability reaches `p`, at least one.

    Source: Holtzman et al. 2019; matches transformers' `TopPLogitsWarper`: tokens are dropped from the least likely on
    while their sum is at most `1 - p`.
    """
    ordered = jnp.sort(logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    dropped = mass <= 1.0 - p[:, None]
    dropped = dropped.at[:, -1].set(False)
    threshold = jnp.min(jnp.where(dropped, jnp.inf, ordered), axis=-1, keepdims=True)
    return jnp.where((logits < threshold) & (p[:, None] < 1.0), -jnp.inf, logits)


def min_p(logits: Array, p: Array) -> Array:
    """Drops tokens that are less than `p` times as likely as the likeliest.

    Source: Nguyen et al. 2024; matches transformers' `MinPLogitsWarper`.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = p[:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)
