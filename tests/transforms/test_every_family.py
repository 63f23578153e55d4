"""Resizing, masking and pruning of every family, against transformers' own modules."""

import copy

import jax
import numpy as np
import pytest
import torch

import fmodels as fm
from fmodels.models import FAMILIES
from tests import families
from tests.families import LANGUAGE

UNPRUNED = {
    **dict.fromkeys(("t5", "mt5", "bart"), "an encoder or a decoder with layers of its own"),
    "mpnet": "mpnet has embed.distances for the heads of all layers together",
    "olmo2": "olmo2 norms queries and keys over all heads together",
}
"""Families whose heads do not go, and why."""


def test_every_family_is_here():
    assert LANGUAGE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", LANGUAGE.values(), ids=LANGUAGE)
def test_resized(case, name):
    """Old rows keep their bits, as in transformers, which computes the same with the new ones; smaller ones are its own."""
    loaded = case(name)
    for size in (67, 50):
        params, config = fm.resize_embeddings(loaded.params, loaded.config, size)
        ours = {key: np.asarray(a) for key, a in fm.to_disk(params, config, tied=True, module=True).items()}
        model = copy.deepcopy(loaded.model)
        model.resize_token_embeddings(size, mean_resizing=False)
        theirs = {key: a.numpy() for key, a in model.state_dict().items()}
        assert {key: a.shape for key, a in ours.items()} == {key: a.shape for key, a in theirs.items()}
        for key, a in theirs.items():
            same = tuple(slice(61) if n == 67 else slice(None) for n in a.shape)
            assert ours[key][same].tobytes() == a[same].tobytes(), key
        if size > 61:
            model.load_state_dict({key: torch.tensor(a) for key, a in ours.items()})
            given = {key: np.where(a > 50, a + 6, a) for key, a in loaded.inputs("right").items()}  # new ones too
            got = fm.forward(params, config, **{key: a for key, a in given.items() if key != "positions"})
            want = {"logits": families.reference(model, given)["logits"]}
            families.assert_equal(got, want, **loaded.masks("right"), causal=loaded.case.causal)


@pytest.mark.parametrize("name", LANGUAGE.values(), ids=LANGUAGE)
def test_masked_and_pruned(case, name):
    """What transformers computes when the first head, or group, of a layer gives nothing to its output projection."""
    loaded = case(name)
    layers, heads, family = loaded.config.num_layers, loaded.config.num_heads, loaded.case.family
    gone = list(range(heads // loaded.config.num_kv_heads))
    where = dict.fromkeys(range(layers) if family == "albert" else (0, layers - 1), gone)
    if family in UNPRUNED:
        with pytest.raises(NotImplementedError, match=UNPRUNED[family]):
            fm.prune_heads(loaded.params, loaded.config, where)
    if loaded.case.pair:
        return
    trees = [(fm.mask_heads(loaded.params, loaded.config, where), loaded.config)]
    if family not in UNPRUNED:
        trees.append(fm.prune_heads(loaded.params, loaded.config, where))

    model = copy.deepcopy(loaded.model)
    for layer in where:
        module = output_projection(model, loaded.unstacked["layers"][layer]["attention"]["output"]["weight"])
        module.register_forward_pre_hook(lambda _, x: silenced(x, heads, gone))
    want = families.reference(model, loaded.inputs("right"))
    want = {key: a for key, a in want.items() if key in ("logits", "hidden_states")}
    for params, config in trees:
        got = loaded.forward("right", params=params, config=config, attentions=False)
        families.assert_equal(got, want, **loaded.masks("right"), causal=loaded.case.causal)


def output_projection(model: torch.nn.Module, weight: jax.Array) -> torch.nn.Module:
    """The module with this weight `(d h k)`."""
    flat = np.asarray(weight).reshape(weight.shape[0], -1)
    for module in model.modules():
        own = getattr(module, "weight", None)
        if own is not None and any(np.array_equal(a, flat) for a in (own.detach().numpy(), own.detach().numpy().T)):
            return module
    raise AssertionError("no module has this weight")


def silenced(inputs: tuple[torch.Tensor, ...], heads: int, gone: list[int]) -> tuple[torch.Tensor]:
    """The contexts of heads `(b t h·k)` with those of some of them zero."""
    x = inputs[0].clone().unflatten(-1, (heads, -1))
    x[..., gone, :] = 0
    return (x.flatten(-2),)
