"""Decoding with a cache, a token or a few at a time: the logits of the whole text at once, by transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

import fmodels as fm
from fmodels.models import FAMILIES
from tests import families


@pytest.mark.parametrize("chunks", [(1,) * 7, (4, 2, 1)], ids=["steps", "chunks"])
@pytest.mark.parametrize("name", families.CAUSAL)
def test_cached_decode(case, name, chunks):
    """Against transformers' forward on the whole text, not against ours."""
    loaded = case(name)
    given = loaded.inputs("left")
    given.pop("positions", None)
    for params in (loaded.params, loaded.unstacked) if name == "llama/causal-lm" else (loaded.params,):
        cache, parts, weights, start = fm.init_cache(params, 2, 9), [], [], 0
        for width in chunks:
            part = {name: a[:, start : start + width] for name, a in given.items()}
            out = fm.forward(params, loaded.config, **part, cache=cache, attentions=True)
            cache, start = out.cache, start + width
            parts.append(out.logits)
            weights.append(out.attentions)
        assert int(cache.length) == 7
        want, real = loaded.reference("left"), given["mask"].astype(bool)
        assert np.abs(np.concatenate(parts, 1) - want["logits"])[real].max() < 1e-5
        found = np.concatenate(weights, 3)
        assert found.shape[-1] == 9  # slots of the cache
        if "attentions" in want:
            error = np.abs(found - np.pad(want["attentions"], [(0, 0)] * 4 + [(0, 2)]))
            assert np.where(real[None, :, None, :, None], error, 0).max() < 1e-5


@pytest.mark.parametrize("name", ["deepseek_v3/causal-lm", "gpt_oss/causal-lm", "bloom/causal-lm"])
def test_cached_decode_in_8_bits(case, name):
    """Latent vectors, layers with sinks and windows, and ALiBi: near transformers' forward on the whole text, but not it."""
    loaded = case(name)
    given = loaded.inputs("left")
    cache, parts = fm.init_cache(loaded.params, 2, 9, quantized=True), []
    for columns in (slice(0, 4), slice(4, 7)):
        part = {name: given[name][:, columns] for name in ("tokens", "mask")}
        out = fm.forward(loaded.params, loaded.config, **part, cache=cache)
        cache = out.cache
        parts.append(out.logits)
    want, real = loaded.reference("left")["logits"], given["mask"].astype(bool)
    error = np.abs(np.concatenate(parts, 1) - want)[real].max() / np.abs(want[real]).max()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("rows", [False, True], ids=["one length", "length per row"])
@pytest.mark.parametrize("name", families.SEQ2SEQ)
def test_cached_decode_of_pairs(case, name, rows):
    """The encoder runs once: beforehand, by `encode`, or in the first call; then its tokens are not asked for."""
    loaded = case(name)
    for padding in ("left", "right"):
        given, want = loaded.inputs(padding), loaded.reference(padding)["logits"]
        real = given["decoder_mask"].astype(bool)
        encode = FAMILIES[loaded.case.family].encode
        cross = encode(loaded.params, loaded.config, given["tokens"], mask=given["mask"].astype(bool))
        for params, first, chunks in (
            (loaded.params, None, (1,) * 5), (loaded.unstacked, cross, (2, 2, 1)), (loaded.params, cross, (3, 1, 1)),
        ):  # fmt: skip
            cache, parts, start = fm.init_cache(params, 2, 7)._replace(cross=first), [], 0
            cache = cache._replace(length=jnp.zeros(2, jnp.int32)) if rows else cache
            for width in chunks:
                part = {n: a[:, start : start + width] for n, a in given.items() if n.startswith("decoder_")}
                if cache.cross is None:
                    part |= {"tokens": given["tokens"], "mask": given["mask"]}
                out = fm.forward(params, loaded.config, **{"tokens": None, **part}, cache=cache)
                cache, start = out.cache, start + width
                parts.append(out.logits)
            assert np.asarray(cache.length).tolist() == ([5, 5] if rows else 5)
            assert np.abs(np.concatenate(parts, 1) - want)[real].max() < 1e-5


@pytest.mark.parametrize("name", families.PAIRS)
def test_cached_rows_at_different_places(case, name):
    """A row that is behind in its cache counts distances, and places, from where it is."""
    loaded = case(name)
    given = loaded.inputs()
    given = {n: a for n, a in given.items() if not n.startswith("decoder_")}
    texts = np.random.default_rng(5).integers(4, 61, (2, 5))
    want = np.asarray(fm.forward(loaded.params, loaded.config, **given, decoder_tokens=texts).logits)
    cache = fm.init_cache(loaded.params, 2, 7)._replace(length=jnp.zeros(2, jnp.int32))
    out = fm.forward(loaded.params, loaded.config, **given, decoder_tokens=texts[:, :3], cache=cache)
    cache = out.cache
    behind = cache._replace(length=jnp.array([3, 2]), mask=cache.mask.at[1, 2].set(False))
    step = np.stack([texts[0, 3:5], texts[1, 2:4]])
    got = np.asarray(fm.forward(loaded.params, loaded.config, None, decoder_tokens=step, cache=behind).logits)
    assert np.abs(got - np.stack([want[0, 3:5], want[1, 2:4]])).max() < 1e-5


def test_what_pairs_refuse(case):
    t5, bart, llama = case("t5/seq2seq-lm"), case("bart/seq2seq-lm"), case("llama/causal-lm")
    tokens = np.full((2, 4), 5)
    for row, given, words in (
        (llama, {"decoder_tokens": tokens}, "llama of task 'causal-lm' is one stack of layers"),
        (t5, {}, "t5 needs decoder_tokens"),
        (t5, {"tokens": None, "decoder_tokens": tokens}, "t5 needs tokens"),
        (t5, {"decoder_tokens": tokens, "positions": tokens}, "t5 has no positions"),
        (t5, {"decoder_tokens": tokens, "token_types": tokens}, "t5 has no token types"),
        (t5, {"decoder_tokens": tokens + 60}, "decoder_tokens reach from 65 to 65, outside of 0 … 60"),
        (t5, {"decoder_tokens": tokens[:1]}, r"the encoder has 2 rows, decoder_tokens have shape \(1, 4\)"),
        (t5, {"decoder_tokens": tokens, "decoder_mask": tokens[:, :2]}, r"decoder_mask has shape \(2, 2\)"),
        (bart, {"tokens": np.full((1, 33), 5)}, "33 tokens are more than the 32 positions"),
        (bart, {"decoder_tokens": np.full((2, 33), 5)}, "33 decoder_tokens are more than the 32 positions"),
        (case("bart/sequence-classification"), {}, "end token 1, which is not in each row"),
        (case("t5/sequence-classification"), {"decoder_tokens": tokens[:, :3]}, "at its end token's column"),
        (case("t5/encoder"), {"cache": fm.init_cache(t5.params, 2, 4)}, "a cache is for a decoder"),
    ):
        with pytest.raises(ValueError, match=words):
            fm.forward(row.params, row.config, **{"tokens": tokens, **given})
    with pytest.raises(ValueError, match=r"no decoder, only encoder\.layers"):
        fm.init_cache(case("t5/encoder").params, 2, 4)
    with pytest.raises(NotImplementedError, match=r"prune_heads: .* \(encoder\.layers, decoder\.layers\)"):
        fm.prune_heads(t5.params, t5.config, {0: [1]})
