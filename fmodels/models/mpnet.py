"""MPNet: RoBERTa with a bias of the scores by distance, which all layers share.

Source: Song et al. 2020; matches transformers' `modeling_mpnet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder, roberta
from fmodels.models._base import without


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


LAYER = {
    "encoder.layer.{l}.attention.attn.q": "layers.attention.query",
    "encoder.layer.{l}.attention.attn.k": "layers.attention.key",
    "encoder.layer.{l}.attention.attn.v": "layers.attention.value",
    "encoder.layer.{l}.attention.attn.o": "layers.attention.output",
    "encoder.layer.{l}.attention.LayerNorm": "layers.attention_norm",
    **{name: leaf for name, leaf in _encoder.LAYER.items() if "mlp" in leaf},
}
"""BERT's, with other names of the attention's."""

WEIGHTS = roberta.weights(
    "mpnet",
    *_encoder.rules({name: leaf for name, leaf in _encoder.EMBEDDINGS.items() if leaf != "embed.types"}),
    *_encoder.rules(LAYER | {"encoder.relative_attention_bias": "embed.distances"}),
)

FAMILY = _encoder.family(Config, WEIGHTS)
