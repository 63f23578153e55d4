"""The losses that `TFModel` computes of labels, against those of transformers' TensorFlow classes (goldens) and PyTorch's."""

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
from interop.tensorflow import TFLayer, TFModel, losses
from tests import families
from tests.interop.wrapped import GPT2, LIBRARIES
from tests.test_losses import labels_for

ROWS = json.loads((Path(__file__).parents[1] / "goldens" / "tensorflow" / "losses.json").read_text())
ONLY_TORCH = ["electra/replaced-token-detection", "gpt2/double-heads", "bart/causal-lm"]


def values(name, shape):
    """As `values` of tests/goldens/make_tensorflow_losses.py."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    drawn = ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 1021 - 510) / 1024
    return (drawn + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32).reshape(shape)


def model_of(row):
    """With the weights of the script."""
    config = fm.models.FAMILIES[row["config"]["model_type"]].config.from_hf(row["config"])
    model = TFModel(fm.init(config, jax.random.key(0)), config)
    for name, variable in model.named_variables.items():
        if variable.trainable:
            variable.assign(values(name, tuple(variable.shape)))
    return model


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['config']['architectures'][0]}-{len(r['loss'])}" for r in ROWS])
def test_loss_and_gradients_are_those_of_transformers(row):
    model = model_of(row)
    with tf.GradientTape() as tape:
        out = model(**row["given"], **row["labels"])
    np.testing.assert_allclose(out.loss.numpy(), row["loss"], atol=1e-5, rtol=1e-5)
    assert out.loss.shape == np.shape(row["loss"])
    found = tape.gradient(out.loss, [model.named_variables[name] for name in row["norms"]])
    norms = [np.linalg.norm(gradient.numpy()) for gradient in found]
    np.testing.assert_allclose(norms, list(row["norms"].values()), rtol=1e-4)
    assert out[0] is out["loss"] is out.to_tuple()[0]
    assert out.to_tuple()[1] is out.logits


@pytest.mark.parametrize("name", ["electra/replaced-token-detection", "gpt2/double-heads", "bart/causal-lm"])
def test_tasks_without_a_loss_there_have_that_of_pytorch(case, name):
    loaded = case(name)
    given = {n: a for n, a in loaded.inputs("right").items() if n != "positions"}
    labels = labels_for(loaded, given)
    with torch.no_grad():
        want = families.call(loaded.model, given, **{n: torch.tensor(a) for n, a in labels.items()}).loss
        logits = torch.tensor(families.call(loaded.model, given).logits)
    got = losses.loss_of(loaded.config, tf.constant(logits.numpy()), None, labels_of(labels), given["mask"])
    np.testing.assert_allclose(got.numpy(), [want.item()], atol=1e-5, rtol=1e-5)


def test_several_labels_of_a_row():
    config = fm.models.bert.Config(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4,
        max_positions=16, task="sequence-classification",
    )  # fmt: skip
    logits, labels = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32), np.array([[1.0, 0, 1], [0, 0, 1]])
    got = losses.loss_of(config, tf.constant(logits), None, {"labels": tf.constant(labels)}, None)
    want = torch.nn.BCEWithLogitsLoss(reduction="none")(torch.tensor(logits), torch.tensor(labels)).mean(-1)
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6)
