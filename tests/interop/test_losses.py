"""The losses that `TorchModel` computes of labels, against transformers'."""

import pytest
import torch

from interop.torch import TorchModel, losses
from tests import families
from tests.test_losses import labels_for

HEADS = [
    "gpt2/causal-lm", "gpt2/double-heads", "bart/causal-lm", "bart/seq2seq-lm", "t5/seq2seq-lm", "bert/masked-lm",
    "bert/pretraining", "albert/pretraining", "bert/next-sentence", "bert/sequence-classification",
    "bert/token-classification", "bert/question-answering", "bert/multiple-choice", "electra/replaced-token-detection",
]  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_losses_are_those_of_transformers(case, name, monkeypatch):
    loaded = case(name)
    config = loaded.model.config  # which transformers changes by what labels it sees
    monkeypatch.setattr(config, "problem_type", getattr(config, "problem_type", None))
    given = loaded.inputs("right")
    labels = {name: torch.tensor(label) for name, label in labels_for(loaded, given).items()}
    given = {name: a for name, a in given.items() if name != "positions"}
    want = families.call(loaded.model, given, **labels)
    model = TorchModel(loaded.params, loaded.config)
    out = model(**{name: torch.tensor(a).long() for name, a in given.items()}, **labels)
    torch.testing.assert_close(out.loss, want.loss, atol=1e-5, rtol=1e-5)
    assert out[0] is out["loss"] is out.to_tuple()[0]
    if name == "t5/seq2seq-lm":  # the labels are shifted to the decoder's tokens
        tokens = torch.tensor(given["tokens"]).long()
        torch.testing.assert_close(
            model(tokens, labels=labels["labels"]).loss, loaded.model(tokens, labels=labels["labels"]).loss
        )
        out.loss.backward()
        want.loss.backward()
        torch.testing.assert_close(model.shared.weight.grad, loaded.model.shared.weight.grad, atol=1e-5, rtol=1e-4)
        loaded.model.zero_grad()


def test_regression_and_several_labels(case, monkeypatch):
    loaded = case("bert/sequence-classification")
    monkeypatch.setattr(loaded.model.config, "problem_type", None)
    tokens, labels = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    model = TorchModel(loaded.params, loaded.config)
    torch.testing.assert_close(model(tokens, labels=labels).loss, loaded.model(tokens, labels=labels).loss)
    one = torch.rand(2, 1), torch.rand(2)
    torch.testing.assert_close(
        losses.loss_of(loaded.config, one[0], None, {"labels": one[1]}, None), ((one[0][:, 0] - one[1]) ** 2).mean()
    )


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_the_problem_that_the_config_names(case, monkeypatch, problem):
    loaded = case("bert/sequence-classification")
    monkeypatch.setattr(loaded.model.config, "problem_type", problem)
    config = type(loaded.config).from_hf(loaded.model.config.to_dict(), task=loaded.config.task)
    tokens, labels = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1.0, 0, 1], [0, 0.5, 1]])
    labels = torch.tensor([2, 0]) if problem.startswith("single") else labels
    model = TorchModel(loaded.params, config)
    torch.testing.assert_close(model(tokens, labels=labels).loss, loaded.model(tokens, labels=labels).loss)
    with pytest.raises(ValueError, match=r"labels are \(1,\), for logits \(2, 3\)"):
        model(tokens, labels=labels.flatten()[:1])


def test_arguments_of_transformers(case):
    loaded = case("gpt2/causal-lm")
    model, tokens = TorchModel(loaded.params, loaded.config), torch.tensor([[5, 6, 7]])
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    got, want = model(tokens, **options, return_dict=False), loaded.model(tokens, **options)
    for a, b in zip(got, (want.logits, torch.stack(want.hidden_states), torch.stack(want.attentions)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="takes labels; got start_positions"):
        model(tokens, start_positions=torch.tensor([0]))
    with pytest.raises(TypeError, match=r"labels must be torch\.Tensors, got labels list"):
        model(tokens, labels=[[5, 6, 7]])
    with pytest.raises(ValueError, match=r"labels are \(1, 1\), for logits \(1, 2, 61\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(KeyError, match="no 'loss'"):
        model(tokens)["loss"]
