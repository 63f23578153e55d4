from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import fmodels as fm
from fmodels.arrays import Scaled
from tests.transforms import tiny
from tests.transforms.tiny import assert_same, make, to_numpy

GOLDENS = Path(__file__).parents[1] / "goldens" / "pruned"
MODELS = ["bert_masked_lm", "bert_sequence_classification", "gpt2_causal_lm"]
STAGES = ["unpruned", "pruned_once", "pruned_twice"]


def golden(model):
    expected = dict(np.load(GOLDENS / model / "expected.npz"))
    heads = [
        {int(layer): gone for layer, gone in json.loads(str(expected[name])).items()} for name in ("first", "second")
    ]
    return expected, heads


def assert_logits(params, config, expected, stage):
    inputs = {name: expected[name] for name in ("mask", "positions", "token_types") if name in expected}
    got = np.asarray(fm.forward(params, config, expected["tokens"], **inputs).logits)
    real = expected["mask"].astype(bool) if got.ndim == 3 else slice(None)
    np.testing.assert_allclose(got[real], expected[stage][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_pruned_checkpoints_of_transformers(model, tmp_path):
    """Loaded, pruned once and pruned twice: the logits, tensors and config.json that transformers 4.57.6 has."""
    expected, (first, second) = golden(model)
    params, config = fm.load(GOLDENS / model / "unpruned")
    params = to_numpy(params)
    once = fm.prune_heads(params, config, first)
    twice = fm.prune_heads(*once, second)
    both = {layer: [*first.get(layer, []), *second.get(layer, [])] for layer in {**first, **second}}
    assert_same(fm.prune_heads(params, config, both)[0], twice[0])
    for stage, (ours, new) in zip(STAGES, ((params, config), once, twice), strict=True):
        fm.check(ours, new)
        theirs, read = fm.load(GOLDENS / model / stage)
        assert new == read
        assert_same(to_numpy(theirs), ours)
        assert_logits(ours, new, expected, stage)
        fm.save(ours, new, tmp_path / stage)
        want = load_file(GOLDENS / model / stage / "model.safetensors")
        got = load_file(tmp_path / stage / "model.safetensors")
        assert got.keys() == want.keys()
        assert all(got[name].tobytes() == want[name].tobytes() and got[name].shape == want[name].shape for name in want)
        written, original = (
            json.loads((folder / "config.json").read_text()) for folder in (tmp_path / stage, GOLDENS / model / stage)
        )
        assert written.get("pruned_heads", {}) == original.get("pruned_heads", {})


@pytest.mark.parametrize(
    ("family", "layers", "heads"),
    [
        ("gpt2", "stacked", {0: [1, 3], 2: [0]}),
        ("bert", "list", {0: [3], 1: [0], 2: [2]}),
        ("llama", "stacked", {0: [2, 3], 1: [0, 1, 6, 7]}),  # whole groups
        ("llama", "stacked", {0: [0, 3, 5, 6], 1: [1, 2, 4, 7], 2: [0, 2, 4, 6]}),  # one head of each
        ("llama", "stacked", {0: [0, 1, 3, 5, 6]}),  # a whole group, and one of each that remains
    ],
)
def test_pruned_computes_what_masked_computes(family, layers, heads):
    params, config = make(family, layers)
    params = to_numpy(params)
    pruned, new = fm.prune_heads(params, config, heads)
    fm.check(pruned, new)
    assert fm.match_config(pruned, new) == new
    masked = fm.mask_heads(params, config, heads)
    assert tiny.shapes(masked) == tiny.shapes(params)
    want = tiny.logits(masked, config)
    np.testing.assert_allclose(tiny.logits(pruned, new), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - tiny.logits(params, config)).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bloom/causal-lm", {0: [1, 3], 2: [0]}),
        ("bloom/causal-lm", {0: [1], 1: [0], 2: [5]}),  # stacked, with other slopes in each layer
        ("falcon/base/alibi", {0: [0, 1, 2, 3, 4, 5], 1: [2, 8]}),
        ("gpt_neox/causal-lm", {1: [0, 2]}),
    ],
)
def test_pruned_heads_keep_their_slopes(case, name, heads, tmp_path):
    """ALiBi's belong to the original heads; queries, keys and values of a head lie side by side on disk."""
    loaded = case(name)
    pruned, config = fm.prune_heads(loaded.params, loaded.config, heads)
    assert fm.tree.is_stacked(pruned) == (len(heads) == 3)
    masked = fm.mask_heads(loaded.params, loaded.config, heads)
    given = {name: a for name, a in loaded.inputs("left").items() if name != "positions"}
    want = np.asarray(fm.forward(masked, loaded.config, **given).hidden)
    got = np.asarray(fm.forward(pruned, config, **given).hidden)
    np.testing.assert_allclose(got[given["mask"] == 1], want[given["mask"] == 1], rtol=1e-5, atol=1e-5)
    fm.save(pruned, config, tmp_path)
    again, read = fm.load(tmp_path)
    assert read.pruned_heads == config.pruned_heads
    assert_same(to_numpy(again), to_numpy(pruned))


def test_mask_after_pruning_counts_original_heads():
    params, config = make("gpt2")
    first, second = {0: [1], 2: [0]}, {0: [0, 3, 1], 1: [2]}
    pruned, new = fm.prune_heads(to_numpy(params), config, first)
    masked = fm.mask_heads(pruned, new, second)
    want = tiny.logits(*fm.prune_heads(pruned, new, second))
    np.testing.assert_allclose(tiny.logits(masked, new), want, rtol=1e-5, atol=1e-5)


def test_stays_stacked_while_layers_are_equal():
    params, config = make("llama")
    params = to_numpy(params)
    heads = {0: [0, 1], 1: [4, 5], 2: [6, 7]}
    pruned, new = fm.prune_heads(params, config, heads)
    assert fm.tree.is_stacked(pruned)
    assert pruned["layers"]["attention"]["query"]["weight"].shape == (3, 6, 4, 16)
    assert pruned["layers"]["attention"]["key"]["weight"].shape == (3, 3, 4, 16)
    assert pruned["layers"]["mlp"]["up"]["weight"] is params["layers"]["mlp"]["up"]["weight"]
    listed, same = fm.prune_heads(fm.unstack_layers(params), config, heads)
    assert same == new
    assert isinstance(listed["layers"], tuple)
    assert_same(fm.stack_layers(listed), pruned)
    ragged, new = fm.prune_heads(pruned, new, {1: [0, 1]})
    assert isinstance(ragged["layers"], tuple)
    even, new = fm.prune_heads(ragged, new, {0: [2, 3], 2: [2, 3]})
    assert isinstance(even["layers"], tuple)
    assert_same(
        fm.stack_layers(even), fm.prune_heads(params, config, {0: [0, 1, 2, 3], 1: [0, 1, 4, 5], 2: [2, 3, 6, 7]})[0]
    )
    assert new.pruned_heads == ((0, (0, 1, 2, 3)), (1, (0, 1, 4, 5)), (2, (2, 3, 6, 7)))


def test_takes_the_right_slices():
    params, config = make("llama")
    pruned, new = fm.prune_heads(params, config, {1: [2, 3]})
    before, after = params["layers"]["attention"], pruned["layers"][1]["attention"]
    heads, groups = [0, 1, 4, 5, 6, 7], [0, 2, 3]
    for name, kept in (("query", heads), ("key", groups), ("value", groups)):
        np.testing.assert_array_equal(after[name]["weight"], before[name]["weight"][1][np.array(kept)])
        np.testing.assert_array_equal(after[name]["bias"], before[name]["bias"][1][np.array(kept)])
    np.testing.assert_array_equal(after["output"]["weight"], before["output"]["weight"][1][:, np.array(heads)])
    np.testing.assert_array_equal(after["output"]["bias"], before["output"]["bias"][1])
    assert (new.num_heads, new.num_kv_heads, new.pruned_heads) == (8, 4, ((1, (2, 3)),))


@pytest.mark.parametrize("heads", [{0: [0, 1], 1: [4, 5], 2: [6, 7]}, {1: [2, 3]}, {0: [0, 2, 4, 6]}])
def test_saved_and_loaded_again(heads, tmp_path):
    params, config = fm.prune_heads(*make("llama"), heads)
    fm.save(params, config, tmp_path)
    again, read = fm.load(tmp_path)
    assert read == config
    assert_same(again, params)
    listed, _ = fm.load(tmp_path, layers="list")
    assert_same(fm.tree.map_leaves(lambda _, leaf: jnp.asarray(leaf), listed), fm.unstack_layers(params))


@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_numpy_stays_numpy_and_jit_agrees(layers):
    params, config = make("llama", layers)
    for heads in ({0: [0, 1], 1: [4, 5], 2: [6, 7]}, {1: [2, 3]}):
        outside, new = fm.prune_heads(params, config, heads)
        assert_same(jax.jit(lambda tree, h=heads: fm.prune_heads(tree, config, h)[0])(params), outside)
        assert_same(fm.prune_heads(to_numpy(params), config, heads)[0], to_numpy(outside))
        masked = fm.mask_heads(params, config, heads)
        assert_same(jax.jit(lambda tree, h=heads: fm.mask_heads(tree, config, h))(params), masked)
        assert_same(fm.mask_heads(to_numpy(params), config, heads), to_numpy(masked))
        assert tiny.shapes(outside) == tiny.shapes(fm.abstract(new) if fm.tree.is_stacked(outside) else outside)


@pytest.mark.parametrize("heads", [{}, {0: []}, {2: [], 0: ()}])
def test_nothing_asked_nothing_done(heads):
    params, config = make("gpt2")
    assert fm.prune_heads(params, config, heads) == (params, config)
    assert fm.mask_heads(params, config, heads) is params


def test_heads_that_are_gone_are_passed_over():
    params, config = fm.prune_heads(*make("gpt2"), {0: [1]})
    again, same = fm.prune_heads(params, config, {0: [1, 1], 1: []})
    assert again is params
    assert same is config
    pruned, new = fm.prune_heads(params, config, {np.int64(0): np.array([1, 2]), 1: {3}, 2: (0, 0)})
    assert new.pruned_heads == ((0, (1, 2)), (1, (3,)), (2, (0,)))
    assert all(isinstance(head, int) for _, gone in new.pruned_heads for head in gone)
    fm.check(pruned, new)


WIDE = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 2, "num_layers": 4}


def test_splitting_a_group_says_what_to_write():
    params, config = make("llama", **WIDE)
    params = to_numpy(params)
    message = (
        "prune_heads: layer 3 has 8 key-value groups of 4 heads; [1] splits a group unevenly. "
        "Prune whole groups or one head of each, or use mask_heads."
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        fm.prune_heads(params, config, {3: [1]})
    params, config = fm.prune_heads(params, config, {3: [*range(0, 32, 4)]})
    message = "prune_heads: layer 3 has 8 key-value groups of 3 heads; [1, 6] split a group unevenly."
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        fm.prune_heads(params, config, {3: [0, 1, 6]})
    fm.prune_heads(params, config, {3: [1, 2, 3]})
    fm.prune_heads(params, config, {3: [*range(1, 32, 4)]})


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ({3: [0]}, IndexError, "layer 3 is out of range, expected 0 to 2"),
        ({-1: [0]}, IndexError, "layer -1 is out of range, expected 0 to 2"),
        ({3: []}, IndexError, "layer 3 is out of range, expected 0 to 2"),
        ({0: [4]}, IndexError, "layer 0: head 4 is out of range, expected 0 to 3"),
        ({0: [-1]}, IndexError, "layer 0: head -1 is out of range, expected 0 to 3"),
        ({"0": [1]}, TypeError, "layer '0' is not an integer"),
        ({0: [1.0]}, TypeError, "layer 0: head 1.0 is not an integer"),
        ({0: [True]}, TypeError, "layer 0: head True is not an integer"),
        ({True: [1]}, TypeError, "layer True is not an integer"),
        ({0: 1}, TypeError, "layer 0 has 1, expected a list of heads such as [0, 2]"),
        ({0: "12"}, TypeError, "layer 0 has '12', expected a list of heads such as [0, 2]"),
        ([0, 1], TypeError, "expected heads as {layer: [head, …]}, got [0, 1]"),
        (
            {1: [0, 1, 2, 3]},
            ValueError,
            "layer 1 has 4 heads and all would go; keep one, or silence them with mask_heads",
        ),
    ],
)
def test_wrong_heads(heads, error, message):
    params, config = make("gpt2")
    before = to_numpy(params)
    with pytest.raises(error, match=rf"^{re.escape('prune_heads: ' + message)}$"):
        fm.prune_heads(params, config, heads)
    if error is not ValueError:
        with pytest.raises(error, match=rf"^{re.escape('mask_heads: ' + message)}$"):
            fm.mask_heads(params, config, heads)
    assert_same(to_numpy(params), before)
    assert config == make("gpt2")[1]


def test_all_problems_at_once():
    params, config = make("llama")
    with pytest.raises(IndexError) as caught:
        fm.prune_heads(params, config, {0: [9, -2], 7: [0], 1: [0], 2: [*range(8)]})
    text = str(caught.value)
    assert text.startswith("prune_heads: 5 problems:\n  layer 0: head 9 is out of range")
    for part in (
        "head -2",
        "layer 7 is",
        "layer 1 has 4 key-value groups of 2 heads; [0] splits",
        "layer 2 has 8 heads",
    ):
        assert part in text


def test_pruning_what_earlier_pruning_left():
    params, config = fm.prune_heads(*make("gpt2"), {1: [0, 2]})
    with pytest.raises(ValueError, match=r"layer 1 has 2 heads and all would go"):
        fm.prune_heads(params, config, {1: [1, 3]})


def test_tree_and_config_that_do_not_fit():
    params, config = make("gpt2")
    _, pruned = fm.prune_heads(params, config, {0: [1]})
    for function in (fm.prune_heads, fm.mask_heads):
        with pytest.raises(
            ValueError, match=r"has 4 (query|key-value) heads, but the config says 3 for layer 0; repair"
        ):
            function(params, pruned, {1: [0]})
        with pytest.raises(ValueError, match=r"the tree has 3 layers, but the config says 5"):
            function(params, dataclasses.replace(config, num_layers=5), {1: [0]})


def test_whole_layers_can_be_silenced():
    params, config = make("gpt2")
    weight = fm.mask_heads(params, config, {1: range(4)})["layers"]["attention"]["output"]["weight"]
    assert not weight[1].any()
    assert weight[0].all()


def test_silenced_heads_may_hold_anything():
    params, config = make("gpt2")
    weight = params["layers"]["attention"]["output"]["weight"].at[1, :, 2].set(jnp.inf)
    broken = fm.tree.update(params, {"layers.attention.output.weight": weight})
    assert_same(fm.mask_heads(broken, config, {1: [2]}), fm.mask_heads(params, config, {1: [2]}))


@pytest.mark.parametrize("layers", ["stacked", "list"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scale(layers, dtype):
    params, config = make("llama", layers)
    params = fm.cast(params, dtype)
    ones = jnp.ones((3, 8))
    assert_same(fm.scale_heads(params, ones), params)
    assert_same(fm.scale_heads(params, tuple(ones)), params)
    assert_same(jax.jit(fm.scale_heads)(params, ones), params)
    zeros = fm.scale_heads(params, ones.at[1, 3].set(0.0))
    masked = fm.mask_heads(params, config, {1: [3]})
    for a, b in zip(jax.tree.leaves(zeros), jax.tree.leaves(masked), strict=True):
        np.testing.assert_array_equal(a, b)
    numpy = fm.scale_heads(to_numpy(params), np.ones((3, 8), bool))
    assert_same(numpy, to_numpy(params))
    assert_same(fm.scale_heads(params, np.ones((3, 8)).tolist()), params)


def test_scale_of_ragged_layers():
    params, _ = fm.prune_heads(*make("gpt2"), {0: [1]})
    scaled = fm.scale_heads(params, (2 * jnp.ones(3), jnp.ones(4), jnp.ones(4)))
    for layer, factor in ((0, 2), (1, 1)):
        before, after = (tree["layers"][layer]["attention"]["output"]["weight"] for tree in (params, scaled))
        np.testing.assert_array_equal(after, factor * before)
    for wrong in (jnp.ones((3, 4)), (jnp.ones(3), jnp.ones(4)), (jnp.ones(3), jnp.ones(4), jnp.ones(5))):
        with pytest.raises(ValueError, match=r"^scale_heads: 'layers.*expected a mask \(l h\)"):
            fm.scale_heads(params, wrong)
    for wrong in (jnp.ones((3, 3)), jnp.ones((2, 4)), (jnp.ones(4), jnp.ones(3), jnp.ones(4))):
        with pytest.raises(
            ValueError, match=r"^scale_heads: 'layers.attention.output.weight' has 3 layers and 4 heads"
        ):
            fm.scale_heads(make("gpt2")[0], wrong)


@pytest.mark.parametrize("shared", [True, False])
def test_quantised_leaves(shared):
    """Pruned, masked and scaled like the arrays that they stand for."""
    params, config = make("gpt2", num_layers=2)
    params = to_numpy(params)
    draw = np.random.default_rng(0)

    def quantise(path, leaf):
        if not path.endswith(("query.weight", "output.weight")):
            return leaf
        shape = list(leaf.shape)
        shape[-2 if shared else -1] = 1
        values = draw.integers(-127, 127, leaf.shape, np.int8)
        return Scaled(values, draw.uniform(0.5, 1, shape).astype(np.float32))

    def plain(tree):
        return fm.tree.map_leaves(lambda _, leaf: leaf.dequantize() if isinstance(leaf, Scaled) else leaf, tree)

    quantised = fm.tree.map_leaves(quantise, params)
    for heads in ({0: [1]}, {0: [1], 1: [2]}):
        pruned, new = fm.prune_heads(quantised, config, heads)
        fm.check(pruned, new)
        assert_same(plain(pruned), fm.prune_heads(plain(quantised), config, heads)[0])
        masked = fm.mask_heads(quantised, config, heads)
        for a, b in zip(
            jax.tree.leaves(plain(masked)), jax.tree.leaves(fm.mask_heads(plain(quantised), config, heads)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    scaled = plain(fm.scale_heads(quantised, 0.5 * jnp.ones((2, 4))))
    assert_same(scaled, fm.scale_heads(plain(quantised), 0.5 * jnp.ones((2, 4))))


head_sets = st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 3), max_size=3))


@settings(max_examples=30, deadline=None)
@given(head_sets, head_sets)
def test_pruning_in_two_steps_is_pruning_at_once(first, second):
    params, config = make("gpt2")
    params = to_numpy(params)
    both = {layer: first.get(layer, set()) | second.get(layer, set()) for layer in range(3)}
    if any(len(gone) == 4 for gone in both.values()):
        return
    once, new = fm.prune_heads(params, config, both)
    twice, same = fm.prune_heads(*fm.prune_heads(params, config, first), second)
    assert new == same
    assert_same(fm.unstack_layers(twice), fm.unstack_layers(once))
    fm.check(twice, same)
    assert {layer: set(gone) for layer, gone in new.pruned_heads} == {l: gone for l, gone in both.items() if gone}
