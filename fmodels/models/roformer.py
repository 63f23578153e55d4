"""RoFormer: BERT whose queries and keys are rotated, by a table of angles that lies in the file.

Source: Su et al. 2021; matches transformers' `modeling_roformer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fmodels.models import _encoder
from fmodels.models._encoder import head
from fmodels.weights.rules import Flax, Rule, TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """RoFormer's config; the defaults are transformers'."""

    vocab_size: int = 50000
    embedding_size: int = 768  # pyright: ignore[reportIncompatibleMethodOverride]
    max_positions: int = 1536

    model_type: ClassVar[str] = "roformer"
    HF: ClassVar[Mapping[str, str]] = {**_encoder.Config.HF, "embedding_size": "embedding_size"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rotary_value": (False,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "RoFormerModel",
        "masked-lm": "RoFormerForMaskedLM",
        "causal-lm": "RoFormerForCausalLM",
        "sequence-classification": "RoFormerForSequenceClassification",
        "token-classification": "RoFormerForTokenClassification",
        "question-answering": "RoFormerForQuestionAnswering",
        "multiple-choice": "RoFormerForMultipleChoice",
    }

    @property
    def is_narrow(self) -> bool:
        """Whether a projection leads from the embeddings to the layers."""
        return self.embedding_size != self.hidden_size

    @property
    def pooler_activation(self) -> str:
        return self.activation

    @property
    def summary(self) -> str:
        return "last"

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        fields["embedding_size"] = data.get("hidden_size", cls.hidden_size)  # where the key is null or not there
        return super().read_special(data, fields, problems)


def angles(config: Config) -> np.ndarray:
    """The table of sines and cosines `(p k)` that PyTorch has in its files, and Flax computes.

    Source: transformers' `RoFormerSinusoidalPositionalEmbedding`.
    """
    power = 2 * np.arange(config.head_dim // 2) / config.head_dim
    turns = np.arange(config.max_positions)[:, None] / np.power(10000, power)
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1).astype(np.float32)


PREDICTIONS = "cls.predictions"

WEIGHTS = _encoder.weights(
    "roformer",
    (
        *_encoder.rules({name: leaf for name, leaf in _encoder.EMBEDDINGS.items() if leaf != "embed.positions"}),
        Rule("@embeddings_project.weight", "embed.projection.weight", when="is_narrow"),
        Rule("@embeddings_project.bias", "embed.projection.bias", when="is_narrow"),
        *_encoder.rules({"encoder.embed_positions": "embed.sinusoids"} | _encoder.LAYER),
        *_encoder.lm_head(
            f"{PREDICTIONS}.transform.dense", f"{PREDICTIONS}.transform.LayerNorm", f"{PREDICTIONS}.decoder",
            f"{PREDICTIONS}.bias", "masked-lm", "causal-lm",
        ),
        *head("classifier.dense", "pooler", "sequence-classification"),
        *head("classifier.out_proj", "classifier", "sequence-classification"),
        *head("classifier", "classifier", "token-classification", "multiple-choice"),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder=f"{PREDICTIONS}.decoder",
    bias=f"{PREDICTIONS}.bias",
    flax=Flax(
        computed={"@encoder.embed_positions.weight": angles},
        lacks={"is_narrow": "a projection of embeddings that are smaller than the hidden states"},
    ),
    tensorflow=TensorFlow(
        names={r"^cls/": "mlm___cls/"},
        holds={"mlm___cls": "/embeddings/"},
        bare={"multiple-choice": "sequence_summary"},
    ),
)  # fmt: skip

FAMILY = _encoder.family(Config, WEIGHTS)
