"""Multi-head latent attention: keys and values of all heads are made from one short vector for each token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fmodels.arrays import plain, precision
from fmodels.nn.attention import Attend, Part, dot_product, keep
from fmodels.nn.cache import NO_SLOT, Slot, read, write
from fmodels.nn.linear import linear
from fmodels.nn.norms import rms_norm
from fmodels.nn.positions import rotate
from fmodels.types import Array, Params

EPS = 1e-6
"""Of the norms inside, whatever that of the model's others."""


def latent_attention(
    params: Params,
    x: Array,
    seen: Attend,
    *,
    rope: tuple[Array, Array],
    scale: Any,
    slot: Slot = NO_SLOT,
    interleaved: bool = False,
) -> tuple[Array, Slot]:
    """Attention whose heads have a part that is not rotated and one that is; the keys' second part is one for all heads.

    Without tokens in the cache, keys and values are made of the latent vectors. With some, queries are turned into the space
    of latent vectors and look at these themselves, so that nothing of the cache is expanded; the sums are the same.

    Args:
        params: `latent` `(z d)` with `latent_norm`, `turned_key` `(w d)`, `key_up` `(h u z)`, `value_up` `(h k z)`, `output`
            `(d h k)`; `query` with `plain` `(h u d)` and `turned` `(h w d)`, or `query_down` `(q d)` with `query_down_norm`
            and `query_up` with `plain` `(h u q)` and `turned` `(h w q)`.
        x: `(b t d)`.
        seen: from `attend`.
        rope: cosines and sines from `rope_tables`.
        scale: of the scores.
        slot: this layer's place in the cache: its keys are rotated ones `(b 1 s w)`, its values latent vectors `(b 1 s z)`.
        interleaved: of `rotate`.

    Returns:
        `(b t d)` and the updated slot.

    Source: DeepSeek-AI 2024; matches transformers' `DeepseekV3Attention`.
    """
    source, low = params.get("query"), x
    if source is None:
        source, low = params["query_up"], linear(params["query_down"], x, "btd,qd->btq")
        low = rms_norm(params["query_down_norm"], low, EPS)
    still, turned = (linear(source[name], low, "btq,hkq->bthk") for name in ("plain", "turned"))
    latent = rms_norm(params["latent_norm"], linear(params["latent"], x, "btd,zd->btz"), EPS)
    key = linear(params["turned_key"], x, "btd,wd->btw")[:, :, None]
    turned, key = (rotate(part, rope, interleaved=interleaved) for part in (turned, key))
    if slot.keys is None or seen.old is None:
        keys = linear(params["key_up"], latent, "btz,huz->bthu")
        keys = jnp.concatenate([keys, jnp.broadcast_to(key, turned.shape)], axis=-1)
        values = linear(params["value_up"], latent, "btz,hkz->bthk")
        parts = [Part(keys.swapaxes(1, 2), values.swapaxes(1, 2), seen.new)]
        context, weights = dot_product(jnp.concatenate([still, turned], axis=-1), parts, scale)
    else:
        full = precision(x.dtype)
        up, down = (plain(params[name]["weight"], x).astype(x.dtype) for name in ("key_up", "value_up"))
        still = jnp.einsum("bthu,huz->bthz", still, up, precision=full)

        def part(keys: Array, latent: Array, seen: Array) -> Part:
            return Part(jnp.concatenate([latent, keys], axis=-1), latent, seen)

        turned_keys, latents = (a.astype(x.dtype) for a in read(slot))
        parts = [part(turned_keys, latents, seen.old), part(key.swapaxes(1, 2), latent[:, None], seen.new)]
        context, weights = dot_product(jnp.concatenate([still, turned], axis=-1), parts, scale)
        context = jnp.einsum("bthz,hkz->bthk", context, down, precision=full)
    slot = keep(slot, weights)
    if slot.keys is not None:
        slot = write(slot, key, latent[:, :, None], context[..., :1])
    return linear(params["output"], context, "bthk,dhk->btd"), slot
