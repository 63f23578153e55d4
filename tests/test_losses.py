"""The loss of every head as transformers computes it of labels, against the textbook's of our logits."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmodels as fm
from tests import families

NOT = -100
"""The label of a place that does not count."""
HEADS = [c.name for c in families.CASES if c.task not in ("base", "encoder")]


def cross_entropy(logits, labels):
    """The mean over the places that count."""
    labels = jnp.asarray(labels)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return each.mean(where=labels != NOT)


def ours(task, out, labels):
    """The loss of an `fm.Output`."""
    match task:
        case "causal-lm" | "double-heads":
            return cross_entropy(out.logits[..., :-1, :], labels["labels"][..., 1:])
        case "pretraining":
            order = labels["next_sentence_label" if "next_sentence_label" in labels else "sentence_order_label"]
            return cross_entropy(out.logits, labels["labels"]) + cross_entropy(out.sequence_logits, order)
        case "question-answering":
            ends = (labels["start_positions"], labels["end_positions"])
            return sum(cross_entropy(out.logits[..., i], ends[i]) for i in range(2)) / 2
        case "replaced-token-detection":
            real = labels["labels"] != NOT
            return optax.sigmoid_binary_cross_entropy(out.logits, labels["labels"]).mean(where=real)
        case _:
            return cross_entropy(out.logits, labels["labels"])


def labels_for(loaded, given):
    """Random labels by transformers' names; padded places do not count."""
    case, random = loaded.case, np.random.default_rng(1)
    real = given.get("decoder_mask", given["mask"]).astype(bool)
    vocabulary = loaded.config.vocab_size
    match case.task:
        case "causal-lm" | "double-heads" | "masked-lm" | "seq2seq-lm":
            return {"labels": np.where(real, random.integers(0, vocabulary, real.shape), NOT)}
        case "pretraining":
            order = "sentence_order_label" if case.family == "albert" else "next_sentence_label"
            return {"labels": np.where(real, random.integers(0, vocabulary, real.shape), NOT), order: np.array([1, 0])}
        case "question-answering":
            return {"start_positions": np.array([1, 2]), "end_positions": np.array([3, 2])}
        case "replaced-token-detection":
            return {"labels": np.where(real, random.integers(0, 2, real.shape), NOT)}
        case "token-classification":
            return {"labels": np.where(real, random.integers(0, 3, real.shape), NOT)}
        case "next-sentence":
            return {"labels": np.array([1, 0])}
        case _:  # one class of three, or one choice of three
            return {"labels": np.array([2, 0])}


@pytest.mark.parametrize("name", HEADS)
def test_loss(case, name, monkeypatch):
    loaded = case(name)
    config = loaded.model.config  # which transformers changes by what labels it sees
    monkeypatch.setattr(config, "problem_type", getattr(config, "problem_type", None))
    # What a causal model says at padded places is its own affair, but the softmax over places has them in it.
    padding = None if loaded.case.task == "question-answering" else "right"
    given = loaded.inputs(padding)
    labels = labels_for(loaded, given)
    with torch.no_grad():
        want = families.call(loaded.model, given, **{n: torch.tensor(a) for n, a in labels.items()}).loss.item()
    out = loaded.forward(padding)
    shifted = name != "bart/causal-lm"  # whose labels are the tokens after
    got = ours(loaded.case.task if shifted else "seq2seq-lm", out, labels)
    if hasattr(config, "router_aux_loss_coef") and loaded.case.task == "causal-lm":  # no other head adds it
        got += config.router_aux_loss_coef * fm.load_balancing_loss(
            out.router_logits, config.num_experts_per_tok, given["mask"]
        )
    assert abs(float(got) - want) <= 1e-5 * max(1, abs(want)), (float(got), want)
