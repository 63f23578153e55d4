"""Optimizer state follows the tree: transformed and then updated is updated and then transformed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmodels as fm
from tests.transforms.tiny import assert_same, make

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = make("llama")[1]


def few_leaves():
    """A tree that has what the transforms are about."""
    flat = fm.tree.flatten(make("llama")[0])
    kept = ("embed.tokens", "lm_head.weight", "layers.mlp_norm.scale", "attention.query.weight", "attention.key.bias",
            "attention.output.weight")  # fmt: skip
    return fm.tree.unflatten({path: leaf for path, leaf in flat.items() if path.endswith(kept)})


HEADS = {0: [0, 1], 2: [4, 5, 6, 7]}
TRANSFORMS = {
    "prune": lambda tree: fm.prune_heads(tree, CONFIG, HEADS)[0],
    "unstack": fm.unstack_layers,
    "resize": lambda tree: fm.resize_embeddings(tree, CONFIG, 41, init="zeros")[0],
    "shrink": lambda tree: fm.resize_embeddings(tree, CONFIG, 30)[0],
    "untie": lambda tree: fm.untie(fm.tie(tree, CONFIG, force=True)[0], CONFIG)[0],
    "mask": lambda tree: fm.mask_heads(tree, CONFIG, HEADS),
}


def labels(params):
    return fm.tree.map_leaves(lambda path, _: "frozen" if "norm" in path else "trained", params)


def decayed(params):
    return fm.tree.map_leaves(lambda path, _: not path.endswith(("scale", "bias")), params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decayed),
    "momentum": lambda: optax.chain(optax.trace(0.9), optax.scale_by_schedule(optax.linear_schedule(1e-2, 0, 5))),
    "every two": lambda: optax.MultiSteps(optax.adam(1e-2, mu_dtype=jnp.bfloat16), 2),
    "some frozen": lambda: optax.multi_transform({"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels),
    "averaged": lambda: optax.chain(optax.sgd(1e-2), optax.ema(0.9)),
}


@pytest.fixture(name="standard_promotion")
def fixture_standard_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def gradients():
    params = few_leaves()
    draw = np.random.default_rng(1)
    return [jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), params) for _ in range(2)]


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "transform"),
    [
        *((name, "prune") for name in OPTIMIZERS if name != "every two"),
        *(("some frozen", name) for name in ("unstack", "resize", "shrink")),
    ],
)
def test_commutes_with_an_update(optimizer, transform, gradients):
    optimize = OPTIMIZERS[optimizer]()
    change = TRANSFORMS[transform]
    params = few_leaves()
    update = jax.jit(optimize.update)
    _, state = update(gradients[0], optimize.init(params), params)
    moved = fm.map_state(change, params, state)
    assert jax.tree.structure(moved) == jax.tree.structure(optimize.init(change(params)))
    changes, end = update(gradients[1], state, params)
    changed, ended = update(change(gradients[1]), moved, change(params))
    if transform == "resize":  # new rows of the parameters are zeros, and so is their update
        assert not np.asarray(changed["embed"]["tokens"][37:]).any()
    assert_close(changed, change(changes))
    assert_close(ended, fm.map_state(change, params, end))


@pytest.mark.parametrize("transform", ["mask", "untie"])
def test_other_transforms(transform):
    change = TRANSFORMS[transform]
    params = few_leaves()
    state = optax.adam(1e-2).init(params)
    moved = fm.map_state(change, params, state)
    assert_same(moved, optax.adam(1e-2).init(change(params)))


def test_stack_of_a_state_with_holes():
    params = few_leaves()
    optimizer = OPTIMIZERS["some frozen"]()
    state = optimizer.init(fm.unstack_layers(params))
    assert_same(fm.map_state(fm.stack_layers, fm.unstack_layers(params), state), optimizer.init(params))


def test_cast_as_optax_maps_it():
    params = few_leaves()
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    ours = fm.map_state(lambda tree: fm.cast(tree, "bfloat16"), params, state)
    theirs = optax.tree_utils.tree_map_params(optimizer, lambda leaf: leaf.astype(jnp.bfloat16), state)
    assert_same(ours, theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finds_the_copies_that_optax_finds(optimizer):
    params = few_leaves()
    optimize = OPTIMIZERS[optimizer]()
    state = optimize.init(params)
    ours = fm.map_state(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), params, state)
    assert_same(ours, optax.tree_utils.tree_map_params(optimize, lambda leaf: leaf + 1, state))


def test_states_without_copies():
    params = few_leaves()
    state = optax.sgd(1e-2).init(params)
    assert_same(fm.map_state(TRANSFORMS["prune"], params, state), state)


def test_states_that_belong_to_another_tree():
    params = few_leaves()
    state = optax.adam(1e-2).init(params)
    with pytest.raises(ValueError, match=r"^map_state: the state holds arrays, but nowhere the paths of params"):
        fm.map_state(fm.stack_layers, fm.unstack_layers(params), state)
    with pytest.raises(ValueError, match=r"has shape .* in the state, but .* in params"):
        fm.map_state(TRANSFORMS["shrink"], TRANSFORMS["shrink"](params), state)
    with pytest.raises(ValueError, match=r"a state that is not shaped like the parameters cannot be transformed"):
        fm.map_state(TRANSFORMS["shrink"], params, optax.adafactor(1e-2, min_dim_size_to_factor=2).init(params))


def test_under_jit():
    params = few_leaves()
    state = optax.adam(1e-2).init(params)
    inside = jax.jit(lambda params, state: fm.map_state(TRANSFORMS["prune"], params, state))(params, state)
    assert_same(inside, fm.map_state(TRANSFORMS["prune"], params, state))
