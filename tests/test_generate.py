"""Generation against transformers 5: greedy tokens, the sets that sampling draws from, padding, buckets, errors."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from scipy import stats

import fmodels as fm
from interop.transformers import from_transformers

VOCAB = 61
END = (7, 9)


def build(name: str):
    torch.manual_seed(0)
    shared = {
        "vocab_size": VOCAB,
        "attn_implementation": "eager",
        "pad_token_id": 3,
        "eos_token_id": list(END),
        "bos_token_id": 1,
    }
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=64, n_embd=24, n_layer=2, n_head=4, **shared))
    elif name == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=10, max_position_embeddings=64, **shared,
            )
        )  # fmt: skip
    else:
        model = hf.BertLMHeadModel(
            hf.BertConfig(
                hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                is_decoder=True, **shared,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def pair(request):
    model = build(request.param)
    return model, *from_transformers(model)


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    return model, *from_transformers(model)


def prompts(batch: int, length: int, seed: int = 0):
    random = np.random.default_rng(seed)
    mask = np.arange(length)[None] >= (np.arange(batch) * 2 % length)[:, None]
    return np.where(mask, random.integers(10, VOCAB, (batch, length)), 3), mask.astype(np.int64)


def theirs(model, tokens, mask, **options):
    return model.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **options).numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 9), (2, 19)])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(pair, batch, length, penalty):
    model, params, config = pair
    tokens, mask = prompts(batch, length, seed=length)
    want = theirs(model, tokens, mask, max_new_tokens=25, do_sample=False, repetition_penalty=penalty)
    got = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=25, options=fm.GenerationConfig(repetition_penalty=penalty)
    )
    np.testing.assert_array_equal(got.tokens, want)
    ended = np.isin(want[:, length:], END)
    lengths = np.where(ended.any(1), ended.argmax(1) + 1, want.shape[1] - length)
    np.testing.assert_array_equal(got.lengths, lengths)


def test_rows_end_early_and_are_filled_with_pad(llama):
    """With the likeliest tokens as end tokens, rows end at different times, as in transformers."""
    model, params, config = llama
    tokens, mask = prompts(4, 6)
    free = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=12, options=fm.GenerationConfig(eos_token_id=[VOCAB - 1])
    )
    ends = sorted({int(free.tokens[0, 8]), int(free.tokens[1, 10]), int(free.tokens[2, 6])})
    want = theirs(model, tokens, mask, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    got = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=12, options=fm.GenerationConfig(eos_token_id=ends)
    )
    np.testing.assert_array_equal(got.tokens, want)
    assert len(set(np.asarray(got.lengths).tolist())) > 1
    assert got.logprobs.shape == (4, int(got.lengths.max()))


def test_padding_on_either_side_changes_nothing(pair):
    _, params, config = pair
    tokens, mask = prompts(3, 9)
    left = fm.generate(params, config, tokens, mask=mask, max_new_tokens=10)
    real = [row[m == 1] for row, m in zip(tokens, mask, strict=True)]
    right_mask = np.array([[1] * len(r) + [0] * (9 - len(r)) for r in real])
    right_tokens = np.array([[*r, *[3] * (9 - len(r))] for r in real])
    right = fm.generate(params, config, right_tokens, mask=right_mask, max_new_tokens=10)
    np.testing.assert_array_equal(left.tokens[:, 9:], right.tokens[:, 9:])
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
    for i, row in enumerate(real):
        alone = fm.generate(params, config, row[None], max_new_tokens=10)
        n = int(alone.lengths[0])
        np.testing.assert_array_equal(alone.tokens[0, len(row) :], left.tokens[i, 9 : 9 + n])


def test_pad_tokens_mask_themselves_as_in_transformers(llama):
    model, params, config = llama
    tokens, _ = prompts(3, 9)
    want = model.generate(torch.tensor(tokens), max_new_tokens=8, do_sample=False).numpy()
    np.testing.assert_array_equal(fm.generate(params, config, tokens, max_new_tokens=8).tokens, want)


def test_logprobs_are_those_of_transformers(llama):
    model, params, config = llama
    tokens, mask = prompts(2, 6)
    out = model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=6, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    want = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).numpy()
    free = dataclasses.replace(config, eos_token_id=None, generation=None)
    got = fm.generate(params, free, tokens, mask=mask, max_new_tokens=6)
    np.testing.assert_allclose(got.logprobs, want, atol=1e-5)


def test_stream_yields_what_generate_returns(pair):
    _, params, config = pair
    tokens, mask = prompts(2, 6)
    for options, key in ((None, None), (fm.GenerationConfig(do_sample=True), jax.random.key(3))):
        whole = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9, options=options, key=key)
        steps = list(fm.stream(params, config, tokens, mask=mask, max_new_tokens=9, options=options, key=key))
        np.testing.assert_array_equal(np.stack(steps, 1), whole.tokens[:, 6:])


def test_stacked_and_list_agree(pair):
    _, params, config = pair
    tokens, mask = prompts(2, 6)
    a = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9)
    b = fm.generate(fm.unstack_layers(params), config, tokens, mask=mask, max_new_tokens=9)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_sampling_draws_from_transformers_distribution(llama):
    """The first sampled token of 4000 rows, against the probabilities after transformers' processors: chi-square."""
    model, params, config = llama
    tokens = np.tile(prompts(1, 6)[0], (4000, 1))
    options = fm.GenerationConfig(do_sample=True, temperature=1.7, top_k=12, top_p=0.9, min_p=0.02)
    out = fm.generate(params, config, tokens, max_new_tokens=1, options=options, key=jax.random.key(0))
    with torch.no_grad():
        logits = model(torch.tensor(tokens[:1])).logits[:, -1]
    for warper in (
        hf.TemperatureLogitsWarper(1.7),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        logits = warper(None, logits)
    probability = logits.softmax(-1)[0].numpy().astype(np.float64)
    counts = np.bincount(np.asarray(out.tokens[:, 6]), minlength=VOCAB)
    allowed = probability > 0
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(allowed))
    expected = probability[allowed] / probability[allowed].sum() * 4000
    assert stats.chisquare(counts[allowed], expected).pvalue > 1e-3
    drawn = probability[np.asarray(out.tokens[:, 6])] / probability.sum()
    np.testing.assert_allclose(out.logprobs[:, 0], np.log(drawn), atol=1e-4)


def test_rows_may_have_options_of_their_own(llama):
    _, params, config = llama
    tokens, _ = prompts(1, 6)
    batch = np.tile(tokens, (3, 1))
    options = [
        fm.GenerationConfig(do_sample=False),
        fm.GenerationConfig(do_sample=True, top_k=1),
        fm.GenerationConfig(do_sample=True, temperature=50.0, top_k=0),
    ]
    out = fm.generate(params, config, batch, max_new_tokens=12, options=options, key=jax.random.key(0)).tokens
    greedy = fm.generate(params, config, tokens, max_new_tokens=12).tokens[0]
    for row in out[:2]:
        np.testing.assert_array_equal(row[: len(greedy)], greedy)
        assert (row[len(greedy) :] == 3).all()
    assert (out[2, : len(greedy)] != greedy).any()


def test_a_row_draws_the_same_in_any_batch(llama):
    _, params, config = llama
    tokens, mask = prompts(3, 6)
    options, key = fm.GenerationConfig(do_sample=True), jax.random.key(5)
    three = fm.generate(params, config, tokens, mask=mask, max_new_tokens=8, options=options, key=key).tokens
    one = fm.generate(params, config, tokens[:1], mask=mask[:1], max_new_tokens=8, options=options, key=key).tokens
    n = min(three.shape[1], one.shape[1])
    np.testing.assert_array_equal(three[0, :n], one[0, :n])
    other = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=8, options=options, key=jax.random.key(6)
    ).tokens
    assert other.shape != three.shape or (other != three).any()


def test_one_program_per_bucket(llama):
    """Prompt lengths, numbers of new tokens and values of options compile nothing new inside of a bucket."""
    _, params, config = llama
    fm.generate(params, config, prompts(2, 17)[0], max_new_tokens=17)
    before = fm.compile_count()
    for length in range(17, 25):
        options = fm.GenerationConfig(repetition_penalty=1 + length / 100, eos_token_id=[length, 2])
        fm.generate(params, config, prompts(2, length)[0], max_new_tokens=length, options=options)
    assert fm.compile_count() == before
    sampled = [
        fm.GenerationConfig(do_sample=True, temperature=t, top_k=k, top_p=p)
        for t, k, p in ((0.5, 3, 0.9), (2.0, 0, 1.0))
    ]
    for options in sampled:
        fm.generate(params, config, prompts(2, 18)[0], max_new_tokens=20, options=options, key=jax.random.key(0))
    assert fm.compile_count() == before


def test_generation_config_is_read_and_written(llama, tmp_path):
    model, params, config = llama
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[7, 9], pad_token_id=3)
    model.save_pretrained(tmp_path / "theirs")
    model.generation_config.update(do_sample=False, temperature=None, top_p=None)
    params, config = fm.load(tmp_path / "theirs")
    assert config.generation == fm.GenerationConfig.from_hf(config.generation.to_hf())
    assert (config.generation.temperature, config.generation.eos_token_ids, config.generation.pad_token_id) == (
        0.6,
        (7, 9),
        3,
    )
    with pytest.raises(ValueError, match="key"):
        fm.generate(params, config, [[12]], max_new_tokens=2)
    fm.save(params, config, tmp_path / "ours")
    again = hf.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (again.temperature, again.top_p, again.eos_token_id, again.do_sample) == (0.6, 0.9, [7, 9], True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"min_p": 2.0}, ValueError, "min_p"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"do_sample": "yes"}, ValueError, "do_sample"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"no_repeat_ngram_size": -2}, ValueError, "no_repeat_ngram_size"),
        ({"bad_words_ids": [1]}, ValueError, "bad_words_ids"),
        ({"early_stopping": "soon"}, ValueError, "early_stopping"),
        ({"token_healing": True}, NotImplementedError, "token_healing"),
        ({"temprature": 1.0}, TypeError, "temperature"),
    ],
)
def test_bad_options(options, error, says):
    with pytest.raises(error, match=says):
        fm.GenerationConfig(**options)


def test_bad_calls(llama):
    _, params, config = llama
    call = lambda tokens, **kw: fm.generate(params, config, tokens, **{"max_new_tokens": 3, **kw})  # noqa: E731
    for tokens, kw, says in (
        (np.zeros((1, 0), int), {}, "at least one token"),
        ([[1, 2], [3]], {}, "length"),
        ([1, 2], {}, r"\(b t\)"),
        ([[VOCAB]], {}, "vocabulary"),
        ([[-1]], {}, "vocabulary"),
        ([[12, 13]], {"mask": [[1]]}, "mask"),
        ([[12, 13]], {"mask": [[0, 0]]}, "no real token"),
        ([[12]], {"options": fm.GenerationConfig(do_sample=True)}, "key"),
        ([[12]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[12]], {"options": [fm.GenerationConfig(), fm.GenerationConfig()]}, "each of the 1 rows"),
        ([[12] * 9], {"max_new_tokens": None, "options": fm.GenerationConfig(max_length=9)}, "max_length"),
    ):
        with pytest.raises(ValueError, match=says):
            call(tokens, **kw)
    with pytest.raises(TypeError, match="integers"):
        call([[1.5]])
    for inside in (
        lambda: jax.jit(call)(np.array([[12]])),
        lambda: jax.jit(lambda: call([[12]]))(),  # of which nothing is traced but what it computes
        lambda: jax.jit(lambda params: next(fm.stream(params, config, [[12]])))(params),
    ):
        with pytest.raises(ValueError, match=r"compiles its own program.*outside of jax\.jit, nnx\.jit"):
            inside()


def test_positions_run_out():
    model = build("gpt2")
    params, config = from_transformers(model)
    with pytest.raises(ValueError, match="64 positions"):
        fm.generate(params, config, np.full((1, 60), 12), max_new_tokens=6)
    with pytest.raises(ValueError, match="64 positions"):
        fm.generate(params, config, np.full((1, 65), 12))
    tokens = np.full((1, 60), 12)
    np.testing.assert_array_equal(
        fm.generate(params, config, tokens, max_new_tokens=4).tokens,
        theirs(model, tokens, tokens * 0 + 1, max_new_tokens=4, do_sample=False),
    )


def test_encoders_do_not_generate(pair):
    _, params, config = pair
    with pytest.raises(ValueError, match="causal language model"):
        fm.generate(params, dataclasses.replace(config, task="base"), [[12]], max_new_tokens=2)


def test_pruned_trees_generate(llama):
    """A ragged tree decodes with caches of different shapes; its masked twin gives the same tokens."""
    _, params, config = llama
    heads = {0: [0, 1], 1: [0, 3]}
    tokens, mask = prompts(2, 6)
    pruned = fm.generate(*fm.prune_heads(params, config, heads), tokens, mask=mask, max_new_tokens=8)
    masked = fm.generate(fm.mask_heads(params, config, heads), config, tokens, mask=mask, max_new_tokens=8)
    np.testing.assert_array_equal(pruned.tokens, masked.tokens)


def test_roberta_counts_as_its_forward_does(case):
    """transformers' `generate` counts from 0 where its `forward` counts from the row after that of padding."""
    loaded = case("roberta/causal-lm")
    tokens, mask = np.array([[7, 9, 11], [3, 8, 6]]), np.array([[1, 1, 1], [0, 1, 1]])
    positions = np.where(mask == 1, mask.cumsum(-1) + 3, 3)  # as `forward` takes them where none are given
    given = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions)}
    want = loaded.model.generate(torch.tensor(tokens), **given, max_new_tokens=5, do_sample=False, pad_token_id=3)
    got = fm.generate(loaded.params, loaded.config, tokens, mask=mask, max_new_tokens=5)
    assert got.tokens.tolist() == want.tolist()


def test_texts_that_outgrow_their_rotary_factors(case):
    """There transformers computes Phi-3's cache again; here two calls do the same, and one says so."""
    loaded = case("phi3/causal-lm/long")
    prompt = np.array([[7, 9]])
    want = loaded.model.generate(torch.tensor(prompt), max_new_tokens=9, do_sample=False, pad_token_id=3).numpy()
    with pytest.raises(NotImplementedError, match=r"beyond 4 tokens phi3 .* Pass max_new_tokens=3"):
        fm.generate(loaded.params, loaded.config, prompt, max_new_tokens=9)
    text = prompt
    for count in (3, 6):
        text = np.asarray(fm.generate(loaded.params, loaded.config, text, max_new_tokens=count).tokens)
    assert text.tolist() == want.tolist()
