"""One run of a model on PyTorch's tensors, with gradients: what `TorchModel.forward` does once its inputs are read."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

import fmodels as fm
from interop.adapters import PREFIX, Active, adapted
from interop.torch.arrays import to_jax, to_tensor

FIELDS = (
    "logits", "hidden", "pooled", "sequence_logits", "hidden_states", "encoder_hidden", "encoder_hidden_states", "attentions",
    "cross_attentions", "encoder_attentions",
)  # fmt: skip
"""The fields of `fm.Output` that `TorchModel` returns."""


class Call:
    """One run of the model: everything but the parameters' values. `fields` names the outputs once it ran.

    `asked` are the options of `fm.forward` that are True, `adapters` those that are used.
    """

    def __init__(
        self, names: Sequence[str], inputs: dict[str, Any], config: Any, asked: tuple[str, ...], adapters: Active
    ) -> None:
        self.names, self.inputs = names, inputs
        self.static = {"config": config, "asked": asked, "adapters": adapters}
        self.fields: list[str] = []

    def run(self, tensors: Iterable[Tensor]) -> dict[str, jax.Array]:
        out = _run(
            {name: to_jax(name, t) for name, t in zip(self.names, tensors, strict=True)}, self.inputs, **self.static
        )
        return self._finish(out, out)

    def run_with_vjp(self, tensors: Iterable[Tensor], trained: Iterable[bool]) -> tuple[dict[str, jax.Array], Any]:
        """The outputs, and what `_backward` needs for the gradients with respect to those tensors that are `trained`."""
        split: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, tensor, wanted in zip(self.names, tensors, trained, strict=True):
            split[not wanted][name] = to_jax(name, tensor)
        out, vjp = _run_with_vjp(*split, self.inputs, **self.static)
        return self._finish(out, (out, vjp)), vjp

    def _finish(self, out: dict[str, jax.Array], everything: Any) -> dict[str, jax.Array]:
        # JAX reads the tensors' own memory: it must be done before PyTorch may write to them again.
        jax.block_until_ready(everything)
        self.fields = list(out)
        return out


class Differentiable(torch.autograd.Function):
    """The model as one node of PyTorch's graph: `(call, *tensors) -> outputs`."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # What the backward pass needs may be the memory of a parameter itself; saving them lets PyTorch notice changes.
        ctx.save_for_backward(*tensors)
        ctx.call = call
        out, ctx.vjp = call.run_with_vjp(tensors, ctx.needs_input_grad[1:])
        values = tuple(to_tensor(value) for value in out.values())
        ctx.like = [(value.shape, value.dtype) for value in values]
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors  # raises if one was changed in place since
        cotangents = {
            name: to_jax(name, torch.zeros(shape, dtype=dtype) if gradient is None else gradient)
            for name, (shape, dtype), gradient in zip(ctx.call.fields, ctx.like, gradients, strict=True)
        }
        found = jax.block_until_ready(_backward(ctx.vjp, cotangents))
        values = [to_tensor(value) for value in found.values()]
        if torch.is_grad_enabled():  # by create_graph=True
            values = Once.apply(len(values), *values, *tensors)
        named = dict(zip(found, values, strict=True))
        return None, *map(named.get, ctx.call.names)


class Once(torch.autograd.Function):
    """The first of the tensors, as functions of the others, whose gradients there are not.

    PyTorch's `once_differentiable` looks at the incoming gradients alone: the second derivatives of a sum of logits would be 0.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "TorchModel: second derivatives are not available; take them of fm.forward with jax.grad, or use TFModel"
        )


@functools.partial(jax.jit, static_argnames=("config", "asked", "adapters"))
def _run(
    tensors: dict[str, Any], inputs: dict[str, Any], *, config: Any, asked: tuple[str, ...], adapters: Active
) -> dict[str, jax.Array]:
    options: dict[str, Any] = dict.fromkeys(asked, True)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    params = adapted(fm.from_disk(own, config), config, tensors, adapters)
    out = fm.forward(params, config, **inputs, **options)
    if isinstance(out.attentions, tuple):
        raise ValueError(
            "TorchModel: attentions needs layers with equally many heads; mask_heads instead of prune_heads keeps them so"
        )
    return {name: getattr(out, name) for name in FIELDS if getattr(out, name) is not None}


@functools.partial(jax.jit, static_argnames=("config", "asked", "adapters"))
def _run_with_vjp(
    trained: Any, fixed: Any, inputs: Any, *, config: Any, asked: tuple[str, ...], adapters: Active
) -> tuple[Any, Any]:
    return jax.vjp(
        lambda tensors: _run({**tensors, **fixed}, inputs, config=config, asked=asked, adapters=adapters), trained
    )


@jax.jit
def _backward(vjp: Any, cotangents: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return vjp(cotangents)[0]
