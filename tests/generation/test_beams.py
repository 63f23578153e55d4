"""Beam search against transformers 5, and what beam sampling keeps of it."""

import jax
import numpy as np
import pytest
import torch
import transformers as hf

import fmodels as fm
from tests.generation.pairs import PAD, VOCAB, likely, ours, pair, prompts, theirs

BEAMS = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 14}
SAME_PROGRAM = [
    {},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"early_stopping": True},
    {"early_stopping": True, "length_penalty": 2.0},
    {"early_stopping": "never", "length_penalty": 0.7},
    {"early_stopping": "never", "length_penalty": -0.5},
    {"repetition_penalty": 1.3, "min_new_tokens": 5},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2, "early_stopping": True},
]


@pytest.fixture(scope="module", params=[("gpt2", 1.0), ("gpt2", 5.0), ("llama", 1.0), ("llama", 5.0)], ids=str)
def models(request):
    name, peaked = request.param
    return pair(name, peaked=peaked)


def compare(models, tokens, mask, **options):
    """Tokens, scores and indices of both, and the lengths."""
    model, params, config = models
    options = {"pad_token_id": PAD, **options}
    want = theirs(model, tokens, mask, **options)
    got = ours(params, config, tokens, mask, **options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    np.testing.assert_allclose(got.sequence_scores, want.sequences_scores, rtol=2e-6, atol=2e-5)
    np.testing.assert_array_equal(got.beam_indices, want.beam_indices)
    np.testing.assert_array_equal(got.lengths, (want.beam_indices >= 0).sum(1))
    penalty = options.get("length_penalty", 1.0)
    sums, lengths = np.asarray(got.logprobs).sum(1), np.asarray(got.lengths, np.float32)
    np.testing.assert_allclose(sums / lengths**penalty, got.sequence_scores, rtol=1e-4, atol=1e-5)
    return got, want


def test_beam_search_equals_transformers(models):
    """In one compiled program: length penalties and rules of stopping are arrays."""
    ends = likely(models[0], 2)
    lengths = set()
    tokens, mask = prompts(3, 9)
    ours(*models[1:], tokens, mask, pad_token_id=PAD, eos_token_id=ends, **BEAMS)
    before = fm.compile_count()
    for seed, options in enumerate(SAME_PROGRAM):
        tokens, mask = prompts(3, 9, seed)
        got, _ = compare(models, tokens, mask, eos_token_id=ends, **{**BEAMS, **options})
        lengths |= set(np.asarray(got.lengths).tolist())
    assert fm.compile_count() == before
    assert len(lengths) > 6


PROCESSED = {
    "num_beams": 3, "max_new_tokens": 12, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[20], [21, 22]],
    "sequence_bias": [[[30], 2.0], [[31, 32], -3.0]], "suppress_tokens": [33], "begin_suppress_tokens": [34],
    "exponential_decay_length_penalty": (6, 1.2),
}  # fmt: skip


def test_processors_see_log_probabilities_as_in_transformers(models):
    ends = likely(models[0], 2)
    for seed in range(3):
        tokens, mask = prompts(2, 8, seed)
        compare(models, tokens, mask, eos_token_id=ends[0], forced_eos_token_id=ends[0], **PROCESSED)


def test_scores_logits_and_transition_scores(models):
    model, params, config = models
    tokens, mask = prompts(2, 7)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "repetition_penalty": 1.1}
    options |= {"eos_token_id": likely(model, 2), "pad_token_id": PAD, "output_logits": True, "output_scores": True}
    got, want = compare((model, params, config), tokens, mask, **options)
    steps = len(got.beam_indices[0])
    for name, table in (("scores", want.scores), ("logits", want.logits)):
        ours_table = np.asarray(got.outputs[name])[:, :steps]
        np.testing.assert_allclose(ours_table, np.stack(table, 1)[:, :steps], rtol=1e-4, atol=1e-4)
    for normalize in (False, True):
        theirs_each = model.compute_transition_scores(
            want.sequences, want.scores, want.beam_indices, normalize_logits=normalize
        )
        for scores in (got.outputs["scores"], [np.asarray(x) for x in want.scores]):
            each = fm.compute_transition_scores(got.tokens, scores, got.beam_indices, normalize_logits=normalize)
            np.testing.assert_allclose(each, theirs_each, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        got.logprobs, fm.compute_transition_scores(got.tokens, got.outputs["scores"], got.beam_indices), atol=1e-6
    )


@pytest.fixture(scope="module")
def llama():
    return pair("llama")


@pytest.mark.parametrize("sampled", [False, True])
def test_transition_scores_of_one_row_each(llama, sampled):
    model, params, config = llama
    tokens, mask = prompts(2, 6)
    got = ours(
        params, config, tokens, mask, max_new_tokens=7, pad_token_id=PAD, eos_token_id=likely(model, 1), output_scores=True,
        do_sample=sampled, key=jax.random.key(1) if sampled else None, top_k=5,
    )  # fmt: skip
    scores = [torch.tensor(np.asarray(x)) for x in np.asarray(got.outputs["scores"]).swapaxes(0, 1)]
    for normalize in (False, True):
        want = model.compute_transition_scores(torch.tensor(np.asarray(got.tokens)), scores, normalize_logits=normalize)
        each = fm.compute_transition_scores(got.tokens, got.outputs["scores"], normalize_logits=normalize)
        np.testing.assert_allclose(each, want, atol=1e-5)
        if normalize:
            inside = np.arange(each.shape[1])[None] < np.asarray(got.lengths)[:, None]
            np.testing.assert_allclose(np.where(inside, each, 0), got.logprobs, atol=1e-5)


def test_padding_on_either_side_changes_nothing(llama):
    _, params, config = llama
    tokens, mask = prompts(3, 9)
    left = ours(params, config, tokens, mask, max_new_tokens=10, num_beams=3)
    real = [row[m == 1] for row, m in zip(tokens, mask, strict=True)]
    right_mask = np.array([[1] * len(r) + [0] * (9 - len(r)) for r in real])
    right_tokens = np.array([[*r, *[PAD] * (9 - len(r))] for r in real])
    right = ours(params, config, right_tokens, right_mask, max_new_tokens=10, num_beams=3)
    np.testing.assert_array_equal(left.tokens[:, 9:], right.tokens[:, 9:])
    np.testing.assert_allclose(left.sequence_scores, right.sequence_scores, atol=1e-5)


def test_user_criteria_end_candidates(llama):
    """A criterion of the user's ends a text as an end token does: here after token 20 … 29."""
    model, params, config = llama
    tokens, mask = prompts(2, 6)

    class Twenties(hf.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return (input_ids[:, -1] >= 20) & (input_ids[:, -1] < 30)

    options = {"num_beams": 3, "num_return_sequences": 3, "pad_token_id": PAD, "eos_token_id": likely(model, 1)}
    want = theirs(
        model, tokens, mask, max_new_tokens=10, stopping_criteria=hf.StoppingCriteriaList([Twenties()]), **options
    )
    got = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=10, options=fm.GenerationConfig(**options), stops=[twenties]
    )
    np.testing.assert_array_equal(got.tokens, want.sequences)
    assert len(set(np.asarray(got.lengths).tolist())) > 1


def twenties(history):
    return (history.last >= 20) & (history.last < 30)


SAMPLED = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "pad_token_id": PAD, "do_sample": True}


def test_beam_sampling_draws_by_the_key_from_what_the_cuts_leave(llama):
    model, params, config = llama
    tokens, mask = prompts(2, 6)
    ends = likely(model, 1)

    def run(seed: int, **options):
        return ours(params, config, tokens, mask, key=jax.random.key(seed), eos_token_id=ends, **SAMPLED, **options)

    first, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    few = run(2, top_k=3, temperature=2.0, output_scores=True)
    scores = np.asarray(few.outputs["scores"])
    assert (np.isfinite(scores[:, 0]).sum(-1) == 3).all()
    assert np.isfinite(few.logprobs).all()
    each = fm.compute_transition_scores(few.tokens, scores, few.beam_indices)
    np.testing.assert_allclose(each.sum(1) / few.lengths.astype(np.float32), few.sequence_scores, rtol=1e-5)


def test_beam_sampling_without_heat_is_beam_search(llama):
    """At a low temperature the draw takes the likeliest, if the heat is taken out of the scores again."""
    model, params, config = llama
    tokens, mask = prompts(2, 6)
    cold = ours(
        params, config, tokens, mask, key=jax.random.key(0), temperature=1e-4, top_k=0, eos_token_id=likely(model, 1), **SAMPLED
    )  # fmt: skip
    greedy = ours(
        params, config, tokens, mask, eos_token_id=likely(model, 1), **{**SAMPLED, "do_sample": False}
    )  # fmt: skip
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    np.testing.assert_allclose(np.asarray(cold.sequence_scores) * 1e-4, greedy.sequence_scores, rtol=1e-3)


def test_first_tokens_of_beam_sampling_are_distributed_as_drawn_without_replacement(llama):
    """The first of the candidates is a draw from the model's distribution; with two beams of one token they are two."""
    model, params, config = llama
    tokens, mask = prompts(1, 6)
    count = 600
    got = ours(
        params, config, np.repeat(tokens, count, 0), np.repeat(mask, count, 0), key=jax.random.key(5), num_beams=2,
        num_return_sequences=2, max_new_tokens=1, pad_token_id=PAD, do_sample=True, top_k=0,
    )  # fmt: skip
    pairs = np.asarray(got.tokens)[:, -1].reshape(count, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor(tokens)).logits[0, -1].double(), -1).numpy()
    included = p + (p[:, None] * p[None] / (1 - p[:, None]) * (1 - np.eye(VOCAB))).sum(0)  # drawn first, or second
    seen = np.bincount(pairs.reshape(-1), minlength=VOCAB) / count
    error = np.sqrt(included * (1 - included) / count)
    assert (np.abs(seen - included) < 5 * error + 1e-9).all()


def test_time_limit_returns_what_there_is(llama):
    _, params, config = llama
    tokens, mask = prompts(2, 6)
    got = ours(params, config, tokens, mask, max_new_tokens=40, num_beams=3, max_time=1e-9)
    assert got.tokens.shape == (2, 7)
    assert np.isfinite(got.sequence_scores).all()
    assert got.lengths.tolist() == [1, 1]


def test_what_contradicts_itself_raises(llama):
    _, params, config = llama
    tokens, mask = prompts(1, 4)
    for options, message in [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_beam_groups": 2}, "needs num_beams above 1"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups=3 must .* divide num_beams=4"),
        ({"num_beams": 4, "num_beam_groups": 2}, "without a diversity_penalty"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "num_beam_groups=1 must be above 1"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "do_sample"),
        ({"force_words_ids": [[5]]}, "needs num_beams above 1"),
        ({"num_beams": 4, "force_words_ids": [[5]], "do_sample": True}, "force_words_ids does not go with do_sample"),
        ({"num_beams": 4, "force_words_ids": [[5]], "num_beam_groups": 2, "diversity_penalty": 1.0}, "force_words_ids does not"),
        ({"num_beams": 4, "force_words_ids": [[VOCAB]]}, "force_words_ids has tokens outside of the vocabulary"),
        ({"num_beams": 4, "force_words_ids": [[[5, 6], [5]]]}, "one begins with another"),
        ({"num_beams": 4, "force_words_ids": [[[5, 6], [5, 6]]]}, "one begins with another"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ours(params, config, tokens, mask, max_new_tokens=4, key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="stream: beams does not make a token"):
        fm.stream(params, config, tokens, options=fm.GenerationConfig(num_beams=2))
    with pytest.raises(ValueError, match="leave no cache behind"):
        fm.generate(params, config, tokens, options=fm.GenerationConfig(num_beams=2), keep_cache=True)
