from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import fmodels as fm
from fmodels.arrays import Scaled
from tests.transforms import tiny
from tests.transforms.tiny import assert_same, make, to_numpy

COMMON = {"vocab_size": 40, "initializer_range": 0.5}
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
HF = {
    "gpt2": lambda tied: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=1, eos_token_id=1, tie_word_embeddings=tied,
            **COMMON,
        )
    ),
    "llama": lambda tied: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(max_position_embeddings=16, tie_word_embeddings=tied, **SMALL, **COMMON)
    ),
    "bert": lambda tied: transformers.BertForMaskedLM(
        transformers.BertConfig(max_position_embeddings=16, tie_word_embeddings=tied, **SMALL, **COMMON)
    ),
}  # fmt: skip
PAIRS = {
    "t5": lambda tied: transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=1, num_heads=2, d_model=8, d_kv=4, d_ff=12, vocab_size=40)
    ),
    "bart": lambda tied: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, d_model=8,
            encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, vocab_size=40, init_std=0.5,
        )
    ),
}  # fmt: skip
CASES = [(family, tied) for family in HF for tied in (True, False)] + [(family, True) for family in PAIRS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def folder(request, tmp_path_factory):
    """A checkpoint saved by transformers, with biases moved off zero."""
    family, tied = request.param
    torch.manual_seed(0)
    model = (HF | PAIRS)[family](tied).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.shape == (1, 40):  # BART's bias of logits
                buffer += torch.randn_like(buffer)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def tensors(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", [{"new": 47}, {"new": 29}, {"new": 45, "pad": 16}, {"pad": 32}, {"pad": 8}, {}])
def test_like_transformers(folder, size):
    model = class_of(fm.load_config(folder)).from_pretrained(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(size.get("new"), pad_to_multiple_of=size.get("pad"))
    params, config = fm.load(folder)
    ours, new = fm.resize_embeddings(
        params, config, size.get("new"), pad_to_multiple_of=size.get("pad"), key=jax.random.key(1)
    )
    fm.check(ours, new)
    assert new.vocab_size == model.config.vocab_size
    before, after = (fm.to_disk(p, c, tied=True, module=True) for p, c in ((params, config), (ours, new)))
    theirs = tensors(model)
    kept = min(config.vocab_size, new.vocab_size)
    if not config.tie_word_embeddings:  # transformers makes BERT's unused second bias the first one here
        after.pop("cls.predictions.bias", None)
    for name, tensor in after.items():
        want = theirs[name]
        assert tensor.shape == want.shape, name
        resized = before[name].shape != tensor.shape
        rows = kept if resized else None
        tensor, want = (np.asarray(x).T if name == "final_logits_bias" else np.asarray(x) for x in (tensor, want))
        np.testing.assert_array_equal(tensor[:rows], want[:rows], err_msg=name)
        if resized and name.endswith("bias") and config.tie_word_embeddings:
            np.testing.assert_array_equal(tensor, want, err_msg=name)
        elif resized:
            old = np.asarray(before[name])
            np.testing.assert_allclose(tensor[kept:], np.broadcast_to(old.mean(0), tensor[kept:].shape), atol=3e-4)
            np.testing.assert_allclose(tensor[kept:], want[kept:], atol=5e-4, err_msg=name)


def class_of(config):
    return getattr(transformers, config.ARCHITECTURES[config.task])


def test_transformers_loads_what_was_resized(folder, tmp_path):
    params, config = fm.load(folder)
    params, config = fm.resize_embeddings(params, config, 47)
    fm.save(params, config, tmp_path)
    model = class_of(config).from_pretrained(tmp_path).eval()
    tokens = jnp.array([[3, 46, 41, 7]], jnp.int32)
    theirs = torch.tensor(np.asarray(tokens))
    pair = config.is_encoder_decoder
    with torch.no_grad():
        want = model(theirs, **({"decoder_input_ids": theirs} if pair else {})).logits.numpy()
    got = fm.forward(params, config, tokens, **({"decoder_tokens": tokens} if pair else {})).logits
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "layers"), [("gpt2", "list"), ("bert", "stacked"), ("llama", "stacked")])
def test_old_logits_stay(family, layers):
    params, config = make(family, layers)
    longer, new = fm.resize_embeddings(params, config, 50)
    fm.check(longer, new)
    np.testing.assert_allclose(tiny.logits(longer, new)[..., :37], tiny.logits(params, config), rtol=1e-6, atol=1e-6)
    assert fm.tree.is_stacked(longer) == (layers == "stacked")


def table(params):
    return np.asarray(params["embed"]["tokens"])


def test_without_key_new_rows_are_the_mean():
    params, config = make("llama")
    longer, _ = fm.resize_embeddings(params, config, 40)
    for before, after in ((params["embed"]["tokens"], longer["embed"]["tokens"]),
                          (params["lm_head"]["weight"], longer["lm_head"]["weight"])):  # fmt: skip
        np.testing.assert_array_equal(after[:37], before)
        np.testing.assert_array_equal(after[37:], jnp.broadcast_to(before.mean(0), (3, 16)))


def test_new_rows_have_the_mean_and_covariance_of_transformers():
    draw = np.random.default_rng(0)
    mix = np.array([[2.0, 0, 0], [1.0, 1.0, 0], [-1.0, 0.5, 0.3]], np.float32)
    old = (draw.normal(size=(200, 3)).astype(np.float32) @ mix.T).astype(np.float32)
    config = make("gpt2")[1]
    params, _ = fm.resize_embeddings({"embed": {"tokens": old}}, config, 40200, key=jax.random.key(0))
    noise = (table(params)[200:] - old.mean(0, dtype=np.float64)) / np.sqrt(1e-9)
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(noise.T), np.cov(old.T, bias=True), rtol=0.05, atol=0.05)


def test_table_and_head_are_drawn_with_different_keys():
    params, config = make("llama", vocab_size=100, hidden_size=4)
    same = fm.tree.update(params, {"lm_head.weight": params["embed"]["tokens"]})
    longer, _ = fm.resize_embeddings(same, config, 104, key=jax.random.key(0))
    assert (table(longer)[100:] != np.asarray(longer["lm_head"]["weight"])[100:]).any()
    again, _ = fm.resize_embeddings(same, config, 104, key=jax.random.key(0))
    assert_same(again, longer)
    other, _ = fm.resize_embeddings(same, config, 104, key=jax.random.key(1))
    assert (table(other)[100:] != table(longer)[100:]).any()


@pytest.mark.parametrize(("rows", "dead"), [(8, False), (20, True)], ids=["v<=d", "singular"])
def test_singular_covariance_gives_the_mean(rows, dead):
    old = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
    if dead:
        old[:, 3] = 0.0
    params, _ = fm.resize_embeddings({"embed": {"tokens": old}}, make("gpt2")[1], rows + 4, key=jax.random.key(0))
    np.testing.assert_array_equal(table(params)[rows:], np.broadcast_to(np.asarray(jnp.mean(old, 0)), (4, 8)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float64"])
def test_computes_in_float32_and_keeps_dtype_and_numpy(dtype):
    old = np.random.default_rng(0).normal(300, 1, size=(50, 4)).astype(jnp.dtype(dtype))
    if dtype.startswith("float8"):
        old = np.random.default_rng(0).normal(3, 1, size=(50, 4)).astype(jnp.dtype(dtype))
    params, _ = fm.resize_embeddings({"embed": {"tokens": old}}, make("gpt2")[1], 53)
    new = params["embed"]["tokens"]
    assert isinstance(new, np.ndarray)
    assert new.dtype == old.dtype
    assert new[:50].tobytes() == old.tobytes()
    want = np.asarray(jnp.asarray(old, jnp.float32).mean(0)).astype(old.dtype)
    np.testing.assert_array_equal(new[50:], np.broadcast_to(want, (3, 4)))


def test_tied_bias_grows_by_zeros_and_untied_by_its_mean():
    tied, config = make("bert")
    assert "weight" not in tied["lm_head"]
    longer, _ = fm.resize_embeddings(tied, config, 40, key=jax.random.key(0))
    np.testing.assert_array_equal(longer["lm_head"]["bias"][37:], np.zeros(3))
    untied, config = make("bert", tie_word_embeddings=False)
    untied = fm.tree.update(untied, {"lm_head.spare_bias": untied["lm_head"]["bias"] + 1})
    fm.check(untied, config)
    for key in (None, jax.random.key(0)):
        longer, new = fm.resize_embeddings(untied, config, 40, key=key)
        fm.check(longer, new)
        for name in ("bias", "spare_bias"):
            old = untied["lm_head"][name]
            np.testing.assert_allclose(longer["lm_head"][name][37:], np.repeat(old.mean(), 3), rtol=1e-6)


def test_normal_and_zeros():
    params, config = make("bert", tie_word_embeddings=False)
    longer, new = fm.resize_embeddings(params, config, 2037, key=jax.random.key(0), init="normal")
    fresh = table(longer)[37:]
    assert abs(fresh.mean()) < 0.01
    assert abs(fresh.std() - config.initializer_range) < 0.01
    np.testing.assert_array_equal(longer["lm_head"]["bias"][37:], np.zeros(2000))
    zeros, _ = fm.resize_embeddings(params, config, 40, init="zeros")
    for path in ("embed.tokens", "lm_head.weight", "lm_head.bias"):
        assert not np.asarray(fm.tree.get(zeros, path))[37:].any()
    assert new.vocab_size == 2037


def test_same_size_returns_the_tree_itself():
    params, config = make("gpt2")
    assert fm.resize_embeddings(params, config, None) == (params, config)
    again, same = fm.resize_embeddings(params, config, 37)
    assert again is params
    assert same is config
    wrong = dataclasses.replace(config, vocab_size=99)
    again, right = fm.resize_embeddings(params, wrong, None)
    assert again is params
    assert right.vocab_size == 37


def test_padding_token_outside_is_forgotten():
    params, config = make("gpt2")
    config = dataclasses.replace(config, pad_token_id=30, eos_token_id=31)
    _, new = fm.resize_embeddings(params, config, 31)
    assert (new.pad_token_id, new.eos_token_id) == (30, 31)
    _, new = fm.resize_embeddings(params, config, 30)
    assert new.pad_token_id is None


def test_under_jit_equals_outside():
    params, config = make("bert", tie_word_embeddings=False)
    for options in ({"key": jax.random.key(0)}, {}):
        inside = jax.jit(lambda params, o=options: fm.resize_embeddings(params, config, 45, **o)[0])(params)
        outside, _ = fm.resize_embeddings(params, config, 45, **options)
        for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    traced = jax.jit(lambda key: fm.resize_embeddings(to_numpy(params), config, 45, key=key)[0])(jax.random.key(0))
    assert table(traced).shape == (45, 16)


def test_quantised_table_shrinks_and_does_not_grow():
    config = make("gpt2")[1]
    values = jnp.arange(12, dtype=jnp.int8).reshape(6, 2)
    for scale in (jnp.ones((6, 1)), jnp.ones((1, 2))):
        params = {"embed": {"tokens": Scaled(values, scale)}}
        small, new = fm.resize_embeddings(params, config, 4)
        np.testing.assert_array_equal(small["embed"]["tokens"].dequantize(), params["embed"]["tokens"].dequantize()[:4])
        assert new.vocab_size == 4
        with pytest.raises(NotImplementedError, match=r"'embed.tokens' is a Scaled, which cannot grow"):
            fm.resize_embeddings(params, config, 8)


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {}, ValueError, "expected new_size of at least 1, got 0"),
        (-3, {}, ValueError, "expected new_size of at least 1, got -3"),
        (3.0, {}, TypeError, "expected an integer new_size, got 3.0"),
        ("40", {}, TypeError, "expected an integer new_size, got '40'"),
        (True, {}, TypeError, "expected an integer new_size, got True"),
        (None, {"pad_to_multiple_of": 0}, ValueError, "expected pad_to_multiple_of of at least 1, got 0"),
        (40, {"pad_to_multiple_of": 1.5}, TypeError, "expected an integer pad_to_multiple_of, got 1.5"),
        (40, {"init": "median"}, ValueError, "init='median' is not one of 'mean', 'normal', 'zeros'"),
        (40, {"init": "normal"}, ValueError, "init='normal' needs a key"),
    ],
)
def test_wrong_arguments(size, options, error, message):
    params, config = make("gpt2")
    with pytest.raises(error, match=rf"^resize_embeddings: {message}"):
        fm.resize_embeddings(params, config, size, **options)


def test_wrong_trees():
    config = make("gpt2")[1]
    with pytest.raises(ValueError, match=r"no leaf that has it"):
        fm.resize_embeddings({"final_norm": {"scale": np.ones(4)}}, config, 5)
    odd = {"embed": {"tokens": np.ones((4, 2))}, "lm_head": {"weight": np.ones((5, 2))}}
    with pytest.raises(ValueError, match=r"'embed.tokens': 4, 'lm_head.weight': 5"):
        fm.resize_embeddings(odd, config, 5)
    with pytest.raises(TypeError, match=r"'embed.tokens' is int32, expected a floating dtype"):
        fm.resize_embeddings({"embed": {"tokens": jnp.ones((4, 2), jnp.int32)}}, config, 5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 20)))
def test_grow_and_shrink_back(size, multiple):
    params, config = make("bert", "list", tie_word_embeddings=False)
    params = to_numpy(params)
    other, new = fm.resize_embeddings(params, config, size, pad_to_multiple_of=multiple)
    assert new.vocab_size == table(other).shape[0] >= size
    assert new.vocab_size % (multiple or 1) == 0
    assert new.vocab_size - size < (multiple or 1)
    back, _ = fm.resize_embeddings(other, new, min(37, size))
    want, _ = fm.resize_embeddings(params, config, min(37, size))
    assert_same(back, want)
