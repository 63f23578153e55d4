"""Nomic BERT: BERT with rotary positions, gated blocks and no biases in its layers.

Source: Nussbaum et al. 2024; matches transformers' `modeling_nomic_bert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _encoder
from fmodels.models._base import without
from fmodels.models._encoder import head
from fmodels.models._rope import OWN_KEYS, read_rope, write_rope
from fmodels.nn.positions import Rope
from fmodels.weights.rules import Weights

OLD = {
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta",
}  # fmt: skip
"""Keys of the model's own code, before transformers had it, and what they are called now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """Nomic BERT's config; the defaults are those of the published embedding models."""

    vocab_size: int = 30528
    max_positions: int = 2048
    activation: str = "silu"
    rope: Rope = Rope(theta=1000.0)  # pyright: ignore[reportIncompatibleMethodOverride]

    model_type: ClassVar[str] = "nomic_bert"
    HF: ClassVar[Mapping[str, str]] = {
        **without(_encoder.Config.HF, "causal"),
        "head_dim": "head_dim",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _encoder.Config.IRRELEVANT | frozenset(
        """attn_pdrop embd_pdrop resid_pdrop dense_seq_output fused_bias_fc fused_dropout_add_ln max_trained_positions
        pad_vocab_size_multiple reorder_and_upcast_attn use_flash_attn use_xentropy summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_encoder.Config.DEFAULTS,
        "activation_function": ("swiglu",),
        "rotary_emb_fraction": (1.0,),
        "scale_attn_weights": (True,),
        **dict.fromkeys(("rotary_emb_scale_base", "rotary_scaling_factor"), (None,)),
        **dict.fromkeys(
            ("causal", "mlp_fc1_bias", "mlp_fc2_bias", "parallel_block", "parallel_block_tied_norm"), (False,)
        ),
        **dict.fromkeys(("prenorm", "qkv_proj_bias", "rotary_emb_interleaved", "use_rms_norm"), (False,)),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        task: name
        for task, name in _encoder.architectures("NomicBert").items()
        if task not in ("question-answering", "multiple-choice")
    }

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        given = {new: data[old] for old, new in OLD.items() if data.get(old) is not None}
        fields.update({field: given[key] for field, key in cls.HF.items() if key in given})
        data = {**given, **data}
        own = super().read_special(data, fields, problems)
        fields["rope"] = read_rope(
            data, problems, head_dim=data.get("head_dim") or fields["head_dim"],
            max_positions=data.get("max_position_embeddings", cls.max_positions), default=cls.rope,
        )  # fmt: skip
        return {*own, *OWN_KEYS, *OLD}

    def write_special(self) -> dict[str, Any]:
        return write_rope(self.rope)


AT = "encoder.layers.{l}"
NAMES: dict[str, str | tuple[str, ...]] = {
    **{name: leaf for name, leaf in _encoder.EMBEDDINGS.items() if leaf in ("embed.tokens", "embed.types")},
    "emb_ln": "embed.norm",
    f"{AT}.attn.Wqkv": ("layers.attention.query", "layers.attention.key", "layers.attention.value"),
    f"{AT}.attn.out_proj": "layers.attention.output",
    f"{AT}.norm1": "layers.attention_norm",
    f"{AT}.mlp.fc12": "layers.mlp.gate",
    f"{AT}.mlp.fc11": "layers.mlp.up",
    f"{AT}.mlp.fc2": "layers.mlp.down",
    f"{AT}.norm2": "layers.mlp_norm",
}
AT = "layers.{l}"
MODULE = {
    **{name: leaf for name, leaf in _encoder.EMBEDDINGS.items() if leaf != "embed.positions"},
    f"{AT}.post_attention_layernorm": "layers.attention_norm",
    f"{AT}.mlp.gate_proj": "layers.mlp.gate",
    f"{AT}.mlp.up_proj": "layers.mlp.up",
    f"{AT}.mlp.down_proj": "layers.mlp.down",
    f"{AT}.self_attn.q_proj": "layers.attention.query",
    f"{AT}.self_attn.k_proj": "layers.attention.key",
    f"{AT}.self_attn.v_proj": "layers.attention.value",
    f"{AT}.self_attn.o_proj": "layers.attention.output",
    f"{AT}.post_mlp_layernorm": "layers.mlp_norm",
}
LM = "cls.predictions"


def weights(names: Mapping[str, str | tuple[str, ...]], module: Weights | None = None) -> Weights:
    """The layout map with these names of the base model's."""
    start = {name: leaf for name, leaf in names.items() if "{l}" not in name}
    layer = {name: leaf for name, leaf in names.items() if name not in start}
    leaves = [leaf if isinstance(leaf, str) else leaf[0] for leaf in layer.values()]
    found = _encoder.weights(
        "nomic_bert",
        (
            *_encoder.rules(start),
            *head("@pooler.dense", "pooler", "sequence-classification"),
            *_encoder.rules(layer, biases={leaf: None for leaf in leaves if not leaf.endswith("norm")}),
            *_encoder.lm_head(
                f"{LM}.transform.dense", f"{LM}.transform.layer_norm", f"{LM}.decoder", f"{LM}.bias", "masked-lm"
            ),
            *head("classifier", "classifier", "sequence-classification", "token-classification"),
        ),
        decoder=f"{LM}.decoder",
        bias=f"{LM}.bias",
        ignored=(r"inv_freq$",),
    )
    return dataclasses.replace(found, module=module)


WEIGHTS = weights(NAMES, weights(MODULE))

FAMILY = _encoder.family(Config, WEIGHTS)
