"""DeepSeek-V3: latent attention; experts in groups, chosen by sigmoids and a bias, behind a few dense layers.

Source: DeepSeek-AI 2024; matches transformers' `modeling_deepseek_v3`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder, _mixture
from fmodels.models._base import without
from fmodels.nn.experts import Routing
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Rule

DERIVED = ("head_dim", "qk_head_dim")
"""Keys of config.json that follow from others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_mixture.Config):
    """DeepSeek-V3's config; the defaults are the published model's.

    Attributes:
        head_dim: of a head's value.
        plain_size: of the part of a head's query and key that is not rotated.
        rope_size: of the part that is.
        latent_size: of the vector from which keys and values are made.
        low_rank_queries: whether queries are made from a short vector, too.
        query_rank: of that vector.
        expert_size: the experts' intermediate size; `intermediate_size` is that of the dense layers.
        num_shared_experts: that all tokens share, side by side in one block.
        num_dense_layers: how many of the first layers have no experts.
        renormalise: whether the weights of a token's experts are made to sum up to 1.
        routed_scaling_factor: what they are then multiplied with.
        num_groups: of experts.
        num_groups_kept: from how many of them the experts of a token are chosen.
        interleaved: whether rotary pairs lie side by side.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_layers: int = 61
    num_heads: int = 128
    num_kv_heads: int = 128
    max_positions: int = 4096
    plain_size: int = 128
    rope_size: int = 64
    latent_size: int = 512
    low_rank_queries: bool = True
    query_rank: int = 1536
    num_experts: int = 256
    num_experts_per_token: int = 8
    expert_size: int = 2048
    num_shared_experts: int = 1
    num_dense_layers: int = 3
    renormalise: bool = True
    routed_scaling_factor: float = 2.5
    num_groups: int = 8
    num_groups_kept: int = 4
    interleaved: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    model_type: ClassVar[str] = "deepseek_v3"
    own_head_dim: ClassVar[bool] = True
    own_kv_heads: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        **without(_mixture.Config.HF, "router_aux_loss_coef"),
        "head_dim": "v_head_dim",
        "plain_size": "qk_nope_head_dim",
        "rope_size": "qk_rope_head_dim",
        "latent_size": "kv_lora_rank",
        "attention_bias": "attention_bias",
        "num_experts": "n_routed_experts",
        "expert_size": "moe_intermediate_size",
        "num_shared_experts": "n_shared_experts",
        "num_dense_layers": "first_k_dense_replace",
        "renormalise": "norm_topk_prob",
        "routed_scaling_factor": "routed_scaling_factor",
        "num_groups": "n_group",
        "num_groups_kept": "topk_group",
        "interleaved": "rope_interleave",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {"num_local_experts": "n_routed_experts"}
    IRRELEVANT: ClassVar[frozenset[str]] = _mixture.Config.IRRELEVANT | frozenset(
        "num_nextn_predict_layers num_mtp_layers aux_loss_alpha seq_aux ep_size".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
    }  # fmt: skip
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _decoder.architectures("DeepseekV3", *_decoder.CLASSIFIERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        each, odd = divmod(self.num_experts, self.num_groups)
        if odd or each < 2 or not 1 <= self.num_groups_kept <= self.num_groups:
            raise ValueError(
                f"deepseek_v3.Config: num_experts={self.num_experts} in num_groups={self.num_groups}, of which "
                f"num_groups_kept={self.num_groups_kept} are kept; expected groups of at least 2, and at most all of them kept"
            )
        if self.num_experts_per_token > each * self.num_groups_kept:
            raise ValueError(
                f"deepseek_v3.Config: num_experts_per_token={self.num_experts_per_token} are more than the "
                f"{each * self.num_groups_kept} experts of the groups that are kept"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"deepseek_v3.Config: each head has its own key; num_kv_heads={self.num_kv_heads}, num_heads={self.num_heads}"
            )

    @property
    def shared_size(self) -> int:
        """The intermediate size of all shared experts together."""
        return self.expert_size * self.num_shared_experts

    @property
    def query_bias(self) -> bool:
        """Whether the short vector of queries has a bias."""
        return self.attention_bias and self.low_rank_queries

    @property
    def routing(self) -> Routing:
        return Routing(
            self.num_experts_per_token, "sigmoid", self.renormalise, self.routed_scaling_factor, self.num_groups,
            self.num_groups_kept,
        )  # fmt: skip

    @property
    def layer_parts(self) -> Mapping[str, tuple[bool, ...]]:
        """Which layers have experts, and which a feed-forward block."""
        dense = tuple(i < self.num_dense_layers for i in range(self.num_layers))
        return {"mlp": dense, "moe": tuple(not one for one in dense)}

    @property
    def attention_scale(self) -> float:
        scale = (self.plain_size + self.rope_size) ** -0.5
        if self.rope.type == "default" or not self.rope.mscale_all_dim or (self.rope.factor or 1) <= 1:
            return scale
        return scale * (0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor or 1) + 1) ** 2

    def rotary_size(self, rope: Rope) -> int:
        return self.rope_size

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        if "q_lora_rank" in data:
            fields["low_rank_queries"] = data["q_lora_rank"] is not None
            fields["query_rank"] = data["q_lora_rank"] or cls.query_rank
        data = {**data, "head_dim": data.get("qk_rope_head_dim", cls.rope_size)}
        return {*super().read_special(data, fields, problems), "q_lora_rank", *DERIVED}

    def write_special(self) -> dict[str, Any]:
        return {**super().write_special(), "q_lora_rank": self.query_rank if self.low_rank_queries else None}


AT = "@layers.{l}.self_attn"
IN = "layers.attention"


def _heads(name: str, leaves: tuple[str, str], layouts: tuple[str, str], when: str | None = None) -> Rule:
    """Two leaves of each head, side by side within it."""
    return Rule(f"{AT}.{name}.weight", tuple(f"{IN}.{p}.weight" for p in leaves), layouts, within="h", when=when)


ATTENTION = (
    _heads("q_proj", ("query.plain", "query.turned"), ("(h u) d", "(h w) d"), "!low_rank_queries"),
    Rule(f"{AT}.q_a_proj.weight", f"{IN}.query_down.weight", when="low_rank_queries"),
    Rule(f"{AT}.q_a_proj.bias", f"{IN}.query_down.bias", when="query_bias"),
    Rule(f"{AT}.q_a_layernorm.weight", f"{IN}.query_down_norm.scale", when="low_rank_queries"),
    _heads("q_b_proj", ("query_up.plain", "query_up.turned"), ("(h u) q", "(h w) q"), "low_rank_queries"),
    Rule(f"{AT}.kv_a_proj_with_mqa.weight", (f"{IN}.latent.weight", f"{IN}.turned_key.weight")),
    Rule(f"{AT}.kv_a_proj_with_mqa.bias", (f"{IN}.latent.bias", f"{IN}.turned_key.bias"), when="attention_bias"),
    Rule(f"{AT}.kv_a_layernorm.weight", f"{IN}.latent_norm.scale"),
    _heads("kv_b_proj", ("key_up", "value_up"), ("(h u) z", "(h k) z")),
    Rule(f"{AT}.o_proj.weight", f"{IN}.output.weight", "d (h k)"),
    Rule(f"{AT}.o_proj.bias", f"{IN}.output.bias", when="attention_bias"),
)

SHARED = {f"shared_experts.{one}_proj": f"layers.moe.shared.{one}" for one in ("gate", "up", "down")}

WEIGHTS = _mixture.weights(
    _decoder.renamed(dict.fromkeys((*_decoder.JOINED, f"{IN}.output"))),
    {"experts": None, "gate": "layers.moe.router", **SHARED},
    ATTENTION,
    (Rule("gate.e_score_correction_bias", "layers.moe.router.choice_bias", buffer=True),),
    ignored=(r"^model\.layers\.{l}\.",),  # a layer that predicts further tokens
)

FAMILY = _decoder.family(Config, WEIGHTS)
