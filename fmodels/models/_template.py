"""A skeleton to copy for a new family; it works and is tested, but is not in `FAMILIES`.

The model: learned positions, then layers `x + attention(norm(x))`, `x + mlp(norm(x))`, a final norm, and a tied head.

To add a family:

1. Copy this file to `models/<model_type>.py` and set `Config.model_type` to Hugging Face's `model_type`.
2. State what differs: the config's keys, the rules of its tensors, the lines of `forward`. A parameter of a new kind also
   needs its line in `fmodels.schema.AXES`; mathematics that other families share goes to `fmodels/nn`.
3. Add one line to `FILES` in `models/__init__.py` and one row per task to `tests/families.py`.

Loading, saving, resizing, pruning, sharding, generation and the PyTorch and TensorFlow wrappers follow from these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from fmodels.models._base import Config as BaseConfig
from fmodels.models._base import Family, decoder_head, init_normal
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention
from fmodels.nn.embeddings import embed
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import of_call
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import Rule, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Every field has a default, the published model's; fields of the family's own come after the common ones."""

    vocab_size: int = 128
    hidden_size: int = 32
    intermediate_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 8
    max_positions: int = 64
    norm_eps: float = 1e-5
    activation: str = "gelu"

    model_type: ClassVar[str] = "template"
    # Field -> key of config.json. A key that is neither here nor below is an error, so that nothing is silently ignored.
    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    # Keys that change no number that `forward` computes, such as dropout.
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    # Keys that would change the numbers, with the values at which they do not.
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {"position_embedding_type": ("absolute",)}
    # Task -> class in transformers.
    ARCHITECTURES: ClassVar[Mapping[str, str]] = {"base": "TemplateModel", "causal-lm": "TemplateForCausalLM"}

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        """What is more than a renaming: here, sizes that follow from others. Returns the keys that it dealt with."""
        heads = data.get("num_attention_heads", cls.num_heads)
        fields.update(num_kv_heads=heads, head_dim=data.get("hidden_size", cls.hidden_size) // heads)
        return set()


# Each tensor on disk: its name, its leaf, and how its axes lie there where that differs from `schema.AXES`. `@` stands for
# the prefix of the base model, `{l}` for the layer. Both directions, and all formats, follow from these lines.
WEIGHTS = Weights(
    prefix={"": "model"},
    tied={"lm_head.weight": "embed.tokens"},
    rules=(
        Rule("@embed_tokens.weight", "embed.tokens"),
        Rule("@embed_positions.weight", "embed.positions"),
        Rule("@layers.{l}.norm_1.weight", "layers.attention_norm.scale"),
        Rule("@layers.{l}.norm_1.bias", "layers.attention_norm.bias"),
        Rule("@layers.{l}.attention.q_proj.weight", "layers.attention.query.weight", "(h k) d"),
        Rule(  # two leaves side by side in one tensor
            "@layers.{l}.attention.kv_proj.weight",
            ("layers.attention.key.weight", "layers.attention.value.weight"),
            ("(g k) d", "(g k) d"),
        ),
        Rule("@layers.{l}.attention.o_proj.weight", "layers.attention.output.weight", "d (h k)"),
        Rule("@layers.{l}.norm_2.weight", "layers.mlp_norm.scale"),
        Rule("@layers.{l}.norm_2.bias", "layers.mlp_norm.bias"),
        Rule("@layers.{l}.mlp.up.weight", "layers.mlp.up.weight"),
        Rule("@layers.{l}.mlp.down.weight", "layers.mlp.down.weight"),
        Rule("@norm.weight", "final_norm.scale"),
        Rule("@norm.bias", "final_norm.bias"),
        Rule("lm_head.weight", "lm_head.weight", tasks=("causal-lm",), when="untied"),
    ),
)


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    mask: Array | None = None,
    positions: Array | None = None,
    token_types: Array | None = None,
    cache: Cache | None = None,
    select: Array | None = None,
    keep: Keep = NOTHING,
) -> Output:
    """The model on `(b t)` tokens; see `fmodels.forward`. Sizes are read from the arrays, not from the config."""
    if token_types is not None:
        raise ValueError("forward: this model has no token types; leave token_types out")
    present, positions = of_call(tokens, mask, positions, cache)
    seen = attend(present, cache, causal=True)

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        y, slot = attention(p["attention"], layer_norm(p["attention_norm"], x, config.norm_eps), seen, slot=slot)
        x = x + y
        return x + mlp(p["mlp"], layer_norm(p["mlp_norm"], x, config.norm_eps), config.activation), slot

    x = embed(params["embed"], tokens, positions)
    ran = layers.run(layer, params["layers"], x, cache, present, keep=keep)
    hidden = layer_norm(params["final_norm"], ran.x, config.norm_eps)
    out = decoder_head(params, config, hidden, tokens=tokens, mask=mask, cache=ran.cache, select=select)
    return ran.onto(out, hidden)


init = functools.partial(init_normal, WEIGHTS)

FAMILY = Family(config=Config, forward=forward, weights=WEIGHTS, init=init)
