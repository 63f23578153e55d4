"""Layers that see a window: tokens of transformers 5, whatever form the cache has, and rings of the size that they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf

import fmodels as fm
from fmodels.nn.cache import periods, rings, slots_of
from interop.transformers import from_transformers
from tests.generation.pairs import PAD, VOCAB, prompts

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "attn_implementation": "eager", "pad_token_id": PAD,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHARES = {name: value for name, value in SIZES.items() if name != "head_dim"}
NEO = {name: SIZES[name] for name in SIZES if not name.startswith("num_") and name != "head_dim"}
MODELS = {
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **SIZES)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=10, **SIZES)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(use_sliding_window=True, sliding_window=3, max_window_layers=1, **SHARES)
    ),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            num_layers=3, num_heads=4, window_size=4, attention_types=[[["local", "global"], 1], [["local"], 1]], **NEO
        )
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    torch.manual_seed(3)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    params, config = from_transformers(model)
    return model, params, fm.unstack_layers(params), config


def theirs(model, tokens, mask, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": PAD, **options}
    return model.generate(torch.tensor(tokens), attention_mask=torch.tensor(mask), **options)


HOW = {
    "greedy": {},
    "chunks": {"prefill_chunk_size": 16},
    "speculation": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 3},
    "8 bits": {"cache_implementation": "quantized"},
}


@pytest.mark.parametrize("how", HOW)
def test_tokens_equal_transformers(models, how):
    """Prompts longer than the window, and more new tokens than it has; as stacked layers and one by one."""
    model, params, unstacked, config = models
    tokens, mask = prompts(3, 20)
    same = {"num_beams": 3} if how == "beams" else {}
    want = theirs(model, tokens, mask, max_new_tokens=12, output_attentions=True, **same)
    options = fm.GenerationConfig(output_attentions=how != "8 bits", pad_token_id=PAD, **HOW[how])
    for tree in (params, unstacked):
        got = fm.generate(tree, config, tokens, mask=mask, max_new_tokens=12, options=options)
        if how == "8 bits":
            assert (np.asarray(got.tokens) == want.sequences.numpy()).mean() > 0.8
            continue
        np.testing.assert_array_equal(got.tokens, want.sequences)
        mine = np.asarray(got.outputs["attentions"])
        # transformers gives the weights of the keys that it has kept: the last ones.
        for step, layers in enumerate(want.attentions):
            for i, layer in enumerate(layers):
                weights = layer[:, :, -1].numpy()
                last = 20 + step
                ours = mine[:, step, i, :, :last][..., -weights.shape[-1] :]
                np.testing.assert_allclose(ours, weights, atol=1e-5)
                assert not mine[:, step, i, :, : last - weights.shape[-1]].any()


def test_rings_are_as_small_as_they_can_be(models):
    _, params, unstacked, config = models
    windows = config.windows
    assert rings(unstacked, config, 64) == tuple(64 if w is None else w - 1 for w in windows)
    assert rings(unstacked, config, 64, ahead=3) == tuple(64 if w is None else w + 2 for w in windows)
    assert rings(unstacked, config, 2) is None
    for tree in (params, unstacked):
        sizes = rings(tree, config, 64)
        assert sizes == tuple(64 if w is None else w - 1 for w in windows)
        cache = fm.init_cache(tree, 2, 64, config=config)
        assert slots_of(cache) == sizes
        assert sum(x.size for x in jax.tree.leaves(cache.keys)) == 2 * config.num_kv_heads * config.head_dim * sum(
            sizes
        )
        assert cache.mask.shape == (2, 64)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_forward_with_rings(models, width):
    """Texts of three times the window, read in pieces: the logits of the whole text at once, by transformers."""
    model, params, unstacked, config = models
    tokens, mask = prompts(2, 21, seed=5)
    with torch.no_grad():
        places = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        want = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=places).logits.numpy()
    for tree, rows in ((params, False), (unstacked, False), (unstacked, True)):
        cache = fm.init_cache(tree, 2, 21, config=config)
        cache = cache._replace(length=jnp.zeros(2, jnp.int32)) if rows else cache
        parts = []
        for start in range(0, 21, width):
            piece = slice(start, start + width)
            out = fm.forward(tree, config, tokens[:, piece], mask=mask[:, piece], cache=cache)
            cache = out.cache
            parts.append(out.logits)
        error = np.abs(np.concatenate(parts, 1) - want)
        assert error[mask.astype(bool)].max() < 2e-5


def test_chats_go_on(models):
    """A cache that is kept has rings, too: rows that end early leave padding behind, wider than the window, which takes no
    room; and speculation, which takes tokens back, makes them larger."""
    model, params, _, config = models
    tokens, mask = prompts(2, 6)
    plain = np.asarray(fm.generate(params, config, tokens, mask=mask, max_new_tokens=9).tokens)
    end = next(t for t in plain[0, 6:9].tolist() if t not in plain[1, 6:])
    first = fm.GenerationConfig(pad_token_id=PAD, eos_token_id=end)
    turn = fm.generate(params, config, tokens, mask=mask, max_new_tokens=9, options=first, keep_cache=True)
    assert turn.lengths[0] <= 3 < turn.lengths[1]
    for ahead, more in ((0, {}), (3, {"prompt_lookup_num_tokens": 3})):
        columns = turn.cache.mask.shape[1]
        assert slots_of(turn.cache) == tuple(columns if w is None else w - 1 for w in config.windows)
        new = np.random.default_rng(8).integers(10, VOCAB, (2, 4))
        options = fm.GenerationConfig(pad_token_id=PAD, **more)
        before = turn
        turn = fm.generate(params, config, new, max_new_tokens=6, options=options, prefix=before, keep_cache=True)
        assert min(slots_of(turn.cache)) == min(w for w in config.windows if w) - 1 + ahead
        for row in range(2):
            said = np.concatenate([np.asarray(before.tokens)[row][np.asarray(before.mask)[row]], new[row]])[None]
            want = theirs(model, said, np.ones_like(said), max_new_tokens=6).sequences[0, said.shape[1] :]
            np.testing.assert_array_equal(turn.tokens[row, -6:], want)


def test_many(models):
    """Rows are refilled at places of their own in the rings."""
    _, params, _, config = models
    random = np.random.default_rng(2)
    texts = [random.integers(10, VOCAB, n).tolist() for n in (3, 20, 9, 31, 5)]
    found = fm.generate_many(params, config, texts, max_new_tokens=10, batch_size=2)
    for text, one in zip(texts, found, strict=True):
        alone = fm.generate(params, config, [text], max_new_tokens=10).tokens[0, len(text) :]
        np.testing.assert_array_equal(one.tokens, alone)


def test_draft_with_windows(models):
    """The model drafts for itself, with noise that makes it fail now and then."""
    _, _, unstacked, config = models
    tokens, mask = prompts(2, 9)
    noise = 0.01 if config.model_type == "gpt_neo" else 0.03  # whose scores are not scaled down
    noisy = jax.tree.map(lambda x: x + noise * jax.random.normal(jax.random.key(x.size), x.shape), unstacked)
    plain = fm.generate(unstacked, config, tokens, mask=mask, max_new_tokens=14)
    options = fm.GenerationConfig(num_assistant_tokens=4)
    got = fm.generate(unstacked, config, tokens, mask=mask, max_new_tokens=14, draft=(noisy, config), options=options)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    calls = np.asarray(got.outputs["calls"]).max(1)  # the first token is the prompt's; each call can give 5 more
    assert calls.max() < 13
    assert calls.max() > 3


def deep(layers):
    sizes = SIZES | {"num_hidden_layers": layers}
    return hf.Gemma3TextConfig(sliding_window=4, sliding_window_pattern=3, query_pre_attn_scalar=10, **sizes)


def test_periods():
    """Eight layers, every third without a window: two periods and two layers more."""
    torch.manual_seed(4)
    model = hf.Gemma3ForCausalLM(deep(8)).eval()
    params, config = from_transformers(model)
    assert periods(tuple(w is None for w in config.windows)) == ((0, 3, 2), (6, 1, 2))
    tokens, mask = prompts(2, 20)
    want = theirs(model, tokens, mask, max_new_tokens=8, output_attentions=True)
    options = fm.GenerationConfig(pad_token_id=PAD, output_attentions=True, output_hidden_states=True)
    got = fm.generate(params, config, tokens, mask=mask, max_new_tokens=8, options=options, keep_cache=True)
    np.testing.assert_array_equal(got.tokens, want.sequences)
    assert slots_of(got.cache) == (3, 3, got.cache.mask.shape[1]) * 2 + (3, 3)
    assert [stack.shape[0] for stack in got.cache.keys.stacks] == [6, 2]
    for i, layer in enumerate(want.attentions[-1]):
        ours = np.asarray(got.outputs["attentions"])[:, -1, i, :, :27]
        np.testing.assert_allclose(ours[..., -layer.shape[-1] :], layer[:, :, -1], atol=1e-5)


def test_programs_do_not_grow_with_depth():
    def program(layers):
        config = fm.models.gemma3_text.Config.from_hf(deep(layers).to_dict(), task="causal-lm")
        params = fm.abstract(config)
        cache = jax.eval_shape(lambda: fm.init_cache(params, 2, 64, config=config))
        assert set(slots_of(cache)) == {3, 64}
        tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        run = jax.make_jaxpr(lambda p, t, c: fm.forward(p, config, t, cache=c).logits)(params, tokens, cache)
        return str(run).count("dot_general")

    assert program(12) == program(48)


def test_patterns_without_a_period_have_full_caches():
    types = ["full_attention" if i * i % 31 < 15 else "sliding_attention" for i in range(40)]
    config = fm.models.gemma2.Config.from_hf(
        hf.Gemma2Config(num_hidden_layers=40, layer_types=types).to_dict(), task="base"
    )
    assert rings(fm.abstract(config), config, 9000) is None
    assert set(rings({"layers": ({},) * 40}, config, 9000)) == {4095, 9000}
