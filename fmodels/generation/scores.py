"""What the tokens of a text have added to its score, read off the scores of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmodels.types import Array


def compute_transition_scores(
    tokens: Any, scores: Any, beam_indices: Any = None, *, normalize_logits: bool = False
) -> Array:
    """The score of each new token among those of all tokens at its step.

    Of beams, `sum(...) / length^length_penalty` is the text's score, the length counted with the end token.

    Args:
        tokens: `(b t)` int, of which the last columns are new: `Generated.tokens`.
        scores: `(r n v)`, `Generated.outputs["scores"]` (with `output_scores` in the options), or a sequence of `n` arrays
            `(r v)` as transformers returns it.
        beam_indices: `(b n)` int, `Generated.beam_indices`: the row of `scores` that each token comes from, -1 after the
            end. Without them row `i` of `tokens` comes from row `i` of `scores`.
        normalize_logits: whether to take the log-softmax of the scores first.

    Returns:
        `(b n)` float32. After the end 0 where there are `beam_indices`, else the scores of the pad token.

    Raises:
        ValueError: shapes that do not fit each other, indices of rows that are not there.

    Example:
        >>> import fmodels as fm
        >>> params, config = fm.load(fm.assets.TINY_LLAMA)
        >>> options = fm.GenerationConfig(num_beams=2, output_scores=True)
        >>> gen = fm.generate(params, config, [[300, 301]], max_new_tokens=3, options=options)
        >>> each = fm.compute_transition_scores(gen.tokens, gen.outputs["scores"], gen.beam_indices)
        >>> bool(abs(float(each.sum()) / int(gen.lengths[0]) - float(gen.sequence_scores[0])) < 1e-5)
        True

    Source: matches transformers 5's `compute_transition_scores`.
    """
    table = jnp.stack([jnp.asarray(x) for x in scores], axis=1) if isinstance(scores, Sequence) else jnp.asarray(scores)
    tokens = np.asarray(tokens)
    if table.ndim != 3 or tokens.ndim != 2:
        raise ValueError(
            f"compute_transition_scores: tokens are (b t) and scores (r n v); got {tokens.shape} and {table.shape}"
        )
    rows, steps, vocabulary = table.shape
    if beam_indices is None:
        if rows != tokens.shape[0]:
            raise ValueError(
                f"compute_transition_scores: {tokens.shape[0]} rows of tokens, {rows} of scores; pass the beam_indices of beams"
            )
        indices = np.broadcast_to(np.arange(rows)[:, None], (rows, min(steps, tokens.shape[1])))
    else:
        indices = np.asarray(beam_indices)
        if indices.ndim != 2 or indices.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"compute_transition_scores: beam_indices have a row for each of {tokens.shape[0]} rows of tokens; "
                f"got {indices.shape}"
            )
        indices = indices[:, : int((indices >= 0).sum(-1).max(initial=0))]
    count = indices.shape[1]
    if count > min(steps, tokens.shape[1]) or indices.max(initial=0) >= rows:
        raise ValueError(
            f"compute_transition_scores: beam_indices of {count} steps and up to row {indices.max(initial=0)}, but scores of "
            f"{rows} rows and {steps} steps, and {tokens.shape[1]} tokens a row"
        )
    new = tokens[:, tokens.shape[1] - count :]
    if new.min(initial=0) < 0 or new.max(initial=0) >= vocabulary:
        raise ValueError(f"compute_transition_scores: tokens outside of the vocabulary 0 … {vocabulary - 1}")
    if normalize_logits:
        table = jax.nn.log_softmax(table, axis=-1)
    found = table[np.maximum(indices, 0), np.arange(count)[None], new]
    return jnp.where(jnp.asarray(indices >= 0), found, 0.0)
