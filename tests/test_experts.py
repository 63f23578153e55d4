"""Experts: both ways to run them, the loss of routers, and what is refused."""

import copy
import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmodels as fm
from fmodels.arrays import Scaled
from fmodels.models import FAMILIES
from fmodels.nn import experts
from tests import families

LANGUAGE = [
    c.name for c in families.CASES if hasattr(FAMILIES[c.family].config, "num_experts") and c.task == "causal-lm"
]


@pytest.mark.parametrize("how", list(experts.HOW))
@pytest.mark.parametrize("name", LANGUAGE)
def test_both_ways_give_the_numbers_of_transformers(case, name, how):
    loaded = case(name)
    for params in (loaded.params, loaded.unstacked):
        got = loaded.forward("left", params=params, experts=how)
        families.assert_equal(got, loaded.reference("left"), **loaded.masks("left"), causal=True)


@pytest.mark.parametrize("name", LANGUAGE)
def test_both_ways_have_the_same_gradients(case, name):
    loaded = case(name)

    def loss(params, how):
        return loaded.forward(params=params, experts=how).logits.std()

    one, two = (jax.jit(jax.grad(loss), static_argnums=1)(loaded.params, how) for how in experts.HOW)
    for path, leaf in fm.tree.flatten(one).items():
        assert np.abs(leaf - fm.tree.get(two, path)).max() < 1e-5, path


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(
    "name", [n for n in LANGUAGE if n.split("/")[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")]
)
def test_loss_of_routers(case, name, padding):
    loaded = case(name)
    given = {n: torch.tensor(a, dtype=torch.long) for n, a in loaded.inputs(padding).items()}
    with torch.no_grad():
        want = loaded.model(given["tokens"], attention_mask=given["mask"], output_router_logits=True).aux_loss
    logits = loaded.forward(padding).router_logits
    got = fm.load_balancing_loss(logits, loaded.config.num_experts_per_token, jnp.asarray(given["mask"].numpy()))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    if padding is None:
        assert float(got) == pytest.approx(float(fm.load_balancing_loss(logits, loaded.config.num_experts_per_token)))


@pytest.mark.parametrize("how", list(experts.HOW))
def test_array_like_leaves(case, how):
    loaded = case("qwen2_moe/causal-lm")
    quantized = jax.tree.map(lambda a: Scaled.quantize(a) if a.ndim == 4 else a, loaded.params["layers"]["moe"])
    plain = jax.tree.map(
        lambda a: a.dequantize() if isinstance(a, Scaled) else a, quantized, is_leaf=lambda a: isinstance(a, Scaled)
    )
    one, two = (
        loaded.forward(params={**loaded.params, "layers": {**loaded.params["layers"], "moe": moe}}, experts=how).logits
        for moe in (quantized, plain)
    )
    assert np.abs(one - two).max() < 1e-5


@pytest.mark.parametrize("how", list(experts.HOW))
def test_bfloat16_experts(case, how):
    loaded = case("mixtral/causal-lm")
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loaded.params)
    out = loaded.forward(params=params, experts=how)
    assert out.hidden.dtype == jnp.bfloat16
    assert np.median(np.abs(np.asarray(out.logits) - loaded.reference()["logits"])) < 0.1


def test_deepseek_routes_in_float32(case):
    """As transformers' router does, whatever the precision of its weights and of what it reads."""
    loaded = case("deepseek_v3/causal-lm")
    router = copy.deepcopy(loaded.model.model.layers[1].mlp.gate).bfloat16()
    rows = torch.randn(16, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        logits, weights, chosen = (x.numpy() for x in router(rows))
    ours = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), loaded.unstacked["layers"][1]["moe"]["router"])
    got = experts.route(ours, jnp.asarray(rows.float().numpy(), jnp.bfloat16), loaded.config.routing)
    assert np.abs(got.logits - logits).max() < 1e-5
    order, same = np.argsort(chosen), np.argsort(got.chosen)  # transformers does not sort them
    assert np.array_equal(np.take_along_axis(chosen, order, 1), np.take_along_axis(got.chosen, same, 1))
    assert np.abs(np.take_along_axis(weights, order, 1) - np.take_along_axis(got.weights, same, 1)).max() < 1e-5


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import fmodels as fm

folder, inputs, out = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "experts"))
params, config = fm.load(folder)
specs = fm.partition_specs(params, {"x": "experts"})
params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
given = np.load(inputs)

def functional(params, how):
    return (fm.forward(params, config, given["tokens"], experts=how).logits * given["weights"]).sum()

gradient = jax.jit(jax.grad(functional), static_argnums=1)
found = {how: gradient(params, how)["layers"]["moe"]["router"]["weight"] for how in ("grouped", "dense")}
np.savez(out, **found)
"""


def test_gradients_of_experts_on_eight_devices(tmp_path, monkeypatch):
    """Of routers whose tokens go to three experts each: no number of devices that share the experts divides it."""
    sizes = families.MIXTRAL | {"num_local_experts": 8, "num_experts_per_tok": 3}
    model = families.build(families.Case("mixtral/causal-lm/sharded", "MixtralForCausalLM", sizes))
    model.save_pretrained(tmp_path / "m")
    model.set_experts_implementation("eager")
    random = np.random.default_rng(0)
    tokens, weights = random.integers(4, 61, (2, 7)), random.normal(size=(2, 7, 61)).astype(np.float32)
    np.savez(tmp_path / "in.npz", tokens=tokens, weights=weights)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    command = [sys.executable, "-c", SHARDED, *(str(tmp_path / name) for name in ("m", "in.npz", "out.npz"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    model = model.double()
    (model(torch.tensor(tokens)).logits * torch.tensor(weights)).sum().backward()
    want = np.stack([layer.mlp.gate.weight.grad.numpy() for layer in model.model.layers])
    for how, got in np.load(tmp_path / "out.npz").items():
        assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() < 1e-4, how


def test_per_example_gradients_of_dense_experts(case):
    loaded = case("mixtral/causal-lm")
    tokens = loaded.inputs()["tokens"]
    loss = lambda p, t: jnp.std(fm.forward(p, loaded.config, t[None], experts="dense").logits)  # noqa: E731
    rows = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(loaded.params, tokens)
    alone = jax.grad(loss)(loaded.params, tokens[1])
    for path, leaf in fm.tree.flatten(alone).items():
        assert np.abs(fm.tree.get(rows, path)[1] - leaf).max() < 1e-5, path


def test_what_is_refused(case):
    loaded, llama = case("mixtral/causal-lm"), case("llama/causal-lm")
    tokens = loaded.inputs()["tokens"]
    for how in ("sparse", ["dense"]):
        with pytest.raises(
            ValueError, match=r"experts=.*(sparse|dense).* is not a way to run experts; one of grouped, dense"
        ):
            fm.forward(loaded.params, loaded.config, tokens, experts=how)
    with pytest.raises(ValueError, match="llama has no experts"):
        fm.forward(llama.params, llama.config, tokens, experts="dense")
    with pytest.raises(ValueError, match="llama has no experts"):
        fm.forward(llama.params, llama.config, tokens, router_logits=True)
    with pytest.raises(ValueError, match="num_experts_per_token=6 of num_experts=5"):
        dataclasses.replace(loaded.config, num_experts_per_token=6)


def test_experts_have_letters_of_their_own():
    config = fm.models.qwen2_moe.Config()
    specs = fm.partition_specs(fm.abstract(config), {"x": "experts", "f": "model"})["layers"]["moe"]
    assert specs["gate"]["weight"] == jax.sharding.PartitionSpec(None, "experts", "model", None)
    assert specs["down"]["weight"] == jax.sharding.PartitionSpec(None, "experts", None, "model")
    assert specs["shared"]["up"]["weight"] == jax.sharding.PartitionSpec(None, "model", None)
    mixtral = fm.models.mixtral.Config(num_layers=1)
    fewer = fm.tree.map_leaves(
        lambda path, leaf: jax.ShapeDtypeStruct(tuple(7 if n == 14336 else n for n in leaf.shape), leaf.dtype),
        fm.abstract(mixtral),
    )
    assert fm.match_config(fewer, mixtral) == dataclasses.replace(mixtral, intermediate_size=7)


HOW = {
    "greedy": {}, "chunks": {"prefill_chunk_size": 4}, "speculation": {"prompt_lookup_num_tokens": 3}, "beams": {"num_beams": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3_moe/causal-lm/mixed", "greedy"),
        ("gpt_oss/causal-lm", "greedy"),
        *(("deepseek_v3/causal-lm/one-group", how) for how in HOW),
    ],
)
def test_tokens_equal_transformers(case, name, how):
    """Also with a cache of latent vectors; the rows of the table have no end token that comes up."""
    loaded = case(name)
    given = loaded.inputs("left")
    loaded.model.set_experts_implementation("eager")
    want = loaded.model.generate(
        torch.tensor(given["tokens"], dtype=torch.long), attention_mask=torch.tensor(given["mask"]), max_new_tokens=9,
        do_sample=False, pad_token_id=3, eos_token_id=60, num_beams=3 if how == "beams" else 1,
    )  # fmt: skip
    options = fm.GenerationConfig(pad_token_id=3, eos_token_id=60, **HOW[how])
    got = fm.generate(
        loaded.params, loaded.config, given["tokens"], mask=given["mask"], max_new_tokens=9, options=options
    )
    np.testing.assert_array_equal(np.asarray(got.tokens)[:, : want.shape[1]], want.numpy())


def test_generation_runs_experts_as_it_is_told(case, monkeypatch):
    loaded = case("qwen3_moe/causal-lm/mixed")
    options = fm.GenerationConfig(pad_token_id=3, eos_token_id=60)
    given = {"tokens": loaded.inputs()["tokens"], "max_new_tokens": 7, "options": options}
    plain = fm.generate(loaded.params, loaded.config, **given, experts="dense").tokens
    monkeypatch.delitem(experts.HOW, "dense")
    np.testing.assert_array_equal(fm.generate(loaded.params, loaded.config, **given, experts="grouped").tokens, plain)
    texts = [row.tolist() for row in given.pop("tokens")]
    many = fm.generate_many(loaded.params, loaded.config, texts, **given, experts="grouped")
    for text, found, one in zip(texts, many, np.asarray(plain), strict=True):
        np.testing.assert_array_equal(found.tokens, one[len(text) : len(text) + len(found.tokens)])
    with pytest.raises(
        ValueError, match="generate: experts='sparse' is not a way to run experts; one of grouped, or None"
    ):
        fm.generate(loaded.params, loaded.config, [[5]], experts="sparse")
    llama = case("llama/causal-lm")
    with pytest.raises(ValueError, match="generate: llama has no experts"):
        fm.generate(llama.params, llama.config, [[5]], experts="dense")


def test_grouped_experts_under_vmap(case):
    loaded = case("mixtral/causal-lm")
    tokens = loaded.inputs()["tokens"]
    rows = jax.vmap(lambda t: fm.forward(loaded.params, loaded.config, t[None], experts="dense").logits[0])(tokens)
    np.testing.assert_allclose(rows, loaded.reference()["logits"], atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"forward: experts='grouped'.*vmap.*pass experts='dense'"):
        jax.vmap(lambda t: fm.forward(loaded.params, loaded.config, t[None], experts="grouped").logits[0])(tokens)


def test_latent_cache(case):
    """One vector and one rotated key for each token, of whatever precision."""
    loaded = case("deepseek_v3/base")
    cache = fm.init_cache(loaded.params, 2, 9)
    assert cache.keys.shape == (2, 2, 1, 9, 6)
    assert cache.values.shape == (2, 2, 1, 9, 5)
    tokens = jnp.asarray(loaded.inputs()["tokens"])
    for quantized, bound in ((False, 1e-5), (True, 0.3)):
        cache = fm.init_cache(loaded.params, 2, 9, quantized=quantized)
        cache = fm.forward(loaded.params, loaded.config, tokens[:, :4], cache=cache).cache
        got = fm.forward(loaded.params, loaded.config, tokens[:, 4:], cache=cache).hidden
        want = loaded.reference()["hidden"][:, 4:]
        assert np.median(np.abs(np.asarray(got) - want)) < bound


def test_sinks_with_rings(case):
    """Caches of layers with a window that are no longer than it; texts of more than twice the window."""
    loaded = case("gpt_oss/causal-lm")
    given, parts = loaded.inputs("left"), []
    cache = fm.init_cache(loaded.unstacked, 2, 7, config=loaded.config)
    assert [keys.shape[-2] for keys in cache.keys] == [2, 7, 2]
    for start, end in ((0, 3), (3, 4), (4, 7)):
        part = {name: given[name][:, start:end] for name in ("tokens", "mask")}
        out = fm.forward(loaded.unstacked, loaded.config, **part, cache=cache)
        cache = out.cache
        parts.append(out.logits)
    error = np.abs(np.concatenate(parts, 1) - loaded.reference("left")["logits"])
    assert error[given["mask"].astype(bool)].max() < 1e-5


@pytest.mark.parametrize(("name", "gone"), [("gpt_oss/causal-lm", [3, 4, 5]), ("deepseek_v3/causal-lm", [1])])
def test_pruned_heads_are_silent_ones(case, name, gone):
    loaded = case(name)
    tokens = jnp.asarray(loaded.inputs()["tokens"])
    pruned, smaller = fm.prune_heads(loaded.params, loaded.config, {1: gone})
    fm.check(pruned, smaller)
    masked = fm.mask_heads(loaded.params, loaded.config, {1: gone})
    one, two = (fm.forward(p, c, tokens).logits for p, c in ((pruned, smaller), (masked, loaded.config)))
    assert np.abs(one - two).max() < 1e-5


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
    "vocab_size": 129280, "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "count"),
    [(QWEN3_30B, 30_532_122_624), (GPT_OSS_20B, 20_914_757_184), (DEEPSEEK_V3, 671_026_419_200)],
    ids=["Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V3"],
)
def test_config_json_of_published_models(data, count):
    """As they lie on the Hub, of transformers 4 and of authors; the last two are quantised there."""
    config = FAMILIES[data["model_type"]].config.from_hf(data)
    assert fm.num_parameters(fm.abstract(config)) == count
    assert type(config).from_hf(config.to_hf()) == config
    for options in (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ):
        quantised = type(config).from_hf(data | {"quantization_config": options})
        assert quantised == config
        assert quantised.to_hf()["quantization_config"] == options
    with pytest.raises(ValueError, match=r"quantization_config: quant_method='hqq' is not supported; one of .*fp8"):
        type(config).from_hf(data | {"quantization_config": {"quant_method": "hqq"}})


def test_refused_configs():
    deepseek = FAMILIES["deepseek_v3"].config
    for changes, words in (
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"n_group": 7}, "num_experts=256 in num_groups=7"),
        ({"topk_group": 9}, "num_groups_kept=9"),
        ({"num_experts_per_tok": 129}, "num_experts_per_token=129 are more than the 128 experts"),
        ({"num_key_value_heads": 64}, "each head has its own key"),
    ):
        with pytest.raises(ValueError, match=words):
            deepseek.from_hf(DEEPSEEK_V3 | changes)
