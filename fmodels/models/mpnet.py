"""MPNet: RoBERTa with a bias of the scores by distance, which all layers share.

Source: Song et al. 2020; matches transformers' `modeling_mpnet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder, roberta
from fmodels.models._base import without
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(roberta.Config):
    """MPNet's config; the defaults are those of transformers' class.

    Attributes:
        num_buckets: rows of the table of distances; 32 of them are used.
    """

    vocab_size: int = 30527
    num_buckets: int = 32

    model_type: ClassVar[str] = "mpnet"
    HF: ClassVar[Mapping[str, str]] = {
        **without(roberta.Config.HF, "num_token_types", "causal"),
        "num_buckets": "relative_attention_num_buckets",
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _encoder.architectures("MPNet")

    @property
    def padding_index(self) -> int | None:
        return 1  # whatever pad_token_id is


ATTENTION = {
    "attention.self.query": "attention.attn.q",
    "attention.self.key": "attention.attn.k",
    "attention.self.value": "attention.attn.v",
    "attention.output.dense": "attention.attn.o",
    "attention.output.LayerNorm": "attention.LayerNorm",
}
"""BERT's names and these."""


def _own(name: str) -> str:
    for theirs, own in ATTENTION.items():
        name = name.replace(theirs, own)
    return name


WEIGHTS = _encoder.weights(
    "mpnet",
    (
        *_encoder.rules({k: v for k, v in _encoder.EMBEDDINGS.items() if v != "embed.types"}),
        *_encoder.rules({_own(k): v for k, v in _encoder.LAYER.items()}),
        *_encoder.rules({"encoder.relative_attention_bias": "embed.distances"}),
        *roberta.HEADS,
    ),
    decoder="lm_head.decoder",
    bias="lm_head.bias",
    tensorflow=TensorFlow(holds={"lm_head": "/embeddings/"}),
)

FAMILY = _encoder.family(Config, WEIGHTS)
