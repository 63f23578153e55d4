from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmodels as fm
from fmodels.arrays import Scaled
from tests.transforms import tiny
from tests.transforms.tiny import FAMILIES, assert_same, make, to_numpy


@pytest.mark.parametrize("convert", [lambda tree: tree, to_numpy], ids=["jax", "numpy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_are_inverse_of_each_other(family, convert):
    params = convert(make(family)[0])
    layers = fm.unstack_layers(params)
    assert isinstance(layers["layers"], tuple)
    assert len(layers["layers"]) == 3
    assert list(layers) == list(params)
    assert_same(fm.stack_layers(layers), params)
    assert_same(fm.unstack_layers(fm.stack_layers(layers)), layers)
    np.testing.assert_array_equal(
        layers["layers"][1]["mlp"]["up"]["weight"], params["layers"]["mlp"]["up"]["weight"][1]
    )


def test_what_has_the_form_already_is_returned_as_it_is():
    params = make("gpt2")[0]
    layers = fm.unstack_layers(params)
    assert fm.stack_layers(params) is params
    assert fm.unstack_layers(layers) is layers


def test_list_of_layers_is_stacked_like_a_tuple():
    params = make("gpt2")[0]
    assert_same(fm.stack_layers({**params, "layers": list(fm.unstack_layers(params)["layers"])}), params)


def test_numpy_layers_are_views():
    params = to_numpy(make("gpt2")[0])
    layers = fm.unstack_layers(params)
    assert np.shares_memory(layers["layers"][0]["mlp"]["up"]["weight"], params["layers"]["mlp"]["up"]["weight"])


def test_both_forms_compute_the_same():
    params, config = make("gpt2")
    np.testing.assert_allclose(
        tiny.logits(fm.unstack_layers(params), config), tiny.logits(params, config), rtol=1e-6, atol=1e-6
    )


def test_works_under_jit_and_on_abstract_trees():
    params = make("llama")[0]
    layers = jax.jit(fm.unstack_layers)(params)
    assert_same(jax.jit(fm.stack_layers)(layers), params)
    assert tiny.shapes(jax.eval_shape(fm.stack_layers, layers)) == tiny.shapes(params)


def test_array_like_leaves_are_stacked_part_by_part():
    layer = {"mlp": {"up": {"weight": Scaled(jnp.arange(6, dtype=jnp.int8).reshape(2, 3), jnp.ones((2, 1)))}}}
    params = {"layers": (layer, layer)}
    stacked = fm.stack_layers(params)
    weight = stacked["layers"]["mlp"]["up"]["weight"]
    assert isinstance(weight, Scaled)
    assert (weight.values.shape, weight.scale.shape) == ((2, 2, 3), (2, 2, 1))
    assert_same(fm.unstack_layers(stacked), params)


def test_ragged_layers_name_the_first_path_that_differs():
    params, config = make("gpt2")
    ragged, _ = fm.prune_heads(params, config, {1: [0]})
    message = (
        "stack_layers: 'layers.1.attention.key.bias' is float32 (3, 4), but 'layers.0.attention.key.bias' is "
        "float32 (4, 4). Layers that differ stay a tuple, which every function accepts."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fm.stack_layers(ragged)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": np.zeros(2)}, "'layers.0' has 'b' float64 (3,), which 'layers.1' has not"),
        ({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(4)}, "'layers.1' has 'c' float64 (4,), which 'layers.0'"),
        ({"a": np.zeros(2), "b": np.zeros(3, "f4")}, "'layers.1.b' is float32 (3,), but 'layers.0.b' is float64 (3,)"),
        ({"a": np.zeros(2), "b": Scaled(np.zeros(3), np.zeros(1))}, "is Scaled(float64 (3,) and float64 (1,))"),
    ],
)
def test_other_differences(second, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fm.stack_layers({"layers": ({"a": np.zeros(2), "b": np.zeros(3)}, second)})


def test_trees_that_have_no_layers():
    with pytest.raises(ValueError, match=r"stack_layers: there are no layers"):
        fm.stack_layers({"layers": ()})
    with pytest.raises(ValueError, match=r"unstack_layers: there are no arrays"):
        fm.unstack_layers({"layers": {}})
    for function in (fm.stack_layers, fm.unstack_layers):
        with pytest.raises(KeyError, match=r"no 'layers' in the tree"):
            function({"embed": {"tokens": np.zeros((3, 2))}})


def test_stacked_leaves_that_disagree_in_depth():
    with pytest.raises(ValueError, match=r"'layers.b' has shape \(3, 4\), but 'layers.a' has \(2, 4\)"):
        fm.unstack_layers({"layers": {"a": np.zeros((2, 4)), "b": np.zeros((3, 4))}})
    with pytest.raises(ValueError, match=r"'layers.b' has shape \(\)"):
        fm.unstack_layers({"layers": {"a": np.zeros((2, 4)), "b": np.zeros(())}})


dtypes = st.sampled_from(["float32", "float16", "int8", jnp.bfloat16])
arrays = st.tuples(st.lists(st.integers(1, 4), max_size=3), dtypes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.dictionaries(st.sampled_from("abcd"), arrays, min_size=1))
def test_round_trip_of_any_tree(depth, leaves):
    draw = np.random.default_rng(0)
    layers = tuple(
        {name: {"weight": draw.normal(size=shape).astype(dtype)} for name, (shape, dtype) in leaves.items()}
        for _ in range(depth)
    )
    params = {"layers": layers}
    assert_same(fm.unstack_layers(fm.stack_layers(params)), params)
