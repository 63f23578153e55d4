"""The common suite: every family, every head, against transformers 5, eager, float32."""

import copy
import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fmodels as fm
from fmodels import nn
from fmodels.models import FAMILIES, _template
from fmodels.nn import positions
from tests import families

# Where the table of angles depends on the length of the text, keys that are cached were turned by another table, as in
# transformers.
CAUSAL = [c.name for c in families.CASES if c.task == "causal-lm" and not c.name.endswith("/long")]
SEQ2SEQ = [c.name for c in families.CASES if c.task == "seq2seq-lm"]
PLAIN = ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm"]
PAIRS = ["t5/seq2seq-lm", "bart/seq2seq-lm"]


def check_parity(loaded, padding=None, **options):
    got = loaded.forward(padding, **options)
    families.assert_equal(got, loaded.reference(padding), **loaded.masks(padding), causal=loaded.case.causal)


def test_every_task_of_every_family_has_a_row():
    have = {(case.family, case.task) for case in families.CASES}
    assert have == {(name, task) for name, family in FAMILIES.items() for task in family.config.ARCHITECTURES}
    for case in families.CASES:
        assert FAMILIES[case.family].config.ARCHITECTURES[case.task] == case.architecture


def test_other_summaries_are_refused():
    """transformers takes them along the axis of the choices: a logit per token, of one choice."""
    case = families.by_name("gpt2/double-heads")
    data = families.build(case).config.to_dict() | {"architectures": [case.architecture]}
    assert fm.models.gpt2.Config.from_hf(data).task == "double-heads"
    with pytest.raises(ValueError, match="summary_type='mean' is not supported, only 'cls_index'"):
        fm.models.gpt2.Config.from_hf(data | {"summary_type": "mean"})
    other = data | {"summary_type": "mean", "architectures": ["GPT2LMHeadModel"]}
    assert fm.models.gpt2.Config.from_hf(other).to_hf()["summary_type"] == "mean"


def fields_of(config, keys):
    """What `from_hf` makes of it: the fields or the error. Of windows, which it may or may not spell out, what they do."""
    try:
        found = config.from_hf(keys, task="base")
    except ValueError as error:
        return str(error)
    spelled = ("layer_types", "no_rope_layers", "sliding_window")
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.compare and f.name not in spelled}
    return fields | {"kinds": getattr(found, "kinds", None)}


def test_old_and_other_keys():
    """transformers reads the same from them."""
    for kind, family, keys, fields in (
        (transformers.GPTNeoXConfig, "gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 50}, ("rope",)),
        (transformers.BloomConfig, "bloom", {"n_embed": 48, "num_attention_heads": 6}, ("hidden_size", "num_heads")),
        (transformers.OPTConfig, "opt", {"hidden_size": 24, "enable_bias": False}, ("embedding_size", "mlp_bias")),
        (transformers.XGLMConfig, "xglm", {"hidden_size": 32, "num_hidden_layers": 3}, ("head_dim", "num_layers")),
        (transformers.FalconConfig, "falcon", {"n_embed": 142, "num_attention_heads": 71}, ("hidden_size", "head_dim")),
        (transformers.GptOssConfig, "gpt_oss", {"rope_theta": 500.0}, ("rope",)),
        (transformers.GPTNeoConfig, "gpt_neo", {"attention_layers": ["local"] * 24}, ("attention_layers", "kinds")),
    ):
        config = FAMILIES[family].config
        assert fields_of(config, keys) == fields_of(config, kind(**keys).to_dict())
        ours = config.from_hf(keys, task="base")
        assert all(getattr(ours, name) != getattr(config(), name) for name in fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_a_config_omits(name):
    """They have transformers' defaults, in a config.json without any key and in those with one, which others may follow.

    Only values that transformers refuses are left out; it refuses no family's defaults, and neither do we.
    """
    config, kind = FAMILIES[name].config, CONFIG_MAPPING[name]
    whole = kind().to_dict()
    assert config.from_hf({}, task="base") == config(task="base")
    assert isinstance(fields_of(config, whole), dict)
    assert fields_of(config, {"model_type": name}) == fields_of(config, whole)
    compared = 0
    if name in ("t5", "mt5"):
        del whole["tie_word_embeddings"]  # not transformers' config reads it, but its models, off the weights
    for key, default in whole.items():
        others = (2 * default, default // 2) if isinstance(default, int) else ()
        others = (not default,) if isinstance(default, bool) else others
        for value in (None, *others):
            try:
                theirs = kind(**{key: value}).to_dict()
            except StrictDataclassError:
                continue
            assert fields_of(config, {key: value}) == fields_of(config, theirs), (key, value)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=false"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("falcon", {"multi_query": False, "num_kv_heads": 7}, "num_kv_heads=7"),
        ("opt", {"word_embed_proj_dim": 512, "architectures": ["OPTForSequenceClassification"]}, "word_embed_proj_dim=512"),
        ("gpt_neo", {"attention_types": [[["global", "far"], 12]]}, "layer_types has far"),
        ("gpt_neox", {"hidden_size": 100}, "hidden_size=100 is not a multiple of num_attention_heads=64"),
        ("bloom", {"hidden_size": 100}, "hidden_size=100 is not a multiple of n_head=8"),
    ],
)  # fmt: skip
def test_what_decoders_refuse(family, keys, words):
    task = None if "architectures" in keys else "base"
    with pytest.raises(ValueError, match=words):
        FAMILIES[family].config.from_hf(keys, task=task)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_outputs_and_hidden_states(loaded, padding):
    assert loaded.config.task == loaded.case.task
    assert len(loaded.reference(padding)) >= 2  # something beside the hidden states
    check_parity(loaded, padding)


@pytest.mark.parametrize(
    "name", [*CAUSAL, *SEQ2SEQ, "gpt2/double-heads", "bert/pretraining", "t5/encoder", "bart/base"]
)
def test_unstacked(case, name):
    loaded = case(name)
    check_parity(loaded, "left" if loaded.case.causal else "right", params=loaded.unstacked)


@pytest.mark.parametrize("name", PLAIN)
def test_positions_and_boolean_mask(case, name):
    loaded = case(name)
    given = loaded.inputs("left")
    want = loaded.reference("left")["logits"]
    if loaded.case.family == "bert":  # for BERT these are other positions than the default
        model, mask = loaded.model, torch.tensor(given["mask"])
        with torch.no_grad():
            tokens, positions = (torch.tensor(given[n], dtype=torch.long) for n in ("tokens", "positions"))
            types = torch.tensor(given["token_types"], dtype=torch.long)
            want = model(tokens, attention_mask=mask, position_ids=positions, token_type_ids=types).logits.numpy()
    given["mask"] = given["mask"].astype(bool)
    got = np.asarray(fm.forward(loaded.params, loaded.config, **given).logits)
    assert np.abs(got - want)[given["mask"]].max() < 1e-5


@pytest.mark.parametrize("name", [*PLAIN, *PAIRS])
def test_select(case, name):
    loaded = case(name)
    got = loaded.forward("right", select=jnp.array([4, 2]), hidden_states=False, attentions=False).logits
    assert got.shape == (2, 1, 61)
    want = loaded.reference("right")["logits"][[0, 1], [4, 2]]
    assert np.abs(np.asarray(got)[:, 0] - want).max() < 1e-5


@pytest.mark.parametrize("chunks", [(1,) * 7, (4, 2, 1)], ids=["steps", "chunks"])
@pytest.mark.parametrize("name", CAUSAL)
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
@pytest.mark.parametrize("name", SEQ2SEQ)
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


@pytest.mark.parametrize("name", PAIRS)
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


def test_gradients(loaded):
    """Of a random linear functional of the outputs, mapped to transformers' names."""
    given, random = loaded.inputs(), np.random.default_rng(0)
    names = [n for n in loaded.reference() if not n.endswith("hidden_states")]
    weights = {n: random.normal(size=loaded.reference()[n].shape).astype(np.float32) for n in names}
    model = loaded.model
    model.zero_grad()
    theirs = families.outputs(families.call(model, given))
    sum((theirs[n] * torch.tensor(weights[n])).sum() for n in names).backward()

    def functional(params):
        out = loaded.forward(params=params, hidden_states=False)
        return sum((getattr(out, n) * weights[n]).sum() for n in names)

    gradient = jax.jit(jax.grad(functional))(loaded.params)
    ours = fm.to_disk(jax.tree.map(np.asarray, gradient), loaded.config, module=True)
    want, spellings = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        spellings.setdefault(p, []).append(name)
    for p, same in spellings.items():  # a tied one has several names, of which we have one
        (name,) = [name for name in same if name in ours]
        want[name] = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
    assert ours.keys() - {n for n, _ in model.named_buffers()} == want.keys()
    for name, gradient in want.items():
        error = np.abs(np.asarray(ours[name]) - gradient) / np.maximum(1, np.abs(gradient))
        assert error.max() <= 1e-4, (name, error.max())


def test_tree_fits_config(loaded):
    """`abstract` and `check` agree with what lies on disk; `match_config` leaves a fitting config alone."""
    fm.check(loaded.params, loaded.config)
    fm.check(loaded.unstacked, loaded.config)
    assert fm.match_config(loaded.params, loaded.config) is loaded.config
    if "no-pooler" not in loaded.case.name and "untied" not in loaded.case.name:
        chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, fm.abstract(loaded.config))
    chex.assert_tree_all_finite(loaded.params)
    assert sum(a.size for a in jax.tree.leaves(loaded.params)) == sum(
        p.numel() for p in (*loaded.model.parameters(), *families.learned_buffers(loaded.model))
    )


@pytest.mark.parametrize("name", [*PLAIN, *PAIRS, "gpt2/double-heads", "bert/pretraining", "mt5/base"])
def test_init_like_transformers(case, name):
    """Fresh parameters: the same leaves, and the same spread of each as a fresh model of transformers."""
    loaded = case(name)
    params = jax.tree.map(np.asarray, jax.jit(lambda key: fm.init(loaded.config, key))(jax.random.key(0)))
    fm.check(params, loaded.config)
    again = type(loaded.model)(loaded.model.config, **loaded.case.options)
    theirs = {name: p.detach().numpy() for name, p in again.named_parameters()}
    for name, ours in fm.to_disk(params, loaded.config, module=True).items():
        if name in theirs and theirs[name].size >= 100:
            assert np.std(ours) == pytest.approx(np.std(theirs[name]), rel=0.3, abs=1e-6), name
            near = max(0.1, 0.2 * float(np.std(ours)))
            assert np.mean(ours) == pytest.approx(np.mean(theirs[name]), abs=near), name


@pytest.mark.parametrize("name", [*PLAIN, *PAIRS])
def test_vmap_jit_and_grad_compose(case, name):
    loaded = case(name)
    given = loaded.inputs()
    given.pop("positions", None)

    @jax.jit
    def rows(params, given):
        return jax.vmap(
            lambda row: fm.forward(params, loaded.config, **{n: a[None] for n, a in row.items()}).logits[0]
        )(given)

    got = np.asarray(rows(loaded.params, given))
    assert np.abs(got - loaded.reference()["logits"]).max() < 1e-5
    chex.assert_shape(got, loaded.reference()["logits"].shape)


def test_gradients_per_example(case):
    """`vmap` of `grad` gives each row's own gradient; their sum is PyTorch's gradient of the sum."""
    loaded = case("gpt2/causal-lm")
    given = loaded.inputs()
    loss = lambda p, t, m: fm.forward(p, loaded.config, t[None], mask=m[None]).logits.std()  # noqa: E731
    rows = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(loaded.params, given["tokens"], given["mask"])
    chex.assert_tree_shape_prefix(rows, (2,))
    loaded.model.zero_grad()
    sum(row.std(correction=0) for row in families.call(loaded.model, given).logits).backward()
    want = loaded.model.transformer.wte.weight.grad.numpy()
    assert np.abs(np.asarray(rows["embed"]["tokens"]).sum(0) - want).max() < 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_traced_once(case, name, monkeypatch):
    """Calls with other values, another mask type, and an equal config from elsewhere do not compile again."""
    loaded = case(name)
    family = FAMILIES[loaded.case.family]
    config = dataclasses.replace(loaded.config, bos_token_id=60)  # a config of this test's own
    counted = chex.assert_max_traces(family.forward, n=1)
    monkeypatch.setitem(FAMILIES, loaded.case.family, family._replace(forward=counted))
    tokens = loaded.inputs()["tokens"]
    for i in range(3):
        mask = np.ones((2, 7), [bool, np.int32, np.float32][i])
        fm.forward(loaded.params, dataclasses.replace(config), jnp.asarray((tokens + i) % 61), mask=mask)
    with pytest.raises(AssertionError, match="traced"):
        fm.forward(loaded.params, config, tokens[:, :6], mask=np.ones((2, 6), bool))
    chex.clear_trace_counter()


MUTATIONS = {
    "wrong eps gpt2": ("gpt2/causal-lm", {"norm_eps": 1e-6}, None),
    "wrong eps llama": ("llama/causal-lm", {"norm_eps": 1e-5}, None),
    "wrong eps bert": ("bert/masked-lm", {"norm_eps": 1e-5}, None),
    "wrong gelu": ("bert/masked-lm", {"activation": "gelu_new"}, None),
    "wrong gelu gpt2": ("gpt2/causal-lm", {"activation": "gelu"}, None),
    "no query bias": ("llama/causal-lm/tied-biases", {}, "layers.attention.query.bias"),
    "no output bias": ("gpt2/causal-lm", {}, "layers.attention.output.bias"),
    "no mlp bias": ("bert/masked-lm", {}, "layers.mlp.up.bias"),
    "no norm bias": ("gpt2/causal-lm", {}, "final_norm.bias"),
    "no head bias": ("bert/masked-lm", {}, "lm_head.bias"),
    "scale by layer": ("gpt2/causal-lm", {"scale_attention_by_inverse_layer": True}, None),
    "not causal": ("bert/causal-lm", {"causal": False}, None),
    "wrong eps t5": ("t5/seq2seq-lm", {"norm_eps": 1e-2}, None),
    "buckets end later": ("t5/encoder", {"max_distance": 12}, None),
    "unscaled logits": ("t5/seq2seq-lm", {"scale_logits": False}, None),
    "scaled logits": ("mt5/seq2seq-lm", {"scale_logits": True}, None),
    "exact gelu": ("mt5/base", {"activation": "gelu"}, None),
    "tied": ("t5/seq2seq-lm/untied", {}, "lm_head.weight"),
    "wrong eps bart": ("bart/seq2seq-lm", {"norm_eps": 1e-3}, None),
    "unscaled embedding": ("bart/base", {"scale_embedding": False}, None),
    "no bias of logits": ("bart/seq2seq-lm", {}, "lm_head.bias"),
    "no query bias bart": ("bart/base", {}, "decoder.layers.cross_attention.query.bias"),
    "shared table": ("bart/seq2seq-lm/untied", {}, "decoder.embed.tokens"),
    "other start": ("bart/base", {"decoder_start_token_id": 4}, None),
    "wider window": ("mistral/causal-lm", {"sliding_window": 4}, None),
    "narrower window": ("gemma2/causal-lm", {"sliding_window": 2}, None),
    "window in other layers": ("qwen2/base", {"layer_types": ("sliding_attention",) * 3}, None),
    "scores as they are": ("gemma2/causal-lm", {"attention_cap": None}, None),
    "logits as they are": ("gemma3_text/causal-lm", {"logit_cap": None}, None),
    "wrong scale of scores": ("gemma2/base", {"query_pre_attn_scalar": 10}, None),
    "one rotary base": ("gemma3_text/base", {"local_rope": positions.Rope()}, None),
    "no query norm": ("qwen3/base", {}, "layers.attention.query_norm"),
    "no joint norm": ("olmo2/base", {}, "layers.attention.key_norms"),
    "norm after": ("olmo2/base", {}, "layers.mlp_after_norm"),
    "no head norm": ("cohere/causal-lm", {}, "layers.attention.key_norms"),
    "logits unscaled": ("cohere/causal-lm", {"logit_scale": 1.0}, None),
    "residual unscaled": ("granite/base", {"residual_multiplier": 1.0}, None),
    "embedding unscaled": ("granite/base", {"embedding_multiplier": 1.0}, None),
    "rotates all": ("stablelm/base", {"rope": positions.Rope()}, None),
    "serial": ("stablelm/causal-lm", {"parallel": False}, None),
    "positions everywhere": ("smollm3/causal-lm", {"no_rope_layers": (1, 1, 1)}, None),
    "no bias of head": ("phi/causal-lm", {}, "lm_head.bias"),
    "serial gpt_neox": ("gpt_neox/causal-lm", {"parallel": False}, None),
    "rotates all gpt_neox": ("gpt_neox/base", {"rope": positions.Rope()}, None),
    "norms before": ("opt/base", {"norm_first": True}, None),
    "no norm": ("opt/causal-lm", {"no_final_norm": True}, None),
    "norms are left out": ("opt/causal-lm/untied", {"norm_affine": True}, None),
    "wider window gpt_neo": ("gpt_neo/causal-lm", {"sliding_window": 4}, None),
    "no positions": ("gpt_neo/base", {}, "embed.positions"),
    "no norm of embedding": ("bloom/base", {}, "embed.norm"),
    "other residual": ("bloom/causal-lm", {"norm_residual": True}, None),
    "no slopes": ("falcon/base/alibi", {"alibi": False}, None),
    "serial falcon": ("falcon/causal-lm", {"parallel": False}, None),
    "unscaled embedding xglm": ("xglm/base", {"scale_embedding": False}, None),
    "zero elsewhere": ("xglm/base", {"pad_token_id": 4}, None),
    "wrong eps phi": ("phi/base", {"norm_eps": 1e-3}, None),
    "long factors": ("phi3/causal-lm/long", {"rope": positions.Rope(theta=100.0)}, None),
    "router weights as they are": ("qwen3_moe/causal-lm", {"renormalise": False}, None),
    "router weights renormalised": ("qwen2_moe/base", {"renormalise": True}, None),
    "fewer experts": ("mixtral/causal-lm", {"num_experts_per_token": 2}, None),
    "shared expert ungated": ("qwen2_moe/base", {}, "layers.moe.shared_gate"),
    "no shared expert": ("qwen2_moe/causal-lm", {}, "layers.moe.shared"),
    "no sinks": ("gpt_oss/base", {}, "layers.attention.sinks"),
    "no bias of router": ("gpt_oss/base", {}, "layers.moe.router.bias"),
    "no bias of experts": ("gpt_oss/causal-lm", {}, "layers.moe.down.bias"),
    "wider clamp": ("gpt_oss/base", {"swiglu_limit": 7.0}, None),
    "other alpha": ("gpt_oss/causal-lm", {"swiglu_alpha": 1.0}, None),
    "windows in other layers": ("gpt_oss/base", {"layer_types": ("full_attention", "sliding_attention")}, None),
    "no bias of choice": ("deepseek_v3/base", {}, "layers.moe.router.choice_bias"),
    "experts unscaled": ("deepseek_v3/base", {"routed_scaling_factor": 1.0}, None),
    "one group": ("deepseek_v3/base", {"num_groups": 1, "num_groups_kept": 1}, None),
    "other pairs": ("deepseek_v3/causal-lm", {"interleaved": False}, None),
    "padding counts": ("roberta/base", {"pad_token_id": 2}, None),
    "other order": ("albert/base", {"num_layers": 5}, None),
    "no distances": ("mpnet/base", {}, "embed.distances"),
    "wider reach": ("modernbert/masked-lm", {"local_attention": 6}, None),
    "narrower reach": ("modernbert/masked-lm", {"local_attention": 3}, None),
    "reach in other layers": (
        "modernbert/base",
        {"layer_types": ("full_attention",) * 2 + ("sliding_attention",) * 2},
        None,
    ),
    "one rotary base in an encoder": ("modernbert/masked-lm", {"local_rope": positions.Rope(theta=160000.0)}, None),
    "wrong eps modernbert": ("modernbert/masked-lm", {"norm_eps": 1e-3}, None),
    "first token": ("modernbert/sequence-classification/mean", {"classifier_pooling": "cls"}, None),
    "distances from the key": ("deberta-v2/base/distances", {"pos_att_type": ("c2p",)}, None),
    "other buckets": ("deberta-v2/base", {"max_relative_positions": 12}, None),
    "distances as they are": ("deberta-v2/masked-lm", {}, "embed.distance_norm"),
    "no convolution": ("deberta-v2/base", {}, "conv"),
    "other convolution": ("deberta-v2/base", {"conv_act": "tanh"}, None),
    "wrong eps deberta": ("deberta-v2/base", {"norm_eps": 1e-3}, None),
    "tanh of the first token": ("deberta-v2/multiple-choice", {"pooler_activation": "tanh"}, None),
    "other rotary base": ("nomic_bert/base", {"rope": positions.Rope()}, None),
    "wrong eps nomic": ("nomic_bert/base", {"norm_eps": 1e-3}, None),
    "no factor of angles": ("nomic_bert/masked-lm/untied", {"rope": positions.Rope(theta=1000.0)}, None),
    "full for sparse": ("big_bird/base/blocks", {"attention_type": "original_full"}, None),
    "no more blocks": ("big_bird/base/blocks", {"num_random_blocks": 0}, None),
    "other blocks": ("big_bird/base/no-pooler-blocks", {"block_size": 3}, None),
    "embedding as it is": ("big_bird/causal-lm", {"rescale_embeddings": False}, None),
    "no projection bias": ("electra/base", {}, "embed.projection.bias"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_fails(case, mutation):
    name, changes, removed = MUTATIONS[mutation]
    loaded = case(name)
    params = loaded.params if removed is None else fm.tree.remove(loaded.params, removed)
    with pytest.raises(AssertionError, match="departs"):
        check_parity(loaded, params=params, config=dataclasses.replace(loaded.config, **changes))


def test_swapped_rope_pairing_fails(case, monkeypatch):
    loaded = case("llama/causal-lm")
    monkeypatch.setattr(fm.models.llama.Config, "interleaved", True)
    config = dataclasses.replace(loaded.config, bos_token_id=59)  # not the compiled one
    with pytest.raises(AssertionError, match="departs"):
        check_parity(loaded, config=config)


def test_buckets_are_those_of_transformers():
    """Every distance, also where float32 logarithms fall on the edge of a bucket."""
    from transformers.models.t5.modeling_t5 import T5Attention

    far = np.arange(-300, 301)
    for causal in (False, True):
        for count, longest in ((32, 128), (8, 6), (16, 20), (64, 256), (33, 100)):
            want = T5Attention._relative_position_bucket(torch.tensor(far), not causal, count, longest).numpy()
            got = positions.distance_buckets(jnp.asarray(far), count, causal=causal, max_distance=longest)
            assert np.array_equal(got, want), (causal, count, longest)


def test_signed_buckets_are_those_of_transformers():
    """Every distance, also where float32 logarithms fall on the edge of a bucket."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    for length, count, longest in (
        (1030, 256, 512), (600, 256, 1024), (40, 4, 8), (70, 32, 64), (9, -1, 4), (300, 100, 128), (120, 256, 128),
    ):  # fmt: skip
        text = torch.zeros(1, length, 1)
        want = build_relative_position(text, text, count, longest)[0].numpy()
        assert np.array_equal(positions.signed_log_buckets(length, count, longest), want), (length, count, longest)


def test_blocks_of_any_length():
    """A text whose last block is not full, and more than one block that transformers draws; only what it cuts back."""
    row = families.by_name("big_bird/masked-lm")
    row = dataclasses.replace(row, config=row.config | {"block_size": 2, "num_random_blocks": 2}, length=23)
    model, given = families.build(row), families.inputs(row, "right")
    config = fm.models.big_bird.Config.from_hf(model.config.to_dict() | {"architectures": [row.architecture]})
    params = fm.from_disk({name: tensor.numpy() for name, tensor in model.state_dict().items()}, config)
    got = fm.forward(params, config, given["tokens"], mask=given["mask"])
    with torch.no_grad():
        want = {"logits": model(*(torch.tensor(given[name]) for name in ("tokens", "mask"))).logits.numpy()}
    families.assert_equal(got, want, given["mask"], causal=False)


@pytest.mark.parametrize("mutation", ["direction", "causal encoder", "offset", "cross mask"])
def test_mutated_parts_fail(case, monkeypatch, mutation):
    name = "bart/base" if mutation == "offset" else "t5/base"
    loaded = case(name)
    if mutation == "direction":
        right = positions.distance_buckets
        monkeypatch.setattr(nn.attention, "distance_buckets", lambda d, *a, **k: right(-d, *a, **k))
    elif mutation == "causal encoder":
        right = positions.distance_buckets
        monkeypatch.setattr(nn.attention, "distance_buckets", lambda *a, causal, **k: right(*a, causal=True, **k))
    elif mutation == "offset":
        monkeypatch.setattr(type(loaded.config), "position_offset", 1)
    else:
        right = nn.attention.cross_attention
        everywhere = lambda p, x, read, mask, **k: right(p, x, read, jnp.ones_like(mask), **k)  # noqa: E731
        monkeypatch.setattr(fm.models.t5, "cross_attention", everywhere)
    config = dataclasses.replace(loaded.config, bos_token_id=58)  # not the compiled one
    with pytest.raises(AssertionError, match="departs"):
        check_parity(loaded, "left", config=config)


def test_eager_falcon_adds_alibi_twice(case, monkeypatch):
    """Why `Config.reference` says "sdpa": what transformers computes by default, and what the models were trained with."""
    loaded = case("falcon/base/alibi")
    assert loaded.config.reference == loaded.attention == "sdpa"
    model = transformers.FalconModel.from_pretrained(loaded.folder, attn_implementation="eager")
    want = families.reference(model, loaded.inputs())["hidden"]
    assert np.abs(want - loaded.reference()["hidden"]).max() > 1e-2
    monkeypatch.setattr(type(loaded.config), "slopes_scale", 2 / math.sqrt(loaded.config.head_dim))
    got = loaded.forward(config=dataclasses.replace(loaded.config, bos_token_id=57)).hidden  # not the compiled one
    assert np.abs(np.asarray(got) - want).max() < 1e-5


HALVES = list(
    {c.family: c.name for c in reversed(families.CASES) if c.task in ("causal-lm", "masked-lm", "seq2seq-lm")}.values()
)


@pytest.mark.parametrize("name", HALVES)
def test_bfloat16(case, name):
    """Hidden states stay in the parameters' dtype, logits are float32; both sides depart alike from float32 with the same weights."""
    loaded = case(name)
    half = copy.deepcopy(loaded.model).bfloat16()
    want, exact = (
        families.reference(model, loaded.inputs("left"))["logits"]
        for model in (half, copy.deepcopy(half).float())
    )  # fmt: skip
    out = loaded.forward("left", params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), loaded.params))
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    real = loaded.masks("left")["mask"].astype(bool)
    ours, theirs = (np.abs(np.asarray(x, np.float32) - exact)[real] for x in (out.logits, want))
    ulp = np.abs(exact[real]).mean() * 2.0**-8
    assert ours.mean() > ulp / 30  # in bfloat16 indeed
    assert ours.mean() < 1.5 * theirs.mean() + ulp, (ours.mean() / ulp, theirs.mean() / ulp)
    assert ours.max() < 2 * theirs.max() + 8 * ulp, (ours.max() / ulp, theirs.max() / ulp)


def template_reference(tensors, config, tokens):
    """`models/_template.py` written again, in torch, from the tensors on disk."""
    w = {name: torch.tensor(np.asarray(a)) for name, a in tensors.items()}
    functional = torch.nn.functional
    b, t = tokens.shape
    d, h = config.hidden_size, config.num_heads

    def norm(x, name):
        return functional.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)

    def split(x):
        return x.view(b, t, h, -1).transpose(1, 2)

    x = w["model.embed_tokens.weight"][torch.tensor(tokens)] + w["model.embed_positions.weight"][:t]
    for i in range(config.num_layers):
        p = f"model.layers.{i}"
        y = norm(x, f"{p}.norm_1")
        key, value = (y @ w[f"{p}.attention.kv_proj.weight"].T).chunk(2, -1)
        query = y @ w[f"{p}.attention.q_proj.weight"].T
        scores = split(query) @ split(key).transpose(2, 3) / math.sqrt(d // h)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ split(value)).transpose(1, 2).reshape(b, t, d)
        x = x + y @ w[f"{p}.attention.o_proj.weight"].T
        y = functional.gelu(norm(x, f"{p}.norm_2") @ w[f"{p}.mlp.up.weight"].T)
        x = x + y @ w[f"{p}.mlp.down.weight"].T
    return (norm(x, "model.norm") @ w["model.embed_tokens.weight"].T).numpy()


def test_template(monkeypatch, tmp_path):
    """The skeleton is a whole family: init, forward, cache, round trip, save and load."""
    assert "template" not in FAMILIES
    monkeypatch.setitem(FAMILIES, "template", _template.FAMILY)
    config = _template.Config(task="causal-lm", initializer_range=0.3, hidden_size=24, head_dim=6)
    params = fm.init(config, jax.random.key(1))
    params = jax.tree.map(np.asarray, params)
    tensors = fm.to_disk(params, config)
    assert tensors["model.layers.1.attention.kv_proj.weight"].shape == (48, 24)
    chex.assert_trees_all_equal(fm.from_disk(tensors, config), params)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 6))
    want = template_reference(tensors, config, tokens)
    assert np.abs(np.asarray(fm.forward(params, config, tokens).logits) - want).max() < 1e-5
    cache = fm.init_cache(params, 2, 6)
    for i in range(0, 6, 3):
        out = fm.forward(params, config, tokens[:, i : i + 3], cache=cache)
        cache = out.cache
        assert np.abs(np.asarray(out.logits) - want[:, i : i + 3]).max() < 1e-5
    fm.save(params, config, tmp_path)
    again, read = fm.load(tmp_path)
    assert dataclasses.replace(read, extra=config.extra) == config
    chex.assert_trees_all_equal(again, params)
