"""Mixtral: Mistral whose layers have experts in place of a feed-forward block.

Source: Jiang et al. 2024; matches transformers' `modeling_mixtral`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fmodels.models import _decoder, _mixture
from fmodels.models._gguf import EXPERTS, Gguf
from fmodels.nn.positions import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_mixture.Config):
    """Mixtral's config; the defaults are Mixtral 8x7B's. `intermediate_size` is that of an expert."""

    intermediate_size: int = 14336
    num_kv_heads: int = 8
    max_positions: int = 131072
    norm_eps: float = 1e-5
    rope: Rope = Rope(theta=1e6)

    model_type: ClassVar[str] = "mixtral"
    gguf: ClassVar[Gguf | None] = Gguf("llama", permuted=True, fields=EXPERTS, factors=("llama3", "longrope"))
    HF: ClassVar[Mapping[str, str]] = {**_mixture.Config.HF, "sliding_window": "sliding_window"}
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    IRRELEVANT: ClassVar[frozenset[str]] = _mixture.Config.IRRELEVANT | {"router_jitter_noise"}  # in training
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("Mixtral", *_decoder.ALL)


WEIGHTS = _mixture.weights(
    _decoder.renamed(dict.fromkeys(_mixture.DENSE)),
    {"gate": "layers.moe.router", "experts": None},
    at="block_sparse_moe",
    experts={"gate": "w1", "down": "w2", "up": "w3"},
    question_answering="model",
)

FAMILY = _decoder.family(Config, WEIGHTS)
