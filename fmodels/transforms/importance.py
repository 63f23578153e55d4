"""Which attention heads a loss would miss least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fmodels import schema
from fmodels.transforms.heads import scale_heads
from fmodels.types import Array, Params


def head_importance(
    params: Params,
    config: Any,
    loss: Callable[[Params, Any], Array],
    batches: Iterable[Any],
    *,
    normalize: bool = False,
) -> Array | tuple[Array, ...]:
    """How much the loss depends on each attention head: the gradient with respect to a mask ξ of ones on the heads.

        I_h = mean over batches of |∂ loss / ∂ ξ_h|

    Args:
        params: the tree, stacked or not.
        config: its config.
        loss: `loss(params, batch)`, a scalar; it is traced by `jit`.
        batches: pytrees of arrays. The mean of absolute values is over batches, in the paper over examples: smaller
            batches come closer to it. Each new shape compiles once.
        normalize: divide each layer's numbers by their L2 norm, as the paper does where heads of all layers compete.

    Returns:
        float32 `(l h)`, or a tuple of `(h)` per layer where layers differ in their numbers of heads. After an earlier
        pruning the numbers belong to the heads that are left, in order.

    Raises:
        ValueError: there are no batches; the loss is not a scalar; the tree does not fit the config.

    Example:
        >>> import jax, jax.numpy as jnp, fmodels as fm
        >>> config = fm.models.gpt2.Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=4,
        ...     head_dim=2, max_positions=16, task="causal-lm")
        >>> params = fm.init(config, jax.random.key(0))
        >>> def loss(params, tokens):
        ...     logits = jax.nn.log_softmax(fm.forward(params, config, tokens).logits[:, :-1])
        ...     return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()
        >>> importance = fm.head_importance(params, config, loss, [jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6]])])
        >>> importance.shape
        (2, 4)
        >>> pruned, after = fm.prune_heads(params, config, fm.least_important_heads(importance, config, 3))
        >>> sum(len(heads) for _, heads in after.pruned_heads)
        3

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", equation 2; matches
    `compute_heads_importance` of transformers' `run_bertology.py`, which divides by
    the number of tokens where this divides by that of batches.
    """
    counts = [schema.heads(config, layer)[0] for layer in range(config.num_layers)]
    uniform = len(set(counts)) == 1
    ones = jnp.ones((len(counts), counts[0])) if uniform else tuple(jnp.ones(count) for count in counts)

    @jax.jit
    def step(total: Any, params: Params, batch: Any) -> Any:
        def masked(mask: Any) -> Array:
            value = loss(scale_heads(params, mask), batch)
            if jnp.shape(value) != ():
                raise ValueError(f"head_importance: expected a loss that is one number, got shape {jnp.shape(value)}")
            return value

        return jax.tree.map(lambda t, g: t + jnp.abs(g), total, jax.grad(masked)(ones))

    total, count = jax.tree.map(jnp.zeros_like, ones), 0
    for batch in tqdm(batches, desc="head_importance", unit="batch", disable=None, leave=False):
        total, count = step(total, params, batch), count + 1
    if not count:
        raise ValueError("head_importance: there are no batches to average over")
    mean = jax.tree.map(lambda t: t / count, total)
    if not normalize:
        return mean
    return jax.tree.map(lambda i: i / (jnp.linalg.norm(i, axis=-1, keepdims=True) + 1e-20), mean)


def least_important_heads(importance: Any, config: Any, count: int) -> dict[int, list[int]]:
    """Chooses heads for `prune_heads`, the least important first.

    Where heads share key-value heads, whole groups compete by the mean of their heads. No layer is emptied.

    Args:
        importance: `(l h)`, or a tuple of `(h)` per layer, as from `head_importance`.
        config: the config of the tree that it was computed for.
        count: how many heads to choose, in all layers together.

    Returns:
        layer -> original numbers of the heads, as `prune_heads` and `mask_heads` take them.

    Raises:
        ValueError: importance does not fit the config, or has NaN; `count` is negative, more than can go, or not to be
            had with whole groups.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_layers=2, num_heads=3, num_kv_heads=3, pruned_heads=())
        >>> least_important_heads([[0.3, 0.1, 0.2], [0.9, 0.8, 0.4]], config, 2)
        {0: [1, 2]}
        >>> least_important_heads([[0.3, 0.1, 0.2], [0.9, 0.8, 0.4]], config, 3)
        {0: [1, 2], 1: [2]}
    """
    rows = [np.asarray(row, np.float32) for row in importance]
    expected = [(schema.heads(config, layer)[0],) for layer in range(config.num_layers)]
    if [row.shape for row in rows] != expected:
        raise ValueError(
            f"least_important_heads: expected one row per layer with the heads {[n for (n,) in expected]} that the "
            f"config has left, got rows of shapes {[row.shape for row in rows]}"
        )
    if any(np.isnan(row).any() for row in rows):
        raise ValueError("least_important_heads: importance has NaN; check the loss and the weights")
    units = sorted(_units(rows, config), key=lambda unit: unit[0])
    left = [schema.heads(config, layer)[1] for layer in range(config.num_layers)]
    chosen: dict[int, list[int]] = {}
    missing = count
    for _, layer, heads in units:
        if left[layer] > 1 and len(heads) <= missing:
            left[layer] -= 1
            missing -= len(heads)
            chosen.setdefault(layer, []).extend(heads)
    if missing:
        sizes = sorted({len(heads) for _, _, heads in units})
        groups = f" in whole groups of {' or '.join(map(str, sizes))} heads" if sizes != [1] else ""
        raise ValueError(
            f"least_important_heads: cannot choose {count} heads{groups} and leave some in each layer; "
            f"the nearest is count={count - missing if count > 0 else 0}"
        )
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


def _units(rows: list[np.ndarray], config: Any) -> Iterable[tuple[float, int, list[int]]]:
    """(importance, layer, original numbers of the heads) of everything that can go by itself: a head, or a group."""
    size = config.num_heads // config.num_kv_heads
    for layer, row in enumerate(rows):
        groups: dict[int, list[tuple[int, float]]] = {}
        for head, value in zip(schema.kept_heads(config, layer), row, strict=True):
            groups.setdefault(head // size, []).append((head, float(value)))
        for members in groups.values():
            yield float(np.mean([value for _, value in members])), layer, [head for head, _ in members]
