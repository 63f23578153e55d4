"""Other kernels of attention than the products and the softmax that XLA compiles: cuDNN's, and splash attention for TPUs.

They never hold the scores of all queries with all keys, so that memory grows with the length of a text and not with its square.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fmodels.types import Array

PLATFORMS = {"xla": None, "cudnn": "gpu", "splash": "tpu"}
"""Name of a kernel -> the platform that has it; None for all."""

LANES = 128
"""Splash attention works on blocks of so many queries and keys."""

_chosen = contextvars.ContextVar("attention", default="xla")


def check(name: Any, of: str = "forward") -> str:
    """The name of a kernel that this platform has.

    Args:
        name: as it was given.
        of: the function that it was given to.

    Raises:
        ValueError: there is none of that name, or it is another platform's.
    """
    if not isinstance(name, str) or name not in PLATFORMS:
        raise ValueError(f"{of}: attention={name!r} is not a kernel; one of {', '.join(PLATFORMS)}")
    platform, here = PLATFORMS[name], jax.default_backend()
    if platform is not None and platform != here:
        raise ValueError(f"{of}: attention={name!r} runs on a {platform}, this is a {here}; leave attention out")
    return name


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """What is traced within uses the kernel `name`."""
    before = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(before)


def chosen() -> Callable[..., Array] | None:
    """The kernel in use; None for XLA's own."""
    return KERNELS.get(_chosen.get())


def _refuse(name: str, problems: dict[str, Any]) -> None:
    """Raises with all that a kernel cannot do."""
    if found := [text for text, wrong in problems.items() if wrong]:
        raise ValueError(f"forward: attention={name!r} does not fit this call: {'; '.join(found)}; leave attention out")


def cudnn(
    query: Array,
    keys: Array,
    values: Array,
    seen: Array,
    bias: Array | None = None,
    *,
    cap: float | None = None,
    sinks: Array | None = None,
    implementation: Any = "cudnn",
) -> Array:
    """Softmax attention by cuDNN's flash attention, in float16 or bfloat16.

    Args:
        query: `(b t h k)`, scaled.
        keys: `(b s g k)`.
        values: `(b s g k)`.
        seen: `(b t s)` bool, which keys each query sees; at least one.
        bias: `(b or 1, h, t, s)`, added to the scores.
        cap: not supported.
        sinks: not supported.
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        `(b t h k)`.

    Raises:
        ValueError: what the kernel cannot do, all of it.

    Source: Dao 2023; NVIDIA's cuDNN through `jax.nn.dot_product_attention`.
    """
    size = query.shape[-1]
    _refuse("cudnn", {
        f"it takes float16 and bfloat16, not {query.dtype} (fm.cast)": query.dtype not in (jnp.float16, jnp.bfloat16),
        f"heads have a multiple of 8 numbers, at most 256, not {size}": size % 8 or size > 256,
        f"keys and values have one size, not {size} and {values.shape[-1]}": values.shape[-1] != size,
        "it knows no cap of scores": cap is not None,
        "it knows no sinks": sinks is not None,
    })  # fmt: skip
    return jax.nn.dot_product_attention(
        query, keys, values, None if bias is None else bias.astype(query.dtype), seen[:, None], scale=1.0,
        implementation=implementation,
    )  # fmt: skip


def splash(
    query: Array,
    keys: Array,
    values: Array,
    seen: Array,
    bias: Array | None = None,
    *,
    cap: float | None = None,
    sinks: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Softmax attention by the TPU's splash attention, which leaves out blocks that no query sees.

    Args:
        query: `(b t h k)`, scaled.
        keys: `(b s g k)`.
        values: `(b s g k)`.
        seen: `(b t s)` bool, which keys each query sees; at least one.
        bias: not supported.
        cap: scores are squeezed between `-cap` and `cap`.
        sinks: `(h)`, the score of one more key of each head, whose value is 0.
        interpret: run it without a TPU, slowly.

    Returns:
        `(b t h k)`.

    Raises:
        ValueError: what the kernel cannot do, all of it.

    Source: Dao et al. 2022; Google's kernel in `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import make_splash_mha  # only where it is asked for

    t, s, size = query.shape[1], keys.shape[1], query.shape[-1]
    _refuse("splash", {
        f"texts have a multiple of {LANES} tokens, not {t} queries and {s} keys": t % LANES or s % LANES,
        f"heads have a multiple of {LANES} numbers, not {size} and {values.shape[-1]}": size % LANES or values.shape[-1] % LANES,
        "it knows nothing that is added to scores": bias is not None,
    })  # fmt: skip
    heads = query.shape[2]

    def row(query: Array, keys: Array, values: Array, seen: Array) -> Array:
        mask = jnp.broadcast_to(seen[None], (heads, t, s))
        kernel = make_splash_mha(mask, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap, interpret=interpret)
        # jax 0.10 makes an array of this, too, and then asks it whether it is true, which it is.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        more = {} if sinks is None else {"sinks": sinks.astype(jnp.float32)}
        found: Any = kernel(*(x.swapaxes(0, 1) for x in (query, keys, values)), **more)
        return found.swapaxes(0, 1)

    return jax.vmap(row)(query, keys, values, seen)


KERNELS: dict[str, Callable[..., Array]] = {"cudnn": cudnn, "splash": splash}
"""The kernels beside XLA's own, by name."""
