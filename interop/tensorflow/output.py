"""What `TFModel` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from interop import outputs


class TFOutput(NamedTuple):
    """What `TFModel` returns: the fields of `fm.Output` as tensors; what the task does not have is None.

    `out["logits"]` is `out.logits`, and `out[0]` is the first of `to_tuple()`, as of what transformers returns.

    Attributes:
        loss: of the labels, if there are any: `(1,)`, the mean over labels of tokens, or `(b,)`, one of each row.
        logits: float32, as in `fm.Output`.
        hidden: `(b t d)`, the last hidden state after the final norm; also `last_hidden_state`.
        pooled: `(b d)`, the pooler's output; also `pooler_output`.
        sequence_logits: float32; the second head of models that have two.
        hidden_states: `(l+1 b t d)`, on request, as the others.
        encoder_hidden: `(b s d)`, of encoder-decoder models.
        encoder_hidden_states: `(l+1 b s d)`.
        attentions: `(l b h t t)`.
        cross_attentions: `(l b h t s)`.
        encoder_attentions: `(l b h s s)`.
    """

    loss: Any = None
    logits: Any = None
    hidden: Any = None
    pooled: Any = None
    sequence_logits: Any = None
    hidden_states: Any = None
    encoder_hidden: Any = None
    encoder_hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    encoder_attentions: Any = None

    @property
    def last_hidden_state(self) -> Any:
        """The hidden states by transformers' name."""
        return self.hidden

    @property
    def pooler_output(self) -> Any:
        """The pooler's output by transformers' name."""
        return self.pooled

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in this order; of a model with a head without `hidden` and `pooled`, as in transformers."""
        return outputs.to_tuple(self, self._fields)

    def __getitem__(self, key: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return outputs.item(self, key)
