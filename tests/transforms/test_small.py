"""cast, tie and untie, and the counts."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import fmodels as fm
from fmodels.arrays import Scaled
from tests.transforms import tiny
from tests.transforms.tiny import FAMILIES, assert_same, make, to_numpy


@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_cast_floating_leaves(layers):
    params = make("llama", layers)[0]
    params = {**params, "embed": {**params["embed"], "positions": jnp.arange(3, dtype=jnp.int32)}}
    half = fm.cast(params, "bfloat16")
    flat = fm.tree.flatten(half)
    assert flat.pop("embed.positions") is params["embed"]["positions"]
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("bfloat16")}
    assert_same(jax.jit(lambda tree: fm.cast(tree, jnp.bfloat16))(params), half)
    assert_same(fm.cast(to_numpy(params), jnp.bfloat16), to_numpy(half))
    back = fm.cast(half, np.float32)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(back["embed"]["tokens"], params["embed"]["tokens"], rtol=1e-2)


def test_cast_some_leaves_by_their_own_paths():
    seen = []
    for layers in ("stacked", "list"):
        params = make("bert", layers)[0]
        some = fm.cast(params, "float16", where=lambda path: seen.append(path) or "mlp.up" in path)
        for path, leaf in fm.tree.flatten(some).items():
            assert leaf.dtype == ("float16" if "mlp.up" in path else "float32")
        assert some["embed"]["tokens"] is params["embed"]["tokens"]
    assert {"layers.mlp.up.weight", "layers.2.mlp.up.weight"} <= set(seen)


def test_cast_shares_what_has_the_dtype_already():
    params = make("gpt2")[0]
    assert fm.cast(params, "float32")["embed"]["tokens"] is params["embed"]["tokens"]


def test_cast_of_quantised_leaves_casts_the_scale():
    leaf = Scaled(jnp.ones((2, 2), jnp.float8_e4m3fn), jnp.ones((2, 1)))
    half = fm.cast({"lm_head": {"weight": leaf}}, "bfloat16")["lm_head"]["weight"]
    assert (half.values.dtype, half.scale.dtype) == (jnp.float8_e4m3fn, jnp.bfloat16)


def test_cast_to_64_bits():
    params = make("gpt2")[0]
    with pytest.raises(ValueError, match=r"^cast: 'embed.positions' is a jax array, which cannot be float64; set"):
        fm.cast(params, "float64")
    wide = fm.cast(to_numpy(params), "float64")
    assert wide["embed"]["tokens"].dtype == np.float64


@pytest.mark.parametrize(
    ("dtype", "message"), [("int8", "expected a floating dtype, got int8"), ("half32", "'half32' is not a")]
)
def test_cast_to_what_is_no_floating_dtype(dtype, message):
    with pytest.raises(TypeError, match=rf"^cast: {message}"):
        fm.cast({"a": np.ones(2)}, dtype)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_untie_and_tie(family, tmp_path):
    params, config = make(family)
    untied, new = fm.untie(params, config)
    fm.check(untied, new)
    assert not new.tie_word_embeddings
    assert_same(untied["lm_head"]["weight"], params["embed"]["tokens"])
    assert untied["lm_head"]["weight"] is not params["embed"]["tokens"]
    np.testing.assert_array_equal(tiny.logits(untied, new), tiny.logits(params, config))
    tied, same = fm.tie(untied, new)
    assert same == config
    assert_same(tied, params)
    assert fm.untie(untied, new) == (untied, new)
    assert fm.tie(params, config)[1] is config
    fm.save(untied, new, tmp_path)
    again, read = fm.load(tmp_path)
    assert read == new
    assert_same(fm.to_disk(again, read), fm.to_disk(untied, new))  # BERT's file has its bias twice


def test_untie_copies_numpy_tables():
    params, config = make("gpt2")
    untied, _ = fm.untie(to_numpy(params), config)
    assert not np.shares_memory(untied["lm_head"]["weight"], untied["embed"]["tokens"])


def test_tie_keeps_the_bias_and_drops_the_spare_one():
    params, config = fm.untie(*make("bert"))
    spare = fm.tree.update(params, {"lm_head.spare_bias": params["lm_head"]["bias"] + 1})
    fm.check(spare, config)
    tied, config = fm.tie(spare, config)
    fm.check(tied, config)
    assert list(tied["lm_head"]) == ["bias"]


def test_tie_of_a_head_that_differs():
    params, config = make("llama")
    with pytest.raises(
        ValueError, match=r"^tie: 'lm_head.weight' differs by up to \S+ from 'embed.tokens'.*force=True"
    ):
        fm.tie(params, config)
    tied, new = fm.tie(params, config, force=True)
    fm.check(tied, new)
    np.testing.assert_array_equal(tied["embed"]["tokens"], params["embed"]["tokens"])
    half = fm.tree.update(params, {"lm_head.weight": params["embed"]["tokens"].astype(jnp.bfloat16)})
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' is bfloat16 \(37, 16\) and not float32 \(37, 16\) as 'embed"
    ):
        fm.tie(half, config)
    with pytest.raises(ValueError, match=r"cannot be compared under jit"):
        jax.jit(lambda tree: fm.tie(tree, config)[0])(params)
    assert "lm_head" not in jax.jit(lambda tree: fm.tie(tree, config, force=True)[0])(params)
    assert "lm_head" in jax.jit(lambda tree: fm.untie(tree, new)[0])(tied)


@pytest.mark.parametrize("function", [fm.tie, fm.untie])
def test_models_without_a_head(function):
    params, config = make("bert", task="base")
    with pytest.raises(ValueError, match=r"a model of task 'base' has no head over the vocabulary"):
        function(params, config)


HF = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=21, n_positions=12, bos_token_id=1,
                                eos_token_id=1)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=8,
                                 intermediate_size=12, vocab_size=21, tie_word_embeddings=False)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=12,
                                vocab_size=21, max_position_embeddings=12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_transformers(family, tmp_path):
    model = HF[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    params, _ = fm.load(tmp_path)
    for tree in (params, fm.unstack_layers(params)):
        for exclude in (False, True):
            assert fm.num_parameters(tree, exclude_embeddings=exclude) == model.num_parameters(
                exclude_embeddings=exclude
            )
        assert fm.memory_footprint(tree) == 4 * fm.num_parameters(tree)
        for tokens in (24, np.int64(24), (2, 12), [2, 12], jnp.zeros((2, 12), jnp.int32), jnp.asarray(24)):
            want = 6 * 24 * model.num_parameters(exclude_embeddings=True)
            assert fm.floating_point_ops(tree, tokens) == want
        want = 6 * 24 * model.num_parameters()
        assert fm.floating_point_ops(tree, 24, exclude_embeddings=False) == want


def test_counts_of_quantised_leaves():
    params = {"lm_head": {"weight": Scaled(jnp.ones((4, 6), jnp.int8), jnp.ones((4, 1)))}}
    assert fm.num_parameters(params) == 24
    assert fm.memory_footprint(params) == 24 + 16


@pytest.mark.parametrize(("tokens", "error"), [(2.5, TypeError), ("9", TypeError), (-1, ValueError), (None, TypeError)])
def test_counts_of_what_is_no_number_of_tokens(tokens, error):
    with pytest.raises(error, match=r"^floating_point_ops: expected"):
        fm.floating_point_ops({"a": np.ones(2)}, tokens)
