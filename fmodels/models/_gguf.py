"""How llama.cpp has a family: what a family's file states beside its rules, for `fmodels.dialects.gguf`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Has = Callable[[str], bool]
"""Whether a file has a tensor of this name, in any layer: `has("ffn_norm.weight")`."""


@dataclasses.dataclass(frozen=True)
class Gguf:
    """What llama.cpp calls a family, and what is special about its files.

    Attributes:
        architecture: `general.architecture`.
        permuted: whether the rows of queries and keys are ordered for rotary pairs that lie side by side.
        square: whether the queries of all heads must be as wide as the model.
        fields: field of the config -> key of the metadata, without the architecture; beyond those that all families have.
        shown: field -> the tensor whose presence says that it is true; a leading `!` for its absence.
        fixed: field -> what llama.cpp computes with, whatever the file says, where that is not the field's default; or a
            function of the other fields and of `Has`.
        factors: the types of rotary settings whose factors of the frequencies it reads from tensors.
        names: name of a tensor in PyTorch, without `.weight` -> its name, where its leaf alone does not tell.
    """

    architecture: str
    permuted: bool = False
    square: bool = False
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any | Callable[[Mapping[str, Any], Has], Any]] = dataclasses.field(default_factory=dict)
    factors: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
"""`shown` of families whose biases llama.cpp takes if they are there."""

EXPERTS = {"num_experts": "expert_count", "num_experts_per_token": "expert_used_count"}
"""`fields` of families with experts."""

WINDOW = {"sliding_window": "attention.sliding_window"}
"""`fields` of families with windows."""

CAPS = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
"""`fields` of families that squeeze scores and logits."""

TIED = {"tie_word_embeddings": True}
"""`fixed` of families that have no head of their own in llama.cpp."""


def scaled_by(layers: int) -> Callable[[Mapping[str, Any], Has], int]:
    """`fixed` of Gemma's divisor of scores: the size of a head, in the model of so many layers a share of the hidden size."""

    def divisor(fields: Mapping[str, Any], has: Has) -> int:
        return fields["hidden_size"] // fields["num_heads"] if fields["num_layers"] == layers else fields["head_dim"]

    return divisor
