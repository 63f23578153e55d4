"""Adapters against PEFT: what it saves is read, computes the same, is merged to the same, has the same gradients, and is
written so that it reads the same again."""

from __future__ import annotations

import copy
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fmodels as fm
from tests import families

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
    "fused-dora": ("gpt2/causal-lm", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "rows": ("gpt2/causal-lm", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 17, 60]}),
    "biases": ("gpt2/causal-lm", {"target_modules": ["c_attn"], "bias": "all"}),
    "whole-table": ("gpt2/causal-lm/untied", {"target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]}),
    "interleaved": ("gpt_neox/causal-lm", {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"}),
    "head": ("bert/sequence-classification", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"],
                                              "task_type": "SEQ_CLS"}),
    "all-but-head": ("bert/masked-lm", {"target_modules": "all-linear", "bias": "all"}),
    "pair": ("t5/seq2seq-lm", {"target_modules": ["q", "v", "wi", "wo"], "modules_to_save": ["final_layer_norm"]}),
    "experts": ("mixtral/causal-lm", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "interleaved-experts": ("gpt_oss/causal-lm", {"target_modules": ["o_proj"], "target_parameters": EXPERTS[:1]}),
    "latent": ("deepseek_v3/causal-lm", {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}),
}  # fmt: skip


def peft(model, options, *, seed=0):
    """PEFT's model with a random adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 2, "lora_alpha": 4} | options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapted


def save(adapted, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    (logits * weight).sum().backward()

    def loss(adapter):
        params = fm.add_adapter(loaded.params, loaded.config, adapter)
        out = ours(loaded, params, given)
        return (out * weight.numpy()).sum(), out

    (_, got), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    real = given["mask"].astype(bool) if logits.ndim == 3 and not loaded.case.pair else ...
    np.testing.assert_allclose(got[real], logits.detach().numpy()[real], rtol=0, atol=1e-5)
    expected = gradients(adapted)
    assert expected.keys() <= gradient.tensors.keys()
    for key, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(gradient.tensors[key], value, rtol=0, atol=1e-4 * scale, err_msg=key)

    merged = fm.merge_adapters(fm.add_adapter(loaded.params, loaded.config, adapter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = copy.deepcopy(adapted).merge_and_unload().state_dict()
    disk = fm.to_disk(merged, loaded.config, module=True)
    for key, tensor in disk.items():
        np.testing.assert_allclose(tensor, state[key].numpy(), rtol=0, atol=1e-6, err_msg=key)


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
    assert all(before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes() for key in before)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == json.loads(
        (folder / "adapter_config.json").read_text()
    )
    given = loaded.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(copy.deepcopy(loaded.model), tmp_path).eval()
        assert torch.equal(theirs(again.base_model.model, given), theirs(adapted.base_model.model, given))
