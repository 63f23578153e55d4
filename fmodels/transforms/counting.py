"""How large a model is, and what a step of training costs."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fmodels import schema, tree
from fmodels.transforms import _leaves
from fmodels.types import Params


def num_parameters(params: Params, *, exclude_embeddings: bool = False) -> int:
    """The number of parameters; a tied head is there once, a quantised leaf counts as what it stands for.

    Args:
        params: the tree, of arrays or of `ShapeDtypeStruct`.
        exclude_embeddings: leave out the tables of tokens, positions, distances and token types (and with the first a tied head).

    Example:
        >>> import fmodels as fm
        >>> abstract = fm.abstract(fm.models.gpt2.Config())
        >>> fm.num_parameters(abstract), fm.num_parameters(abstract, exclude_embeddings=True)
        (124439808, 85056000)

    Source: transformers' `PreTrainedModel.num_parameters`.
    """
    return sum(
        math.prod(leaf.shape)
        for path, leaf in tree.flatten(params).items()
        if not _leaves.is_hole(leaf) and not (exclude_embeddings and ".".join(path.split(".")[-2:]) in schema.TABLES)
    )


def memory_footprint(params: Params) -> int:
    """Bytes of all arrays of the tree, on all devices together if each array is counted once.

    Example:
        >>> import fmodels as fm
        >>> fm.memory_footprint(fm.abstract(fm.models.gpt2.Config(), dtype="bfloat16"))
        248879616
    """
    return sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in jax.tree.leaves(params))


def floating_point_ops(params: Params, tokens: Any, *, exclude_embeddings: bool = True) -> int:
    """Floating-point operations of a forward and a backward pass, `6 · tokens · parameters`.

    Good while attention costs little beside the matrices, which is to say for texts shorter than 12 d.

    Args:
        params: the tree.
        tokens: the number of tokens, or an array of tokens, or its shape.
        exclude_embeddings: see `num_parameters`.

    Raises:
        TypeError: `tokens` is none of these.
        ValueError: a negative number of tokens.

    Example:
        >>> import fmodels as fm
        >>> fm.floating_point_ops(fm.abstract(fm.models.gpt2.Config()), (8, 1024))
        4180672512000

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", table 1; transformers' `floating_point_ops`.
    """
    shape = getattr(tokens, "shape", tokens)
    try:
        # A number has no shape or, in numpy, the shape ().
        count = (
            math.prod(map(operator.index, shape)) if isinstance(shape, Sequence) and shape else operator.index(tokens)
        )
    except TypeError:
        raise TypeError(
            f"floating_point_ops: expected the number of tokens, an array of them or its shape, got {tokens!r}"
        ) from None
    if count < 0:
        raise ValueError(f"floating_point_ops: expected a number of tokens of at least 0, got {count}")
    return 6 * count * num_parameters(params, exclude_embeddings=exclude_embeddings)
