"""Beam search against transformers 5, and what beam sampling keeps of it."""

import numpy as np
import pytest

import fmodels as fm
from tests.generation.pairs import PAD, likely, ours, pair, prompts, theirs

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
