"""The labels that the wrappers take: their names, and what those of each task mean; the losses are each framework's own."""

from __future__ import annotations

from typing import Any

from interop.loading import setting

IGNORED = -100
"""The label of a place that does not count."""

LABELS = {
    "pretraining": {"labels", "next_sentence_label", "sentence_order_label"},
    "next-sentence": {"labels", "next_sentence_label"},
    "question-answering": {"start_positions", "end_positions"},
    "base": set[str](),
    "encoder": set[str](),
}
"""Task -> names of its labels; of the others it is `labels`. The two of the next sentence are one, PyTorch's and TensorFlow's."""


def given_labels(what: str, config: Any, **labels: Any) -> dict[str, Any]:
    """The labels that are there.

    Args:
        what: the name of the wrapper, for errors.
        config: whose task says which labels there may be.
        **labels: by transformers' names; None for what is not there.

    Raises:
        TypeError: labels that the task has not, some without the others that its loss needs, the same ones twice.
    """
    given = {name: label for name, label in labels.items() if label is not None}
    known = LABELS.get(config.task, {"labels"})
    if odd := sorted(given.keys() - known):
        has = f"takes {', '.join(sorted(known))}" if known else "has no labels"
        raise TypeError(f"{what}: {config.model_type} of task {config.task!r} {has}; got {', '.join(odd)}")
    there = ", ".join(given)
    match config.task:
        case "next-sentence" if len(given) == 2:
            raise TypeError(f"{what}: labels and next_sentence_label are the same labels; pass one of them")
        case "next-sentence" if given:
            (label,) = given.values()
            return {"labels": label}
        case "pretraining" if given and ("labels" not in given or len(given) != 2):
            raise TypeError(
                f"{what}: a loss of pretraining needs labels, and next_sentence_label or sentence_order_label; got {there}"
            )
        case "question-answering" if len(given) == 1:
            raise TypeError(
                f"{what}: a loss of question answering needs start_positions and end_positions; got {there}"
            )
    return given


def is_next(config: Any) -> bool:
    """Whether the logits of a place are for the label of the next one; BART's decoder alone says its own."""
    return config.task in ("causal-lm", "double-heads") and config.model_type != "bart"


def problem_of(config: Any, classes: int, *, floating: bool) -> str:
    """What a classification of rows is: the `problem_type` of config.json; without one the classes and the labels say which."""
    likely = "multi_label_classification" if floating else "single_label_classification"
    return setting(config, "problem_type", "regression" if classes == 1 else likely)
