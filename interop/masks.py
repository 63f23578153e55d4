"""Masks in the forms of transformers' `ModuleUtilsMixin`, for tensors of any library that is indexed as numpy's are.

Source: `ModuleUtilsMixin` of transformers 4.57; version 5 has dropped it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Cast = Callable[[Any], Any]
"""Makes a tensor of a tensor or an array of numpy, in one fixed dtype."""


def for_all_heads(what: str, mask: Any) -> Any:
    """`(b 1 1 s)` of a mask `(b s)`, `(b 1 t s)` of `(b t s)`."""
    if len(mask.shape) not in (2, 3):
        raise ValueError(f"{what}: expected a mask (b s) or (b t s), got one of shape {tuple(mask.shape)}")
    return mask[:, None, None, :] if len(mask.shape) == 2 else mask[:, None, :, :]


def causal(input_shape: Sequence[int], mask: Any, cast: Cast) -> Any:
    """`(b 1 t s)` of 0 and 1, in the dtype of `cast`: what a decoder's tokens see of a mask `(b s)`.

    Args:
        input_shape: `(b, t)`.
        mask: `(b s)` of 0 and 1; `s` may be longer than `t` by what is in a cache, which all tokens see.
        cast: to the mask's own dtype.
    """
    _, length = input_shape
    seen = mask.shape[-1]
    if len(mask.shape) != 2 or seen < length:
        raise ValueError(
            f"create_extended_attention_mask_for_decoder: expected a mask (b s) of at least {length} columns for an input of "
            f"shape {tuple(input_shape)}, got one of shape {tuple(mask.shape)}"
        )
    return cast(np.tri(length, seen, seen - length)[None, None]) * mask[:, None, None, :]


def to_scores(mask: Any, cast: Cast, lowest: float) -> Any:
    """What to add to the scores: 0 where the mask is 1, the dtype's lowest number where it is 0."""
    return (1.0 - cast(mask)) * lowest


def of_heads(mask: Any, layers: int, cast: Cast, *, chunked: bool) -> Any:
    """`(l 1 h 1 1)` of `(h)` or `(l h)`, with one axis more if `chunked`; `layers` times None if there is no mask."""
    if mask is None:
        return [None] * layers
    if len(mask.shape) not in (1, 2):
        raise ValueError(f"get_head_mask: expected a mask (h) or (l h), got one of shape {tuple(mask.shape)}")
    if len(mask.shape) == 1:
        whole = cast(np.ones([layers, 1, 1, 1, 1])) * cast(mask)[None, None, :, None, None]
    else:
        whole = cast(mask)[:, None, :, None, None]
    return whole[..., None] if chunked else whole
