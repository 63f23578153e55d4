"""The losses that transformers' TensorFlow classes compute of labels, of what `TFModel` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from interop.labels import IGNORED, is_next, problem_of


def shifted_right(config: Any, labels: Any) -> tf.Tensor:
    """What a decoder reads that shall say `labels`: all but the last, after the token that starts it.

    Raises:
        ValueError: no pad token to be read where labels do not count.
    """
    if config.pad_token_id is None:
        raise ValueError(
            f"TFModel: the config has no pad_token_id for the decoder to read where labels hold {IGNORED}; pass decoder_tokens="
        )
    start = tf.fill(tf.shape(labels[..., :1]), tf.cast(config.decoder_start_token_id, labels.dtype))
    tokens = tf.concat([start, labels[..., :-1]], axis=-1)
    return tf.where(tokens == IGNORED, tf.cast(config.pad_token_id, labels.dtype), tokens)


def loss_of(config: Any, logits: Any, sequence_logits: Any, labels: Mapping[str, Any], mask: Any) -> tf.Tensor:
    """The loss: of labels of tokens `(1,)`, the mean over those that count; else `(b,)`, one of each row.

    Args:
        config: whose task says which.
        logits: of the model, as the others.
        sequence_logits: those of the second head, or None.
        labels: by their names, what `given_labels` gives.
        mask: `(b t)` of the tokens, or None.

    Source: `modeling_tf_utils.py` and the TensorFlow models of transformers 4.57.6; where there is none for a task (replaced
    tokens, double heads, several labels of a row), the PyTorch models. Apart from them, rows of every task may have the label
    -100, as there for the next sentence; and -1, which there counts as the first token of a vocabulary, is refused.
    """
    if is_next(config):
        return _mean(*_cross_entropy(logits[..., :-1, :], labels["labels"][..., 1:]))
    match config.task:
        case "pretraining":
            (order,) = labels.keys() - {"labels"}
            first, second = _cross_entropy(logits, labels["labels"]), _cross_entropy(sequence_logits, labels[order])
            return _mean(*first) + _mean(*second)
        case "question-answering":
            start, _ = _cross_entropy(logits[..., 0], labels["start_positions"])
            end, _ = _cross_entropy(logits[..., 1], labels["end_positions"])
            return (start + end) / 2
        case "replaced-token-detection":
            real = tf.ones_like(logits, tf.bool) if mask is None else tf.cast(mask, tf.bool)
            target = tf.cast(_fitted(logits, labels["labels"]), logits.dtype)
            each = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)
            return _mean(tf.where(real, each, 0), real)
        case "sequence-classification" if logits.shape[-1] == 1:
            target = tf.cast(_fitted(logits[..., 0], labels["labels"]), logits.dtype)
            return tf.math.squared_difference(logits[..., 0], target)
        case "sequence-classification" if _are_several(labels["labels"], logits):
            target = tf.cast(labels["labels"], logits.dtype)
            if problem_of(config, logits.shape[-1], floating=True) == "regression":
                return tf.reduce_mean(tf.math.squared_difference(logits, target), axis=-1)
            return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(target, logits), axis=-1)
        case _:
            each, counts = _cross_entropy(logits, labels["labels"], _passed_over(config))
            return each if logits.shape.rank == 2 else _mean(each, counts)


def _passed_over(config: Any) -> int:
    """The label that does not count either: -1 of the classes of tokens, and the pad token of what BART shall say."""
    if config.task == "token-classification":
        return -1
    if config.task == "seq2seq-lm" and config.model_type == "bart" and config.pad_token_id is not None:
        return config.pad_token_id
    return IGNORED


def _are_several(labels: tf.Tensor, logits: tf.Tensor) -> bool:
    """Whether each class of a row has a label of its own."""
    return labels.dtype.is_floating and labels.shape.rank == 2 and labels.shape[-1] == logits.shape[-1]


def _mean(each: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    """`(1,)`, of what counts, where the rest is 0."""
    return tf.reshape(tf.reduce_sum(each) / tf.reduce_sum(tf.cast(counts, each.dtype)), [1])


def _cross_entropy(logits: Any, labels: tf.Tensor, passed_over: int = IGNORED) -> tuple[tf.Tensor, tf.Tensor]:
    """That of each place, 0 where it does not count; and whether it does.

    Raises:
        ValueError: labels of another shape, or outside of the classes, as far as they are known.
    """
    labels = tf.cast(_fitted(logits[..., 0], labels), tf.int64)
    counts = (labels != IGNORED) & (labels != passed_over)
    labels = tf.where(counts, labels, 0)
    if not tf.is_symbolic_tensor(labels) and tf.size(labels):
        low, high, size = int(tf.reduce_min(labels)), int(tf.reduce_max(labels)), logits.shape[-1]
        if low < 0 or high >= size:
            raise ValueError(
                f"TFModel: labels reach from {low} to {high}, outside of 0 … {size - 1}; {IGNORED} is that of what does not count"
            )
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return tf.where(counts, each, 0), counts


def _fitted(places: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The labels in the shape of `places`; Keras has those of rows also as `(b, 1)`."""
    expected = places.shape
    if not (labels.shape.is_compatible_with(expected) or labels.shape.is_compatible_with([*expected, 1])):
        raise ValueError(f"TFModel: labels are {tuple(labels.shape)}; expected {tuple(expected)}, one for each place")
    return tf.reshape(labels, tf.shape(places))
