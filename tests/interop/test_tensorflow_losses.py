"""The losses that `TFModel` computes of labels, against those of transformers' TensorFlow classes (goldens) and PyTorch's."""

import dataclasses
import json
import os
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch

import fmodels as fm
from interop.labels import given_labels
from interop.tensorflow import TFLayer, TFModel
from interop.tensorflow.losses import loss_of
from tests import families
from tests.interop.wrapped import BERT, GPT2, LIBRARIES
from tests.test_losses import labels_for

ROWS = json.loads((Path(__file__).parents[1] / "goldens" / "tensorflow" / "losses.json").read_text())
FAST = ("BertForPreTraining", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "T5ForConditionalGeneration")
"""The classes whose rows are run everywhere: each shape of a loss, shifted tokens; the rest differs in the head alone."""
TOKENS = (np.arange(32).reshape(8, 4) % 11).astype(np.int32)


def values(name, shape):
    """As `values` of tests/goldens/make_tensorflow_losses.py."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    drawn = ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 1021 - 510) / 1024
    return (drawn + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32).reshape(shape)


def model_of(row):
    config = fm.models.FAMILIES[row["config"]["model_type"]].config.from_hf(row["config"])
    model = TFModel(fm.init(config, jax.random.key(0)), config)
    for name, variable in model.named_variables.items():
        if variable.trainable:
            variable.assign(values(name, tuple(variable.shape)))
    return model


def param(number, row):
    name = row["config"]["architectures"][0]
    return pytest.param(row, id=f"{number}-{name}", marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("row", [param(number, row) for number, row in enumerate(ROWS)])
def test_loss_and_gradients_are_those_of_transformers(row):
    model = model_of(row)
    with tf.GradientTape() as tape:
        out = model(**row["given"], **row["labels"])
    assert out.loss.shape == np.shape(row["loss"])
    np.testing.assert_allclose(out.loss.numpy(), row["loss"], atol=1e-5, rtol=1e-5)
    found = tape.gradient(out.loss, [model.named_variables[name] for name in row["norms"]])
    norms = [float(tf.norm(gradient)) for gradient in found]
    np.testing.assert_allclose(norms, list(row["norms"].values()), rtol=1e-4)
    assert out[0] is out["loss"] is out.to_tuple()[0]


@pytest.mark.parametrize("name", ["electra/replaced-token-detection", "gpt2/double-heads", "bart/causal-lm"])
def test_tasks_without_a_loss_there_have_that_of_pytorch(case, name):
    loaded = case(name)
    given = {n: a for n, a in loaded.inputs("right").items() if n != "positions"}
    labels = labels_for(loaded, given)
    with torch.no_grad():
        want = families.call(loaded.model, given, **{n: torch.tensor(a) for n, a in labels.items()})
    labels = {n: tf.constant(a) for n, a in labels.items()}
    got = loss_of(loaded.config, tf.constant(want.logits.numpy()), None, labels, tf.constant(given["mask"]))
    np.testing.assert_allclose(got.numpy(), [want.loss.item()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_several_labels_of_a_row(case, monkeypatch, problem):
    loaded = case("bert/sequence-classification")
    monkeypatch.setattr(loaded.model.config, "problem_type", problem)
    config = type(loaded.config).from_hf(loaded.model.config.to_dict(), task=loaded.config.task)
    labels = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    with torch.no_grad():
        want = loaded.model(torch.tensor([[5, 6], [7, 8]]), labels=torch.tensor(labels))
    got = loss_of(config, tf.constant(want.logits.numpy()), None, {"labels": tf.constant(labels)}, None)
    assert got.shape == (2,)
    np.testing.assert_allclose(got.numpy().mean(), want.loss.item(), rtol=1e-5)


def test_a_step_inside_tf_function():
    model = LIBRARIES["tensorflow"].model(GPT2)
    optimizer = tf.keras.optimizers.Adam(1e-2)
    eager = model(TOKENS, labels=TOKENS).loss.numpy()

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    def step(tokens):
        with tf.GradientTape() as tape:
            loss = model(input_ids=tokens, labels=tokens).loss
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    found = [float(step(TOKENS)[0]) for _ in range(4)]
    assert found[0] == pytest.approx(eager[0], abs=1e-6)
    assert found[-1] < found[0] - 0.1, found


@pytest.mark.slow
def test_fit_of_keras_takes_the_loss_of_the_model():
    model = LIBRARIES["tensorflow"].model(GPT2)
    data = {"tokens": TOKENS, "labels": np.where(TOKENS == 5, -100, TOKENS)}
    before = float(model(**data).loss[0])
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")  # which changes nothing
    try:
        names = {name: tf.keras.Input((4,), dtype="int32", name=name) for name in data}
        network = tf.keras.Model(names, TFLayer(model)(names))
        network.compile(tf.keras.optimizers.Adam(1e-2))
        assert network.evaluate(data, verbose=0) == pytest.approx(before, abs=1e-5)
        found = network.fit(data, batch_size=8, epochs=3, verbose=0).history["loss"]
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert found[0] == pytest.approx(before, abs=1e-5)
    assert float(model(**data).loss[0]) < found[-1] < before - 0.1


def test_labels_that_do_not_fit():
    model, tokens = LIBRARIES["tensorflow"].model(BERT), TOKENS[:2]
    assert np.isnan(model(tokens, labels=np.full_like(tokens, -100)).loss[0])  # as there: the mean of nothing
    assert model(tokens).loss is None
    with pytest.raises(KeyError, match="no 'loss'"):
        model(tokens)["loss"]
    with pytest.raises(TypeError, match="takes labels; got start_positions"):
        model(tokens, start_positions=[0, 1])
    with pytest.raises(ValueError, match=r"labels are \(2, 3\); expected \(2, 4\), one for each place"):
        model(tokens, labels=tokens[:, 1:])
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=f"labels reach from .*{wrong}.*, outside of 0 … 10; -100 is"):
            model(tokens, labels=np.where(tokens == 3, wrong, tokens))


def test_labels_of_rows_that_do_not_fit():
    """What transformers' classes raise an InvalidArgumentError for on a CPU, and answer with NaN on a GPU."""
    config = dataclasses.replace(BERT, task="question-answering")
    ends = {"start_positions": tf.constant([1, 4]), "end_positions": tf.constant([3, 3])}
    with pytest.raises(ValueError, match="labels reach from 1 to 4, outside of 0 … 3"):
        loss_of(config, tf.zeros((2, 4, 2)), None, ends, None)
    config = dataclasses.replace(BERT, task="sequence-classification")
    got = loss_of(config, tf.zeros((2, 3)), None, {"labels": tf.constant([[-100], [2]])}, None)
    np.testing.assert_allclose(got, [0, np.log(3)], rtol=1e-6)  # as those of the next sentence


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("pretraining", {"labels": 1}, "pretraining needs labels, and next_sentence_label or"),
        ("question-answering", {"end_positions": 1}, "needs start_positions and end_positions; got end_positions"),
        ("next-sentence", {"labels": 1, "next_sentence_label": 1}, "are the same labels; pass one of them"),
    ],
)
@pytest.mark.parametrize("what", ["TorchModel", "TFModel"])
def test_labels_that_go_together(what, task, labels, message):
    config = dataclasses.replace(BERT, task=task)
    with pytest.raises(TypeError, match=f"{what}: .*{message}"):
        given_labels(what, config, **labels)
    assert given_labels(what, config, labels=None) == {}
