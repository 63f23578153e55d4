"""Experts: both ways to run them, the loss of routers, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmodels as fm
from fmodels.arrays import Scaled
from fmodels.models import FAMILIES
from fmodels.nn import experts
from tests import families

LANGUAGE = [
    c.name for c in families.CASES if hasattr(FAMILIES[c.family].config, "num_experts") and c.task == "causal-lm"
]


@pytest.mark.parametrize("how", list(experts.HOW))
@pytest.mark.parametrize("name", LANGUAGE)
def test_both_ways_give_the_numbers_of_transformers(case, name, how):
    loaded = case(name)
    for params in (loaded.params, loaded.unstacked):
        got = loaded.forward("left", params=params, experts=how)
        families.assert_equal(got, loaded.reference("left"), **loaded.masks("left"), causal=True)


@pytest.mark.parametrize("name", LANGUAGE)
def test_both_ways_have_the_same_gradients(case, name):
    loaded = case(name)

    def loss(params, how):
        return loaded.forward(params=params, experts=how).logits.std()

    one, two = (jax.jit(jax.grad(loss), static_argnums=1)(loaded.params, how) for how in experts.HOW)
    for path, leaf in fm.tree.flatten(one).items():
        assert np.abs(leaf - fm.tree.get(two, path)).max() < 1e-5, path


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    "name", [n for n in LANGUAGE if n.split("/")[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")]
)
def test_loss_of_routers(case, name, padding):
    loaded = case(name)
    given = {n: torch.tensor(a, dtype=torch.long) for n, a in loaded.inputs(padding).items()}
    with torch.no_grad():
        want = loaded.model(given["tokens"], attention_mask=given["mask"], output_router_logits=True).aux_loss
    logits = loaded.forward(padding).router_logits
    got = fm.load_balancing_loss(logits, loaded.config.num_experts_per_token, jnp.asarray(given["mask"].numpy()))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    if padding is None:
        assert float(got) == pytest.approx(float(fm.load_balancing_loss(logits, loaded.config.num_experts_per_token)))


@pytest.mark.parametrize("how", list(experts.HOW))
def test_array_like_leaves(case, how):
    loaded = case("qwen2_moe/causal-lm")
    quantized = jax.tree.map(lambda a: Scaled.quantize(a) if a.ndim == 4 else a, loaded.params["layers"]["moe"])
    plain = jax.tree.map(
        lambda a: a.dequantize() if isinstance(a, Scaled) else a, quantized, is_leaf=lambda a: isinstance(a, Scaled)
    )
    one, two = (
        loaded.forward(params={**loaded.params, "layers": {**loaded.params["layers"], "moe": moe}}, experts=how).logits
        for moe in (quantized, plain)
    )
    assert np.abs(one - two).max() < 1e-5


@pytest.mark.parametrize("how", list(experts.HOW))
def test_bfloat16_experts(case, how):
    loaded = case("mixtral/causal-lm")
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loaded.params)
    out = loaded.forward(params=params, experts=how)
    assert out.hidden.dtype == jnp.bfloat16
    assert np.median(np.abs(np.asarray(out.logits) - loaded.reference()["logits"])) < 0.1


def test_per_example_gradients_of_dense_experts(case):
    loaded = case("mixtral/causal-lm")
    tokens = loaded.inputs()["tokens"]
    loss = lambda p, t: jnp.std(fm.forward(p, loaded.config, t[None], experts="dense").logits)  # noqa: E731
    rows = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(loaded.params, tokens)
    alone = jax.grad(loss)(loaded.params, tokens[1])
    for path, leaf in fm.tree.flatten(alone).items():
        assert np.abs(fm.tree.get(rows, path)[1] - leaf).max() < 1e-5, path


def test_what_is_refused(case):
    loaded, llama = case("mixtral/causal-lm"), case("llama/causal-lm")
    tokens = loaded.inputs()["tokens"]
    with pytest.raises(ValueError, match="experts='sparse' is not a way to run experts; one of grouped, dense"):
        fm.forward(loaded.params, loaded.config, tokens, experts="sparse")
    with pytest.raises(ValueError, match="llama has no experts"):
        fm.forward(llama.params, llama.config, tokens, experts="dense")
    with pytest.raises(ValueError, match="llama has no experts"):
        fm.forward(llama.params, llama.config, tokens, router_logits=True)
    with pytest.raises(ValueError, match="num_experts_per_token=6 of num_experts=5"):
        dataclasses.replace(loaded.config, num_experts_per_token=6)


def test_experts_have_letters_of_their_own():
    config = fm.models.qwen2_moe.Config()
    specs = fm.partition_specs(fm.abstract(config), {"x": "experts", "f": "model"})["layers"]["moe"]
    assert specs["gate"]["weight"] == jax.sharding.PartitionSpec(None, "experts", "model", None)
    assert specs["down"]["weight"] == jax.sharding.PartitionSpec(None, "experts", None, "model")
    assert specs["shared"]["up"]["weight"] == jax.sharding.PartitionSpec(None, "model", None)
    mixtral = fm.models.mixtral.Config(num_layers=1)
    fewer = fm.tree.map_leaves(
        lambda path, leaf: jax.ShapeDtypeStruct(tuple(7 if n == 14336 else n for n in leaf.shape), leaf.dtype),
        fm.abstract(mixtral),
    )
    assert fm.match_config(fewer, mixtral) == dataclasses.replace(mixtral, intermediate_size=7)
