"""What must not pass unseen: wrong configs, parts that compute something else, leaves that are missing."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import fmodels as fm
from fmodels import nn
from fmodels.nn import positions
from tests import families

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
        loaded.check(params=params, config=dataclasses.replace(loaded.config, **changes))


def test_swapped_rope_pairing_fails(case, monkeypatch):
    loaded = case("llama/causal-lm")
    monkeypatch.setattr(fm.models.llama.Config, "interleaved", True)
    config = dataclasses.replace(loaded.config, bos_token_id=59)  # not the compiled one
    with pytest.raises(AssertionError, match="departs"):
        loaded.check(config=config)


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
        loaded.check("left", config=config)


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
