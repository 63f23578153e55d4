"""ALBERT: narrow embeddings, and a few layers that are each applied many times.

Source: Lan et al. 2019; matches transformers' `modeling_albert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _encoder
from fmodels.models._base import without
from fmodels.models._encoder import CLASSES, head
from fmodels.weights.rules import TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """ALBERT's config; the defaults are those of transformers' class.

    Attributes:
        num_layers: with weights of their own, `num_hidden_groups`.
        depth: how many layers are applied, `num_hidden_layers`.
    """

    vocab_size: int = 30000
    hidden_size: int = 4096
    intermediate_size: int = 16384
    embedding_size: int = 128  # pyright: ignore[reportIncompatibleMethodOverride]
    num_layers: int = 1
    depth: int = 12
    num_heads: int = 64
    num_kv_heads: int = 64
    activation: str = "gelu_new"
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 3

    model_type: ClassVar[str] = "albert"
    HF: ClassVar[Mapping[str, str]] = {
        **without(_encoder.Config.HF, "causal"),
        "embedding_size": "embedding_size",
        "num_layers": "num_hidden_groups",
        "depth": "num_hidden_layers",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _encoder.Config.IRRELEVANT | {"classifier_dropout_prob"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_encoder.Config.DEFAULTS,
        "inner_group_num": (1,),
        "down_scale_factor": (1,),
        "gap_size": (0,),
        "net_structure_type": (0,),
        "num_memory_blocks": (0,),
        "layers_to_keep": ([],),
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "AlbertModel",
        "masked-lm": "AlbertForMaskedLM",
        "pretraining": "AlbertForPreTraining",
        "sequence-classification": "AlbertForSequenceClassification",
        "token-classification": "AlbertForTokenClassification",
        "question-answering": "AlbertForQuestionAnswering",
        "multiple-choice": "AlbertForMultipleChoice",
    }

    @property
    def order(self) -> tuple[int, ...] | None:
        return tuple(int(i / (self.depth / self.num_layers)) for i in range(self.depth))


AT = "encoder.albert_layer_groups.{l}.albert_layers.0"
GROUP = "bert.encoder.transformer.group_"
TENSORFLOW = TensorFlow(
    names={r"^predictions/bias$": "predictions/decoder/bias"},
    unread={"predictions/bias": "predictions/decoder/bias"},
    holds={"predictions": "/embeddings/"},  # of which it needs the tokens'
    original={
        r"^albert\.encoder\.albert_layer_groups\.(\d+)\.albert_layers\.(\d+)": rf"{GROUP}\1.inner_group_\2",
        r"(inner_group_\d+)\.attention\.(query|key|value)\.": r"\1.attention_1.self.\2.",
        r"(inner_group_\d+)\.attention\.dense\.": r"\1.attention_1.output.dense.",
        r"(inner_group_\d+)\.attention\.LayerNorm\.": r"\1.LayerNorm.",
        r"(inner_group_\d+)\.full_layer_layer_norm\.": r"\1.LayerNorm_1.",
        r"(inner_group_\d+)\.ffn\.": r"\1.ffn_1.intermediate.dense.",
        r"(inner_group_\d+)\.ffn_output\.": r"\1.ffn_1.intermediate.output.dense.",
        r"^albert\.pooler\.": "bert.pooler.dense.",
        r"^albert\.": "bert.",
        r"^predictions\.bias$": "cls.predictions.output_bias",
        r"^predictions\.(dense|LayerNorm)\.": r"cls.predictions.transform.\1.",
        r"^sop_classifier\.classifier\.(weight|bias)$": r"cls.seq_relationship.output_\1",
        r"^qa_outputs\.(weight|bias)$": r"cls.squad.output_\1",
        r"^classifier\.(weight|bias)$": r"output_\1",
    },
)

WEIGHTS = _encoder.weights(
    "albert",
    (
        *_encoder.rules(
            {
                **_encoder.EMBEDDINGS,
                "encoder.embedding_hidden_mapping_in": "embed.projection",
                f"{AT}.full_layer_layer_norm": "layers.mlp_norm",
                f"{AT}.attention.query": "layers.attention.query",
                f"{AT}.attention.key": "layers.attention.key",
                f"{AT}.attention.value": "layers.attention.value",
                f"{AT}.attention.dense": "layers.attention.output",
                f"{AT}.attention.LayerNorm": "layers.attention_norm",
                f"{AT}.ffn": "layers.mlp.up",
                f"{AT}.ffn_output": "layers.mlp.down",
            }
        ),
        *_encoder.pooler("@pooler", "pretraining", *CLASSES),
        *_encoder.lm_head(
            "predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias", "masked-lm",
            "pretraining", norm_first=True,
        ),
        *head("sop_classifier.classifier", "classifier", "pretraining"),
        *head("classifier", "classifier", "token-classification", *CLASSES),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder="predictions.decoder",
    bias="predictions.bias",
    tensorflow=TENSORFLOW,
)  # fmt: skip

FAMILY = _encoder.family(Config, WEIGHTS)
