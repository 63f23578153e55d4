"""What decoders with mixtures of experts have in common: their configs and the names of their experts.

Source: Jiang et al. 2024; matches transformers' `modeling_mixtral`, `modeling_qwen2_moe` and what was copied from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _decoder
from fmodels.nn.experts import Routing
from fmodels.weights.rules import Rule, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_decoder.Config):
    """The config of a decoder with experts.

    Attributes:
        num_experts: in each layer.
        num_experts_per_token: how many of them a token goes to.
        router_aux_loss_coef: what `load_balancing_loss` is multiplied with where a model is trained.
    """

    num_experts: int = 8
    num_experts_per_token: int = 2
    router_aux_loss_coef: float = 0.001

    HF: ClassVar[Mapping[str, str]] = {
        **_decoder.Config.HF,
        "num_experts": "num_local_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "router_aux_loss_coef": "router_aux_loss_coef",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _decoder.Config.IRRELEVANT | {"output_router_logits"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"{self.model_type}.Config: num_experts_per_token={self.num_experts_per_token} of num_experts={self.num_experts}; "
                "expected at least 1 and at most all of them"
            )

    @property
    def routing(self) -> Routing:
        return Routing(self.num_experts_per_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(Config):
    """The config of a decoder of which some layers may have a feed-forward block in place of experts; defaults are Qwen's.

    Attributes:
        use_sliding_window: whether layers may have a window.
        expert_size: the experts' intermediate size; `intermediate_size` is that of the feed-forward blocks.
        renormalise: whether the weights of a token's experts are made to sum up to 1.
        decoder_sparse_step: every so many layers have experts.
        mlp_only_layers: numbers of layers that have none.
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_layers: int = 24
    max_positions: int = 32768
    use_sliding_window: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    expert_size: int = 768
    renormalise: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    HF: ClassVar[Mapping[str, str]] = {
        **Config.HF,
        "sliding_window": "sliding_window",
        "use_sliding_window": "use_sliding_window",
        "expert_size": "moe_intermediate_size",
        "renormalise": "norm_topk_prob",
        "decoder_sparse_step": "decoder_sparse_step",
        "mlp_only_layers": "mlp_only_layers",
    }

    @property
    def routing(self) -> Routing:
        return super().routing._replace(renormalise=self.renormalise)

    @property
    def layer_parts(self) -> Mapping[str, tuple[bool, ...]]:
        """Which layers have experts, and which a feed-forward block."""
        step, without = self.decoder_sparse_step, self.mlp_only_layers
        sparse = tuple((i + 1) % step == 0 and i not in without for i in range(self.num_layers))
        return {"moe": sparse, "mlp": tuple(not one for one in sparse)}


EXPERTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Leaves of an expert, and the names of its tensors in files."""

DENSE = ("layers.mlp.gate", "layers.mlp.up", "layers.mlp.down")
"""What models lack whose layers all have experts."""

LAYOUTS = {"layers.moe.shared_gate": "() d"}
"""How leaves of the block lie on disk that do not lie as they are."""


def weights(
    names: Mapping[str, str],
    block: Mapping[str, str | None],
    before: tuple[Rule, ...] = (),
    more: tuple[Rule, ...] = (),
    *,
    at: str = "mlp",
    experts: Mapping[str, str] = EXPERTS,
    **options: Any,
) -> Weights:
    """The layout map of a decoder with experts: files have a tensor for each expert, PyTorch's module has them fused.

    Args:
        names: as for `_decoder.weights`.
        block: name in the block, without `.weight` -> leaf, in the order of PyTorch's modules; None for the experts.
        before: rules of a layer that come before those of the block.
        more: rules of the block, with names in it.
        at: name of the block in files.
        experts: the leaves of an expert, and the names of its tensors in files.
        options: of `_decoder.weights`.
    """
    apart = tuple(Rule(f"experts.{{x}}.{name}.weight", f"layers.moe.{leaf}.weight") for leaf, name in experts.items())
    module = build(names, block, before, FUSED, more, **options)
    return dataclasses.replace(build(names, block, before, apart, more, at=at, **options), module=module)


FUSED = (
    Rule("experts.gate_up_proj", ("layers.moe.gate.weight", "layers.moe.up.weight"), along=1),
    Rule("experts.down_proj", "layers.moe.down.weight"),
)
"""The experts in PyTorch's module."""


def build(
    names: Mapping[str, str],
    block: Mapping[str, str | None],
    before: tuple[Rule, ...],
    experts: tuple[Rule, ...],
    more: tuple[Rule, ...] = (),
    *,
    at: str = "mlp",
    **options: Any,
) -> Weights:
    """One layout map; `experts` are the rules of the experts, with names in the block, the rest as for `weights`."""
    here: list[Rule] = []
    for name, leaf in block.items():
        here += experts if leaf is None else [Rule(f"{name}.weight", f"{leaf}.weight", LAYOUTS.get(leaf))]
    here = [dataclasses.replace(rule, name=f"@layers.{{l}}.{at}.{rule.name}") for rule in (*here, *more)]
    found = _decoder.weights(names, **options)
    place = next(
        i
        for i, rule in enumerate(found.rules)
        if rule.name.startswith("@layers.{l}.mlp.") or rule.leaf == "layers.attention_norm.scale"
    )
    return dataclasses.replace(found, rules=(*found.rules[:place], *before, *here, *found.rules[place:]))
