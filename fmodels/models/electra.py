"""ELECTRA: BERT's layers over narrower embeddings, trained to tell which tokens were replaced.

Source: Clark et al. 2020; matches transformers' `modeling_electra`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _encoder
from fmodels.models._encoder import head
from fmodels.weights.rules import Rule, TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """ELECTRA's config; the defaults are those of the small discriminator.

    Attributes:
        summary_activation: of what the head of multiple choice makes of the first token, or None.
    """

    embedding_size: int = 128  # pyright: ignore[reportIncompatibleMethodOverride]
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_heads: int = 4
    num_kv_heads: int = 4
    summary_activation: str | None = "gelu"

    model_type: ClassVar[str] = "electra"
    HF: ClassVar[Mapping[str, str]] = {
        **_encoder.Config.HF,
        "embedding_size": "embedding_size",
        "summary_activation": "summary_activation",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _encoder.Config.IRRELEVANT | {
        "summary_last_dropout", "summary_type", "summary_use_proj",
    }  # fmt: skip
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "ElectraModel",
        "masked-lm": "ElectraForMaskedLM",
        "causal-lm": "ElectraForCausalLM",
        "replaced-token-detection": "ElectraForPreTraining",
        "sequence-classification": "ElectraForSequenceClassification",
        "token-classification": "ElectraForTokenClassification",
        "question-answering": "ElectraForQuestionAnswering",
        "multiple-choice": "ElectraForMultipleChoice",
    }

    @property
    def is_narrow(self) -> bool:
        """Whether a projection leads from the embeddings to the layers."""
        return self.embedding_size != self.hidden_size

    @property
    def lm_activation(self) -> str:
        return "gelu"

    @property
    def pooler_activation(self) -> str:
        return (self.summary_activation or "linear") if self.task == "multiple-choice" else "gelu"

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        if "ElectraForMultipleChoice" in (data.get("architectures") or ()):  # other heads have no summary
            for key, only in (("summary_type", "first"), ("summary_use_proj", True)):
                if data.get(key, only) != only:
                    problems.append(f"{key}={data[key]!r} is not supported, only {only!r}")
        return super().read_special(data, fields, problems)


WEIGHTS = _encoder.weights(
    "electra",
    (
        *_encoder.rules(_encoder.EMBEDDINGS),
        Rule("@embeddings_project.weight", "embed.projection.weight", when="is_narrow"),
        Rule("@embeddings_project.bias", "embed.projection.bias", when="is_narrow"),
        *_encoder.rules(_encoder.LAYER),
        *head("generator_predictions.LayerNorm", "lm_transform.norm", "masked-lm", "causal-lm"),
        *head("generator_predictions.dense", "lm_transform.dense", "masked-lm", "causal-lm"),
        Rule("generator_lm_head.weight", "lm_head.weight", tasks=("masked-lm", "causal-lm"), when="untied"),
        Rule("generator_lm_head.bias", "lm_head.bias", tasks=("masked-lm", "causal-lm")),
        *head("discriminator_predictions.dense", "pooler", "replaced-token-detection"),
        *head("discriminator_predictions.dense_prediction", "classifier", "replaced-token-detection"),
        *head("classifier.dense", "pooler", "sequence-classification"),
        *head("classifier.out_proj", "classifier", "sequence-classification"),
        *head("sequence_summary.summary", "pooler", "multiple-choice"),
        *head("classifier", "classifier", "token-classification", "multiple-choice"),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder="generator_lm_head",
    tensorflow=TensorFlow(without=("causal-lm",), holds={"generator_lm_head": "/embeddings/"}),
)

FAMILY = _encoder.family(Config, WEIGHTS)
