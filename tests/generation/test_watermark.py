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


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3]], ids=str)
def test_speculation_bears_the_mark(gpt2, settings):
    """The text of transformers, which guesses one row at a time."""
    model, params, config = gpt2
    tokens = np.tile(np.random.default_rng(4).integers(10, 97, (2, 4)), 3)
    options = fm.GenerationConfig(watermarking_config=settings, prompt_lookup_num_tokens=3)
    got = fm.generate(params, config, tokens, max_new_tokens=20, options=options)
    for row, count, text in zip(tokens, np.asarray(got.lengths), np.asarray(got.tokens), strict=True):
        want = model.generate(
            torch.tensor(row[None]), attention_mask=torch.ones((1, 12), dtype=torch.long), max_new_tokens=20, do_sample=False,
            watermarking_config=hf.WatermarkingConfig(**settings), prompt_lookup_num_tokens=3,
        )  # fmt: skip
        np.testing.assert_array_equal(text[: 12 + count], want[0])


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


SYNTHID = [
    {"ngram_len": 5, "keys": [654, 400, 836, 123, 340, 443, 597, 160, 57]},
    {"ngram_len": 2, "keys": [-7, 2**62, 5], "sampling_table_size": 1000, "sampling_table_seed": 9, "context_history_size": 2},
    {"ngram_len": 3, "keys": [1, 2], "sampling_table_size": 12345, "skip_first_ngram_calls": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SYNTHID, ids=str)
def test_synthid_is_that_of_transformers(settings):
    """Bits, and contexts that were there before, on texts that repeat themselves and on tokens of a large vocabulary."""
    processor = hf.SynthIDTextWatermarkingConfig(**settings).construct_processor(97, "cpu")
    random = np.random.default_rng(0)
    for tokens in (random.integers(0, 3, (4, 40)), random.integers(0, 262144, (3, 30))):
        want = processor.compute_g_values(torch.tensor(tokens)).numpy()
        np.testing.assert_array_equal(fm.SynthID(**settings).bits(tokens), want)
        fresh = processor.compute_context_repetition_mask(torch.tensor(tokens)).numpy()
        np.testing.assert_array_equal(fm.SynthID(**settings).fresh(tokens), fresh)
        found = fm.detect_watermark(tokens, settings)
        np.testing.assert_array_equal(found.num_green_tokens, (want * fresh[:, :, None]).sum((1, 2)))
        np.testing.assert_array_equal(found.num_tokens_scored, fresh.sum(1) * len(settings["keys"]))


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2, "renormalize_logits": True}], ids=str)
@pytest.mark.parametrize("settings", SYNTHID, ids=str)
def test_synthid_text_equals_transformers(gpt2, settings, more):
    model, params, config = gpt2
    tokens = np.random.default_rng(0).integers(10, 97, (2, 7))
    want = model.generate(
        torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), max_new_tokens=24, do_sample=False,
        watermarking_config=hf.SynthIDTextWatermarkingConfig(**settings), return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip
    options = fm.GenerationConfig(watermarking_config=settings, output_scores=True, **more)
    got = fm.generate(params, config, tokens, max_new_tokens=24, options=options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    alive = np.arange(24)[None] < np.asarray(got.lengths)[:, None]
    ours, theirs = np.asarray(got.outputs["scores"])[alive], np.stack(want.scores, 1)[alive]
    dropped = theirs < -1e30
    np.testing.assert_array_equal(np.isneginf(ours), dropped)
    np.testing.assert_allclose(ours[~dropped], theirs[~dropped], atol=2e-4)


def test_synthid_with_speculation(gpt2):
    """The text of transformers without guesses; its own remembers guesses that did not hold."""
    model, params, config = gpt2
    tokens = np.random.default_rng(0).integers(10, 97, (2, 7))
    want = model.generate(
        torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), max_new_tokens=20, do_sample=False,
        watermarking_config=hf.SynthIDTextWatermarkingConfig(**SYNTHID[0]),
    )  # fmt: skip
    options = fm.GenerationConfig(watermarking_config=SYNTHID[0], num_assistant_tokens=4)
    noisy = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    got = fm.generate(params, config, tokens, max_new_tokens=20, options=options, draft=(noisy, config))
    np.testing.assert_array_equal(got.tokens, want)
    assert 3 < np.asarray(got.outputs["calls"]).max() < 18  # some guesses hold, some do not
    drawn = {"do_sample": True, "top_k": 0, "watermarking_config": SYNTHID[0]}
    plain, guessed = (
        fm.generate(
            params,
            config,
            tokens,
            max_new_tokens=20,
            options=fm.GenerationConfig(**drawn, **more),
            key=jax.random.key(1),
        )
        for more in ({}, {"prompt_lookup_num_tokens": 3})
    )
    np.testing.assert_array_equal(plain.tokens, guessed.tokens)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 20, "top_p": 0.9, "temperature": 0.7}], ids=str)
def test_synthid_draws_from_what_transformers_draws_from(gpt2, cuts):
    """The log-probabilities of drawn tokens are those of transformers' functions on the same text."""
    model, params, config = gpt2
    tokens = np.random.default_rng(3).integers(10, 97, (4, 7))
    options = fm.GenerationConfig(do_sample=True, watermarking_config=SYNTHID[0], **({"top_k": 0} | cuts))
    got = fm.generate(params, config, tokens, max_new_tokens=16, options=options, key=jax.random.key(1))
    text = torch.tensor(np.asarray(got.tokens), dtype=torch.long)
    with torch.no_grad():
        logits = model(text).logits
    rules = [
        *([hf.TemperatureLogitsWarper(cuts["temperature"]), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9)] if cuts else []),
        hf.SynthIDTextWatermarkingConfig(**SYNTHID[0]).construct_processor(97, "cpu"),
    ]  # fmt: skip
    for i in range(16):
        scores = logits[:, 6 + i]
        for rule in rules:
            scores = rule(text[:, : 7 + i], scores)
        alive = i < np.asarray(got.lengths)
        want = torch.log_softmax(scores, -1)[torch.arange(4), text[:, 7 + i]].numpy()
        np.testing.assert_allclose(np.asarray(got.logprobs)[alive, i], want[alive], atol=2e-4)


def test_synthid_text_is_detected_and_plain_text_is_not(gpt2):
    _, params, config = gpt2
    tokens = np.random.default_rng(1).integers(10, 97, (6, 5))
    free = {"eos_token_id": [96], "do_sample": True, "top_k": 0, "min_new_tokens": 40}
    plain, marked = (
        fm.generate(
            params, config, tokens, max_new_tokens=40, key=jax.random.key(0), options=fm.GenerationConfig(**free, **more)
        ).tokens[:, 5:]
        for more in ({}, {"watermarking_config": SYNTHID[0]})
    )  # fmt: skip
    assert fm.detect_watermark(marked, SYNTHID[0]).prediction.mean() > 0.8
    assert fm.detect_watermark(plain, SYNTHID[0]).prediction.mean() < 0.2


def test_bad_settings(gpt2):
    _, params, config = gpt2
    synthid = {"ngram_len": 5, "keys": [1]}
    for settings, error, says in (
        ({"greenlist_ratio": 1.5}, ValueError, "greenlist_ratio"),
        ({"seeding_scheme": "none"}, ValueError, "seeding_scheme"),
        ({"colour": "green"}, TypeError, "colour"),
        ({"ngram_len": 5}, TypeError, "keys"),
        (synthid | {"ngram_len": 1, "keys": [], "sampling_table_size": 2**25}, ValueError, "ngram_len.*keys.*sampling_table_size"),
        (synthid | {"debug_mode": True}, NotImplementedError, "debug_mode"),
    ):  # fmt: skip
        options = fm.GenerationConfig(watermarking_config=settings)
        with pytest.raises(error, match=says):
            fm.generate(params, config, [[5, 6]], max_new_tokens=2, options=options)
    options = fm.GenerationConfig(watermarking_config=synthid, num_beams=2)
    with pytest.raises(NotImplementedError, match=r"SynthID .* is not supported with beams"):
        fm.generate(params, config, [[5, 6]], max_new_tokens=2, options=options)
    options = fm.GenerationConfig(watermarking_config=synthid, penalty_alpha=0.5, top_k=3)
    with pytest.raises(NotImplementedError, match=r"watermarking_config is not supported with contrastive"):
        fm.generate(params, config, [[5, 6]], max_new_tokens=2, options=options)
    with pytest.raises(ValueError, match="give vocab_size"):
        fm.detect_watermark([[1, 2, 3]], {"bias": 2.0})
