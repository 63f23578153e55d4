"""DeBERTa, version 2 and 3: scores of the content of two tokens, and of the content of each with their distance.

Source: He et al. 2020 and 2021; matches transformers' `modeling_deberta_v2`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from fmodels.models import _encoder
from fmodels.models._base import Family, init_normal, without
from fmodels.models._encoder import CLASSES, head
from fmodels.nn import layers
from fmodels.nn.attention import attend, attention, distance_scores
from fmodels.nn.embeddings import embed
from fmodels.nn.linear import ACTIVATIONS, activation, convolution, linear
from fmodels.nn.mlp import mlp
from fmodels.nn.norms import layer_norm
from fmodels.nn.positions import signed_log_buckets
from fmodels.types import NOTHING, Array, Cache, Keep, Output, Params
from fmodels.weights.rules import Rule, TensorFlow

SAME = """relative_attention max_relative_positions position_buckets share_att_key pos_att_type norm_rel_ebd
position_biased_input conv_kernel_size conv_act legacy""".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_encoder.Config):
    """The config of DeBERTa 2 and 3; the defaults are transformers'.

    Attributes:
        has_token_types: whether there is a table of token types (`type_vocab_size` above 0).
        relative_attention: whether distances count.
        max_relative_positions: the longest distance that is told from longer ones; `max_positions` if below 1.
        position_buckets: how many distances on each side have a row of the table, the far ones in buckets; -1 for all.
        share_att_key: whether rows of that table are projected as the content is, and not by weights of their own.
        pos_att_type: which scores there are, `"c2p"` (a query's content with the distance) and `"p2c"` (a key's).
        norm_rel_ebd: whether the table is normed (`"layer_norm"`).
        position_biased_input: whether positions are added to the embeddings.
        conv_kernel_size: of the convolution beside the first layer; 0 for none.
        conv_act: its activation.
        legacy: whether a language model's head is BERT's, and not a bias over the token table.
        pooler_activation: of what a head makes of the first token.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    intermediate_size: int = 6144
    num_layers: int = 24
    num_heads: int = 24
    num_kv_heads: int = 24
    norm_eps: float = 1e-7
    num_token_types: int = 1
    has_token_types: bool = False
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    share_att_key: bool = False
    pos_att_type: tuple[str, ...] = ()
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    legacy: bool = True
    pooler_activation: str = "gelu"  # pyright: ignore[reportIncompatibleMethodOverride]

    model_type: ClassVar[str] = "deberta-v2"
    HF: ClassVar[Mapping[str, str]] = {
        **without(_encoder.Config.HF, "num_token_types", "causal"),
        **{name: name for name in SAME},
        "pooler_activation": "pooler_hidden_act",
    }
    IRRELEVANT: ClassVar[frozenset[str]] = _encoder.Config.IRRELEVANT | {"pooler_dropout", "cls_dropout"}
    DEFAULTS: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_encoder.Config.DEFAULTS, "conv_groups": (1,)}
    ARCHITECTURES: ClassVar[Mapping[str, str]] = _encoder.architectures("DebertaV2")

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"pos_att_type has {name!r}; known are c2p and p2c" for name in {*self.pos_att_type} - {"c2p", "p2c"}
        ]
        unknown = {self.conv_act, self.pooler_activation} - ACTIVATIONS.keys()
        problems += [f"activation {name!r} is not supported" for name in unknown]
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            problems.append(f"conv_kernel_size={self.conv_kernel_size} is even, which changes the length")
        if self.position_buckets == 1:
            problems.append("position_buckets=1 are too few")
        if not self.legacy and not self.tie_word_embeddings:
            problems.append("legacy=False has the token table as its head, so tie_word_embeddings must be true")
        if problems:
            raise ValueError(f"deberta-v2.Config: {'; '.join(problems)}")

    @property
    def longest(self) -> int:
        """The longest distance that is told from longer ones."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_positions

    @property
    def num_buckets(self) -> int:
        """Rows of the table of distances, for both directions."""
        return 2 * (self.position_buckets if self.position_buckets > 0 else self.longest)

    @property
    def kernel_size(self) -> int:
        """The width of the convolution, where there is one."""
        return self.conv_kernel_size or 1

    @property
    def is_normed(self) -> bool:
        """Whether the table of distances has a norm."""
        return "layer_norm" in [part.strip() for part in self.norm_rel_ebd.lower().split("|")]

    @property
    def projects_keys(self) -> bool:
        """Whether the table of distances has a projection of its own for `c2p`; `projects_queries`, for `p2c`."""
        return self.relative_attention and not self.share_att_key and "c2p" in self.pos_att_type

    @property
    def projects_queries(self) -> bool:
        return self.relative_attention and not self.share_att_key and "p2c" in self.pos_att_type

    @property
    def repeats_head(self) -> bool:
        return self.legacy

    @property
    def tied_legacy(self) -> bool:
        """Whether BERT's head is tied."""
        return self.legacy and self.tie_word_embeddings

    @classmethod
    def read_special(cls, data: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> set[str]:
        own = super().read_special(data, fields, problems)
        types, hidden = data.get("type_vocab_size", 0), data.get("hidden_size", cls.hidden_size)
        fields.update(num_token_types=max(types, 1), has_token_types=types > 0)
        sizes = {"embedding_size": hidden, "pooler_hidden_size": hidden, "attention_head_size": fields["head_dim"]}
        problems += [f"{k}={data[k]!r} is not supported, only {n}" for k, n in sizes.items() if data.get(k, n) != n]
        own |= {"type_vocab_size", *sizes}
        if isinstance(data.get("pos_att_type"), str):
            fields["pos_att_type"] = tuple(part.strip() for part in data["pos_att_type"].lower().split("|"))
            own.add("pos_att_type")
        return own

    def write_special(self) -> dict[str, Any]:
        return {"type_vocab_size": self.num_token_types if self.has_token_types else 0}


NAMES = {
    **_encoder.EMBEDDINGS,
    **{re.sub(r"(query|key|value)", r"\1_proj", name): leaf for name, leaf in _encoder.LAYER.items()},
    **{f"encoder.layer.{{l}}.attention.self.pos_{x}_proj": f"layers.attention.position_{x}" for x in ("key", "query")},
    "encoder.rel_embeddings": "embed.distance_vectors",
    "encoder.LayerNorm": "embed.distance_norm",
    "encoder.conv.conv": "conv",
    "encoder.conv.LayerNorm": "conv_norm",
}
WHEN = {
    "embed.positions": "position_biased_input",
    "embed.types": "has_token_types",
    "layers.attention.position_key": "projects_keys",
    "layers.attention.position_query": "projects_queries",
    "embed.distance_vectors": "relative_attention",
    "embed.distance_norm": "is_normed",
    **dict.fromkeys(("conv", "conv_norm"), "conv_kernel_size"),
}
LM, NEW_LM = "cls.predictions", "lm_predictions.lm_head"

WEIGHTS = _encoder.weights(
    "deberta",
    (
        *_encoder.rules(NAMES, when=WHEN),
        *_encoder.lm_head(
            f"{LM}.transform.dense", f"{LM}.transform.LayerNorm", f"{LM}.decoder", f"{LM}.bias", "masked-lm",
            when="legacy", tied="tied_legacy",
        ),
        *head(f"{NEW_LM}.dense", "lm_transform.dense", "masked-lm", when="!legacy"),
        *head(f"{NEW_LM}.LayerNorm", "lm_transform.norm", "masked-lm", when="!legacy"),
        Rule(f"{NEW_LM}.bias", "lm_head.bias", tasks=("masked-lm",), when="!legacy"),
        *head("pooler.dense", "pooler", *CLASSES),
        *head("classifier", "classifier", "token-classification", *CLASSES),
        *head("qa_outputs", "classifier", "question-answering"),
    ),
    decoder=f"{LM}.decoder",
    bias=f"{LM}.bias",
    ignored=(r"embeddings\.position_embeddings\.weight$", r"^mask_predictions\."),
    tensorflow=TensorFlow(
        names={r"rel_embeddings/embeddings$": "rel_embeddings.weight", "/pos_key_proj/": "/pos_proj/", "/pos_query_proj/": "/pos_q_proj/"},
        holds={"cls": "/embeddings/"}, bare={"sequence-classification": "cls_dropout"},
    ),
)  # fmt: skip


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
    """The model on `(b t)` tokens; see `fmodels.forward`. Positions and distances count columns."""
    present, positions = _encoder.begin(params, config, tokens, mask, positions, token_types, cache)
    seen = attend(present, causal=False)
    seen = seen._replace(new=seen.new & present[:, :, None])  # padding sees nothing, so all alike
    norm = functools.partial(layer_norm, eps=config.norm_eps)

    start = norm(params["embed"]["norm"], embed(params["embed"], tokens, positions, token_types))
    real = present[..., None].astype(start.dtype)
    start = start * real
    vectors = params["embed"].get("distance_vectors")
    if vectors is not None and "distance_norm" in params["embed"]:
        vectors = norm(params["embed"]["distance_norm"], vectors)
    span = config.num_buckets // 2
    rows = signed_log_buckets(tokens.shape[1], config.position_buckets, config.longest).clip(-span, span - 1) + span
    scale = (config.head_dim * (1 + len({*config.pos_att_type}))) ** -0.5
    beside = activation(config.conv_act)(convolution(params["conv"], start) * real) if "conv" in params else None

    def layer(p: Params, index: Any, x: Array, slot: Any) -> Any:
        tables = {} if vectors is None else _tables(p["attention"], config, vectors)
        bias = functools.partial(distance_scores, index=jnp.asarray(rows), scale=scale, **tables) if tables else None
        y, slot = attention(p["attention"], x, seen, slot=slot, scale=scale, bias=bias)
        x = norm(p["attention_norm"], x + y)
        x = norm(p["mlp_norm"], x + mlp(p["mlp"], x, config.activation))
        if beside is not None:
            x = jnp.where(index == 0, norm(params["conv_norm"], x + beside) * real, x)
        return x, slot

    ran = layers.run(layer, params["layers"], start, keep=keep)
    return ran.onto(_encoder.head_output(params, config, Output(hidden=ran.x), select), ran.x)


def _tables(params: Params, config: Config, vectors: Array) -> dict[str, Array]:
    """What queries, and keys, meet at each distance, `(m h k)`, for the distances' `(m d)`."""
    own = "" if config.share_att_key else "position_"
    leaves = {"c2p": ("for_queries", f"{own}key"), "p2c": ("for_keys", f"{own}query")}
    pairs = (leaves[score] for score in config.pos_att_type)
    return {name: linear(params[leaf], vectors[None], "bmd,hkd->bmhk")[0] for name, leaf in pairs}


FAMILY = Family(Config, forward, WEIGHTS, functools.partial(init_normal, WEIGHTS))
