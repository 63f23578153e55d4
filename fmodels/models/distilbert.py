"""DistilBERT: half of BERT's layers, without token types and pooler.

Source: Sanh et al. 2019; matches transformers' `modeling_distilbert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _encoder
from fmodels.models._encoder import CLASSES, head
from fmodels.weights.rules import Rule, TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """DistilBERT's config; the defaults are the base model's."""

    num_layers: int = 6

    model_type: ClassVar[str] = "distilbert"
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "activation": "activation",
        "max_positions": "max_position_embeddings",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
    }  # fmt: skip
    # sinusoidal_pos_embds says how the table of positions began; it is on disk.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_ output_past".split()
    )
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "DistilBertModel",
        "masked-lm": "DistilBertForMaskedLM",
        "sequence-classification": "DistilBertForSequenceClassification",
        "token-classification": "DistilBertForTokenClassification",
        "question-answering": "DistilBertForQuestionAnswering",
        "multiple-choice": "DistilBertForMultipleChoice",
    }

    @property
    def pooler_activation(self) -> str:
        return "relu"


AT = "transformer.layer.{l}"

WEIGHTS = _encoder.weights(
    "distilbert",
    (
        *_encoder.rules(
            {
                "embeddings.word_embeddings": "embed.tokens",
                "embeddings.position_embeddings": "embed.positions",
                "embeddings.LayerNorm": "embed.norm",
                f"{AT}.attention.q_lin": "layers.attention.query",
                f"{AT}.attention.k_lin": "layers.attention.key",
                f"{AT}.attention.v_lin": "layers.attention.value",
                f"{AT}.attention.out_lin": "layers.attention.output",
                f"{AT}.sa_layer_norm": "layers.attention_norm",
                f"{AT}.ffn.lin1": "layers.mlp.up",
                f"{AT}.ffn.lin2": "layers.mlp.down",
                f"{AT}.output_layer_norm": "layers.mlp_norm",
            }
        ),
        *head("vocab_transform", "lm_transform.dense", "masked-lm"),
        *head("vocab_layer_norm", "lm_transform.norm", "masked-lm"),
        Rule("vocab_projector.weight", "lm_head.weight", tasks=("masked-lm",), when="untied"),
        Rule("vocab_projector.bias", "lm_head.bias", tasks=("masked-lm",)),
        *head("pre_classifier", "pooler", *CLASSES),
        *head("classifier", "classifier", "token-classification", *CLASSES),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder="vocab_projector",
    tensorflow=TensorFlow(holds={"vocab_projector": "/embeddings/"}),
)

FAMILY = _encoder.family(Config, WEIGHTS)
