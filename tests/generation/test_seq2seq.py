"""Encoder-decoder models against transformers 5: T5 in its forms, mT5, BART."""

import jax
import numpy as np
import pytest
import torch
import transformers as hf

import fmodels as fm
from interop.transformers import from_transformers

VOCAB = 61
T5 = {
    "vocab_size": VOCAB, "d_model": 24, "d_kv": 10, "d_ff": 37, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0, "pad_token_id": 0,
    "eos_token_id": [1, 7],
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 41, "max_position_embeddings": 48,
    "decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": [2, 7], "forced_eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-v1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model, *from_transformers(model)


def texts(seed=0, batch=3, width=9):
    random = np.random.default_rng(seed)
    mask = np.arange(width)[None] < (width - 2 * np.arange(batch))[:, None]
    return np.where(mask, random.integers(10, VOCAB, (batch, width)), 3), mask.astype(np.int64)


GIVEN = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    {"forced_bos_token_id": 12, "min_new_tokens": 6},
    {"num_beams": 3, "num_return_sequences": 2},
]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given) or "greedy")
def test_tokens_equal_transformers(pair, given):
    model, params, config = pair
    tokens, mask = texts()
    want = model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=15, do_sample=False, **given
    ).numpy()
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=15, options=fm.GenerationConfig(**given))
    np.testing.assert_array_equal(got.tokens, want)
    listed = fm.generate(
        fm.unstack_layers(params), config, tokens, mask=mask, max_new_tokens=15, options=fm.GenerationConfig(**given)
    )
    np.testing.assert_array_equal(listed.tokens, want)


def test_decoder_prompts_equal_transformers(pair):
    model, params, config = pair
    tokens, mask = texts(1, batch=2)
    for first in (
        np.array([[15, 16, 17], [20, 21, 22]]),
        np.array([[config.decoder_start_token_id, 16], [config.decoder_start_token_id, 22]]),
    ):
        want = model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(first), max_new_tokens=8,
            do_sample=False,
        ).numpy()  # fmt: skip
        got = fm.generate(params, config, tokens, mask=mask, decoder_tokens=first, max_new_tokens=8)
        np.testing.assert_array_equal(got.tokens, want)


def test_many_and_streams_equal_generate(pair):
    _, params, config = pair
    tokens, mask = texts(2, batch=3)
    options, key = fm.GenerationConfig(do_sample=True, temperature=1.5), jax.random.key(2)
    whole = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9, options=options, key=key)
    steps = np.stack(list(fm.stream(params, config, tokens, mask=mask, max_new_tokens=9, options=options, key=key)), 1)
    np.testing.assert_array_equal(steps, whole.tokens[:, 1:])
    rows = [row[m == 1].tolist() for row, m in zip(tokens, mask, strict=True)]
    many = fm.generate_many(params, config, rows, max_new_tokens=9, options=options, key=key, batch_size=2)
    for row, length, one in zip(np.asarray(whole.tokens), np.asarray(whole.lengths), many, strict=True):
        np.testing.assert_array_equal(row[1 : 1 + length], one.tokens)


def test_what_does_not_fit_is_refused(pair):
    _, params, config = pair
    with pytest.raises(ValueError, match="decoder_tokens have 1 rows"):
        fm.generate(params, config, texts()[0], decoder_tokens=[[5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="vocabulary"):
        fm.generate(params, config, [[VOCAB]], max_new_tokens=2)
