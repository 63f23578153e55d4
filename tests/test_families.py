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
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fmodels as fm
from fmodels.models import FAMILIES, _template
from fmodels.nn import norms
from tests import families

PLAIN = ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm"]


def test_every_task_of_every_family_has_a_row():
    have = {(case.family, case.task) for case in families.CASES}
    assert have == {(name, task) for name, family in FAMILIES.items() for task in family.config.ARCHITECTURES}
    for case in families.CASES:
        assert FAMILIES[case.family].config.ARCHITECTURES[case.task] == case.architecture


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_outputs_and_hidden_states(loaded, padding):
    assert loaded.config.task == loaded.case.task
    assert len(loaded.reference(padding)) >= 2  # something beside the hidden states
    loaded.check(padding)


@pytest.mark.parametrize(
    "name", [*families.CAUSAL, *families.SEQ2SEQ, "gpt2/double-heads", "bert/pretraining", "t5/encoder", "bart/base"]
)
def test_unstacked(case, name):
    loaded = case(name)
    loaded.check("left" if loaded.case.causal else "right", params=loaded.unstacked)


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


def test_windows_with_a_gap_in_the_mask(case):
    """They count columns, as in transformers; positions count real tokens."""
    loaded = case("mistral/causal-lm")
    given = loaded.inputs()
    given["mask"][1, 2:4] = 0
    given["positions"] = given["mask"].cumsum(-1).astype(np.int32) - 1
    want = families.reference(loaded.model, given)["logits"]
    got = np.asarray(fm.forward(loaded.params, loaded.config, given["tokens"], mask=given["mask"]).logits)
    assert np.abs(got - want)[given["mask"].astype(bool)].max() < 1e-5


def test_an_odd_window_of_both_directions(case):
    """As transformers was given it; what it writes is the even number that reaches as far."""
    loaded = case("gemma3_text/base/bidirectional")
    assert (loaded.case.config["sliding_window"], loaded.config.sliding_window) == (5, 4)
    loaded.check("left", config=dataclasses.replace(loaded.config, sliding_window=5))


def test_big_bird_fills_its_last_block(case):
    """With padding, here and in transformers; it hides whole blocks and is of a text that is no multiple of them."""
    loaded = case("big_bird/token-classification")
    given = families.inputs(dataclasses.replace(loaded.case, length=17))
    given["mask"][0, 2:6] = 0
    given["mask"][1, 13:] = 0
    with torch.no_grad():
        want = families.call(loaded.model, given).logits.numpy()
    got = np.asarray(fm.forward(loaded.params, loaded.config, given["tokens"], mask=given["mask"]).logits)
    assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("name", [*PLAIN, *families.PAIRS])
def test_select(case, name):
    loaded = case(name)
    got = loaded.forward("right", select=jnp.array([4, 2]), hidden_states=False, attentions=False).logits
    assert got.shape == (2, 1, 61)
    want = loaded.reference("right")["logits"][[0, 1], [4, 2]]
    assert np.abs(np.asarray(got)[:, 0] - want).max() < 1e-5


def test_gradients(loaded):
    """Of a random linear functional of the outputs, mapped to transformers' names.

    Transformers computes in float64: in float32 its own depart from those by up to 1e-4. XGLM's mask wants float32.
    """
    given, random = loaded.inputs(), np.random.default_rng(0)
    names = [n for n in loaded.reference() if not n.endswith("hidden_states")]
    weights = {n: random.normal(size=loaded.reference()[n].shape).astype(np.float32) for n in names}
    model = copy.deepcopy(loaded.model)
    model = model if loaded.case.family == "xglm" else model.double()
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


@pytest.mark.parametrize("name", [*PLAIN, *families.PAIRS, "gpt2/double-heads", "bert/pretraining", "mt5/base"])
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


@pytest.mark.parametrize("name", [*PLAIN, *families.PAIRS])
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


def test_norms_round_where_transformers_rounds():
    """In bfloat16, bit for bit but where float32 sums fall on an edge: Llama's before the scale and behind it, others once."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 24, generator=generator).bfloat16() for n in (64, 1))
    for kind, norm in (
        (LlamaRMSNorm, norms.rms_norm), (Gemma2RMSNorm, norms.rms_norm_plus_one), (torch.nn.LayerNorm, norms.layer_norm),
    ):  # fmt: skip
        module = kind(24, eps=1e-6).bfloat16()
        module.weight = torch.nn.Parameter(weight[0])
        want = module(x).detach().float().numpy()
        numbers, scale = (jnp.asarray(a.float().numpy(), jnp.bfloat16) for a in (x, weight[0]))
        assert np.mean(np.asarray(norm({"scale": scale}, numbers, 1e-6), np.float32) == want) > 0.99, kind


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
