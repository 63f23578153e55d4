"""BigBird: BERT whose tokens, in long texts, see the blocks beside theirs, the first and the last.

In evaluation transformers draws no random blocks: all of them are the first, which so counts several times.

Source: Zaheer et al. 2020; matches transformers' `modeling_big_bird`, in evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels.models import _encoder
from fmodels.models._base import Family, init_normal
from fmodels.models._encoder import LM, head
from fmodels.nn import layers
from fmodels.nn.attention import Attend, attend, attention, block_sparse
from fmodels.nn.embeddings import embed
from fmodels.nn.linear import activation, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params

SAME = ("attention_type", "block_size", "num_random_blocks", "use_bias", "rescale_embeddings", "sep_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """BigBird's config; the defaults are the base model's.

    Attributes:
        attention_type: `"original_full"`, or `"block_sparse"` for texts longer than `longest_full`.
        block_size: how many tokens a block has.
        num_random_blocks: how many more times the first block counts.
        use_bias: whether queries, keys and values have biases.
        rescale_embeddings: whether rows of the token table are multiplied by the root of their size.
        sep_token_id: the token that ends a question.
    """

    vocab_size: int = 50358
    max_positions: int = 4096
    activation: str = "gelu_new"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    attention_type: str = "block_sparse"
    block_size: int = 64
    num_random_blocks: int = 3
    use_bias: bool = True
    rescale_embeddings: bool = False
    sep_token_id: int = 66

    model_type: ClassVar[str] = "big_bird"
    HF: ClassVar[Mapping[str, str]] = {**_encoder.Config.HF, **{name: name for name in SAME}}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        **_encoder.architectures("BigBird"),
        "causal-lm": "BigBirdForCausalLM",
        "pretraining": "BigBirdForPreTraining",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_type not in ("original_full", "block_sparse"):
            raise ValueError(
                f"big_bird.Config: attention_type={self.attention_type!r} is not supported, only 'original_full' and 'block_sparse'"
            )
        if self.causal and self.attention_type != "original_full":
            raise ValueError(
                "big_bird.Config: is_decoder with attention_type='block_sparse' is not supported: transformers' blocks look "
                "ahead. Set attention_type='original_full'"
            )

    @property
    def longest_full(self) -> int:
        """The longest text whose tokens see everything, whatever `attention_type` is."""
        return (5 + 2 * self.num_random_blocks) * self.block_size


PREDICTIONS = "cls.predictions"
BIASES = {f"layers.attention.{name}": "use_bias" for name in ("query", "key", "value")}
POOLED = ("pretraining", "sequence-classification", "multiple-choice")
UNREAD = ("masked-lm", "causal-lm", "token-classification")
"""Tasks whose models have a pooler in PyTorch, which no number of theirs depends on, and none in Flax."""

WEIGHTS = _encoder.weights(
    "bert",
    (
        *_encoder.rules(_encoder.EMBEDDINGS | _encoder.LAYER, biases=BIASES),
        *_encoder.pooler("@pooler", *POOLED),
        *head("@pooler", "pooler", *UNREAD, optional=True),
        *_encoder.lm_head(
            f"{PREDICTIONS}.transform.dense", f"{PREDICTIONS}.transform.LayerNorm", f"{PREDICTIONS}.decoder",
            f"{PREDICTIONS}.bias", *LM,
        ),
        *head("cls.seq_relationship", "classifier", "pretraining"),
        *head("classifier.dense", "head.dense", "sequence-classification"),
        *head("classifier.out_proj", "classifier", "sequence-classification"),
        *head("classifier", "classifier", "token-classification", "multiple-choice"),
        *head("qa_classifier.intermediate.dense", "head.up", "question-answering"),
        *head("qa_classifier.output.dense", "head.down", "question-answering"),
        *head("qa_classifier.output.LayerNorm", "head.norm", "question-answering"),
        *head("qa_classifier.qa_outputs", "classifier", "question-answering"),
    ),
    decoder=f"{PREDICTIONS}.decoder",
    bias=f"{PREDICTIONS}.bias",
)  # fmt: skip


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    mask: Array | None = None,
    positions: Array | None = None,
    token_types: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """The model on `(b t)` tokens; see `fmodels.forward`.

    Positions count columns. For question answering, tokens up to the first `sep_token_id` are the question: of type 0,
    the others of type 1, unless types are given; all of them but the first cannot be an answer.
    """
    present, places = _encoder.begin(params, config, tokens, mask, positions, token_types, cache)
    question = jnp.argmax(tokens == config.sep_token_id, axis=-1)[:, None] >= jnp.arange(tokens.shape[1])[None]
    if token_types is None and config.task == "question-answering":
        token_types = (~question).astype(jnp.int32)
    sparse = config.attention_type == "block_sparse" and tokens.shape[1] > config.longest_full
    seen = Attend(present[:, None], None) if sparse else attend(present, cache, causal=config.causal)
    blocks = functools.partial(block_sparse, size=config.block_size, repeats=config.num_random_blocks)
    norm = functools.partial(layer_norm, eps=config.norm_eps)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y, slot = attention(p["attention"], x, seen, slot=slot, product=blocks if sparse else None)
        if sparse:  # of padding, only the bias
            y = jnp.where(present[..., None], y, p["attention"]["output"]["bias"].astype(y.dtype)[None, None])
        x = norm(p["attention_norm"], x + y)
        return norm(p["mlp_norm"], x + mlp(p["mlp"], x, config.activation)), slot

    scale = math.sqrt(config.hidden_size) if config.rescale_embeddings else None
    x = norm(params["embed"]["norm"], embed(params["embed"], tokens, places, token_types, scale=scale))
    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep)
    out, own = Output(hidden=ran.x, cache=ran.cache), params.get("head")
    if own is None:
        return ran.onto(_encoder.head_output(params, config, out, select), ran.x)
    if config.task == "question-answering":
        x = norm(own["norm"], ran.x + mlp(own, ran.x, config.activation))
        logits = linear(params["classifier"], x).astype(jnp.float32)
        barred = question & (jnp.arange(tokens.shape[1]) > 0)[None]
        return ran.onto(out._replace(logits=logits - 1e6 * barred[..., None].astype(jnp.float32)), ran.x)
    x = activation(config.activation)(linear(own["dense"], ran.x[:, 0], "bd,ed->be"))
    return ran.onto(out._replace(logits=linear(params["classifier"], x, "bd,cd->bc").astype(jnp.float32)), ran.x)


FAMILY = Family(Config, forward, WEIGHTS, functools.partial(init_normal, WEIGHTS))
