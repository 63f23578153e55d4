"""Flax trees against files that transformers 4.57.6 wrote, and the two modules against `fm.forward` and optax."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training import train_state

import fmodels as fm
from interop import flax as ix

GOLDENS = Path(__file__).parents[1] / "goldens" / "flax"
MODELS = sorted(path.parent.name for path in GOLDENS.glob("*/flax_model.msgpack"))
TOKENS = np.array([[5, 6, 7, 8], [3, 4, 5, 6]], np.int32)
MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.fixture(scope="module")
def gpt2():
    return fm.load(GOLDENS / "gpt2")


def same(a, b):
    """Whether two trees are equal bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_trees_are_those_of_the_flax_classes(name):
    params, config = fm.load(GOLDENS / name)
    theirs = serialization.msgpack_restore((GOLDENS / name / "flax_model.msgpack").read_bytes())
    ours = ix.to_flax(params, config)
    assert same(ours, theirs)
    assert list(ours) == list(theirs)
    assert same(ix.from_flax(theirs, config), params)
    assert same(ix.from_flax({"params": ours}, config), params)


def test_experts_are_no_repetitions_of_each_other(case):
    loaded = case("mixtral/causal-lm")
    assert same(ix.from_flax(ix.to_flax(loaded.params, loaded.config), loaded.config), loaded.params)


def test_to_flax_takes_lists_and_tracers(gpt2):
    params, config = gpt2
    want = ix.to_flax(params, config)
    assert same(ix.to_flax(fm.unstack_layers(params), config), want)
    assert same(jax.jit(lambda params: ix.to_flax(params, config))(params), want)


def test_trees_that_do_not_fit(gpt2):
    params, config = gpt2
    tree = ix.to_flax(params, config)
    with pytest.raises(TypeError, match="expected nested dicts of arrays, got list at 'transformer'"):
        ix.from_flax({"transformer": [1]}, config)
    with pytest.raises(ValueError, match="has shape"):
        ix.from_flax(tree, dataclasses.replace(config, hidden_size=12))
    with pytest.raises(ValueError, match=r"missing 'transformer\.ln_f\.weight'"):
        ix.from_flax({"transformer": {k: v for k, v in tree["transformer"].items() if k != "ln_f"}}, config)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    with pytest.raises(ValueError, match="arrays have 64 bits"):
        ix.from_flax(wide, config)


def test_a_tied_head_that_differs():
    params, config = fm.load(GOLDENS / "llama")
    tree, tied = ix.to_flax(params, config), dataclasses.replace(config, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"the config ties 'lm_head.weight'"):
        ix.from_flax(tree, tied)
    tree["lm_head"]["kernel"] = tree["model"]["embed_tokens"]["embedding"].T
    assert "lm_head" not in ix.from_flax(tree, tied)
    assert same(ix.to_flax(ix.from_flax(tree, tied), tied), tree)


def test_linen_takes_the_tree_unchanged(gpt2):
    params, config = gpt2
    model = ix.LinenModel(config)
    want = fm.forward(params, config, TOKENS, mask=MASK)
    for tree in (params, fm.unstack_layers(params)):
        got = model.apply({"params": tree}, TOKENS, mask=MASK)
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-6, rtol=0)
    drawn = model.init(jax.random.key(0), TOKENS)["params"]
    fm.check(drawn, config)
    assert not same(drawn, model.init(jax.random.key(1), TOKENS)["params"])
    with pytest.raises(ValueError, match="got no parameters"):
        model.apply({}, TOKENS)
    less = fm.tree.remove(params, "embed.tokens", "final_norm.scale")
    with pytest.raises(ValueError, match=r"2 problems:\n  missing 'embed\.tokens'\n  missing 'final_norm\.scale'"):
        model.apply({"params": less}, TOKENS)
    with pytest.raises(ValueError, match=r"outside of jax\.jit, nnx\.jit"):
        nnx.jit(lambda module: module.generate(TOKENS))(ix.NNXModel(params, config))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def test_modules_train_as_the_tree_does(gpt2):
    params, config = gpt2
    optimizer = optax.sgd(0.1)

    @jax.jit
    def pure(params):
        return jax.value_and_grad(lambda p: loss_of(fm.forward(p, config, TOKENS).logits))(params)

    loss, gradient = pure(params)
    want = optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params))[0])

    linen = ix.LinenModel(config)
    state = train_state.TrainState.create(apply_fn=linen.apply, params=params, tx=optimizer)
    linen_gradient = jax.jit(jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, TOKENS).logits)))(state.params)
    state = state.apply_gradients(grads=linen_gradient)

    module = ix.NNXModel(params, config)
    tool = nnx.Optimizer(module, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(module, tool):
        found, gradient = nnx.value_and_grad(lambda module: loss_of(module(TOKENS).logits))(module)
        tool.update(module, gradient)
        return found

    np.testing.assert_allclose(step(module, tool), loss, rtol=1e-6)
    for tree in (state.params, module.params):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, want)
    assert not same(module.params, params)
    fm.check(params, config)  # which nobody changed or deleted


def test_nnx_splits_merges_and_generates(gpt2, tmp_path):
    params, config = gpt2
    module = ix.NNXModel(params, config)
    assert same(module.params, params)
    graph, state = nnx.split(module)
    doubled = nnx.merge(graph, jax.tree.map(lambda leaf: 2 * leaf, state))
    assert same(doubled.params, jax.tree.map(lambda leaf: 2 * leaf, params))
    prompt = TOKENS[:1]
    want = fm.generate(params, config, prompt, max_new_tokens=3)
    np.testing.assert_array_equal(module.generate(prompt, max_new_tokens=3).tokens, want.tokens)
    module.save_pretrained(tmp_path, format="flax")
    assert same(ix.NNXModel.from_pretrained(tmp_path).params, params)
    listed = ix.NNXModel(fm.unstack_layers(params), config)
    np.testing.assert_allclose(listed(TOKENS).logits, module(TOKENS).logits, atol=1e-6)


def test_buffers_are_no_parameters():
    module = ix.NNXModel(*fm.load(GOLDENS / "bart"))
    assert type(module.tree["lm_head"]["bias"]) is nnx.Variable
    assert type(module.tree["embed"]["tokens"]) is nnx.Param
    assert isinstance(jnp.asarray(module.params["lm_head"]["bias"]), jax.Array)
