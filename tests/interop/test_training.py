"""The wrappers in the training loops of their libraries: autocast, data loaders, processes, Keras."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import torch

from interop.tensorflow import TFLayer
from tests.interop.wrapped import GPT2, LIBRARIES

ROOT = Path(__file__).parents[2]
LOOPBACK = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
TOKENS = np.arange(32).reshape(8, 4) % 11


def test_autocast_changes_nothing():
    model, tokens = LIBRARIES["torch"].model(GPT2), torch.from_numpy(TOKENS)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(tokens).logits
            assert logits.dtype == torch.float32
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        found.append((logits.detach().clone(), [p.grad.clone() for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_batches_of_a_data_loader():
    model = LIBRARIES["torch"].model(GPT2)
    data = torch.utils.data.TensorDataset(torch.from_numpy(TOKENS))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(4):
        for (tokens,) in loader:
            optimizer.zero_grad()
            logits = model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses


WORKER = """
import sys, jax, torch, torch.distributed as dist, fmodels as fm
from interop.torch import TorchModel
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
config = fm.models.gpt2.Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2,
                               num_kv_heads=2, head_dim=4, max_positions=16, task="causal-lm")
model = TorchModel(fm.init(config, jax.random.key(0)), config)
tokens = torch.arange(32).reshape(8, 4) % 11
model(tokens).logits.logsumexp(-1).mean().backward()
want = [p.grad.clone() for p in model.parameters()]
for options in ({}, {"static_graph": True}):
    model.zero_grad(set_to_none=True)
    parallel = torch.nn.parallel.DistributedDataParallel(model, **options)
    parallel(tokens[4 * rank : 4 * rank + 4]).logits.logsumexp(-1).mean().backward()
    for p, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], cwd=ROOT, env=LOOPBACK, text=True, stdout=-1, stderr=-1
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert out.strip().endswith("equal"), err


@pytest.mark.slow
def test_fit_of_keras_trains_the_model():
    model = LIBRARIES["tensorflow"].model(GPT2)
    layer = TFLayer(model)
    assert [v.name for v in layer.weights] == list(model.named_variables)
    network = tf.keras.Sequential([tf.keras.Input((3,), dtype="int32"), layer])
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=tf.keras.optimizers.Adam(1e-2), loss=loss)
    tokens = TOKENS.astype(np.int32)
    before = model(tokens[:, :-1]).logits.numpy()
    np.testing.assert_allclose(network.predict(tokens[:, :-1], verbose=0), before, atol=1e-6)
    losses = network.fit(tokens[:, :-1], tokens[:, 1:], epochs=6, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.3, losses
    after = model(tokens[:, :-1]).logits.numpy()
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(network.predict(tokens[:, :-1], verbose=0), after, atol=1e-6)
    model.resize_token_embeddings(12)
    with pytest.raises(ValueError, match="make a new TFLayer"):
        layer(tokens)
    with pytest.raises(ValueError, match="has no pooled"):
        TFLayer(model, output="pooled")(tokens)


@pytest.mark.slow
def test_mixed_precision_of_keras_changes_nothing():
    model, tokens = LIBRARIES["tensorflow"].model(GPT2), TOKENS.astype(np.int32)
    before = model(tokens).logits.numpy()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        network = tf.keras.Sequential([TFLayer(model)])  # without an Input, so that Keras makes float32 of the tokens
        np.testing.assert_array_equal(network.predict(tokens, verbose=0), before)
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras with numpy 2
def test_a_file_of_keras_is_loaded(tmp_path):
    model, tokens = LIBRARIES["tensorflow"].model(GPT2), TOKENS.astype(np.int32)
    layer = TFLayer(model, name="body", trainable=False)
    network = tf.keras.Sequential([tf.keras.Input((4,), dtype="int32"), layer, tf.keras.layers.Dense(2)])
    network.save(tmp_path / "network.keras")
    again = tf.keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(again.predict(tokens, verbose=0), network.predict(tokens, verbose=0))
    assert again.get_layer("body").model.config == model.config
    assert len(again.trainable_weights) == len(network.trainable_weights) == 2
    model.add_adapter({"r": 2, "target_modules": ["c_attn"]}, seed=0)
    with pytest.raises(NotImplementedError, match="with adapters"):
        TFLayer(model).get_config()


@pytest.mark.slow
def test_fit_of_keras_trains_an_adapter_alone():
    model, tokens = LIBRARIES["tensorflow"].model(GPT2), TOKENS.astype(np.int32)
    model.add_adapter({"r": 2, "target_modules": ["c_attn"]}, seed=0)
    own = {name: variable.numpy() for name, variable in model.named_variables.items()}
    network = tf.keras.Sequential([tf.keras.Input((4,), dtype="int32"), TFLayer(model)])
    network.compile(tf.keras.optimizers.Adam(0.1), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = network.fit(tokens, tokens, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0], losses
    assert all(np.array_equal(variable.numpy(), own[name]) for name, variable in model.named_variables.items())
