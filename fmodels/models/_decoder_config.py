"""The config that the decoders after Llama have in common, with a property for whatever their trees do not tell.

Source: matches transformers' `configuration_llama` and what was copied from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from fmodels.models._base import Config as BaseConfig
from fmodels.models._rope import OWN_KEYS, TYPES, read_rope, read_ropes, rotated, write_rope, write_ropes
from fmodels.nn.experts import Routing
from fmodels.nn.positions import Rope


class Kind(NamedTuple):
    """What is special about the attention of a layer.

    Attributes:
        window: how many tokens it sees, or None for all.
        rope: its rotary settings, or None for no positions.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """The config of a rotary decoder; the defaults are Llama 7B's.

    Attributes:
        attention_bias: whether queries, keys and values have biases.
        mlp_bias: whether the feed-forward block has.
        rope: rotary settings.
        sliding_window: how many tokens a layer with a window sees.
        layer_types: of each layer, `"full_attention"` or `"sliding_attention"`; None for the family's own pattern.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    max_positions: int = 2048
    norm_eps: float = 1e-6
    activation: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    HF: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = frozenset({"pretraining_tp", "attention_dropout"})
    norm: ClassVar[str] = "rms"
    """Which of `_decoder.NORMS`."""
    causal: ClassVar[bool] = True
    """Whether a token sees only those before it; else windows reach half as far, in both directions."""
    parallel: ClassVar[bool] = False
    """Whether both blocks read the same input; then one norm may serve both."""
    period: ClassVar[int] = 0
    """Of how many layers one sees everything, and the others have a window; 0 where all have it, if there is one."""
    local_rope: ClassVar[Rope | None] = None
    """Rotary settings of the layers with a window, where they are not the others'."""
    rotary: ClassVar[bool] = True
    """Whether queries and keys are rotated."""
    interleaved: ClassVar[bool] = False
    """Whether rotary pairs lie side by side."""
    partial: ClassVar[bool] = False
    """Whether a part of each head may be rotated."""
    rounds_up: ClassVar[bool] = False
    """Whether that part may be odd; one number more is then rotated."""
    norm_first: ClassVar[bool] = True
    """Whether norms are before the blocks, and not behind the sums."""
    norm_residual: ClassVar[bool] = False
    """Whether what a block adds to is its normed input."""
    own_head_dim: ClassVar[bool] = False
    """Whether the size of a head that config.json does not say is the class's, and not that of a share."""
    own_kv_heads: ClassVar[bool] = False
    """The same of the number of key-value heads, which is else that of heads where it is by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rounds = (
            self.rounds_up and self.rope.partial_rotary_factor < 1.0 and self.rope.type not in ("yarn", "proportional")
        )
        if self.rotary and not rounds and self.rotary_size(self.rope) % 2:
            raise ValueError(
                f"{self.model_type}.Config: rotary embeddings turn pairs of numbers; of head_dim={self.head_dim} "
                f"{self.rotary_size(self.rope)} would be turned, which is odd"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"{self.model_type}.Config: layer_types has {len(self.layer_types)} entries for {self.num_layers} layers"
            )
        if unknown := sorted({*(self.layer_types or ())} - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"{self.model_type}.Config: layer_types has {', '.join(unknown)}; known are full_attention and sliding_attention"
            )

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies, `rope.theta`."""
        return self.rope.theta

    def rotary_size(self, rope: Rope) -> int:
        """How many numbers of each head are rotated, but for `rounds_up`."""
        return rotated(self.head_dim, rope)

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """ALiBi's, of the query heads; None for none."""
        return None

    @property
    def slopes_scale(self) -> float:
        """Of what ALiBi adds to the scores."""
        return 1.0

    @property
    def slopes_rounded(self) -> bool:
        """Whether ALiBi is computed in bfloat16."""
        return False

    @property
    def sinusoidal(self) -> bool:
        """Whether sines of the positions are added to the embeddings."""
        return False

    @property
    def plain_norms(self) -> bool:
        """Whether norms are there that have no parameters."""
        return False

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows on the last layer."""
        return True

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output has a bias."""
        return self.attention_bias

    @property
    def head_bias(self) -> bool:
        """Whether the language model's head has a bias."""
        return False

    @property
    def embedding_scale(self) -> float | None:
        """Of the rows of the token table."""
        return None

    @property
    def attention_scale(self) -> float | None:
        """Of the scores; `1 / √k` if None."""
        return None

    @property
    def attention_cap(self) -> float | None:
        """The scores are squeezed between this and its negative."""
        return None

    @property
    def routing(self) -> Routing:
        """How tokens go to experts, in layers that have some."""
        return Routing(1)

    @property
    def expert_clamp(self) -> tuple[float, float] | None:
        """Of the experts' gated form, see `Gate`."""
        return None

    @property
    def residual_scale(self) -> float | None:
        """Of what each block adds."""
        return None

    @property
    def own_types(self) -> tuple[str, ...]:
        """The `layer_types` where config.json does not say them: of each `period`, the last sees everything."""
        full = (self.period and (i + 1) % self.period == 0 for i in range(self.num_layers))
        return tuple("full_attention" if one else "sliding_attention" for one in full)

    def kind(self, full: bool) -> Kind:
        """Of the layers that see everything, or of the others."""
        rope = self.rope if full or self.local_rope is None else self.local_rope
        return Kind(None if full else self.sliding_window, rope if self.rotary else None)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each layer."""
        return tuple(self.kind(one == "full_attention") for one in self.layer_types or self.own_types)

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        found = tuple(kind.window for kind in self.kinds)
        return found if any(found) else None

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        hidden, heads = (data.get(cls.HF[field], getattr(cls, field)) for field in ("hidden_size", "num_heads"))
        fields["num_kv_heads"] = cls.num_kv_heads if cls.own_kv_heads or cls.num_kv_heads != cls.num_heads else heads
        if "num_key_value_heads" in data and data["num_key_value_heads"] is None:
            fields["num_kv_heads"] = heads
        fields["head_dim"] = cls.head_dim if cls.own_head_dim else hidden // heads
        if "head_dim" not in cls.HF and hidden % heads:
            names = cls.HF["hidden_size"], cls.HF["num_heads"]
            problems.append(f"{names[0]}={hidden} is not a multiple of {names[1]}={heads}")
        if cls.rotary is False:
            return set()
        sizes: Any = {
            "head_dim": data.get("head_dim") or fields["head_dim"],
            "max_positions": data.get("max_position_embeddings", cls.max_positions),
        }
        if cls.local_rope is None:
            fields["rope"] = read_rope(data, problems, default=cls.rope, partial=cls.partial, **sizes)
            return {*OWN_KEYS}
        bases = data.get("rope_theta") or cls.rope.theta, data.get("rope_local_base_freq") or cls.local_rope.theta
        fields["rope"], fields["local_rope"] = read_ropes(data, problems, bases, scaled=TYPES[:1], **sizes)
        return {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"}

    def write_special(self) -> dict[str, Any]:
        if self.local_rope is not None:
            return write_ropes(self.rope, self.local_rope)
        return write_rope(self.rope, partial=self.partial) if self.rotary else {}
