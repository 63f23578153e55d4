"""Adapters on the wrappers against PEFT and transformers' `PeftAdapterMixin`."""

from __future__ import annotations

import copy
import pickle

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch

import fmodels as fm
from interop.torch import TorchModel
from tests import families
from tests.interop.wrapped import LIBRARIES
from tests.test_adapters import peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


@pytest.fixture(scope="module")
def made(case, tmp_path_factory):
    """A row of the table, PEFT's model with an adapter of its second layer, and the folder that it saves."""
    row = case("llama/causal-lm")
    adapted = peft(row.model, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]})
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return row, adapted, folder


def given(library, row):
    return {n: library.tensor(a.tolist(), "int32") for n, a in row.inputs().items() if n != "positions"}


def logits(library, model, row):
    return library.numpy(model(**given(library, row)).logits)


def test_loaded_adapters_compute_what_peft_does(library, made):
    row, adapted, folder = made
    with torch.no_grad():
        want = families.call(adapted, row.inputs()).logits.numpy()
    model = library.wrapper(row.params, row.config)
    alone = logits(library, model, row)
    with pytest.raises(ValueError, match="active_adapters: there is no adapter"):
        model.active_adapters()
    model.load_adapter(folder)
    assert model.active_adapters() == ["default"]
    np.testing.assert_allclose(logits(library, model, row), want, atol=1e-4, rtol=1e-5)
    assert np.abs(want - alone).max() > 0.01
    theirs = copy.deepcopy(row.model)
    theirs.load_adapter(str(folder))
    expected, found = theirs.get_adapter_state_dict(), model.get_adapter_state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(library.numpy(found[name]), tensor.double().numpy()) for name, tensor in expected.items())
    assert model.num_parameters() == theirs.num_parameters()
    spec = fm.load_adapter(folder).config
    model.load_adapter(adapter_name="other", peft_config=spec, adapter_state_dict=found)
    model.set_adapter(["default", "other"])
    both = fm.add_adapter(row.params, row.config, [fm.load_adapter(folder)] * 2)
    inputs = {n: a for n, a in row.inputs().items() if n != "positions"}
    np.testing.assert_allclose(
        logits(library, model, row), fm.forward(both, row.config, **inputs).logits, atol=1e-4, rtol=1e-5
    )
    model.disable_adapters()
    np.testing.assert_allclose(logits(library, model, row), alone, atol=1e-6)
    model.enable_adapters()
    model.delete_adapter("default")
    assert model.active_adapters() == ["other"]
    np.testing.assert_allclose(logits(library, model, row), want, atol=1e-4, rtol=1e-5)
    model.delete_adapter(["other"])
    np.testing.assert_allclose(logits(library, model, row), alone, atol=1e-6)
    assert model.num_parameters() == row.model.num_parameters()


def test_only_the_adapter_is_trained_as_in_peft(library, made, tmp_path):
    row, adapted, folder = made
    for p in adapted.parameters():
        p.grad = None
    families.call(adapted, row.inputs()).logits.logsumexp(-1).sum().backward()
    want = {n.replace(".default", ""): p.grad.numpy() for n, p in adapted.named_parameters() if p.grad is not None}
    model = library.wrapper(row.params, row.config)
    model.load_adapter(folder, is_trainable=True)
    if isinstance(model, torch.nn.Module):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**given(library, row)).logits.logsumexp(-1).sum().backward()
        found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    else:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.reduce_logsumexp(model(**given(library, row)).logits, -1))
        names = list(model.adapter_variables)
        values = tape.gradient(loss, model.trainable_variables)
        found = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        tf.keras.optimizers.SGD(0.1).apply_gradients(zip(values, model.trainable_variables, strict=True))
    found = {name.removeprefix("adapters.default."): gradient for name, gradient in found.items()}
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-4, rtol=1e-3, err_msg=name)
    assert model.num_parameters(only_trainable=True) == sum(gradient.size for gradient in want.values())
    for path, leaf in fm.tree.flatten(model.params).items():
        assert np.array_equal(leaf, fm.tree.get(row.params, path)), path

    from peft import PeftModel

    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = PeftModel.from_pretrained(copy.deepcopy(row.model), tmp_path)
    with torch.no_grad():
        stepped = families.call(again, row.inputs()).logits.numpy()
    np.testing.assert_allclose(logits(library, model, row), stepped, atol=1e-4, rtol=1e-5)


def test_new_adapters_and_generation(library, made):
    from peft import LoraConfig

    row, _, folder = made
    model = library.wrapper(row.params, row.config)
    alone = logits(library, model, row)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "new", seed=0)
    np.testing.assert_allclose(logits(library, model, row), alone, atol=1e-6)
    model.load_adapter(folder, "new", hotswap=True)
    tokens = given(library, row)["tokens"]
    tree = fm.add_adapter(row.params, row.config, fm.load_adapter(folder))
    want = fm.generate(tree, row.config, row.inputs()["tokens"], max_new_tokens=3).tokens
    assert np.array_equal(library.numpy(model.generate(tokens, max_new_tokens=3)), want)
    twins = [copy.deepcopy(model)]
    if isinstance(model, TorchModel):
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert np.array_equal(logits(library, twin, row), logits(library, model, row))
        assert twin.active_adapters() == model.active_adapters() == ["new"]
        old, new = ({**m._named(), **m._adapter_tensors()} for m in (model, twin))
        assert [(n, twin._is_trained(t)) for n, t in new.items()] == [(n, model._is_trained(t)) for n, t in old.items()]
        assert not any(new[name] is old[name] for name in old)
    for error, match, wrong in (
        (TypeError, "key= and seed=", lambda: model.add_adapter({"r": 2}, "x")),
        (TypeError, "LoraConfig", lambda: model.add_adapter(7, "x", seed=0)),
        (ValueError, "another adapter_name", lambda: model.add_adapter({"r": 2}, "new", seed=0)),
        (ValueError, "hotswap", lambda: model.load_adapter(folder, "new")),
        (ValueError, "leave hotswap out", lambda: model.load_adapter(folder, "x", hotswap=True)),
        (ValueError, "no dots", lambda: model.load_adapter(folder, "a.b")),
        (TypeError, "peft_model_id", lambda: model.load_adapter()),
        (ValueError, "no adapter x", lambda: model.set_adapter("x")),
        (ValueError, "state_dict", lambda: model.save_pretrained("x", state_dict={})),
        (
            ValueError,
            "matrices|modules|no rule|name",
            lambda: model.add_adapter({"r": 2, "target_modules": ["none"]}, "x", seed=0),
        ),
    ):
        with pytest.raises(error, match=match):
            wrong()
    assert model.active_adapters() == ["new"]
    assert jax.tree.structure(model.params) == jax.tree.structure(row.params)
