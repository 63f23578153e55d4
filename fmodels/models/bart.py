"""BART: an encoder and a decoder with learned positions and layer norms after the blocks.

Source: Lewis et al. 2020; matches transformers' `modeling_bart`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models import _seq2seq
from fmodels.models._base import init_normal
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, cross_attention
from fmodels.nn.embeddings import embed
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import columns
from fmodels.types import NOTHING, Array, Cache, Cross, Keep, Output, Params
from fmodels.weights.rules import Flax, Rule, TensorFlow, Weights

BOTH = ("base", "seq2seq-lm", "sequence-classification", "question-answering")
"""Tasks whose models have an encoder beside the decoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_seq2seq.Config):
    """BART's config; the defaults are BART large's.

    Attributes:
        scale_embedding: whether rows of the token table are multiplied by √d.
    """

    vocab_size: int = 50265
    hidden_size: int = 1024
    intermediate_size: int = 4096
    decoder_intermediate_size: int = 4096
    num_layers: int = 12
    decoder_num_layers: int = 12
    num_heads: int = 16
    decoder_num_heads: int = 16
    num_kv_heads: int = 16
    decoder_num_kv_heads: int = 16
    head_dim: int = 64
    decoder_head_dim: int = 64
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu"
    scale_embedding: bool = False
    num_labels: int = 3
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 1
    decoder_start_token_id: int = 2

    model_type: ClassVar[str] = "bart"
    counts_columns: ClassVar[bool] = True
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "decoder_intermediate_size": "decoder_ffn_dim",
        "num_layers": "encoder_layers",
        "decoder_num_layers": "decoder_layers",
        "num_heads": "encoder_attention_heads",
        "decoder_num_heads": "decoder_attention_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "scale_embedding": "scale_embedding",
        "initializer_range": "init_std",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "decoder_start_token_id": "decoder_start_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    ALIASES: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads",
    }  # fmt: skip
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset(
        """activation_dropout attention_dropout dropout classifier_dropout classif_dropout encoder_layerdrop
        decoder_layerdrop num_hidden_layers force_bos_token_to_be_generated save_step
        replacing_rate student_encoder_layers student_decoder_layers""".split()
    )
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_bias_logits": (False,),
        "add_final_layer_norm": (False,),
        "normalize_before": (False,),
        "normalize_embedding": (True,),
        "static_position_embeddings": (False,),
        "extra_pos_embeddings": (2,),
    }
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {
        "base": "BartModel",
        "seq2seq-lm": "BartForConditionalGeneration",
        "sequence-classification": "BartForSequenceClassification",
        "question-answering": "BartForQuestionAnswering",
        "causal-lm": "BartForCausalLM",
    }
    ONE_PART: ClassVar[Mapping[str, str]] = {"causal-lm": "decoder"}
    SHIFTS: ClassVar[tuple[str, ...]] = BOTH

    @property
    def position_offset(self) -> int:
        return 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "question-answering":  # as transformers' class sets it, whatever the file says
            object.__setattr__(self, "num_labels", 2)

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden = data.get("d_model", cls.hidden_size)
        for field, key in (("", "encoder_attention_heads"), ("decoder_", "decoder_attention_heads")):
            heads = data.get(key, cls.num_heads)
            fields |= {f"{field}num_kv_heads": heads, f"{field}head_dim": hidden // heads}
            if hidden % heads:
                problems.append(f"d_model={hidden} is not a multiple of {key}={heads}")
        return {"is_decoder"} | super().read_special(data, fields, problems)

    def write_special(self) -> dict[str, Any]:
        return {"is_decoder": not self.is_encoder_decoder, **super().write_special()}


def _rules(part: str, blocks: Mapping[str, str], tasks: tuple[str, ...] | None) -> list[Rule]:
    """Of a stack whose layers have these blocks of attention, PyTorch's name -> leaf."""
    rules = [Rule(f"@{part}.embed_positions.weight", f"{part}.embed.positions", tasks=tasks)]

    def add(name: str, leaf: str, kind: str, weight: str | None = None, bias: str | None = None) -> None:
        rules.append(Rule(f"@{part}.{name}.weight", f"{part}.{leaf}.{kind}", weight, tasks=tasks))
        rules.append(Rule(f"@{part}.{name}.bias", f"{part}.{leaf}.bias", bias, tasks=tasks))

    at = "layers.{l}"
    for name, leaf in blocks.items():
        add(f"{at}.{name}.k_proj", f"layers.{leaf}.key", "weight", "(g k) d", "(g k)")
        add(f"{at}.{name}.v_proj", f"layers.{leaf}.value", "weight", "(g k) d", "(g k)")
        add(f"{at}.{name}.q_proj", f"layers.{leaf}.query", "weight", "(h k) d", "(h k)")
        add(f"{at}.{name}.out_proj", f"layers.{leaf}.output", "weight", "d (h k)")
        add(f"{at}.{name}_layer_norm", f"layers.{leaf}_norm", "scale")
    add(f"{at}.fc1", "layers.mlp.up", "weight")
    add(f"{at}.fc2", "layers.mlp.down", "weight")
    add(f"{at}.final_layer_norm", "layers.mlp_norm", "scale")
    add("layernorm_embedding", "embed.norm", "scale")
    return rules


CLASSES = ("sequence-classification",)

WEIGHTS = Weights(
    prefix={"": "model"},
    tied={"lm_head.weight": "embed.tokens"},
    shared=(
        Rule("@encoder.embed_tokens.weight", "embed.tokens", tasks=BOTH, when="tie_word_embeddings"),
        Rule("@decoder.embed_tokens.weight", "embed.tokens", tasks=BOTH, when="tie_word_embeddings"),
    ),
    ignored=(r"(en|de)coder\.version$",),
    tensorflow=TensorFlow(
        without=("question-answering", "causal-lm"),
        tokens="embeddings",
        names={r"^model/shared/": "model.shared/"},
        outside=("model.shared",),
    ),
    fallbacks={"model.decoder.embed_tokens.weight": "model.shared.weight"},
    stand_ins={"encoder.embed.tokens": "embed.tokens", "decoder.embed.tokens": "embed.tokens"},
    flax=Flax(joined={"@shared.weight": ("@encoder.embed_tokens.weight", "@decoder.embed_tokens.weight")}),
    rules=(
        Rule("@shared.weight", "embed.tokens", tasks=BOTH),
        Rule("@decoder.embed_tokens.weight", "embed.tokens", tasks=("causal-lm",)),
        # Untied, transformers 5 has a table for each part and reads the shared one nowhere.
        Rule("@encoder.embed_tokens.weight", "encoder.embed.tokens", tasks=BOTH, when="untied", optional=True),
        Rule("@decoder.embed_tokens.weight", "decoder.embed.tokens", tasks=BOTH, when="untied", optional=True),
        *_rules("encoder", {"self_attn": "attention"}, BOTH),
        *_rules("decoder", {"self_attn": "attention", "encoder_attn": "cross_attention"}, None),
        Rule("lm_head.weight", "lm_head.weight", tasks=("seq2seq-lm", "causal-lm"), when="untied"),
        Rule("final_logits_bias", "lm_head.bias", "() v", tasks=("seq2seq-lm",), optional=True, buffer=True),
        Rule("classification_head.dense.weight", "pooler.weight", tasks=CLASSES),
        Rule("classification_head.dense.bias", "pooler.bias", tasks=CLASSES),
        Rule("classification_head.out_proj.weight", "classifier.weight", tasks=CLASSES),
        Rule("classification_head.out_proj.bias", "classifier.bias", tasks=CLASSES),
        Rule("qa_outputs.weight", "classifier.weight", tasks=("question-answering",)),
        Rule("qa_outputs.bias", "classifier.bias", tasks=("question-answering",)),
    ),
)


def stack(
    params: Params,
    config: Config,
    part: str,
    tokens: Array,
    present: Array,
    *,
    positions: Array | None = None,
    cache: Cache | None = None,
    cross: Cross | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """The encoder or the decoder on `(b t)` tokens; positions count columns, whatever the mask, as in transformers."""
    own = params[part]
    positions = columns(tokens, cache) if positions is None else positions
    seen = attend(present, cache, causal=part == "decoder")

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y, slot = attention(p["attention"], x, seen, slot=slot)
        x = layer_norm(p["attention_norm"], x + y, config.norm_eps)
        if cross is not None:
            y, slot = cross_attention(p["cross_attention"], x, p["cross"], cross.mask, slot=slot)
            x = layer_norm(p["cross_attention_norm"], x + y, config.norm_eps)
        return layer_norm(p["mlp_norm"], x + mlp(p["mlp"], x, config.activation), config.norm_eps), slot

    tables = params["embed"] | own["embed"]
    scale = math.sqrt(config.hidden_size) if config.scale_embedding else None
    x = embed(tables, tokens, positions + config.position_offset, scale=scale)
    x = layer_norm(own["embed"]["norm"], x, config.norm_eps)
    blocks = own["layers"] if cross is None else layers.with_cross(own["layers"], cross)
    ran = layers.run(layer, blocks, x, cache, present, keep=keep)
    return ran.onto(Output(hidden=ran.x, cache=ran.cache), ran.x)


FAMILY = _seq2seq.family(Config, stack, WEIGHTS, functools.partial(init_normal, WEIGHTS))
