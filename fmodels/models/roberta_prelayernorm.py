"""RoBERTa-PreLayerNorm: RoBERTa with the norms before the blocks.

Source: Ott et al. 2019 (fairseq's `--encoder-normalize-before`); matches transformers' `modeling_roberta_prelayernorm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder, roberta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(roberta.Config):
    """As RoBERTa's."""

    model_type: ClassVar[str] = "roberta-prelayernorm"
    pre_norm: ClassVar[bool] = True
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        task: name.replace("Roberta", "RobertaPreLayerNorm") for task, name in roberta.Config.ARCHITECTURES.items()
    }


NORMS = {
    "encoder.layer.{l}.attention.LayerNorm": "layers.attention_norm",
    "encoder.layer.{l}.intermediate.LayerNorm": "layers.mlp_norm",
}
"""Their own names; the others are BERT's."""

BLOCKS = {name: leaf for name, leaf in _encoder.LAYER.items() if leaf not in NORMS.values()}

WEIGHTS = roberta.weights(
    "roberta_prelayernorm",
    *_encoder.rules(roberta.EMBEDDINGS),
    *_encoder.rules({name: leaf for name, leaf in BLOCKS.items() if "attention" in leaf}),
    *_encoder.rules(NORMS),
    *_encoder.rules({name: leaf for name, leaf in BLOCKS.items() if "mlp" in leaf}),
    *_encoder.rules({"LayerNorm": "final_norm"}),
)

FAMILY = _encoder.family(Config, WEIGHTS)
