"""gpt-oss: experts with biases and a clamped gate, attention with sinks, every other layer with a window.

Source: OpenAI 2025; matches transformers' `modeling_gpt_oss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder, _mixture
from fmodels.models._rope import rope_parameters
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_mixture.Config):
    """gpt-oss's config; the defaults are those of gpt-oss-120b. `intermediate_size` is that of an expert.

    Attributes:
        swiglu_alpha: of the experts' gate.
        swiglu_limit: where the experts' gate and its input are cut.
    """

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_layers: int = 36
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    max_positions: int = 131072
    norm_eps: float = 1e-5
    attention_bias: bool = True
    sliding_window: int | None = 128
    num_experts: int = 128
    num_experts_per_token: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rope: Rope = Rope(
        type="yarn",
        theta=150000.0,
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_positions=4096,
    )
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    model_type: ClassVar[str] = "gpt_oss"
    period: ClassVar[int] = 2
    own_head_dim: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **_mixture.Config.HF,
        **_decoder.WINDOWS,
        "attention_bias": "attention_bias",
        "swiglu_alpha": "swiglu_alpha",
        "swiglu_limit": "swiglu_limit",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    IRRELEVANT: ClassVar[frozenset[str]] = _mixture.Config.IRRELEVANT | {"experts_per_token", "initial_context_length"}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("GptOss", *_decoder.CLASSIFIERS)

    @property
    def expert_clamp(self) -> tuple[float, float] | None:
        return self.swiglu_alpha, self.swiglu_limit

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        if not data.get("rope_scaling") and not data.get("rope_parameters"):
            own = {key: value for key, value in rope_parameters(cls.rope).items() if key != "rope_theta"}
            data = {**data, "rope_parameters": own}
        return super().read_special(data, fields, problems)


GATES = ("layers.moe.gate", "layers.moe.up")

EXPERTS = (
    Rule("router.bias", "layers.moe.router.bias"),
    Rule("experts.gate_up_proj", tuple(f"{p}.weight" for p in GATES), ("x d i", "x d i"), along=2, within="i"),
    Rule("experts.gate_up_proj_bias", tuple(f"{p}.bias" for p in GATES), along=1, within="i"),
    Rule("experts.down_proj", "layers.moe.down.weight", "x i d"),
    Rule("experts.down_proj_bias", "layers.moe.down.bias"),
)

WEIGHTS = _mixture.build(
    _decoder.renamed(dict.fromkeys(_mixture.DENSE)),
    {"router": "layers.moe.router", "experts": None},
    (Rule("@layers.{l}.self_attn.sinks", "layers.attention.sinks"),),
    EXPERTS,
)

FAMILY = _decoder.family(Config, WEIGHTS)
