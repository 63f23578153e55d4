"""The names that llama.cpp gives to tensors, from the leaves that a family's rules name.

Source: gguf-py/gguf/tensor_mapping.py of llama.cpp.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from fmodels import schema
from fmodels.models import FAMILIES, Config, family
from fmodels.models._decoder import JOINED, LAYOUTS
from fmodels.models._gguf import Gguf
from fmodels.weights.rules import Place, Rule

NAMES = {
    "embed.tokens": "token_embd",
    "embed.positions": "position_embd",
    "embed.norm": "token_embd_norm",
    "final_norm": "output_norm",
    "lm_head": "output",
    "layers.attention_norm": "blk.{l}.attn_norm",
    "layers.attention.query": "blk.{l}.attn_q",
    "layers.attention.key": "blk.{l}.attn_k",
    "layers.attention.value": "blk.{l}.attn_v",
    "layers.attention.output": "blk.{l}.attn_output",
    "layers.attention.query_norm": "blk.{l}.attn_q_norm",
    "layers.attention.key_norm": "blk.{l}.attn_k_norm",
    "layers.attention.query_norms": "blk.{l}.attn_q_norm",
    "layers.attention.key_norms": "blk.{l}.attn_k_norm",
    "layers.attention_after_norm": "blk.{l}.post_attention_norm",
    "layers.mlp_norm": "blk.{l}.ffn_norm",
    "layers.mlp_after_norm": "blk.{l}.post_ffw_norm",
    "layers.mlp.gate": "blk.{l}.ffn_gate",
    "layers.mlp.up": "blk.{l}.ffn_up",
    "layers.mlp.down": "blk.{l}.ffn_down",
    "layers.moe.router": "blk.{l}.ffn_gate_inp",
    "layers.moe.gate": "blk.{l}.ffn_gate_exps",
    "layers.moe.up": "blk.{l}.ffn_up_exps",
    "layers.moe.down": "blk.{l}.ffn_down_exps",
    "layers.moe.shared.gate": "blk.{l}.ffn_gate_shexp",
    "layers.moe.shared.up": "blk.{l}.ffn_up_shexp",
    "layers.moe.shared.down": "blk.{l}.ffn_down_shexp",
    "layers.moe.shared_gate": "blk.{l}.ffn_gate_inp_shexp",
}
"""Leaf -> llama.cpp's name, both without `.weight`."""

TOGETHER = {JOINED: "blk.{l}.attn_qkv", ("layers.mlp.gate", "layers.mlp.up"): "blk.{l}.ffn_up"}
"""Leaves that lie in one tensor in GGUF, too, where they do in PyTorch."""


FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""What llama.cpp's converter may write (`--fuse-qkv`, `--fuse-gate-up-exps`) -> the tensors whose rows it has one after the other."""


class Source(NamedTuple):
    """A tensor of GGUF that holds leaves of a tensor of PyTorch's.

    Attributes:
        rule: how the leaves lie in it, or in its part of one expert or head; its name is that in the file.
        turned: whether its rows are ordered for rotary pairs side by side.
        shifted: whether 1 is added.
    """

    rule: Rule
    turned: bool
    shifted: bool


def of_family(kind: type[Config]) -> Gguf:
    """What a family's file states about llama.cpp.

    Raises:
        ValueError: llama.cpp does not have the family, or it is not supported here.
    """
    own = vars(kind).get("gguf")
    if own is None:
        known = sorted(name for name in FAMILIES if vars(family(name).config).get("gguf"))
        raise ValueError(
            f"gguf: model_type {kind.model_type!r} is not supported in GGUF; supported are {', '.join(known)}"
        )
    return own


def names(config: Config) -> list[str]:
    """The names of the tensors of a GGUF file of a model with this config."""
    places = family(config).weights.places(config)
    found = [name_at(source, place) for place in places.values() for source in sources(place.rule, config)]
    return list(dict.fromkeys(found))


def sources(rule: Rule, config: Config) -> list[Source]:
    """The tensors of GGUF in which the leaves of a rule lie; none where llama.cpp has no such tensor."""
    return _of_kind(rule, type(config))


@functools.cache
def _of_kind(rule: Rule, kind: type[Config]) -> list[Source]:
    own = of_family(kind)
    stems = tuple(leaf if leaf in schema.TABLES else leaf.rpartition(".")[0] for leaf in rule.leaves)
    suffix = ".bias" if rule.leaves[0].endswith("bias") else ".weight"
    each = f".{{{rule.numbered}}}" if rule.numbered else ""  # which is not written: the rule then describes a part
    if stems in TOGETHER:
        own_layouts = zip(stems, rule.leaves, strict=True)
        layouts = tuple(_layout(stem, suffix) or " ".join(rule.letters(leaf)) for stem, leaf in own_layouts)
        return [Source(Rule(TOGETHER[stems] + suffix, rule.leaves, layouts), False, False)]
    found: list[Source] = []
    for stem, leaf in zip(stems, rule.leaves, strict=True):
        named = own.names.get(rule.name.removeprefix("@").removesuffix(suffix), NAMES.get(stem))
        if named is None:
            return []
        layout = rule.layout if leaf.endswith("norms.scale") else _layout(stem, suffix)
        turned = own.permuted and stem in JOINED[:2]
        shifted = leaf.endswith(".scale") and getattr(kind, "norm", None) == "rms-plus-one"
        found.append(Source(Rule(f"{named}{suffix}{each}", leaf, layout), turned, shifted))
    return found


def _layout(stem: str, suffix: str) -> str | None:
    """How a leaf lies in GGUF: as it is, heads together."""
    return LAYOUTS.get(stem, (None, None))[suffix == ".bias"]


def parts_of(name: str) -> tuple[str, ...]:
    """The tensors that one of `FUSED` holds; none of another.

    Example:
        >>> parts_of("blk.0.ffn_gate_up_exps.weight"), parts_of("output.weight")
        (('blk.0.ffn_gate_exps.weight', 'blk.0.ffn_up_exps.weight'), ())
    """
    found = re.fullmatch(r"(blk\.\d+\.)(\w+)(\.\w+)", name)
    return tuple(f"{found[1]}{part}{found[3]}" for part in FUSED.get(found[2], ())) if found else ()


def name_at(source: Source, place: Place) -> str:
    """The name of the tensor in the file."""
    return source.rule.name.removesuffix(f".{{{source.rule.numbered}}}").replace("{l}", str(place.layer))
