"""What encoder-decoder families have in common: their configs, how the two parts go together, and the heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels import schema
from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, at
from fmodels.nn import layers
from fmodels.nn.embeddings import lm_logits
from fmodels.nn.linear import linear
from fmodels.nn.positions import last_real
from fmodels.types import NOTHING, Array, Cache, Cross, Keep, Output, Params
from fmodels.weights.rules import Weights

Stack = Callable[..., Output]
"""`stack(params, config, part, tokens, present, *, positions, cache, cross, keep)`: the layers of a `part`,
`"encoder"` or `"decoder"`, on `(b t)` tokens of which `present` `(b t)` bool are real."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """A config with an encoder's sizes, and a decoder's where they are its own."""

    decoder_num_layers: int
    decoder_start_token_id: int

    ONE_PART: ClassVar[Mapping[str, str]]
    """Task -> the part, of the two, that its models have; the other tasks' have both."""
    SHIFTS: ClassVar[tuple[str, ...]]
    """Tasks in which decoder tokens that are not given are the encoder's, one to the right behind the start token."""

    @property
    def is_encoder_decoder(self) -> bool:
        return self.task not in self.ONE_PART

    @property
    def hidden_scale(self) -> float | None:
        """Of the hidden states that become logits over the vocabulary."""
        return None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        return {"is_encoder_decoder"}  # follows from the task

    def write_special(self) -> dict[str, Any]:
        return {"is_encoder_decoder": self.is_encoder_decoder}


def family(config: type[Config], stack: Stack, weights: Weights, init: Callable[..., Params]) -> Family:
    """The family whose parts are run by `stack`."""
    return Family(config, functools.partial(forward, stack), weights, init, functools.partial(encode, stack))


def encode(stack: Stack, params: Params, config: Config, tokens: Array, *, mask: Array | None = None) -> Cross:
    """Runs the encoder on `(b s)` tokens: the keys and values of the decoder's cross-attention, for `Cache.cross`."""
    return _read(stack, params, config, tokens, mask, NOTHING)[1]


def forward(
    stack: Stack,
    params: Params,
    config: Config,
    tokens: Array | None,
    *,
    mask: Array | None = None,
    decoder_tokens: Array | None = None,
    decoder_mask: Array | None = None,
    positions: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """The model on `(b s)` tokens and `(b t)` decoder tokens; see `fmodels.forward`."""
    if (part := config.ONE_PART.get(config.task)) is not None:
        assert tokens is not None
        given: dict[str, Any] = {"positions": positions, "cache": cache, "keep": keep}
        return _head(
            params, config, stack(params, config, part, tokens, _present(tokens, mask), **given), tokens, select
        )
    if decoder_tokens is None:
        decoder_tokens = _shifted(config, tokens)
    encoded, cross = Output(), None if cache is None else cache.cross
    if cross is None:
        if tokens is None:
            raise ValueError("forward: without tokens the cache must hold what the encoder has read of them")
        encoded, cross = _read(stack, params, config, tokens, mask, keep)
    out = stack(
        params,
        config,
        "decoder",
        decoder_tokens,
        _present(decoder_tokens, decoder_mask),
        positions=positions,
        cache=None if cache is None else cache._replace(cross=cross),
        cross=cross,
        keep=keep,
    )
    out = out._replace(
        encoder_hidden=encoded.hidden,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )
    return _head(params, config, out, tokens, select)


def _read(
    stack: Stack, params: Params, config: Config, tokens: Array, mask: Array | None, keep: Keep
) -> tuple[Output, Cross]:
    present = _present(tokens, mask)
    out = stack(params, config, "encoder", tokens, present, keep=keep)
    assert out.hidden is not None
    return out, layers.cross(params["decoder"]["layers"], out.hidden, present)


def _present(tokens: Array, mask: Array | None) -> Array:
    return jnp.ones(tokens.shape, bool) if mask is None else mask


def _shifted(config: Config, tokens: Array | None) -> Array:
    """Source: transformers' `shift_tokens_right`."""
    if tokens is None or config.task not in config.SHIFTS:
        raise ValueError(f"forward: {config.model_type} ({config.task}) needs decoder_tokens, (b t) integers; got None")
    start = jnp.full((tokens.shape[0], 1), config.decoder_start_token_id, tokens.dtype)
    return jnp.concatenate([start, tokens[:, :-1]], axis=1)


def _head(params: Params, config: Config, out: Output, tokens: Array | None, select: Array | None) -> Output:
    """The task's head; a sequence is classified at the decoder's place where `tokens` have their last end token.

    Source: transformers' `BartForSequenceClassification`, `BartForQuestionAnswering` and their like.
    """
    hidden = out.hidden
    assert hidden is not None
    if config.task in schema.LM_TASKS:
        chosen = hidden if select is None else at(hidden, select)[:, None]
        scale = config.hidden_scale
        chosen = chosen if scale is None else chosen * jnp.asarray(scale, chosen.dtype)
        return out._replace(logits=lm_logits(params, chosen))
    if config.task == "sequence-classification":
        assert tokens is not None
        vector = at(hidden, last_real(tokens == config.eos_token_ids[0]))
        pooled = jnp.tanh(linear(params["pooler"], vector, "bd,ed->be"))
        logits = linear(params["classifier"], pooled, "bd,cd->bc").astype(jnp.float32)
        return out._replace(pooled=pooled, logits=logits)
    if "classifier" in params:
        return out._replace(logits=linear(params["classifier"], hidden).astype(jnp.float32))
    return out
