"""One table for tokens and head, or two."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fmodels import tree
from fmodels.schema import LM_TASKS
from fmodels.types import Params

Config = TypeVar("Config", bound=Any)


def untie(params: Params, config: Config) -> tuple[Params, Config]:
    """Gives the head a copy of the token table, to be trained by itself; the inverse of `tie`. Logits stay the same.

    Args:
        params: the tree.
        config: its config.

    Returns:
        `(params, config)` with a leaf `lm_head.weight` and `config.tie_word_embeddings` False. A head that is untied
        already is left as it is; a head's bias stays.

    Raises:
        ValueError: the model's task has no head over the vocabulary.

    Example:
        >>> import jax, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
        ...     head_dim=4, max_positions=16, task="causal-lm")
        >>> params, config = fm.untie(fm.init(config, jax.random.key(0)), config)
        >>> params["lm_head"]["weight"].shape, config.tie_word_embeddings
        ((11, 8), False)
        >>> params, config = fm.tie(params, config)
        >>> "lm_head" in params, config.tie_word_embeddings
        (False, True)
    """
    _check_head("untie", config)
    if not tree.has(params, "lm_head.weight"):
        # A copy: two leaves that are one buffer cannot both be donated, and numpy's would change together.
        table = jax.tree.map(lambda part: part.copy(), tree.get(params, "embed.tokens"))
        params = tree.update(params, {"lm_head.weight": table})
    return params, _with_tied(config, False)


def tie(params: Params, config: Config, *, force: bool = False) -> tuple[Params, Config]:
    """Drops a head that equals the token table, which then serves as both; the inverse of `untie`.

    Args:
        params: the tree.
        config: its config.
        force: also drop a head that differs from the table. Needed under `jit`, where values cannot be compared.

    Returns:
        `(params, config)` without `lm_head.weight` and with `config.tie_word_embeddings` True. The bias that logits are
        computed with, `lm_head.bias`, stays; a second one that nothing reads, `lm_head.spare_bias`, goes.

    Raises:
        ValueError: the head differs from the table and `force` is False; the task has no head over the vocabulary.

    Example:
        See `untie`.
    """
    _check_head("tie", config)
    table = tree.get(params, "embed.tokens")
    copies = [path for path in tree.flatten(params) if path.endswith((".embed.tokens", "lm_head.weight"))]
    for path in copies:
        if not force and (difference := _difference(tree.get(params, path), table)):
            raise ValueError(
                f"tie: {path!r} {difference} 'embed.tokens', and would be lost; pass force=True to drop it all the same"
            )
    return tree.remove(params, *copies, "lm_head.spare_bias"), _with_tied(config, True)


def _check_head(name: str, config: Any) -> None:
    if config.task not in LM_TASKS:
        raise ValueError(
            f"{name}: a model of task {config.task!r} has no head over the vocabulary; "
            f"expected one of {', '.join(LM_TASKS)}"
        )


def _with_tied(config: Config, tied: bool) -> Config:
    return config if config.tie_word_embeddings == tied else dataclasses.replace(config, tie_word_embeddings=tied)


def _difference(head: Any, table: Any) -> str | None:
    """How two leaves differ, None if they are the same bit for bit."""
    parts = list(zip(jax.tree.leaves(head), jax.tree.leaves(table), strict=False))
    if jax.tree.structure(head) != jax.tree.structure(table):
        return f"is a {type(head).__name__} and not a {type(table).__name__} as"
    for a, b in parts:
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"is {a.dtype} {tuple(a.shape)} and not {b.dtype} {tuple(b.shape)} as"
        if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
            return "cannot be compared under jit with"
        if not _same_bits(a, b):
            gap = jnp.abs(jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)).max()
            return f"differs by up to {float(gap):.3g} from"
    return None


def _same_bits(a: Any, b: Any) -> bool:
    x, y = (np.ascontiguousarray(np.asarray(part)).view(np.uint8) for part in (a, b))
    return np.array_equal(x, y)
