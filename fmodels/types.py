"""The types that every level shares: aliases for trees and arrays, and the NamedTuples that functions return."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
"""A JAX random key, `jax.random.key(seed)` or the older `jax.random.PRNGKey(seed)`."""
Params: TypeAlias = dict[str, Any]
"""A nested dict of arrays. `params["layers"]` is a dict of stacked leaves or a tuple with one dict per layer."""


class Cross(NamedTuple):
    """Keys and values of what the encoder has read, for the decoder's cross-attention.

    Attributes:
        keys: `(l b g s k)`, or a tuple of `(b g s k)`, of the decoder's layers.
        values: as `keys`.
        mask: `(b s)` bool, True for real tokens.
    """

    keys: Any
    values: Any
    mask: Array


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; an argument of `forward` and part of what it returns.

    Attributes:
        keys: `(l b g s k)`, or a tuple of `(b g s k)` when layers differ in shape. Of layers with a window they may have
            fewer slots than `mask`: a ring, in which a row's real token number `n` has the slot `n % s`, and padding none.
            Where some stacked layers have rings and some not, `nn.cache.Groups` of arrays.
        values: as `keys`.
        mask: `(b s)` bool, True where a slot holds a real token.
        length: int32, the number of slots written so far, which is the slot of the next token: `()` for all rows, or
            `(b)` where rows are at different places.
        cross: the encoder's keys and values, for encoder-decoder models.
        other: the cache of a second text that is read along, under classifier-free guidance.
    """

    keys: Any
    values: Any
    mask: Array
    length: Array
    cross: Cross | None = None
    other: Cache | None = None


class Output(NamedTuple):
    """What `forward` returns; a field that the task does not have is None.

    Attributes:
        logits: float32. `(b t v)` for language models, `(b c)` for sequence classification and next-sentence
            prediction, `(b t c)` for token classification, `(b t 2)` for question answering (start, end),
            `(b n)` for multiple choice.
        hidden: `(b t d)`, the last hidden state after the final norm.
        cache: the updated `Cache`, if one was given.
        pooled: `(b d)`, the pooler's output, if the model has a pooler.
        sequence_logits: float32; the second head of models that have two: `(b 2)` for BERT's pretraining task,
            `(b n)` for GPT-2's double heads.
        hidden_states: `(l+1 b t d)`, on request: the input of each layer, then `hidden`, unless its size
            is another (OPT projects it); `b` counts every choice.
        encoder_hidden: `(b s d)`, the encoder's last hidden state, where an encoder ran before a decoder, whose fields
            are those above.
        encoder_hidden_states: `(l+1 b s d)`, on request, as `hidden_states`.
        attentions: `(l b h t s)`, on request: the weights of each layer's attention of its `t` tokens to `s` others: those
            of the call, or the slots of the cache if there is one, with these tokens in it. A tuple of `(b h t s)` where
            layers differ in their heads.
        cross_attentions: as `attentions`, of the decoder to the `s` tokens of the encoder.
        encoder_attentions: as `attentions`, of the encoder to itself.
        router_logits: `(l b t x)`, on request: what the routers of the layers with experts gave.
    """

    logits: Array | None = None
    hidden: Array | None = None
    cache: Cache | None = None
    pooled: Array | None = None
    sequence_logits: Array | None = None
    hidden_states: Array | None = None
    encoder_hidden: Array | None = None
    encoder_hidden_states: Array | None = None
    attentions: Any = None
    cross_attentions: Any = None
    encoder_attentions: Any = None
    router_logits: Array | None = None


class Keep(NamedTuple):
    """What `forward` returns of the layers, beside what they make, and what it keeps of them for the gradient; static.

    Attributes:
        hidden_states: the input of every layer.
        attentions: the weights of every attention.
        router_logits: what every router gave.
        remat: whether the backward pass finds only the input of every layer and computes the rest again.
    """

    hidden_states: bool = False
    attentions: bool = False
    router_logits: bool = False
    remat: bool = False


NOTHING = Keep()
