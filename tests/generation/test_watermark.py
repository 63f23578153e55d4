"""Watermarks: the text of transformers 5, token for token, and what its detector says of it."""

import jax
import numpy as np
import pytest
import torch
import transformers as hf

import fmodels as fm
from interop.transformers import from_transformers


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    model = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, *from_transformers(model)


SETTINGS = [
    {"bias": 2.5},
    {"bias": 4.0, "greenlist_ratio": 0.5, "context_width": 3, "hashing_key": 12345},
    {"bias": 3.0, "seeding_scheme": "selfhash"},
    {"bias": 3.0, "seeding_scheme": "selfhash", "context_width": 2, "greenlist_ratio": 0.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_text_and_detector_equal_transformers(gpt2, settings):
    model, params, config = gpt2
    tokens = np.random.default_rng(0).integers(10, 97, (2, 7))
    watermark = hf.WatermarkingConfig(**settings)
    want = model.generate(
        torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), max_new_tokens=24, do_sample=False,
        watermarking_config=watermark,
    ).numpy()  # fmt: skip
    got = fm.generate(
        params, config, tokens, max_new_tokens=24, options=fm.GenerationConfig(watermarking_config=settings)
    )
    np.testing.assert_array_equal(got.tokens, want)
    for ignore in (False, True):
        theirs = hf.WatermarkDetector(model.config, "cpu", watermark, ignore_repeated_ngrams=ignore)(
            torch.tensor(want[:, 7:]), return_dict=True
        )
        ours = fm.detect_watermark(want[:, 7:], settings, vocab_size=97, bos_token_id=1, ignore_repeated_ngrams=ignore)
        np.testing.assert_array_equal(ours.num_green_tokens, theirs.num_green_tokens)
        np.testing.assert_array_equal(ours.num_tokens_scored, theirs.num_tokens_scored)
        np.testing.assert_allclose(ours.z_score, theirs.z_score)
        np.testing.assert_allclose(ours.p_value, theirs.p_value, atol=1e-6)
        np.testing.assert_array_equal(ours.prediction, theirs.prediction)


@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=str)
def test_beams_bear_the_mark(gpt2, settings):
    model, params, config = gpt2
    tokens = np.random.default_rng(2).integers(10, 97, (2, 7))
    more = {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "length_penalty": 0.5}
    want = model.generate(
        torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), max_new_tokens=16, do_sample=False,
        watermarking_config=hf.WatermarkingConfig(**settings), return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip
    options = fm.GenerationConfig(watermarking_config=settings, **more)
    got = fm.generate(params, config, tokens, max_new_tokens=16, options=options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    np.testing.assert_allclose(got.sequence_scores, want.sequences_scores, rtol=1e-4, atol=1e-4)


def test_sampled_text_is_detected_and_plain_text_is_not(gpt2):
    _, params, config = gpt2
    tokens = np.random.default_rng(1).integers(10, 97, (6, 5))
    free = {"eos_token_id": [96], "do_sample": True, "top_k": 60, "min_new_tokens": 40}
    plain, marked = (
        fm.generate(
            params,
            config,
            tokens,
            max_new_tokens=40,
            key=jax.random.key(0),
            options=fm.GenerationConfig(**free, **more),
        ).tokens[:, 5:]
        for more in ({}, {"watermarking_config": {"bias": 5.0}})
    )
    assert fm.detect_watermark(marked, fm.Watermark(bias=5.0), vocab_size=97).prediction.mean() > 0.8
    assert fm.detect_watermark(plain, fm.Watermark(bias=5.0), vocab_size=97).prediction.mean() < 0.2


def test_bad_settings():
    for settings, error, says in (
        ({"greenlist_ratio": 1.5}, ValueError, "greenlist_ratio"),
        ({"seeding_scheme": "none"}, ValueError, "seeding_scheme"),
        ({"ngram_len": 5, "keys": [1]}, NotImplementedError, "SynthID"),
        ({"colour": "green"}, TypeError, "colour"),
    ):
        with pytest.raises(error, match=says):
            fm.Watermark.from_hf(settings)
