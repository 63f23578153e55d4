"""Dotted paths: inverses of each other, and agreement with jax's own paths."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fmodels as fm
from fmodels import tree

NAMES = st.text("abcdefgh_", min_size=1, max_size=4)
TREES = st.recursive(
    st.integers(0, 9),
    lambda child: (
        st.dictionaries(NAMES, child, min_size=1, max_size=3) | st.lists(child, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_unflatten_inverts_flatten(params):
    assert tree.unflatten(tree.flatten(params)) == params


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_paths_are_those_of_jax(params):
    theirs = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert tree.flatten(params) == theirs
    assert all(tree.get(params, path) == leaf for path, leaf in theirs.items())


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_map_leaves_is_jax_tree_map(params):
    assert tree.map_leaves(lambda _, leaf: leaf + 1, params) == jax.tree.map(lambda leaf: leaf + 1, params)


def test_more_than_ten_layers_stay_in_order():
    params = {"layers": tuple({"x": i} for i in range(12))}
    assert tree.unflatten(tree.flatten(params)) == params
    assert tree.get(params, "layers.11.x") == 11


def test_update_and_remove_share_leaves():
    leaf = np.ones(3)
    params = {"embed": {"tokens": leaf, "norm": {"scale": leaf}}, "layers": ({"up": 1}, {"up": 2})}
    changed = tree.update(params, {"layers.1.up": 7, "lm_head.weight": 3})
    assert changed == {**params, "layers": ({"up": 1}, {"up": 7}), "lm_head": {"weight": 3}}
    assert changed["embed"]["tokens"] is leaf
    assert params["layers"][1]["up"] == 2
    assert tree.remove(changed, "lm_head", "embed.norm.scale", "nothing.here") == {
        "embed": {"tokens": leaf}, "layers": ({"up": 1}, {"up": 7}),
    }  # fmt: skip


@pytest.mark.parametrize("path", ["embed.token", "layers.2.up", "layers.x.up", "embed.tokens.deeper", "Embed"])
def test_missing_path_names_the_nearest(path):
    params = {"embed": {"tokens": 1}, "layers": ({"up": 1}, {"up": 2})}
    assert not tree.has(params, path)
    with pytest.raises(KeyError, match=f"no '{path}' in the tree; the nearest path is '(embed|layers)"):
        tree.get(params, path)


def test_is_stacked():
    assert tree.is_stacked(fm.abstract(fm.models.gpt2.Config()))
    assert not tree.is_stacked({"layers": ({}, {})})
