"""What `generate` takes beside options: prefixes, chunks, caches of 8 bits, constraints, stop strings, clocks, callbacks."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer

import fmodels as fm
from fmodels.prepare import bucket
from interop.transformers import to_transformers


@pytest.fixture(scope="module")
def tiny():
    params, config = fm.load(fm.assets.TINY_LLAMA)
    tokenizer = Tokenizer.from_file(str(Path(fm.assets.TINY_LLAMA) / "tokenizer.json"))
    return fm.cast(params, "float32"), config, tokenizer


def prompts(batch, length, seed=0, high=2000):
    random = np.random.default_rng(seed)
    mask = np.arange(length)[None] >= (np.arange(batch) * 2 % length)[:, None]
    return np.where(mask, random.integers(10, high, (batch, length)), 3), mask


def test_a_prefix_is_not_read_again(tiny):
    params, config, _ = tiny
    tokens, mask = prompts(2, 7)
    options = fm.GenerationConfig(repetition_penalty=1.2, eos_token_id=[201])
    first = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9, options=options, keep_cache=True)
    more = prompts(2, 4, seed=1)[0]
    second = fm.generate(params, config, more, prefix=first, max_new_tokens=8, options=options, keep_cache=True)
    third = fm.generate(params, config, more, prefix=second, max_new_tokens=5, options=options)
    text, real = np.concatenate([first.tokens, more], 1), np.concatenate([first.mask, np.ones((2, 4), bool)], 1)
    whole = fm.generate(params, config, text, mask=real, max_new_tokens=8, options=options)
    np.testing.assert_array_equal(second.tokens, whole.tokens)
    text, real = np.concatenate([second.tokens, more], 1), np.concatenate([second.mask, np.ones((2, 4), bool)], 1)
    np.testing.assert_array_equal(
        third.tokens, fm.generate(params, config, text, mask=real, max_new_tokens=5, options=options).tokens
    )
    with pytest.raises(ValueError, match="keep_cache"):
        fm.generate(params, config, more, prefix=whole, max_new_tokens=2)


def test_padding_between_tokens_counts_nothing(tiny):
    """A text whose padding lies in its middle, as between the turns of a chat, against transformers."""
    params, config, _ = tiny
    tokens, mask = prompts(3, 12, seed=4)
    mask = mask & ~np.isin(np.arange(12)[None], [[5], [8], [9]]) & (np.arange(12)[None] != 7)
    want = to_transformers(params, config).generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), max_new_tokens=8, do_sample=False,
        eos_token_id=2047, pad_token_id=3,
    )  # fmt: skip
    got = fm.generate(
        params, config, tokens, mask=mask, max_new_tokens=8, options=fm.GenerationConfig(eos_token_id=[2047])
    )
    np.testing.assert_array_equal(got.tokens, want)


@pytest.mark.parametrize("form", ["stacked", "list"])
def test_chunks_change_nothing_and_8_bits_little(tiny, form):
    params, config, _ = tiny
    params = params if form == "stacked" else fm.unstack_layers(params)
    tokens, mask = prompts(2, 37)
    run = lambda **given: fm.generate(  # noqa: E731
        params, config, tokens, mask=mask, max_new_tokens=8, options=fm.GenerationConfig(**given)
    )
    whole = run()
    chunked = run(prefill_chunk_size=16)
    np.testing.assert_array_equal(chunked.tokens, whole.tokens)
    np.testing.assert_allclose(chunked.logprobs, whole.logprobs, atol=1e-4)
    small = run(cache_implementation="quantized", eos_token_id=[0])
    np.testing.assert_allclose(
        small.logprobs[:, 0], whole.logprobs[:, 0], atol=1e-4
    )  # the prompt reads itself in float32
    np.testing.assert_allclose(small.logprobs[:, 1], whole.logprobs[:, 1], atol=0.05)
    assert (small.logprobs[:, 1:] != whole.logprobs[:, 1:]).any()


def test_many_equal_generate(tiny):
    params, config, _ = tiny
    random = np.random.default_rng(0)
    rows = [random.integers(5, 2000, n).tolist() for n in (3, 30, 1, 17, 12, 25, 2)]
    options = fm.GenerationConfig(do_sample=True, eos_token_id=[201, 223, 5, 16])
    many = fm.generate_many(
        params, config, rows, max_new_tokens=12, options=options, key=jax.random.key(1), batch_size=3
    )
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    whole = fm.generate(params, config, tokens, mask=mask, max_new_tokens=12, options=options, key=jax.random.key(1))
    assert len({len(one.tokens) for one in many}) > 1
    for row, length, logprobs, one in zip(whole.tokens, whole.lengths, whole.logprobs, many, strict=True):
        np.testing.assert_array_equal(row[width : width + int(length)], one.tokens)
        np.testing.assert_allclose(logprobs[: int(length)], one.logprobs, atol=1e-4)
    with pytest.raises(ValueError, match=r"prompts \[1\]"):
        fm.generate_many(params, config, [[5], []], max_new_tokens=2)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def texts(tokenizer, out, width, config):
    rows = [row[width : width + n] for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)]
    return [tokenizer.decode([t for t in row.tolist() if t not in config.eos_token_ids]) for row in rows]


def test_constraints_hold(tiny):
    params, config, tokenizer = tiny
    start = tokenizer.encode("x = ").ids
    batch = [start] * 4
    schema, pattern = fm.constraints.json_schema(SCHEMA), fm.constraints.regex(r"[a-f]{2,4}\d+\.\d\d")
    out = fm.generate(
        params, config, batch, max_new_tokens=48, constraint=[schema, schema, pattern, None], tokenizer=tokenizer,
        options=fm.GenerationConfig(do_sample=True, temperature=1.5), key=jax.random.key(0),
    )  # fmt: skip
    found = texts(tokenizer, out, len(start), config)
    for text in found[:2]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert pattern.matches(found[2])
    with pytest.raises(ValueError, match="max_new_tokens"):
        fm.generate(params, config, batch, max_new_tokens=3, constraint=schema, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer"):
        fm.generate(params, config, batch, max_new_tokens=3, constraint=schema)


def test_recursive_schemas_are_followed_by_the_host(tiny):
    params, config, tokenizer = tiny
    following = {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": following}}
    schema = {"$defs": {"n": {**node, "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/n"}
    start = tokenizer.encode("x = ").ids
    for seed in range(3):
        out = fm.generate(
            params, config, [start], max_new_tokens=28, constraint=fm.constraints.json_schema(schema), tokenizer=tokenizer,
            options=fm.GenerationConfig(do_sample=True), key=jax.random.key(seed),
        )  # fmt: skip
        jsonschema.validate(json.loads(texts(tokenizer, out, len(start), config)[0]), schema)


def test_stop_strings_end_where_transformers_does(tiny):
    params, config, tokenizer = tiny
    model = to_transformers(params, config).eval()
    theirs = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    start = [tokenizer.encode(text).ids for text in ("def add(self", "import os", "class A")]
    for tokens in start:
        for strings in (["self"], ["):\n", "import"], ["e"]):
            want = model.generate(
                torch.tensor([tokens]), max_new_tokens=20, do_sample=False, stop_strings=strings, tokenizer=theirs,
                pad_token_id=0,
            ).numpy()  # fmt: skip
            got = fm.generate(
                params, config, [tokens], max_new_tokens=20, tokenizer=tokenizer,
                options=fm.GenerationConfig(stop_strings=strings),
            )  # fmt: skip
            np.testing.assert_array_equal(got.tokens, want)


def test_functions_of_the_users(tiny):
    params, config, _ = tiny
    only = fm.PrefixAllowed(lambda row, tokens: [int(tokens[-1]) + 1 + row])
    out = fm.generate(params, config, [[300], [400]], max_new_tokens=3, processors=[only])
    assert out.tokens.tolist() == [[300, 301, 302, 303], [400, 402, 404, 406]]
    upwards = lambda logits, history: jnp.where(  # noqa: E731
        jnp.arange(logits.shape[1])[None] > history.last[:, None], logits, -jnp.inf
    )
    stop = lambda history: (history.new >= 4) & (history.length > 4)  # noqa: E731
    out = fm.generate(params, config, [[300], [400]], max_new_tokens=9, processors=[upwards], stops=[stop])
    assert (np.diff(np.asarray(out.tokens), axis=1) > 0).all()
    assert out.lengths.tolist() == [4, 4]


def test_time_runs_out(tiny):
    params, config, _ = tiny
    run = lambda seconds: fm.generate(  # noqa: E731
        params, config, [[300, 301]], max_new_tokens=90, options=fm.GenerationConfig(max_time=seconds, eos_token_id=[0])
    )
    whole = run(1e6)
    assert int(whole.lengths[0]) == 90
    begun = time.monotonic()
    short = run(1e-6)
    assert time.monotonic() - begun < 60
    n = int(short.lengths[0])
    assert n < 90
    np.testing.assert_array_equal(short.tokens[0], whole.tokens[0, : 2 + n])


def test_programs_are_bounded_by_buckets(tiny):
    """100 random combinations of prompt length, row options and sampling parameters: one program for each bucket."""
    params, config, _ = tiny
    random = np.random.default_rng(0)
    before, buckets = fm.compile_count(), set()
    for _ in range(100):
        length = int(random.integers(1, 33))
        given = [
            fm.GenerationConfig(
                do_sample=bool(random.integers(2)), temperature=float(random.uniform(0.3, 2)), top_k=int(random.integers(0, 80)),
                top_p=float(random.uniform(0.1, 1)), min_p=float(random.uniform(0, 0.3)), top_h=float(random.uniform(0.2, 1)),
                typical_p=float(random.uniform(0.2, 1)), repetition_penalty=float(random.uniform(0.8, 1.4)),
                min_new_tokens=int(random.integers(0, 3)), epsilon_cutoff=float(random.uniform(0, 0.01)),
            )
            for _ in range(2)
        ]  # fmt: skip
        fm.generate(
            params, config, prompts(2, length, seed=length)[0], max_new_tokens=int(random.integers(1, 4)), options=given,
            key=jax.random.key(0),
        )  # fmt: skip
        buckets.add(bucket(length))
    assert fm.compile_count() - before <= len(buckets) == 3


@pytest.mark.parametrize("given", [{}, {"max_time": 60.0}], ids=["whole", "in pieces"])
def test_warm_up(tiny, caplog, given):
    """From shapes alone; the call after it compiles no program of generation, and says what it says without."""
    params, config, _ = tiny
    asked = {"max_new_tokens": 5, "options": fm.GenerationConfig(do_sample=True, num_return_sequences=3, **given)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    names = ("whole", "first", "steps", "last")

    def compiled():
        return [name for name in names for text in caplog.messages if f"XLA compilation of jit({name})" in text]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        count = fm.warm_up(shapes, config, [3, 12, 20], batch_size=3, **asked)
        assert len(compiled()) == count == (6 if given else 2)
        caplog.clear()
        for length in (4, 19):
            out = fm.generate(params, config, prompts(3, length, seed=1)[0], key=jax.random.key(5), **asked)
            assert out.tokens.shape[0] == 9
        assert not compiled()


def test_warm_up_refuses(tiny):
    params, config, _ = tiny
    with pytest.raises(TypeError, match="warm_up: unknown argument 'tokens'"):
        fm.warm_up(params, config, [3], tokens=[[1]])
    with pytest.raises(ValueError, match="llama has no experts"):
        fm.warm_up(params, config, [3], experts="dense")
