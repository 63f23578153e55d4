"""RoBERTa: BERT without next sentences, whose positions count from the row after that of padding.

Source: Liu et al. 2019; matches transformers' `modeling_roberta`. Its `generate` (of version 5) counts positions from 0, which
`forward` of the same model does not; here both count as `forward`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder
from fmodels.models._encoder import head
from fmodels.weights.rules import Rule, TensorFlow, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.PaddedConfig):
    """RoBERTa's config; the defaults are those of transformers' class."""

    vocab_size: int = 50265

    model_type: ClassVar[str] = "roberta"
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "RobertaModel",
        "masked-lm": "RobertaForMaskedLM",
        "causal-lm": "RobertaForCausalLM",
        "sequence-classification": "RobertaForSequenceClassification",
        "token-classification": "RobertaForTokenClassification",
        "question-answering": "RobertaForQuestionAnswering",
        "multiple-choice": "RobertaForMultipleChoice",
    }

    @property
    def lm_activation(self) -> str:
        return "gelu"


EMBEDDINGS = {
    "embeddings.word_embeddings": "embed.tokens",
    "embeddings.token_type_embeddings": "embed.types",
    "embeddings.LayerNorm": "embed.norm",
    "embeddings.position_embeddings": "embed.positions",
}
"""BERT's names in RoBERTa's order."""

HEADS: tuple[Rule, ...] = (
    *_encoder.pooler("@pooler.dense", "multiple-choice"),
    *head("classifier.dense", "pooler", "sequence-classification"),
    *_encoder.lm_head(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", "masked-lm", "causal-lm"
    ),
    *head("classifier.out_proj", "classifier", "sequence-classification"),
    *head("classifier", "classifier", "token-classification", "multiple-choice"),
    *head("qa_outputs", "classifier", "question-answering"),
)


def weights(prefix: str, *base: Rule) -> Weights:
    """The layout map of a base model of these rules with RoBERTa's heads."""
    return _encoder.weights(
        prefix,
        (*base, *HEADS),
        decoder="lm_head.decoder",
        bias="lm_head.bias",
        tensorflow=TensorFlow(holds={"lm_head": "/embeddings/"}),
    )


WEIGHTS = weights("roberta", *_encoder.rules(EMBEDDINGS | _encoder.LAYER))

FAMILY = _encoder.family(Config, WEIGHTS)
