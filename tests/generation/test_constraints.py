"""Regular expressions, vocabularies and automata over tokens, against `re`, `tokenizers` and brute force."""

from __future__ import annotations

import itertools
import json
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import fmodels as fm
from fmodels.generation.constraints import (
    TooLargeError,
    Vocabulary,
    advance,
    allowed,
    choices,
    read_vocabulary,
    regex,
    require_room,
    stack,
)
from fmodels.generation.constraints.automaton import compile_tokens
from fmodels.generation.constraints.dfa import difference, intersect

ALPHABET = "ab0_ \n.é€😀"


def quantified(part):
    return st.sampled_from(
        ["{p}*", "{p}+", "{p}?", "{p}{{2}}", "{p}{{1,}}", "{p}{{0,2}}", "{p}*?", "{p}{{1,3}}?"]
    ).flatmap(lambda form: part.map(lambda p: form.format(p=f"(?:{p})")))


ATOMS = st.sampled_from(
    ["a", "b", "0", "é", "€", "😀", r"\.", r"\n", r"\x61", r"\u20ac", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", ".",
     "[ab]", "[^ab]", "[a-z0-9]", "[^é-😀]", r"[\d_]", r"[^\s\w]", "[à-ÿ€]", "(?i:B)", "(?s:.)", "[]a]", "[a-]"]
)  # fmt: skip
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        quantified(inner),
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        inner.map(lambda p: f"(?:^{p}|{p}b)"),
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(PATTERNS, st.data())
def test_regex_agrees_with_re(pattern, data):
    dfa = regex(pattern).dfa()
    compiled = re.compile(pattern, re.ASCII)
    texts = data.draw(st.lists(st.text(ALPHABET, max_size=6), min_size=20, max_size=20))
    texts += [text + extra for text in sample(dfa, data.draw(st.integers(0, 2**32)), 10) for extra in ("", "a", "\n")]
    for text in texts:
        assert dfa.matches(text.encode()) == bool(compiled.fullmatch(text)), (pattern, text)


def sample(dfa, seed, count):
    """Random accepted texts: mostly short ones, walked along states from which the end is near."""
    rng = np.random.default_rng(seed)
    bytes_of = [np.flatnonzero(dfa.classes == c) for c in range(dfa.next.shape[1])]
    found = []
    for _ in range(20 * count):
        state, text = 0, bytearray()
        while len(text) < 40:
            options = np.flatnonzero(dfa.next[state] >= 0)
            if not options.size or (dfa.final[state] and rng.random() < 0.3):
                break
            c = rng.choice(options)
            text.append(rng.choice(bytes_of[c]))
            state = int(dfa.next[state, c])
        if dfa.final[state]:
            found.append(bytes(text).decode())
        if len(found) == count:
            break
    return found


def test_regex_accepts_what_it_should():
    assert regex(r"\d{3}-\d{4}").matches("555-1234")
    assert not regex(r"\d{3}-\d{4}").matches("555-123")
    assert not regex(r"\d").matches("٣")
    assert regex(r"\d\w", unicode=True).matches("٣é")
    assert not regex("[^a]").matches("a")
    assert regex("^(?:yes|no)$").matches("yes")
    assert not regex("a^b|c").matches("ab")


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(?=a)b", "lookaround"),
        ("(?<!a)b", "negative lookaround"),
        (r"(a)\1", "backreference"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"\ba", "word boundary"),
        ("(?>a)", "atomic"),
        ("a++", "possessive"),
        ("(?m)^a$", r"\(\?m\)"),
        ("a(", "no regular expression"),
        ("[b-a]", "no regular expression"),
    ],
)
def test_regex_names_what_it_refuses(pattern, what):
    with pytest.raises(ValueError, match=what):
        regex(pattern)


def test_regex_limits_and_empty_languages():
    with pytest.raises(TooLargeError, match="states"):
        regex("(?:[ab]{1,300}c){1,300}").dfa()
    with pytest.raises(TooLargeError, match="states"):
        regex("(?:a|b)*a(?:a|b){20}").dfa()
    with pytest.raises(ValueError, match="no text fulfils"):
        regex(r"a^").dfa()
    with pytest.raises(ValueError, match="at least one"):
        choices([])
    with pytest.raises(TypeError, match="list of str"):
        choices("yes")


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(PATTERNS, PATTERNS, st.lists(st.text(ALPHABET, max_size=5), min_size=20, max_size=20))
def test_intersection_and_difference(left, right, texts):
    a, b = regex(left).dfa(), regex(right).dfa()
    both, only = intersect(a, b), difference(a, b)
    for text in map(str.encode, texts):
        assert both.matches(text) == (a.matches(text) and b.matches(text))
        assert only.matches(text) == (a.matches(text) and not b.matches(text))


def test_constraints_are_hashable_values():
    assert regex("a") == regex("a") != regex("a", unicode=True)
    assert len({choices(["a", "b"]), choices(["a", "b", "a"]), choices(["b"])}) == 2


# Vocabularies


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.from_file(str(fm.assets.TINY_LLAMA / "tokenizer.json"))


TEXTS = [
    "Hello, world",
    " def f(x):\n    return x",
    "naïve café €5 😀",
    "\t\r\n",
    "日本語 テキスト",
    "a" * 50,
    '{"k": [1, 2]}',
]


def sentencepiece():
    """A small tokenizer of the kind that SentencePiece writes: `▁` for spaces, bytes for what it does not know."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz,",
        "▁the",
        "he",
    ]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("h", "e")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.text(max_size=30))
def test_vocabulary_spells_what_the_tokenizer_decodes(tiny, text):
    vocabulary = read_vocabulary(tiny)
    ids = tiny.encode(text).ids
    assert vocabulary.text(ids).decode(errors="replace") == tiny.decode(ids) == text


@pytest.mark.parametrize("make", [sentencepiece, lambda: metaspace(models.Unigram), lambda: bytelevel()])
def test_vocabulary_of_other_tokenizers(make):
    tokenizer = make()
    vocabulary = read_vocabulary(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        spelled = vocabulary.text(ids).decode()
        assert spelled.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")


def metaspace(model):
    pieces = [("<unk>", 0.0), *((c, -5.0) for c in "▁abcdefghijklmnopqrstuvwxyzHW,({:)}\n\t\r"), ("▁the", -2.0)]
    tokenizer = Tokenizer(model(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bytelevel():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<think>", "日本"])
    return tokenizer


def test_vocabulary_sources_agree(tiny):
    import transformers

    vocabulary = read_vocabulary(tiny)
    folder = fm.assets.TINY_LLAMA
    assert read_vocabulary(folder) == read_vocabulary(folder / "tokenizer.json") == vocabulary
    assert read_vocabulary(transformers.AutoTokenizer.from_pretrained(folder)) == vocabulary
    assert read_vocabulary(vocabulary) is vocabulary
    assert vocabulary.special == ((0, b"<pad>"), (1, b"<bos>"), (2, b"<eos>"))
    assert vocabulary.tokens[:3] == (None, None, None)
    assert len(read_vocabulary(tiny, size=2100)) == 2100
    with pytest.raises(ValueError, match="2048 tokens, the model 2000"):
        read_vocabulary(tiny, size=2000)
    with pytest.raises(TypeError, match="got int"):
        read_vocabulary(3)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        read_vocabulary(folder / "nowhere")


def test_vocabulary_refuses_decoders_without_bytes(tiny):
    data = json.loads(tiny.to_str())
    data["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(ValueError, match="CTC"):
        read_vocabulary(Tokenizer.from_str(json.dumps(data)))


# Automata over tokens

SMALL = Vocabulary((None, b"a", b"b", b"ab", b"ba", b"aab", b"0", b"\xc3", b"\xa9", "é".encode(), b"a0", None))
END = 11
JIT_ALLOWED, JIT_ADVANCE = jax.jit(allowed), jax.jit(advance)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(PATTERNS)
def test_token_automaton_is_brute_force(pattern):
    dfa = regex(pattern).dfa()
    accepted = {
        ids
        for length in range(4)
        for ids in itertools.product(range(1, 11), repeat=length)
        if dfa.matches(b"".join(SMALL.tokens[i] or b"" for i in ids))
    }
    try:
        automaton = compile_tokens(dfa, SMALL, [END])
    except ValueError:
        assert not accepted
        return
    # Every sequence that the masks let through: end tokens complete it, the budget lets no other through.
    whole = stack([automaton])  # of a rounded size, compiled once
    states = jnp.arange(len(whole.final))
    moves = np.stack([JIT_ADVANCE(whole, states, jnp.full(states.shape, token)) for token in range(12)], axis=1)
    free = np.asarray(JIT_ALLOWED(whole, states))[: len(automaton.final)]
    assert free.any(1).all()
    reached, complete = {(): 0}, set()
    for left in range(4, 0, -1):
        mask = np.asarray(JIT_ALLOWED(whole, states, jnp.full(states.shape, left)))
        new = {}
        for ids, state in reached.items():
            assert mask[state].any() == (automaton.distance[state] <= left)
            for token in np.flatnonzero(mask[state]).tolist():
                assert free[state, token]
                if token == END:
                    complete.add(ids)
                else:
                    new[(*ids, token)] = int(moves[state, token])
        reached = new
    assert complete == accepted
    shortest = min(map(len, accepted), default=4) + 1
    assert automaton.distance[0] == shortest or (not accepted and automaton.distance[0] > 4)


def test_forbidden_tokens_change_nothing_and_pads_stay():
    automaton = choices(["ab"]).compile(SMALL, [END])
    state = jnp.array([0])
    assert int(advance(automaton, state, jnp.array([0]))[0]) == 0
    assert int(advance(automaton, state, jnp.array([END]))[0]) == 0
    assert np.flatnonzero(allowed(automaton, state)[0]).tolist() == [1, 3]


def test_stack_gives_each_row_its_constraint():
    a, b = choices(["ab", "ba"]).compile(SMALL, [END]), regex("0*").compile(SMALL, [END])
    whole = stack([a, None, b, a])
    mask = np.asarray(jax.jit(allowed)(whole, jnp.asarray(whole.start)))
    assert [np.flatnonzero(row).tolist() for row in mask] == [[1, 2, 3, 4], list(range(12)), [6, END], [1, 2, 3, 4]]
    state = advance(whole, jnp.asarray(whole.start), jnp.array([3, 5, 6, 1]))
    mask = np.asarray(allowed(whole, state, jnp.array([1, 1, 1, 1])))
    assert [np.flatnonzero(row).tolist() for row in mask] == [[END], list(range(12)), [END], []]
    assert stack([None], size=12).classes.shape == (1, 12)
    assert len(whole.final) == 16
    assert stack([a, b]).next.shape == stack([b, a]).next.shape == whole.next.shape
    with pytest.raises(ValueError, match="different vocabularies"):
        stack([a, choices(["ab"]).compile(SMALL, [0])])
    with pytest.raises(ValueError, match="size="):
        stack([None])


def test_room_and_end_tokens():
    automaton = stack([choices(["abba"]).compile(SMALL, [END]), None])
    require_room(automaton, 3)
    with pytest.raises(ValueError, match=r"rows \[0\] need at least 3 tokens"):
        require_room(automaton, 2)
    with pytest.raises(ValueError, match="at least one end token"):
        choices(["ab"]).compile(SMALL, [])
    with pytest.raises(ValueError, match="no sequence of the vocabulary's tokens"):
        choices(["xyz"]).compile(SMALL, [END])


def test_compiled_once(tiny):
    vocabulary = read_vocabulary(tiny)
    assert choices(["x"]).compile(vocabulary, [2]) is choices(["x"]).compile(tiny, [2])
