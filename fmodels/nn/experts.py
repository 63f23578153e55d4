"""Mixtures of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmodels.arrays import plain, precision, target
from fmodels.nn.linear import activation, linear
from fmodels.nn.mlp import mlp
from fmodels.types import Array, Params


class Routing(NamedTuple):
    """How a router's logits become experts and their weights; static.

    Attributes:
        top: how many experts a token goes to.
        score: `"softmax"` over all experts, or `"sigmoid"` of each.
        renormalise: whether the weights of the chosen experts are divided by their sum. After a softmax over all experts
            that is the softmax over the chosen ones.
        scale: of the weights.
        groups: the experts are so many groups of equal size, side by side.
        groups_kept: from how many groups experts are chosen: those whose two best experts have the highest sum.
    """

    top: int
    score: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1


class Routed(NamedTuple):
    """Where tokens go.

    Attributes:
        logits: `(n x)`.
        chosen: `(n top)` int32, the experts of each token.
        weights: `(n top)` float32, their parts in the sum.
    """

    logits: Array
    chosen: Array
    weights: Array


class Gate(NamedTuple):
    """How the gated form joins the two products of an expert; static.

    Attributes:
        activation: transformers' name; `act(gate) · up`.
        clamp: `(alpha, limit)` for gpt-oss's form `gate · sigmoid(alpha · gate) · (up + 1)`, in which `gate` is at most
            `limit` and `up` is between `-limit` and `limit`.
    """

    activation: str
    clamp: tuple[float, float] | None = None

    def __call__(self, gate: Array, up: Array) -> Array:
        if self.clamp is None:
            return activation(self.activation)(gate) * up
        alpha, limit = self.clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(gate * alpha) * (up + 1)


def route(params: Params, rows: Array, routing: Routing) -> Routed:
    """The experts of each token, and the weight of each.

    Args:
        params: `weight` `(x d)`, optionally `bias` `(x)`, and `choice_bias` `(x)`, which counts for the choice alone.
        rows: `(n d)`.
        routing: the rule.

    Source: Shazeer et al. 2017; DeepSeek-AI 2024 (groups, `choice_bias`); matches transformers' `MixtralTopKRouter`,
    `Qwen2MoeTopKRouter`, `GptOssTopKRouter` and `DeepseekV3TopkRouter`, the last in float32 throughout.
    """
    sigmoid = routing.score == "sigmoid"
    logits = linear(params, rows.astype(jnp.float32) if sigmoid else rows, "nd,xd->nx")
    wide = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(wide) if sigmoid else jax.nn.softmax(wide, axis=-1)
    choice = scores + params["choice_bias"].astype(jnp.float32)[None] if "choice_bias" in params else scores
    if routing.groups > 1:
        grouped = choice.reshape(choice.shape[0], routing.groups, -1)
        best = jnp.sort(grouped, axis=-1)[..., -2:].sum(-1)
        kept = jax.nn.one_hot(_largest(best, routing.groups_kept), routing.groups, dtype=bool).any(1)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    chosen = _largest(choice, routing.top)
    # No gather: where experts lie on several devices, XLA's partitioner makes a wrong gradient of it (jaxlib 0.10.2).
    weights = jnp.where(_is_chosen(chosen, scores.shape[-1]), scores[:, None], 0.0).sum(-1)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routed(logits, chosen, weights * routing.scale)


def _largest(x: Array, count: int) -> Array:
    """The places of the largest numbers of the last axis, int32; of equal ones the first."""
    # By a sort: jax exports top_k as an operation that TensorFlow 2.21 cannot read.
    return jnp.argsort(x, axis=-1, descending=True, stable=True)[..., :count].astype(jnp.int32)


def _is_chosen(chosen: Array, count: int) -> Array:
    """`(… x)` bool, which of so many experts each of the `(…)` is."""
    return jax.nn.one_hot(chosen, count, dtype=bool)


def moe(params: Params, x: Array, routing: Routing, gate: Gate, *, how: str | None = None) -> tuple[Array, Array]:
    """`Σ weight · down(gate(x) joined with up(x))` over the experts of each token, and the experts that all share.

    Args:
        params: `router`; `gate` and `up` `(x i d)` and `down` `(x d i)`, each with an optional bias; optionally `shared`, as
            for `mlp`, and `shared_gate` `(d)`.
        x: `(b t d)`.
        routing: the rule of the router.
        gate: the gated form.
        how: one of `HOW`. `"grouped"` sorts the pairs of tokens and experts by expert and multiplies group by group, so
            that each token costs what its own experts cost where the platform has such a product (`jax.lax.ragged_dot`).
            `"dense"` runs all experts on all tokens. The sums are the same. None: dense on CPU, which has no product by
            groups, grouped elsewhere. jax has no rule for `vmap` of products by groups, see `explained`.

    Returns:
        `(b t d)`, and the router's logits `(b t x)`.

    Raises:
        ValueError: an unknown `how`.

    Source: Shazeer et al. 2017; matches transformers' `MixtralSparseMoeBlock` and its like.
    """
    run = (
        HOW[check_how(how)]
        if how is not None or target.value is None
        else _by_platform
        if target.value.recent
        else _dense
    )
    rows = x.reshape(-1, x.shape[-1])
    routed = route(params["router"], rows, routing)
    y = run(params, rows, routed, gate).astype(x.dtype).reshape(x.shape)
    if "shared" in params:
        shared = mlp(params["shared"], x, gate.activation)
        if "shared_gate" in params:
            shared = jax.nn.sigmoid(linear(params["shared_gate"], x, "btd,d->bt"))[..., None] * shared
        y = y + shared
    return y, routed.logits.reshape(*x.shape[:-1], -1)


def _grouped(params: Params, rows: Array, routed: Routed, gate: Gate) -> Array:
    """`(n d)` float32, the products expert by expert."""
    top = routed.chosen.shape[1]
    experts = routed.chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    owners = experts[order]
    sizes = jnp.bincount(owners, length=routed.logits.shape[1]).astype(jnp.int32)

    def product(name: str, x: Array) -> Array:
        y = jax.lax.ragged_dot_general(
            x, plain(params[name]["weight"], x).astype(x.dtype), sizes, BY_EXPERT, precision=precision(x.dtype)
        )
        return y + params[name]["bias"].astype(y.dtype)[owners] if "bias" in params[name] else y

    x = rows[order // top]
    y = product("down", gate(product("gate", x), product("up", x)))
    mine = y[jnp.argsort(order)].reshape(*routed.chosen.shape, -1).astype(jnp.float32)
    return (mine * routed.weights[..., None]).sum(1)


BY_EXPERT = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
"""`(n i) × (x o i) -> (n o)`, the rows in groups, one for each `x`."""


def _dense(params: Params, rows: Array, routed: Routed, gate: Gate) -> Array:
    """`(n d)` float32, all experts on all tokens; those that are not chosen have the weight 0."""
    weights = jnp.where(_is_chosen(routed.chosen, routed.logits.shape[1]), routed.weights[..., None], 0.0).sum(1)
    inner = gate(linear(params["gate"], rows, "nd,xid->nxi"), linear(params["up"], rows, "nd,xid->nxi"))
    down = plain(params["down"]["weight"], inner).astype(inner.dtype)
    y = jnp.einsum("nxi,xdi->xnd", inner, down, precision=precision(inner.dtype))
    if "bias" in params["down"]:
        y = y + params["down"]["bias"].astype(y.dtype)[:, None]
    return (y.astype(jnp.float32) * weights.T[..., None]).sum(0)


def _by_platform(params: Params, rows: Array, routed: Routed, gate: Gate) -> Array:
    """`(n d)` float32, dense on CPU and grouped elsewhere, in one program for both."""

    def run(how: Callable[..., Array]) -> Callable[..., Array]:
        return lambda params, rows, routed: how(params, rows, routed, gate)

    return jax.lax.platform_dependent(params, rows, routed, cpu=run(_dense), default=run(_grouped))


HOW: dict[str, Callable[[Params, Array, Routed, Gate], Array]] = {"grouped": _grouped, "dense": _dense}
"""The ways to run experts."""


def check_how(how: Any, of: str = "forward") -> str:
    """The name of a way to run experts, or the platform's own for None.

    Args:
        how: as it was given.
        of: the function that it was given to.

    Raises:
        ValueError: there is none of that name, with the list of those that are.
    """
    if how is None:
        return "dense" if jax.default_backend() == "cpu" else "grouped"
    if not isinstance(how, str) or how not in HOW:
        raise ValueError(f"{of}: experts={how!r} is not a way to run experts; one of {', '.join(HOW)}, or None")
    return how


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Where jax says that it has no rule for `vmap` of products by groups, says what to write instead.

    No rule is given to it: one of `jax.custom_batching` would take derivatives away.
    """
    try:
        yield
    except NotImplementedError as error:
        if "ragged_dot" not in str(error):
            raise
        raise NotImplementedError(
            "forward: experts='grouped', the default but on CPU, does not run under vmap, for which jax has no rule; pass "
            "experts='dense'"
        ) from error


def load_balancing_loss(router_logits: Array, top: int, mask: Array | None = None) -> Array:
    """`x · Σ share · probability` over the experts: how unevenly routers spread tokens; about `top` if evenly.

    `share` is the number of choices of an expert per token, `probability` the mean of its softmax over all experts, both
    over all layers and real tokens.

    Args:
        router_logits: `(l b t x)`, `Output.router_logits`.
        top: how many experts a token goes to, `config.num_experts_per_token`.
        mask: `(b t)` bool or 0/1, True for real tokens; all real if None.

    Returns:
        A float32 number, to be added to a loss times `config.router_aux_loss_coef`.

    Example:
        >>> import jax.numpy as jnp
        >>> load_balancing_loss(jnp.array([[[[9.0, 0.0], [0.0, 9.0]]]]), 1).round(3)
        Array(1., dtype=float32)

    Source: Fedus et al. 2021, equations 4 to 6; matches transformers' `load_balancing_loss_func`.
    """
    depth, count = router_logits.shape[0], router_logits.shape[-1]
    rows = router_logits.reshape(depth, -1, count)
    probabilities = jax.nn.softmax(rows, axis=-1)
    chosen = jax.nn.one_hot(_largest(probabilities, top), count, dtype=jnp.float32).sum(2)
    real = jnp.ones(rows.shape[1], jnp.float32) if mask is None else jnp.asarray(mask).reshape(-1).astype(jnp.float32)
    total = real.sum() * depth
    share, probability = (
        (x * real[None, :, None]).sum((0, 1)) / total for x in (chosen, probabilities.astype(jnp.float32))
    )
    return (share * probability).sum() * count
