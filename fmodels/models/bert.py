"""BERT: learned positions and token types, layer norms after the blocks, a pooler, and all of its heads.

Source: Devlin et al. 2018; matches transformers' `modeling_bert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder
from fmodels.models._encoder import CLASSES, LM, head
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """BERT's config; the defaults are BERT base's."""

    model_type: ClassVar[str] = "bert"
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "BertModel",
        "masked-lm": "BertForMaskedLM",
        "causal-lm": "BertLMHeadModel",
        "pretraining": "BertForPreTraining",
        "next-sentence": "BertForNextSentencePrediction",
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "question-answering": "BertForQuestionAnswering",
        "multiple-choice": "BertForMultipleChoice",
    }
    OTHERS: ClassVar[Mapping[str, str]] = {"BertForCausalLM": "causal-lm"}  # of Flax


PREDICTIONS = "cls.predictions"
TENSORFLOW = TensorFlow(
    names={r"^cls/predictions": "mlm___cls/predictions", r"^cls/seq_relationship": "nsp___cls/seq_relationship"},
    holds={"mlm___cls": "/embeddings/"},  # of which it needs the tokens'
    original={
        r"\.layer\.(\d+)\.": r".layer_\1.",
        r"^cls\.predictions\.bias$": "cls.predictions.output_bias",
        r"^cls\.seq_relationship\.(weight|bias)$": r"cls.seq_relationship.output_\1",
        r"^qa_outputs\.(weight|bias)$": r"cls.squad.output_\1",
        r"^classifier\.(weight|bias)$": r"output_\1",
    },
)

WEIGHTS = _encoder.weights(
    "bert",
    (
        *_encoder.rules(_encoder.EMBEDDINGS | _encoder.LAYER),
        *_encoder.pooler("@pooler.dense", "next-sentence", "pretraining", *CLASSES),
        *_encoder.lm_head(
            f"{PREDICTIONS}.transform.dense", f"{PREDICTIONS}.transform.LayerNorm", f"{PREDICTIONS}.decoder",
            f"{PREDICTIONS}.bias", *LM,
        ),
        *head("cls.seq_relationship", "classifier", "next-sentence", "pretraining"),
        *head("classifier", "classifier", "token-classification", *CLASSES),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder=f"{PREDICTIONS}.decoder",
    bias=f"{PREDICTIONS}.bias",
    tensorflow=TENSORFLOW,
)  # fmt: skip

FAMILY = _encoder.family(Config, WEIGHTS)
