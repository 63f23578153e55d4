"""Adapters against PEFT: what it saves is read, computes the same, is merged to the same, has the same gradients, and is
written so that it reads the same again."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fmodels as fm
from tests import families
from tests.loopback_hub import LoopbackHub, Repo

# PEFT warns of tables that are adapted and of names of transformers that it will lose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = {
    "lora": ("llama/causal-lm", {"target_modules": ALL, "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
                                 "alpha_pattern": {r"layers\.\d\.self_attn\..*": 7}, "lora_alpha": 4}),
    "rslora": ("llama/causal-lm", {"target_modules": r".*\.(q_proj|down_proj)", "use_rslora": True, "lora_alpha": 3,
                                   "exclude_modules": ["layers.2.self_attn.q_proj"]}),
    "dora": ("llama/causal-lm", {"target_modules": "all-linear", "use_dora": True}),
    "layers": ("llama/causal-lm", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2], "use_dora": True}),
    "tables": ("llama/causal-lm", {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "fused": ("gpt2/causal-lm", {"target_modules": ["c_attn", "c_proj", "c_fc", "wpe"], "fan_in_fan_out": True}),
    "fused-dora": ("gpt2/causal-lm", {"target_modules": ["c_attn", "attn.c_proj", "wpe"], "fan_in_fan_out": True,
                                      "use_dora": True}),
    "dora-tables": ("llama/causal-lm", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True, "lora_alpha": 3}),
    "rows": ("gpt2/causal-lm", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 17, 60]}),
    "biases": ("gpt2/causal-lm", {"target_modules": ["c_attn"], "bias": "all"}),
    "norms": ("llama/causal-lm", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "whole-table": ("gpt2/causal-lm/untied", {"target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]}),
    "interleaved": ("gpt_neox/causal-lm", {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"}),
    "head": ("bert/sequence-classification", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"],
                                              "task_type": "SEQ_CLS"}),
    "all-but-head": ("bert/masked-lm", {"target_modules": "all-linear", "bias": "all"}),
    "pair": ("t5/seq2seq-lm", {"target_modules": ["q", "v", "wi", "wo"], "modules_to_save": ["final_layer_norm"]}),
    "experts": ("mixtral/causal-lm", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "interleaved-experts": ("gpt_oss/causal-lm", {"target_modules": ["o_proj"], "target_parameters": EXPERTS[:1]}),
    "lora-bias": ("qwen2/causal-lm", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "lora_alpha": 3,
                                      "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
                                      "use_rslora": True, "layers_to_transform": [0, 1]}),
    "fused-lora-bias": ("gpt2/causal-lm", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True,
                                           "bias": "lora_only"}),
    "latent": ("deepseek_v3/causal-lm", {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}),
}  # fmt: skip

TRAINED = ("lora", "dora-tables", "tables", "fused", "rows", "biases", "head", "experts", "interleaved", "lora-bias")
"""Whose gradients are compared."""


def peft(model, options, *, seed=0):
    """PEFT's model with a random adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 2, "lora_alpha": 4} | options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapted


def save(adapted, folder):
    adapted.save_pretrained(folder)
    return folder


def theirs(model, given):
    out = families.call(model, given)
    return out.logits


@pytest.fixture(scope="module")
def made(case, tmp_path_factory):
    """`made(name)`: the row of the table, PEFT's model, its folder, and what we read."""
    done = {}

    def make(name):
        if name not in done:
            loaded = case(ADAPTERS[name][0])
            adapted = peft(loaded.model, ADAPTERS[name][1])
            folder = save(adapted, tmp_path_factory.mktemp(name))
            done[name] = loaded, adapted, folder, fm.load_adapter(folder)
        return done[name]

    return make


def ours(loaded, params, given):
    given = {name: a for name, a in given.items() if name != "positions"}
    return fm.forward(params, loaded.config, **given).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft(made, name):
    loaded, adapted, _, adapter = made(name)
    given = loaded.inputs("left" if loaded.case.causal and not loaded.case.pair else None)
    logits = theirs(adapted.base_model.model, given)
    seed = torch.tensor(given["mask"])[..., None] if logits.ndim == 3 and not loaded.case.pair else torch.ones(1, 1, 1)
    weight = torch.randn(logits.shape) * (seed if logits.ndim == 3 else 1)

    def loss(adapter):
        params = fm.add_adapter(loaded.params, loaded.config, adapter)
        out = ours(loaded, params, given)
        return (out * weight.numpy()).sum(), (out, fm.merge_adapters(params))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True) if name in TRAINED else lambda adapter: (loss(adapter), None))
    (_, (got, merged)), gradient = run(without_copies(adapter))
    real = given["mask"].astype(bool) if logits.ndim == 3 and not loaded.case.pair else ...
    np.testing.assert_allclose(got[real], logits.detach().numpy()[real], rtol=0, atol=1e-5)
    state = copy.deepcopy(adapted).merge_and_unload().state_dict()
    for key, tensor in fm.to_disk(merged, loaded.config, module=True).items():
        np.testing.assert_allclose(tensor, state[key].numpy(), rtol=0, atol=1e-6, err_msg=key)
    if gradient is None:
        return
    (logits * weight).sum().backward()
    expected = gradients(adapted)
    assert expected
    assert expected.keys() <= gradient.tensors.keys()
    for key, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(gradient.tensors[key], value, rtol=0, atol=1e-4 * scale, err_msg=key)
    for key in gradient.tensors.keys() - expected.keys():  # the model's own
        np.testing.assert_array_equal(gradient.tensors[key], 0)


@pytest.mark.parametrize("name", ["lora", "rslora", "fused", "experts", "latent", "lora-bias"])
def test_unmerged(made, name):
    """From PEFT's merged weights, against what PEFT takes out of them."""
    loaded, adapted, _, adapter = made(name)
    theirs = copy.deepcopy(adapted)
    theirs.merge_adapter()
    state = copy.deepcopy(adapted).merge_and_unload().state_dict()
    merged = fm.from_disk({key: tensor.numpy() for key, tensor in state.items()}, loaded.config)
    theirs.unmerge_adapter()
    state = theirs.unload().state_dict()
    again = fm.unmerge_adapters(merged, loaded.config, adapter)
    for key, tensor in fm.to_disk(again, loaded.config, module=True).items():
        np.testing.assert_allclose(tensor, state[key].numpy(), rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["dora", "dora-tables", "rows", "biases", "head"])
def test_what_cannot_be_unmerged(made, name):
    loaded, _, _, adapter = made(name)
    with pytest.raises(ValueError, match="load the base model"):
        fm.unmerge_adapters(loaded.params, loaded.config, adapter)


def without_copies(adapter):
    """PEFT saves a bias that is tied to another beside it."""
    copies = ("cls.predictions.decoder.bias",)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.endswith(copies)}
    return dataclasses.replace(adapter, tensors=tensors)


def gradients(adapted):
    """By the names of PEFT's files."""
    found = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            found[key.removesuffix(".weight") if "magnitude" in key else key] = parameter.grad.numpy()
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_as_by_peft(made, name, tmp_path):
    from peft import PeftModel

    loaded, adapted, folder, adapter = made(name)
    fm.save_adapter(adapter, tmp_path)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(
        before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes() for key in before
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == json.loads(
        (folder / "adapter_config.json").read_text()
    )
    given = loaded.inputs()
    with torch.no_grad():
        again = PeftModel.from_pretrained(copy.deepcopy(loaded.model), tmp_path).eval()
        assert torch.equal(theirs(again.base_model.model, given), theirs(adapted.base_model.model, given))


def test_embedding_of_a_tied_model(case, tmp_path):
    """PEFT adapts the rows that are read and not the tied head: such a tree needs two tables."""
    loaded = case("gpt2/causal-lm")
    options = {"target_modules": ["wte", "c_fc"], "fan_in_fan_out": True, "ensure_weight_tying": True}  # of other names
    adapted = peft(loaded.model, options)
    adapter = fm.load_adapter(save(adapted, tmp_path))
    with pytest.raises(ValueError, match=r"'transformer.wte' is tied to 'lm_head'(.|\n)*fm.untie"):
        fm.add_adapter(loaded.params, loaded.config, adapter)
    params, config = fm.untie(loaded.params, loaded.config)
    given = loaded.inputs()
    out = fm.forward(fm.add_adapter(params, config, adapter), config, given["tokens"]).logits
    np.testing.assert_allclose(out, theirs(adapted.base_model.model, given).detach(), rtol=0, atol=1e-5)


def test_embedding_and_head_with_one_adapter(case, tmp_path):
    """PEFT's merge adds the factors to the one table twice, so that its merged model is not its own; ours is."""
    from peft import PeftModel

    loaded = case("llama/causal-lm/tied-biases")
    options = {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}
    adapted = peft(loaded.model, options)
    adapter = fm.load_adapter(save(adapted, tmp_path / "theirs"))
    params = fm.add_adapter(loaded.params, loaded.config, adapter)
    given = loaded.inputs()
    expected = theirs(adapted.base_model.model, given).detach()
    for tree in (params, fm.merge_adapters(params)):
        out = fm.forward(tree, loaded.config, given["tokens"]).logits
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    copies = {name: tensor for name, tensor in adapter.tensors.items() if ".lm_head.lora" in name}
    assert len(copies) == 2
    for change, message in (
        (lambda x: x + 1, r"differs from .*, to which it is tied"),
        (lambda x: x[:1], "differs from"),
    ):
        changed = adapter.tensors | {name: change(tensor) for name, tensor in copies.items()}
        with pytest.raises(ValueError, match=message):
            fm.add_adapter(loaded.params, loaded.config, dataclasses.replace(adapter, tensors=changed))
    with pytest.raises(ValueError, match=r"repeats .*leave it out"):
        jax.jit(lambda adapter: fm.add_adapter(loaded.params, loaded.config, adapter))(adapter)
    spec = fm.AdapterConfig(r=2, **options, use_dora=True)
    with pytest.raises(ValueError, match="tied to 'lm_head', and PEFT gives the two other factors"):
        fm.init_adapter(loaded.params, loaded.config, spec, jax.random.key(0))
    spec = fm.AdapterConfig(r=2, **options, init_lora_weights=False)
    new = fm.init_adapter(loaded.params, loaded.config, spec, jax.random.key(0))
    new = jax.tree.map(lambda x: x / 8, new)
    fm.save_adapter(new, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(loaded.model), tmp_path / "ours").eval()
    out = fm.forward(fm.add_adapter(loaded.params, loaded.config, new), loaded.config, given["tokens"]).logits
    np.testing.assert_allclose(out, theirs(again.base_model.model, given).detach(), rtol=0, atol=1e-5)


OPTIONS = [
    {"target_modules": ["q_proj", "down_proj"], "r": 3},
    {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "layers_to_transform": [1], "lora_bias": True},
    {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
]


@pytest.fixture(scope="module")
def several(case, tmp_path_factory):
    """PEFT's model with adapters `0`, `1` and `2`, and those adapters as we read them."""
    from peft import PeftModel

    loaded = case("llama/causal-lm")
    folders = [
        save(peft(loaded.model, options, seed=i), tmp_path_factory.mktemp(f"a{i}")) for i, options in enumerate(OPTIONS)
    ]
    adapted = PeftModel.from_pretrained(copy.deepcopy(loaded.model), folders[0], adapter_name="0")
    for i in (1, 2):
        adapted.load_adapter(folders[i], adapter_name=str(i))
    return loaded, adapted.eval(), [fm.load_adapter(folder) for folder in folders]


TOKENS = np.random.default_rng(0).integers(4, 61, (4, 6))
CHOICE = [2, -1, 0, 1]


def test_adapters_chosen_by_row(several):
    loaded, adapted, adapters = several
    names = ["__base__" if i < 0 else str(i) for i in CHOICE]
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        expected = adapted(input_ids=tokens, adapter_names=names).logits.numpy()
    params = fm.add_adapter(loaded.params, loaded.config, adapters, choice=CHOICE)
    np.testing.assert_allclose(fm.forward(params, loaded.config, TOKENS).logits, expected, rtol=0, atol=1e-5)
    unstacked = fm.add_adapter(loaded.unstacked, loaded.config, adapters, choice=jnp.array(CHOICE))
    np.testing.assert_allclose(fm.forward(unstacked, loaded.config, TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_adapters_summed(several):
    loaded, adapted, adapters = several
    adapted.base_model.set_adapter(["0", "2"])
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor(TOKENS)).logits.numpy()
    params = fm.add_adapter(loaded.params, loaded.config, [adapters[0], adapters[2]])
    for tree in (params, fm.merge_adapters(params), fm.unstack_layers(params)):
        np.testing.assert_allclose(fm.forward(tree, loaded.config, TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_generate_by_row(several):
    """Rows with adapters of their own are continued as each alone, by one program whatever the choice."""
    loaded, _, adapters = several
    options = fm.GenerationConfig(num_beams=2)

    def generate(params, tokens):
        return np.asarray(fm.generate(params, loaded.config, tokens, max_new_tokens=4, options=options).tokens)

    params = fm.add_adapter(loaded.params, loaded.config, adapters, choice=CHOICE)
    together = generate(params, TOKENS)
    count = fm.compile_count()
    assert (
        generate(fm.add_adapter(loaded.params, loaded.config, adapters, choice=[0, 0, 1, 1]), TOKENS) != together
    ).any()
    assert fm.compile_count() == count
    alone = loaded.params if CHOICE[0] < 0 else fm.add_adapter(loaded.params, loaded.config, adapters[CHOICE[0]])
    np.testing.assert_array_equal(together[:1], generate(alone, TOKENS[:1]))
    with pytest.raises(ValueError, match="chosen for 4 rows, the batch has 2"):
        generate(params, TOKENS[:2])
    with pytest.raises(ValueError, match="chosen for 4 rows, its rows come and go"):
        fm.generate_many(params, loaded.config, TOKENS.tolist(), max_new_tokens=1)


@pytest.mark.parametrize("names", [("lora", "dora"), ("tables", "dora-tables")])
def test_dora_chosen_by_row(made, names):
    """Each row as PEFT's model with that adapter alone: PEFT itself has no `adapter_names` with DoRA."""
    loaded, *_ = made(names[0])
    params = fm.add_adapter(loaded.params, loaded.config, [made(name)[3] for name in names], choice=[1, -1, 0, 1])
    got = fm.forward(params, loaded.config, TOKENS).logits
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        base, lora, dora = (model(input_ids=tokens).logits for model in (loaded.model, *(made(n)[1] for n in names)))
    np.testing.assert_allclose(got, np.stack([dora[0], base[1], lora[2], dora[3]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    {"target_modules": r".*(_proj|embed_tokens)", "init_lora_weights": "gaussian", "use_dora": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "bias": "all", "lora_bias": True},
])  # fmt: skip
def test_new_adapter_is_one_of_peft(case, options, tmp_path):
    """It has PEFT's tensors, leaves the model as it is, and PEFT reads it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    loaded = case("llama/causal-lm")
    fresh = save(get_peft_model(copy.deepcopy(loaded.model), LoraConfig(r=2, **options)), tmp_path / "theirs")
    expected = load_file(fresh / "adapter_model.safetensors")
    adapter = fm.init_adapter(loaded.params, loaded.config, fm.AdapterConfig(r=2, **options), jax.random.key(0))
    base = [name for name in expected if ".base_layer.weight" in name]
    assert {n: t.shape for n, t in expected.items() if n not in base} == {
        n: t.shape for n, t in adapter.tensors.items()
    }
    for name, tensor in expected.items():
        drawn = ".lora_A.weight" in name or ".lora_embedding_B" in name
        if name not in base and not drawn:
            np.testing.assert_allclose(adapter.tensors[name], tensor, rtol=0, atol=1e-6, err_msg=name)
        elif name not in base:
            assert 0.5 < float(jnp.std(adapter.tensors[name])) / tensor.std() < 2, name
    out = fm.forward(fm.add_adapter(loaded.params, loaded.config, adapter), loaded.config, TOKENS).logits
    with torch.no_grad():
        np.testing.assert_allclose(out, loaded.model(torch.tensor(TOKENS)).logits, rtol=0, atol=1e-5)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    fm.save_adapter(adapter, tmp_path / "ours", format="torch")
    again = PeftModel.from_pretrained(copy.deepcopy(loaded.model), tmp_path / "ours").eval()
    out = fm.forward(
        fm.add_adapter(loaded.params, loaded.config, fm.load_adapter(tmp_path / "ours")), loaded.config, TOKENS
    )
    with torch.no_grad():
        np.testing.assert_allclose(out.logits, again(torch.tensor(TOKENS)).logits, rtol=0, atol=1e-5)


def test_columns_of_a_low_rank_leaf():
    """By the definition: no model multiplies with a table whose columns have lengths of their own, but a leaf can."""
    w, a, b, c, x = (
        np.random.default_rng(i).normal(size=s).astype("float32")
        for i, s in enumerate([(5, 3), (2, 3), (5, 2), (4, 3), (4, 6, 3)])
    )
    leaf = fm.low_rank.LowRank(*map(jnp.asarray, (w, a, b)), gain=jnp.ones((4, 2)), columns=jnp.asarray(c))
    expected = np.einsum("btd,bvd->btv", x, (w + b @ a) * c[:, None])
    np.testing.assert_allclose(leaf.einsum("btd,vd->btv", jnp.asarray(x)), expected, rtol=0, atol=1e-5)
    one = dataclasses.replace(leaf, gain=None, columns=leaf.columns[0])
    np.testing.assert_allclose(one.dequantize(), (w + b @ a) * c[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(one.einsum("btd,vd->btv", jnp.asarray(x))[0], expected[0], rtol=0, atol=1e-5)


REFUSED = {
    "peft_type": "IA3", "lora_bias": "all", "megatron_config": {}, "alora_invocation_tokens": [1], "use_qalora": True,
    "layer_replication": [[0, 2]], "use_bdlora": {}, "kasa_config": {"beta": 1}, "corda_config": {"verbose": True},
    "loftq_config": {"bits": 4}, "init_lora_weights": "pissa", "news": 1, "bias": "some", "r": 0, "r ": 8, "lora_alpha": "x",
    "target_modules": [1], "rank_pattern": {"q": 0}, "alpha_pattern": {"(": 1}, "trainable_token_indices": [True],
    "layers_to_transform": "0", "use_dora": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_configs_that_are_refused(key, tmp_path):
    data = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]} | {key: REFUSED[key]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(key.strip() if key != "alpha_pattern" else "'('")):
        fm.load_adapter(tmp_path)


def test_biases_of_adapters_that_are_refused(several):
    """As by PEFT: with DoRA, other beginnings and tables, and to be merged where the model has no bias."""
    from peft import LoraConfig, get_peft_model

    loaded, adapted, adapters = several
    for more in ({"use_dora": True}, {"init_lora_weights": "gaussian"}):
        for kind in (LoraConfig, fm.AdapterConfig):
            with pytest.raises(ValueError, match="lora_bias=True"):
                kind(target_modules=["q_proj"], lora_bias=True, **more)
    options = {"target_modules": ["embed_tokens"], "lora_bias": True}
    with pytest.raises(ValueError, match="lora_bias=True is not supported"):
        get_peft_model(copy.deepcopy(loaded.model), LoraConfig(**options))
    with pytest.raises(ValueError, match=r"lora_bias for 'model\.embed_tokens', a table"):
        fm.init_adapter(loaded.params, loaded.config, fm.AdapterConfig(**options), jax.random.key(0))
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        copy.deepcopy(adapted).merge_adapter(["1"])
    params = fm.add_adapter(loaded.params, loaded.config, adapters[1])
    with pytest.raises(
        ValueError, match=r"2 biases .* 'layers.attention.query.bias' is one; use the tree of add_adapter"
    ):
        fm.merge_adapters(params)
    with pytest.raises(ValueError, match="more than an array"):
        fm.dequantize(params)


def test_other_kinds_are_refused_in_one_line(tmp_path):
    data = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "token_dim": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"^load_adapter: peft_type='PREFIX_TUNING' is not supported.*load it$"):
        fm.load_adapter(tmp_path)


def test_adapters_that_do_not_fit(several, made, tmp_path):
    loaded, _, (one, two, _) = several
    params, config = loaded.params, loaded.config

    def without(adapter, *ends, **more):
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.endswith(ends)}
        return dataclasses.replace(adapter, tensors=tensors | more)

    some = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    dora, length = made("dora-tables")[3], "base_model.model.model.embed_tokens.lora_magnitude_vector"
    for adapter, message in [
        (without(one, "layers.0.self_attn.q_proj.lora_A.weight"), f"missing '{some.replace('_B', '_A')}'"),
        (without(one, other=jnp.ones(2)), r"unexpected 'other' \[2\]"),
        (
            dataclasses.replace(one, tensors=one.tensors | {some: jnp.ones((7, 3))}),
            r"q_proj.weight': factors of shapes",
        ),
        (
            dataclasses.replace(dora, tensors=dora.tensors | {length: jnp.ones(7)}),
            r"embed_tokens.weight': a vector of shape \[7\] beside them, expected \[",
        ),
        (
            dataclasses.replace(one, config=dataclasses.replace(one.config, r=2)),
            "have rank 3, adapter_config.json says 2",
        ),
        (fm.Adapter({}, fm.AdapterConfig(target_modules=["norm"])), "'model.norm' is neither a matrix nor a table"),
        (made("fused")[3], "unexpected 'base_model.model.transformer.h.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fm.add_adapter(params, config, adapter)
    adapted = fm.add_adapter(params, config, [one, two], choice=[0, 1])
    for call, message in [
        (lambda: fm.merge_adapters(adapted), "'layers.attention.query.weight' has an adapter for each row"),
        (lambda: fm.save(adapted, config, tmp_path / "model"), "save: 3 leaves have adapters"),
        (lambda: fm.to_disk(adapted, config), "to_disk: 3 leaves have adapters"),
        (lambda: fm.add_adapter(adapted, config, one), "the tree has adapters"),
        (lambda: fm.add_adapter(params, config, [made("tables")[3], made("dora")[3], made("layers")[3]]), "cannot sum"),
        (lambda: fm.add_adapter(params, config, [one], choice=[0.5]), "choice has shape"),
        (
            lambda: fm.init_adapter(params, config, fm.AdapterConfig(target_modules=["query"]), jax.random.key(0)),
            "nothing of",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError, match="numbers from -1 to 0"):
        fm.add_adapter(params, config, [one], choice=[1])
    with pytest.raises(FileNotFoundError, match="no adapter_config"):
        fm.load_adapter(loaded.folder)


def test_transforms_of_adapted_trees(several):
    loaded, _, (one, _, _) = several
    params = fm.add_adapter(loaded.params, loaded.config, one)
    fm.check(params, loaded.config)
    listed = fm.add_adapter(loaded.unstacked, loaded.config, one)
    for a, b in zip(jax.tree.leaves(fm.stack_layers(listed)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    half = fm.cast(params, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}
    assert fm.num_parameters(params) == fm.num_parameters(loaded.params)
    with pytest.raises(NotImplementedError, match="is a LowRank"):
        fm.prune_heads(params, loaded.config, {0: [0, 3]})


def test_adapter_of_a_quantised_weight(several):
    loaded, _, (one, _, _) = several
    path = "layers.attention.query.weight"
    small = fm.arrays.Scaled.quantize(fm.tree.get(loaded.params, path))
    quantised = fm.tree.update(loaded.params, {path: small})
    plain = fm.tree.update(loaded.params, {path: small.dequantize()})
    got, expected = (
        fm.forward(fm.add_adapter(params, loaded.config, one), loaded.config, TOKENS).logits
        for params in (quantised, plain)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="adapter of a Scaled"):
        fm.merge_adapters(fm.add_adapter(quantised, loaded.config, one))


def test_the_models_own_tables_are_not_trained(made):
    """PEFT saves the tables that it adapts beside the adapter: they have no gradient and no decay."""
    adapter = made("tables")[3]
    own = {name.removeprefix("base_model.model.") for name, trained in adapter.trained.tensors.items() if not trained}
    assert own == {"model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight"}
    for name in ("biases", "whole-table", "rows", "head", "lora", "experts"):
        assert all(made(name)[3].trained.tensors.values()), name


def test_adapter_from_the_hub(several, tmp_path, monkeypatch):
    _, _, (one, *_) = several
    fm.save_adapter(one, tmp_path / "a")
    files = {f"sub/{path.name}": path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with LoopbackHub() as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        hub.repos["me/adapter"] = Repo(files | {"sub/optimizer.pt": b"large"})
        again = fm.load_adapter("me/adapter", subfolder="sub")
        assert not any("optimizer" in path for _, path in hub.requests)
    assert again.config == one.config
    assert all((again.tensors[name] == tensor).all() for name, tensor in one.tensors.items())
