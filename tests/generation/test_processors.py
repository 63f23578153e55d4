"""Logits functions against transformers 5's processors on the same logits, and in whole generations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers as hf

import fmodels as fm
from fmodels.generation import history as said
from fmodels.generation import logits as rules
from fmodels.generation.options import build, process
from fmodels.generation.sampling import Warp, cut, draw, gumbel, row_keys, warp_logits
from interop.transformers import from_transformers

VOCAB = 61


def random_logits(kind, batch=5, vocabulary=VOCAB, seed=1):
    scale = {"flat": 0.1, "plain": 2.0, "peaked": 12.0}[kind]
    return np.random.default_rng(seed).normal(0, scale, (batch, vocabulary)).astype(np.float32)


def off(batch, **on):
    neutral = {
        "temperature": 1.0,
        "top_h": 2.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
    }
    dtypes = {"top_k": np.int32}
    return Warp(**{
        name: jnp.asarray(np.broadcast_to(np.asarray(on.get(name, value), dtypes.get(name, np.float32)), (batch,)))
        for name, value in neutral.items()
    })  # fmt: skip


CUTS = {
    "top_h": (hf.TopHLogitsWarper, [0.1, 0.4, 0.7, 0.95, 0.99]),
    "top_k": (hf.TopKLogitsWarper, [1, 2, 7, 50, 61]),
    "top_p": (hf.TopPLogitsWarper, [0.01, 0.3, 0.7, 0.95, 1.0]),
    "min_p": (hf.MinPLogitsWarper, [0.0, 0.01, 0.1, 0.5, 1.0]),
    "typical_p": (hf.TypicalLogitsWarper, [0.05, 0.3, 0.6, 0.9, 0.99]),
    "epsilon_cutoff": (hf.EpsilonLogitsWarper, [0.001, 0.01, 0.05, 0.3, 0.9]),
    "eta_cutoff": (hf.EtaLogitsWarper, [0.001, 0.01, 0.05, 0.3, 0.9]),
}


@pytest.mark.parametrize("kind", ["flat", "plain", "peaked"])
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("keep", [1, 3])
def test_cuts_equal_transformers(kind, name, keep):
    """Every row has its own parameter, which transformers sees one at a time."""
    make, values = CUTS[name]
    if name == "top_h" and keep > 1:
        pytest.skip("transformers' top-h knows no least number of tokens")
    logits = random_logits(kind)
    dtype = np.int32 if name == "top_k" else np.float32
    got = cut(name, jnp.asarray(logits), jnp.asarray(np.array(values, dtype)), keep=keep)
    options = {} if keep == 1 else {"min_tokens_to_keep": keep}
    want = np.concatenate(
        [make(v, **options)(None, torch.tensor(row[None])).numpy() for v, row in zip(values, logits, strict=True)]
    )
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "plain", "peaked"])
def test_all_cuts_together_equal_transformers(kind):
    logits = random_logits(kind, 1)
    on = {
        "temperature": 1.3,
        "top_h": 0.9,
        "top_k": 30,
        "top_p": 0.93,
        "min_p": 0.01,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
    }
    got = warp_logits(jnp.asarray(logits), off(1, **on))
    want = torch.tensor(logits)
    for processor in (hf.TemperatureLogitsWarper(1.3), *(CUTS[name][0](on[name]) for name in CUTS)):
        want = processor(None, want)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want.numpy()))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("on", [
    {}, {"top_k": 40}, {"top_k": 400}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.2}, {"top_k": 300, "top_p": 0.9},
    {"typical_p": 0.5}, {"epsilon_cutoff": 1e-3, "top_k": 50}, {"top_h": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["flat", "plain", "peaked"])
def test_drawing_from_candidates_is_drawing_from_all(kind, on):
    """With a vocabulary larger than the candidates: tokens lie in the warped set, and their log-probabilities are its."""
    batch, vocabulary = 64, 1000
    logits = jnp.asarray(np.repeat(random_logits(kind, 1, vocabulary), batch, 0))
    warp = off(batch, **on)
    token, logprob = jax.jit(draw)(logits, warp, jax.random.key(3))
    whole = np.asarray(jax.nn.log_softmax(warp_logits(logits, warp), axis=-1))
    want = whole[np.arange(batch), np.asarray(token)]
    assert np.isfinite(want).all()
    np.testing.assert_allclose(logprob, want, atol=2e-5)
    # The noise belongs to the token, so a draw from all of the vocabulary takes the same token.
    noise = gumbel(row_keys(jax.random.key(3), batch), jnp.broadcast_to(jnp.arange(vocabulary), (batch, vocabulary)))
    np.testing.assert_array_equal(token, np.argmax(whole + np.asarray(noise), axis=-1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_noise_is_gumbel_noise(seed):
    """Of each token over the rows, of each row over the tokens, and of no token the same as of its neighbour or its row's."""
    rows, tokens = 300, 400
    noise = np.asarray(
        gumbel(row_keys(jax.random.key(seed), rows), jnp.broadcast_to(jnp.arange(tokens), (rows, tokens)))
    )
    assert scipy.stats.kstest(noise.ravel(), scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    for values in (noise, noise.T):
        levels = np.array([scipy.stats.kstest(line, scipy.stats.gumbel_r.cdf).pvalue for line in values])
        assert scipy.stats.kstest(levels, "uniform").pvalue > 1e-3
        correlations = np.corrcoef(values)[np.triu_indices(len(values), 1)] * np.sqrt(values.shape[1])
        assert abs(correlations.mean()) < 0.03
        assert abs(correlations.std() - 1) < 0.03
        assert abs(correlations).max() < 6


def histories(seed=0, batch=4, width=12, room=6, high=9, **options):
    """Rows of few different tokens, of different lengths, padded on the left, with a few new tokens."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, high, (batch, width)).astype(np.int32)
    start = random.integers(0, width - 6, batch)
    mask = np.arange(width)[None] >= start[:, None]
    history = said.begin(jnp.asarray(tokens), jnp.asarray(mask), VOCAB, room=room, pad=jnp.asarray(0), **options)
    new = random.integers(1, high, (batch, 3)).astype(np.int32)
    for column in new.T:
        history = said.append(history, jnp.asarray(column), jnp.ones(batch, bool))
    rows = [np.concatenate([t[m], n]) for t, m, n in zip(tokens, mask, new, strict=True)]
    return history, rows, [t[m] for t, m in zip(tokens, mask, strict=True)]


def by_row(processor, rows, logits):
    return np.concatenate(
        [
            processor(torch.tensor(row[None].astype(np.int64)), torch.tensor(x[None])).numpy()
            for row, x in zip(rows, logits, strict=True)
        ]
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram(seed, size):
    history, rows, _ = histories(seed, high=3, ngrams=True)
    logits = random_logits("plain", 4)
    got = rules.no_repeat_ngram(jnp.asarray(logits), history, jnp.full(4, size))
    np.testing.assert_array_equal(got, by_row(hf.NoRepeatNGramLogitsProcessor(size), rows, logits))
    assert np.isneginf(got).any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_encoder_no_repeat_ngram_and_penalty(size):
    random = np.random.default_rng(5)
    context = random.integers(1, 4, (4, 10)).astype(np.int32)
    history, rows, _ = histories(2, high=4, context=(jnp.asarray(context), jnp.ones(context.shape, bool)))
    logits = random_logits("plain", 4)
    got = rules.encoder_no_repeat_ngram(jnp.asarray(logits), history, jnp.full(4, size))
    want = np.concatenate([
        by_row(hf.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor(c[None].astype(np.int64))), [r], x[None])
        for c, r, x in zip(context, rows, logits, strict=True)
    ])  # fmt: skip
    np.testing.assert_array_equal(got, want)
    got = rules.encoder_repetition_penalty(jnp.asarray(logits), history, jnp.full(4, 1.7))
    want = np.concatenate([
        by_row(hf.EncoderRepetitionPenaltyLogitsProcessor(1.7, torch.tensor(c[None].astype(np.int64))), [r], x[None])
        for c, r, x in zip(context, rows, logits, strict=True)
    ])  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-6)


def options_of(rows, **given):
    config = fm.GenerationConfig(**given)
    return build([config] * rows, eos=[5, 6], pad=0, max_new_tokens=6, vocabulary=VOCAB, prompt=6)


@pytest.mark.parametrize("seed", range(3))
def test_sequence_bias_and_bad_words(seed):
    history, rows, _ = histories(seed, high=4)
    logits = random_logits("plain", 4)
    bias = {(3,): -2.0, (1, 2): 4.0, (2, 2, 3): 1.5, (1, 3): -7.0, (1,) * 3 + (7,): 9.0, (2,) * 15: 1.0}
    bias |= {(*map(int, row[-2:]), 11): 3.25 for row in rows[:2]}
    got = process(jnp.asarray(logits), history, options_of(4, sequence_bias=bias))
    want = by_row(hf.SequenceBiasLogitsProcessor([[list(k), v] for k, v in bias.items()]), rows, logits)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    words = [[3], [1, 2], [2, 2, 3], [5], [9, 5], [*map(int, rows[0][-1:]), 12]]
    got = process(jnp.asarray(logits), history, options_of(4, bad_words_ids=words))
    want = by_row(hf.NoBadWordsLogitsProcessor(words, torch.tensor([5, 6])), rows, logits)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_lengths_and_forced_tokens():
    history, rows, prompts = histories(1)
    logits = random_logits("plain", 4)
    eos = torch.tensor([5, 6])

    def check(got, processors):
        want = np.concatenate([
            by_row(make(len(prompt)), [row], x[None]) for make, prompt, row, x in zip(processors, prompts, rows, logits, strict=True)
        ])  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=1e-5)

    run = lambda **given: process(jnp.asarray(logits), history, options_of(4, **given))  # noqa: E731
    for least in (5, 11, 14):
        check(run(min_length=least), [lambda n, least=least: hf.MinLengthLogitsProcessor(least, eos, device="cpu")] * 4)
    for least in (2, 3, 4):
        check(
            run(min_new_tokens=least),
            [lambda n, least=least: hf.MinNewTokensLengthLogitsProcessor(n, least, eos, device="cpu")] * 4,
        )
    for start in (1, 3, 5):
        check(
            run(exponential_decay_length_penalty=(start, 1.4)),
            [lambda n, start=start: hf.ExponentialDecayLengthPenalty((start, 1.4), eos, n)] * 4,
        )
    check(run(suppress_tokens=[1, 9, 60]), [lambda n: hf.SuppressTokensLogitsProcessor([1, 9, 60], device="cpu")] * 4)
    check(
        run(forced_eos_token_id=[5, 6]),
        [lambda n: hf.ForcedEOSTokenLogitsProcessor(n + 6, torch.tensor([5, 6]), device="cpu")] * 4,
    )
    at_the_end = history
    for _ in range(2):
        at_the_end = said.append(at_the_end, jnp.ones(4, jnp.int32), jnp.ones(4, bool))
    forced = process(jnp.asarray(logits), at_the_end, options_of(4, forced_eos_token_id=5))
    np.testing.assert_array_equal(np.isneginf(forced), np.arange(VOCAB)[None] != np.full((4, 1), 5))


def test_invalid_values_are_removed():
    history, rows, _ = histories(1)
    logits = random_logits("plain", 4)
    logits[0, 3], logits[1, 4], logits[2, 5] = np.nan, np.inf, -np.inf
    got = process(jnp.asarray(logits), history, options_of(4, remove_invalid_values=True))
    want = by_row(hf.InfNanRemoveLogitsProcessor(), rows, logits)
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=64, attn_implementation="eager", pad_token_id=3,
            eos_token_id=[7, 9], bos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model = model.eval()
    return model, *from_transformers(model)


WHOLE = [
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_new_tokens": 8},
    {"bad_words_ids": [[12], [20, 21], [33]], "sequence_bias": {(14,): 3.0, (15, 16): 5.0}},
    {"encoder_repetition_penalty": 1.5, "min_length": 14},
    {"encoder_no_repeat_ngram_size": 1},
    {"suppress_tokens": [10, 11, 12, 13], "begin_suppress_tokens": [14, 15, 16, 17, 18, 19]},
    {"exponential_decay_length_penalty": (3, 1.5), "forced_eos_token_id": 7},
    {"guidance_scale": 1.8},
    {"remove_invalid_values": True, "renormalize_logits": True},
]


@pytest.mark.parametrize("given", WHOLE, ids=lambda given: "+".join(given))
def test_generations_equal_transformers(llama, given):
    model, params, config = llama
    tokens = np.random.default_rng(3).integers(10, VOCAB, (3, 8))
    common = {"max_new_tokens": 14, "do_sample": False}
    out = model.generate(
        torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_hidden_states=True, **common, **given,
    )  # fmt: skip
    got = fm.generate(
        params, config, tokens, max_new_tokens=14,
        options=fm.GenerationConfig(**given, output_scores=True, output_logits=True, output_hidden_states=True),
        top_logprobs=4,
    )  # fmt: skip
    np.testing.assert_array_equal(got.tokens, out.sequences.numpy())
    live = np.arange(out.sequences.shape[1] - 8)[None] < np.asarray(got.lengths)[:, None]
    scores, logits = (np.stack([x.numpy() for x in xs], 1) for xs in (out.scores, out.logits))
    if not given.get("guidance_scale"):  # ours are the guided ones
        np.testing.assert_allclose(np.asarray(got.outputs["logits"])[live], logits[live], atol=2e-5)
    if not given.get("guidance_scale") and not given.get("remove_invalid_values"):
        np.testing.assert_allclose(np.asarray(got.outputs["scores"])[live], scores[live], atol=5e-5)
    states = np.stack([np.stack([h[:, -1].numpy() for h in step], 1) for step in out.hidden_states], 1)
    np.testing.assert_allclose(np.asarray(got.outputs["hidden_states"])[live], states[live], atol=2e-5)
    top = np.sort(np.asarray(jax.nn.log_softmax(scores, axis=-1)), -1)[..., ::-1][..., :4]
    np.testing.assert_allclose(np.asarray(got.outputs["top_logprobs"])[live], top[live], atol=5e-5)
