"""`output_attentions` against transformers 5: what the newest token looks at, by columns of the text."""

import jax
import numpy as np
import pytest
import torch

import fmodels as fm
from tests.generation.pairs import PAD, VOCAB, pair, prompts
from tests.generation.test_seq2seq import MODELS, from_transformers, texts

ALL = {"output_attentions": True, "output_hidden_states": True}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request):
    model, params, config = pair(request.param)
    model.set_attn_implementation("eager")
    return model, params, config


def theirs(model, tokens, mask, **options):
    return model.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), return_dict_in_generate=True, output_attentions=True,
        pad_token_id=PAD, **({"do_sample": False} | options),
    )  # fmt: skip


def by_step(attentions, columns):
    """transformers' `(b h q s)` of each step and layer, of the newest token: `(b n l h columns)`."""
    steps = [np.stack([layer[:, :, -1].numpy() for layer in step], 1) for step in attentions]
    return np.stack([np.pad(w, [(0, 0)] * 3 + [(0, columns - w.shape[-1])]) for w in steps], 1)


def check(got, want, name="attentions", attentions=None, steps=None):
    mine = np.asarray(got.outputs[name])
    expected = by_step(want[name] if attentions is None else attentions, mine.shape[-1])
    assert mine.shape == expected.shape
    live = np.arange(mine.shape[1])[None] < (np.asarray(got.lengths) if steps is None else steps)[:, None]
    np.testing.assert_allclose(mine[live], expected[live], atol=1e-5)
    assert (expected[live].max(-1) < 0.999).any()


@pytest.mark.parametrize(
    "how", [{}, {"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "chunks", "speculation"]
)
def test_greedy(models, how):
    """Rows of different length, padded between their tokens too; some end early."""
    model, params, config = models
    tokens, mask = prompts(3, 20)
    want = theirs(model, tokens, mask, max_new_tokens=9)
    ends = int(want.sequences[0, 23])
    want = theirs(model, tokens, mask, max_new_tokens=9, eos_token_id=ends)
    options = fm.GenerationConfig(output_attentions=True, eos_token_id=ends, pad_token_id=PAD, **how)
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9, options=options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    assert set(np.asarray(got.lengths)) != {9}
    assert got.outputs["attentions"].shape == (
        3,
        got.tokens.shape[1] - 20,
        config.num_layers,
        config.num_heads,
        got.tokens.shape[1],
    )
    check(got, {"attentions": want.attentions})


def test_beams(models):
    model, params, config = models
    tokens, mask = prompts(2, 9)
    want = theirs(model, tokens, mask, max_new_tokens=7, num_beams=3)
    options = fm.GenerationConfig(output_attentions=True, pad_token_id=PAD, num_beams=3)
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=7, options=options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    check(got, {"attentions": want.attentions}, steps=np.full(6, 7))


OTHERS = {
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 3},
    "phrases": {"num_beams": 3, "force_words_ids": [[17, 18]], "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low"},
}


@pytest.mark.parametrize("how", OTHERS)
def test_what_transformers_5_cannot_decode(models, how):
    """What the newest token looks at when transformers reads the whole text; of beams, along the path of each that is returned."""
    model, params, config = models
    tokens, mask = prompts(2, 8)
    options = fm.GenerationConfig(output_attentions=True, pad_token_id=PAD, eos_token_id=2, **OTHERS[how])
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=6, options=options, key=jax.random.key(2))
    rows = len(got.tokens)
    real = np.repeat(mask, rows // 2, 0)
    text = torch.tensor(np.asarray(got.tokens), dtype=torch.long)
    there = torch.tensor(np.concatenate([real, np.ones((rows, 6), real.dtype)], 1))
    with torch.no_grad():
        places = (there.cumsum(-1) - 1).clamp(min=0)
        layers = model(text, attention_mask=there, position_ids=places, output_attentions=True).attentions
    want = np.stack([layer.numpy() for layer in layers], 1)  # (b l h t s)
    found = np.asarray(got.outputs["attentions"])
    lengths = np.asarray(got.lengths)
    for row in range(rows):
        for step in range(int(lengths[row])):
            source = row if got.beam_indices is None else int(got.beam_indices[row, step])
            assert source >= 0
            np.testing.assert_allclose(found[source, step], want[row, :, :, 7 + step], atol=1e-5)
    assert lengths.sum() > rows


def test_goes_on_after_a_prefix(models):
    """The columns are those of the whole text, which transformers reads at once."""
    model, params, config = models
    tokens, mask = prompts(2, 6)
    options = fm.GenerationConfig(output_attentions=True, pad_token_id=PAD)
    before = fm.generate(params, config, tokens, mask=mask, max_new_tokens=5, options=options, keep_cache=True)
    more = np.random.default_rng(8).integers(10, VOCAB, (2, 4))
    got = fm.generate(params, config, more, max_new_tokens=6, options=options, prefix=before)
    whole = np.concatenate([np.asarray(before.tokens), more], 1)
    real = np.concatenate([np.asarray(before.mask), np.ones_like(more)], 1).astype(np.int64)
    want = theirs(model, whole, real, max_new_tokens=6)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    check(got, {"attentions": want.attentions})


def test_padding_between_tokens(models):
    _, params, config = models
    tokens = np.random.default_rng(4).integers(10, VOCAB, (1, 8))
    options = fm.GenerationConfig(output_attentions=True, pad_token_id=PAD)
    plain = fm.generate(params, config, tokens, max_new_tokens=4, options=options)
    columns = [0, 1, 2, 5, 6, 7, 8, 9]
    spread, mask = np.zeros((1, 10), np.int64), np.zeros((1, 10), bool)
    spread[:, columns], mask[:, columns] = tokens, True
    got = fm.generate(params, config, spread, mask=mask, max_new_tokens=4, options=options)
    want = np.zeros((1, 4, *plain.outputs["attentions"].shape[2:4], 14), np.float32)
    want[..., [*columns, 10, 11, 12, 13]] = plain.outputs["attentions"]
    np.testing.assert_allclose(got.outputs["attentions"], want, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    model.set_attn_implementation("eager")
    params, config = from_transformers(model)
    tokens, mask = texts()
    want = theirs(model, tokens, mask, max_new_tokens=8, num_beams=2)
    options = fm.GenerationConfig(num_beams=2, pad_token_id=PAD, **ALL)
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=8, options=options)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    assert got.outputs["cross_attentions"].shape[-1] == tokens.shape[1]
    steps = np.full(6, len(want.cross_attentions))
    check(got, None, "attentions", want.decoder_attentions, steps)
    check(got, None, "cross_attentions", want.cross_attentions, steps)


def test_sampled_rows_and_layers_that_differ(models):
    _, params, config = models
    tokens, mask = prompts(2, 6)
    options = fm.GenerationConfig(do_sample=True, num_return_sequences=2, pad_token_id=PAD, output_attentions=True)
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=4, options=options, key=jax.random.key(1))
    sums = np.asarray(got.outputs["attentions"]).sum(-1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    some = range(config.num_heads // config.num_kv_heads)
    smaller, ragged = fm.prune_heads(params, config, {1: list(some)})
    with pytest.raises(ValueError, match="output_attentions needs layers with equally many heads"):
        fm.generate(smaller, ragged, tokens, mask=mask, max_new_tokens=4, options=options, key=jax.random.key(1))
    found = fm.forward(smaller, ragged, tokens, mask=mask, attentions=True).attentions
    assert [w.shape[1] for w in found] == [w["attention"]["query"]["weight"].shape[0] for w in smaller["layers"]]
