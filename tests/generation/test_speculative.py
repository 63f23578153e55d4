"""Speculation: what comes out is what greedy decoding and sampling give, whatever was guessed; and fewer calls of the model."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import stats

import fmodels as fm
from tests.generation.pairs import PAD, likely, ours, pair, prompts, theirs

NGRAMS = {"prompt_lookup_num_tokens": 4}
EXIT = {"assistant_early_exit": 1, "num_assistant_tokens": 3}
COUNT = 20
GOLDENS = Path(__file__).parents[1] / "goldens" / "generation"


@pytest.fixture(scope="module", params=[("gpt2", 1.0), ("llama", 5.0)], ids=["gpt2-flat", "llama-peaked"])
def models(request):
    name, peaked = request.param
    return pair(name, peaked=peaked)


@pytest.fixture(scope="module")
def gpt2():
    return pair("gpt2")


def both(models, tokens, mask, guesses, *, draft=None, key=None, **options):
    """The call with and without guesses."""
    _, params, config = models
    arguments = {"mask": mask, "max_new_tokens": COUNT, "key": key}
    options = {"pad_token_id": PAD, **options}
    want = fm.generate(params, config, tokens, options=fm.GenerationConfig(**options), **arguments)
    options = fm.GenerationConfig(**options, **guesses)
    return fm.generate(params, config, tokens, options=options, draft=draft, **arguments), want


def equal(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_array_equal(got.mask, want.mask)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize("guesses", [NGRAMS, EXIT], ids=["ngrams", "exit"])
def test_greedy_and_samples_are_those_without_guesses(models, guesses):
    """Rows of several lengths in a batch, end tokens, logits functions, sampling: all with one program each."""
    ends = likely(models[0], 2)
    lengths = set()
    for seed, options in enumerate(
        [
            {},
            {"eos_token_id": ends},
            {"eos_token_id": ends, "repetition_penalty": 1.3, "min_new_tokens": 3},
            {"do_sample": True, "temperature": 0.7},
            {"do_sample": True, "top_k": 5, "top_p": 0.9, "eos_token_id": ends[:1]},
        ]
    ):
        tokens, mask = prompts(4, 9, seed)
        got, want = both(models, tokens, mask, guesses, key=jax.random.key(seed), **options)
        equal(got, want)
        assert (np.diff(got.outputs["calls"], axis=1) <= 1).all()
        lengths |= set(np.asarray(got.lengths).tolist())
    assert len(lengths) > 3


@pytest.mark.parametrize("guesses", [NGRAMS, EXIT], ids=["ngrams", "exit"])
def test_logits_functions_see_each_place(gpt2, guesses):
    """Those that look at what was said, within a block too; a forced end, mixed rows, and what is kept of each token."""
    ends = likely(gpt2[0], 1)
    tokens, mask = prompts(3, 9)
    options = {
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[20], [11, 12]],
        "sequence_bias": {(15, 16): 2.0, (17,): 1.0},
        "forced_eos_token_id": 5,
        "exponential_decay_length_penalty": (6, 1.1),
        "eos_token_id": ends,
        "output_scores": True,
        "output_logits": True,
    }
    got, want = both(gpt2, tokens, mask, guesses, **options)
    equal(got, want)
    for name in ("scores", "logits"):
        np.testing.assert_allclose(got.outputs[name], want.outputs[name], rtol=1e-4, atol=1e-4)


def test_rows_that_sample_beside_rows_that_do_not(gpt2):
    _, params, config = gpt2
    tokens, mask = prompts(3, 9)
    rows = [
        fm.GenerationConfig(**options, pad_token_id=PAD)
        for options in ({}, {"do_sample": True}, {"repetition_penalty": 1.5})
    ]
    arguments = {"mask": mask, "max_new_tokens": COUNT, "key": jax.random.key(3)}
    want = fm.generate(params, config, tokens, options=rows, **arguments)
    equal(fm.generate(params, config, tokens, options=[row.replace(**NGRAMS) for row in rows], **arguments), want)


@pytest.mark.parametrize("layers", ["stacked", "list"])
def test_a_draft_of_another_family_changes_nothing(gpt2, layers):
    """Bad guesses, and, from the model itself, those that all hold: one call for each block."""
    _, params, config = gpt2
    params = params if layers == "stacked" else fm.unstack_layers(params)
    tokens, mask = prompts(3, 9)
    _, other, other_config = pair("llama")
    for options in ({}, {"do_sample": True, "temperature": 0.8}):
        sizes = {"num_assistant_tokens": 4}
        key = jax.random.key(0)
        got, want = both((None, params, config), tokens, mask, sizes, draft=(other, other_config), key=key, **options)
        equal(got, want)
        got, want = both((None, params, config), tokens, mask, sizes, draft=(params, config), key=key, **options)
        equal(got, want)
        assert got.outputs["calls"].max() == (COUNT - 1 + 4) // 5


def test_transformers_gives_the_same(gpt2):
    """Their prompt lookup, and their assisted decoding with a draft, one row."""
    model, params, config = gpt2
    assistant, draft, draft_config = pair("llama")
    assistant.generation_config.update(num_assistant_tokens=4, num_assistant_tokens_schedule="constant")
    for seed in range(2):
        tokens, mask = prompts(1, 12, seed)
        tokens = np.concatenate([tokens, tokens], axis=1)
        mask = np.ones_like(tokens)
        options = {"max_new_tokens": COUNT, "pad_token_id": PAD, "eos_token_id": likely(model, 1)}
        want = theirs(model, tokens, mask, prompt_lookup_num_tokens=4, **options).sequences
        np.testing.assert_array_equal(ours(params, config, tokens, mask, **NGRAMS, **options).tokens, want)
        want = theirs(model, tokens, mask, assistant_model=assistant, **options).sequences
        got = fm.generate(
            params, config, tokens, mask=mask, options=fm.GenerationConfig(**options), draft=(draft, draft_config)
        )
        np.testing.assert_array_equal(got.tokens, want)


@pytest.mark.parametrize("guesses", [NGRAMS, EXIT], ids=["ngrams", "exit"])
def test_decoders_with_an_encoder(guesses):
    """The first layers of the decoder read what the encoder has read; each row stands at its own place."""
    params, config = fm.load(GOLDENS / "bart")
    case = json.loads((GOLDENS / "bart" / "cases.json").read_text())[0]
    models = None, params, dataclasses.replace(config, eos_token_id=None)
    got, want = both(models, case["tokens"], case["mask"], guesses, eos_token_id=7)
    equal(got, want)
    if guesses == NGRAMS:
        assert (got.outputs["calls"].max(1) + 1 < got.lengths).all()


def exact(params, config, prompt, steps: int, warp) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, by `forward`."""
    found = {(): 1.0}
    for _ in range(steps):
        texts = jnp.array([[*prompt, *said] for said in found])
        logits = np.asarray(fm.forward(params, config, texts).logits)[:, -1]
        found = {
            (*said, token): p * q
            for (said, p), row in zip(found.items(), logits, strict=True)
            for token, q in enumerate(warp(row))
            if q > 0
        }
    return found


@pytest.mark.parametrize("guesses", [NGRAMS, EXIT], ids=["ngrams", "exit"])
def test_samples_have_the_distribution_of_the_model(gpt2, guesses):
    """A chi-square test of the first three tokens of 4096 rows against all continuations."""
    _, params, config = gpt2
    prompt = [12, 30, 12, 30, 12]

    def warp(row):
        row = row / 0.9
        row = np.where(row < np.sort(row)[-3], -np.inf, row)
        return np.exp(row - row.max()) / np.exp(row - row.max()).sum()

    options = fm.GenerationConfig(
        do_sample=True, temperature=0.9, top_k=3, num_return_sequences=4096, pad_token_id=PAD, **guesses
    )
    out = fm.generate(params, config, [prompt], max_new_tokens=3, options=options, key=jax.random.key(11))
    expected = exact(params, config, prompt, 3, warp)
    counts = dict.fromkeys(expected, 0)
    for row in np.asarray(out.tokens)[:, len(prompt) :].tolist():
        counts[tuple(row)] += 1
    expected = np.array(list(expected.values()), np.float64)
    expected = 4096 * expected / expected.sum()
    observed, large = np.array(list(counts.values())), expected > 5
    if expected[~large].sum() > 1:  # rare ones as one
        observed, expected = (np.append(x[large], x[~large].sum()) for x in (observed, expected))
    assert len(expected) > 10
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert out.outputs["calls"].max() <= 2


def test_copies_need_few_calls():
    """The checkpoint that comes with the package, on a text that repeats itself, in the dtype that it is stored in."""
    params, config = fm.load(fm.assets.TINY_LLAMA)
    tokenizer = tokenizers.Tokenizer.from_file(str(fm.assets.TINY_LLAMA / "tokenizer.json"))
    tokens = [tokenizer.encode("import os\nimport sys\nimport time\n" * 10).ids]
    options = fm.GenerationConfig(prompt_lookup_num_tokens=7)
    got = fm.generate(params, config, tokens, max_new_tokens=48, options=options)
    assert int(got.lengths[0]) == 48
    assert int(got.outputs["calls"].max()) < 12


def test_what_has_been_said_is_kept(gpt2):
    """A cache from speculation goes on as any other; a block that is cut by `max_new_tokens` leaves nothing in it."""
    _, params, config = gpt2
    tokens, mask = prompts(2, 9)
    options = fm.GenerationConfig(pad_token_id=PAD, **NGRAMS)
    first = fm.generate(params, config, tokens, mask=mask, max_new_tokens=7, options=options, keep_cache=True)
    more = np.array([[20, 21], [22, 23]])
    got = fm.generate(params, config, more, max_new_tokens=8, options=options, prefix=first)
    whole, real = (np.concatenate(x, axis=1) for x in ((first.tokens, more), (first.mask, np.ones_like(more))))
    options = fm.GenerationConfig(pad_token_id=PAD)
    want = fm.generate(params, config, whole, mask=real, max_new_tokens=8, options=options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_the_table_of_positions_may_end(gpt2):
    """Guesses beyond the last position do no harm."""
    tokens, mask = prompts(2, 64 - COUNT)
    got, want = both(gpt2, tokens, mask, NGRAMS)
    equal(got, want)


@pytest.mark.parametrize(
    ("options", "draft", "message"),
    [
        ({**NGRAMS, **EXIT}, None, "different ways"),
        (NGRAMS, "llama", "different ways"),
        ({**NGRAMS, "num_beams": 2}, None, "beams"),
        ({"num_beams": 2}, "llama", "beams"),
        ({**NGRAMS, "dola_layers": "low"}, None, "different ways"),
        ({"assistant_early_exit": 2}, None, "below the 2 layers"),
        ({}, "short", "vocabulary of 40"),
        ({}, "classifier", "no causal language model"),
        ({"penalty_alpha": 0.5, "do_sample": True}, None, "does not sample"),
        ({"penalty_alpha": 0.5, "num_beams": 2}, None, "beams"),
    ],
)
def test_contradictions(gpt2, options, draft, message):
    _, params, config = gpt2
    drafts = {None: None, "llama": pair("llama")[1:]}
    if draft == "short":
        drafts["short"] = fm.resize_embeddings(params, config, 40)
    if draft == "classifier":
        drafts["classifier"] = (params, dataclasses.replace(config, task="sequence-classification"))
    with pytest.raises(ValueError, match=message):
        fm.generate(
            params,
            config,
            [[12, 13]],
            max_new_tokens=3,
            options=fm.GenerationConfig(**options),
            draft=drafts[draft],
            key=jax.random.key(0),
        )
