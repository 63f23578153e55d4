"""Feed-forward blocks."""

from __future__ import annotations

from fmodels.nn.linear import activation, linear
from fmodels.types import Array, Params


def mlp(params: Params, x: Array, act: str) -> Array:
    """`down(act(up(x)))`, or with a `gate` key the gated form `down(act(gate(x)) * up(x))`.

    Args:
        params: `up`, `down` and, optionally, `gate`; weights `(f d)` and `(d f)`.
        x: `(b t d)`.
        act: transformers' name of the activation.

    Source: Shazeer 2020 for the gated form; matches transformers' `GPT2MLP`, `LlamaMLP` and BERT's intermediate.
    """
    up = linear(params["up"], x)
    f = activation(act)
    inner = f(linear(params["gate"], x)) * up if "gate" in params else f(up)
    return linear(params["down"], inner, "btf,df->btd")
