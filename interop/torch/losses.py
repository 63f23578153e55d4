"""The losses that transformers' models compute of labels, of what `TorchModel` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from interop.labels import IGNORED, is_next, problem_of
from interop.torch.arrays import kind_of


def check_labels(labels: Mapping[str, Any]) -> None:
    """Raises a TypeError for labels that are no tensors."""
    if odd := [f"{name} {kind_of(label)}" for name, label in labels.items() if not isinstance(label, Tensor)]:
        raise TypeError(f"TorchModel: labels must be torch.Tensors, got {', '.join(odd)}; use torch.tensor(…)")


def shifted_right(config: Any, labels: Tensor) -> Tensor:
    """What a decoder reads that shall say `labels`: all but the last, after the token that starts it.

    Raises:
        ValueError: labels that do not count, and no pad token to be read in their place.
    """
    tokens = labels.new_full(labels.shape, config.decoder_start_token_id)
    tokens[..., 1:] = labels[..., :-1]
    ignored = tokens == IGNORED
    if config.pad_token_id is None and bool(ignored.any()):
        raise ValueError(
            f"TorchModel: labels hold {IGNORED}, and the config has no pad_token_id for the decoder to read there; pass "
            "decoder_tokens="
        )
    return tokens if config.pad_token_id is None else tokens.masked_fill(ignored, config.pad_token_id)


def loss_of(
    config: Any, logits: Tensor, sequence_logits: Tensor | None, labels: Mapping[str, Tensor], mask: Tensor | None
) -> Tensor:
    """The loss: the mean over the places that count.

    Args:
        config: whose task says which.
        logits: of the model, as the others.
        sequence_logits: those of the second head.
        labels: by their names, what `given_labels` gives.
        mask: `(b t)` of the tokens.

    Source: the models and `loss/loss_utils.py` of transformers 5.
    """
    if is_next(config):
        return _cross_entropy(logits[..., :-1, :], labels["labels"][..., 1:])
    match config.task:
        case "pretraining":
            assert sequence_logits is not None
            (order,) = labels.keys() - {"labels"}
            return _cross_entropy(logits, labels["labels"]) + _cross_entropy(sequence_logits, labels[order])
        case "question-answering":
            length = logits.shape[-2]  # what is cut off does not count
            ends = [labels[name].clamp(0, length) for name in ("start_positions", "end_positions")]
            return (
                _cross_entropy(logits[..., 0], ends[0], length) + _cross_entropy(logits[..., 1], ends[1], length)
            ) / 2
        case "replaced-token-detection":
            each = functional.binary_cross_entropy_with_logits(logits, labels["labels"].float(), reduction="none")
            return each.mean() if mask is None else each[mask == 1].mean()
        case "sequence-classification":
            return _classification(config, logits, labels["labels"])
        case _:
            return _cross_entropy(logits, labels["labels"])


def _classification(config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Of rows `(b c)`, the loss of `problem_of`."""
    match problem_of(config, logits.shape[-1], floating=labels.is_floating_point()):
        case "regression":
            return functional.mse_loss(logits, _fitting(labels, logits).float())
        case "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, _fitting(labels, logits).float())
        case "single_label_classification":
            return _cross_entropy(logits, labels)
        case problem:
            raise ValueError(
                f"TorchModel: problem_type {problem!r} of config.json has no loss; one of regression, "
                "single_label_classification, multi_label_classification has"
            )


def _cross_entropy(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    labels = _fitting(labels, logits[..., 0], logits)
    return functional.cross_entropy(rows, labels.reshape(-1).to(torch.int64), ignore_index=ignored)


def _fitting(labels: Tensor, places: Tensor, logits: Tensor | None = None) -> Tensor:
    """The labels in the shape of the places that they are for."""
    if labels.numel() != places.numel():
        shape = tuple((places if logits is None else logits).shape)
        raise ValueError(f"TorchModel: labels are {tuple(labels.shape)}, for logits {shape}; expected one each")
    return labels.reshape(places.shape)
