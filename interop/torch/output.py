"""What `TorchModel` returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from interop import outputs


@dataclasses.dataclass(frozen=True)
class TorchOutput:
    """What `TorchModel` returns: the fields of `fm.Output` as tensors; what the task does not have is None.

    `out["logits"]` is `out.logits`, and `out[0]` is the first of `to_tuple()`, as of what transformers returns.

    Attributes:
        loss: of the labels, if there are any.
        logits: float32, see `fm.Output`.
        hidden: `(b t d)`, the last hidden state; also as `last_hidden_state`.
        pooled: `(b d)`, the pooler's output; also as `pooler_output`.
        sequence_logits: float32, the second head of models that have two.
        hidden_states: `(l+1 b t d)`, on request.
        encoder_hidden: `(b s d)`, of encoder-decoder models.
        encoder_hidden_states: `(l+1 b s d)`, on request.
        attentions: `(l b h t t)`, on request, weights of attention.
        cross_attentions: `(l b h t s)`, on request, of a decoder to what the encoder has read.
        encoder_attentions: `(l b h s s)`, on request, of the encoder.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    pooled: Tensor | None = None
    sequence_logits: Tensor | None = None
    hidden_states: Tensor | None = None
    encoder_hidden: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    attentions: Tensor | None = None
    cross_attentions: Tensor | None = None
    encoder_attentions: Tensor | None = None

    @property
    def last_hidden_state(self) -> Tensor | None:
        return self.hidden

    @property
    def pooler_output(self) -> Tensor | None:
        return self.pooled

    def to_tuple(self) -> tuple[Tensor, ...]:
        """What is there, in this order; of a model with a head without `hidden` and `pooled`, as in transformers."""
        return outputs.to_tuple(self, (field.name for field in dataclasses.fields(self)))

    def __getitem__(self, key: Any) -> Any:
        return outputs.item(self, key)


def _flatten(out: TorchOutput) -> tuple[list[Tensor], list[str]]:
    there = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
    there = {name: value for name, value in there.items() if value is not None}
    return list(there.values()), list(there)


# As transformers does with its outputs: DistributedDataParallel(static_graph=True) finds the tensors in no other way, and would
# leave the gradients of each process as they are.
_pytree.register_pytree_node(
    TorchOutput,
    _flatten,
    lambda values, names: TorchOutput(**dict(zip(names, values, strict=True))),
    serialized_type_name="interop.torch.TorchOutput",
)
