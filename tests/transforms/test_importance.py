from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from tests.transforms.tiny import make, to_numpy


def loss_of(config):
    def loss(params, tokens):
        logits = jax.nn.log_softmax(fm.forward(params, config, tokens).logits[:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    return loss


BATCHES = [jnp.array([[1, 5, 9, 2], [3, 3, 7, 8]], jnp.int32), jnp.array([[4, 0, 6, 11], [9, 10, 2, 1]], jnp.int32)]


def test_equals_the_definition_on_transformers(tmp_path):
    """|Σ Attₕᵀ ∂L/∂Attₕ|, with the heads' outputs and their gradients caught at the input of GPT-2's `c_proj`."""
    torch.manual_seed(0)
    hf = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=13, n_positions=8, bos_token_id=1,
                                 eos_token_id=1, initializer_range=0.3)  # fmt: skip
    model = transformers.GPT2LMHeadModel(hf).eval()
    model.save_pretrained(tmp_path)
    caught = []
    for block in model.transformer.h:
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: (caught.append(args[0]), args[0].retain_grad())[0])
    want = np.zeros((2, 4))
    for batch in BATCHES:
        caught.clear()
        tokens = torch.tensor(np.asarray(batch)).long()
        model(tokens, labels=tokens).loss.backward()
        for layer, x in enumerate(caught):
            want[layer] += (x * x.grad).reshape(*x.shape[:2], 4, 4).sum((0, 1, 3)).abs().detach().numpy() / len(BATCHES)
    params, config = fm.load(tmp_path)
    got = fm.head_importance(params, config, loss_of(config), iter(BATCHES))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_forms_of_trees():
    """With a loss that is linear in what heads write, the importance is |sum| of each head's weights."""
    params, config = make("gpt2")
    params = to_numpy(params)

    def loss(params, batch):
        written = [leaf for path, leaf in fm.tree.flatten(params).items() if "output.weight" in path]
        return batch * sum(leaf.astype(jnp.float32).sum() for leaf in written)

    batches = [np.float32(1), np.float32(-3)]
    want = 2 * np.abs(params["layers"]["attention"]["output"]["weight"].sum((1, 3)))
    for tree in (params, fm.unstack_layers(params)):
        np.testing.assert_allclose(fm.head_importance(tree, config, loss, batches), want, rtol=1e-5)
    scaled = fm.head_importance(params, config, loss, batches, normalize=True)
    np.testing.assert_allclose(scaled, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-5)
    ragged, new = fm.prune_heads(params, config, {0: [1, 3], 2: [0]})
    rows = fm.head_importance(ragged, new, loss, batches)
    assert isinstance(rows, tuple)
    for row, full, kept in zip(rows, want, ([0, 2], [0, 1, 2, 3], [1, 2, 3]), strict=True):
        np.testing.assert_allclose(row, full[kept], rtol=1e-5)
    half = fm.head_importance(fm.cast(params, "bfloat16"), config, loss, batches)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, want, rtol=0.1, atol=0.05)


def test_what_cannot_be_measured():
    params, config = make("gpt2")
    with pytest.raises(ValueError, match=r"^head_importance: there are no batches"):
        fm.head_importance(params, config, loss_of(config), [])
    with pytest.raises(ValueError, match=r"expected a loss that is one number, got shape \(3,\)"):
        fm.head_importance(params, config, lambda params, batch: jnp.ones(3), BATCHES)
    with pytest.raises(ValueError, match=r"^scale_heads: "):
        fm.head_importance(
            params, dataclasses.replace(config, num_layers=2), lambda params, batch: jnp.zeros(()), BATCHES
        )


SCORES = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 9, 9, 9, 9, 9, 9], [8, 7, 6, 5, 4, 3, 2, 1]], np.float32)


def config_of(heads, groups, pruned=()):
    return dataclasses.replace(make("llama")[1], num_heads=heads, num_kv_heads=groups, pruned_heads=pruned)


def test_least_important_heads_first():
    config = config_of(8, 8)
    assert fm.least_important_heads(SCORES, config, 0) == {}
    assert fm.least_important_heads(SCORES, config, 3) == {0: [0], 1: [1], 2: [7]}
    most = fm.least_important_heads(SCORES, config, 21)
    assert {layer: len(gone) for layer, gone in most.items()} == {0: 7, 1: 7, 2: 7}
    with pytest.raises(
        ValueError, match=r"cannot choose 22 heads and leave some in each layer; the nearest is count=21"
    ):
        fm.least_important_heads(SCORES, config, 22)


def test_groups_go_as_a_whole():
    config = config_of(8, 4)
    assert fm.least_important_heads(SCORES, config, 4) == {0: [0, 1], 2: [6, 7]}
    assert fm.least_important_heads(tuple(SCORES), config, 18) == {0: [*range(6)], 1: [*range(6)], 2: [*range(2, 8)]}
    with pytest.raises(ValueError, match=r"cannot choose 3 heads in whole groups of 2 heads .* nearest is count=2"):
        fm.least_important_heads(SCORES, config, 3)


def test_after_pruning_heads_keep_their_numbers():
    config = config_of(8, 4, ((0, (0, 1)), (1, (0, 2, 4, 6))))
    rows = (SCORES[0, 2:], SCORES[1, 1::2], SCORES[2])
    assert fm.least_important_heads(rows, config, 1) == {1: [1]}
    assert fm.least_important_heads(rows, config, 6) == {0: [2, 3], 1: [1, 3], 2: [6, 7]}  # one more pair does not fit
    assert fm.least_important_heads(rows, config, 7) == {0: [2, 3], 1: [1], 2: [4, 5, 6, 7]}


def test_importance_that_does_not_fit():
    config = config_of(8, 4)
    with pytest.raises(ValueError, match=r"the heads \[8, 8, 8\] that the config has left"):
        fm.least_important_heads(SCORES[:2], config, 2)
    with pytest.raises(ValueError, match=r"importance has NaN"):
        fm.least_important_heads(SCORES * np.nan, config, 2)
    with pytest.raises(ValueError, match=r"cannot choose -1 heads"):
        fm.least_important_heads(SCORES, config, -1)
