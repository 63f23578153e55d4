"""Configs of families: the keys of config.json that they read, those that they refuse, and what they are where it says nothing."""

import dataclasses

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import fmodels as fm
from fmodels.models import FAMILIES
from tests import families
from tests.families import LONG


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
        (
            transformers.GPT2Config,
            "gpt2",
            {"hidden_size": 48, "max_position_embeddings": 64},
            ("hidden_size", "max_positions"),
        ),
        (
            transformers.GPTJConfig,
            "gptj",
            {"num_attention_heads": 4, "num_hidden_layers": 2},
            ("num_heads", "num_layers"),
        ),
        (
            transformers.DistilBertConfig,
            "distilbert",
            {"hidden_size": 24, "num_hidden_layers": 2},
            ("hidden_size", "num_layers"),
        ),
        (transformers.T5Config, "t5", {"hidden_size": 24, "head_dim": 6}, ("hidden_size", "head_dim")),
        (transformers.BartConfig, "bart", {"hidden_size": 64, "num_attention_heads": 4}, ("hidden_size", "num_heads")),
        (transformers.MixtralConfig, "mixtral", {"num_experts": 4}, ("num_experts",)),
        (transformers.GptOssConfig, "gpt_oss", {"num_experts": 16}, ("num_experts",)),
        (transformers.DeepseekV3Config, "deepseek_v3", {"num_local_experts": 64}, ("num_experts",)),
        (transformers.FalconConfig, "falcon", {"n_embed": 142, "num_attention_heads": 71}, ("hidden_size", "head_dim")),
        (transformers.GptOssConfig, "gpt_oss", {"rope_theta": 500.0}, ("rope",)),
        (transformers.GPTNeoConfig, "gpt_neo", {"attention_layers": ["local"] * 24}, ("attention_layers", "kinds")),
    ):
        config = FAMILIES[family].config
        assert fields_of(config, keys) == fields_of(config, kind(**keys).to_dict())
        ours = config.from_hf(keys, task="base")
        assert all(getattr(ours, name) != getattr(config(), name) for name in fields)


def test_keys_of_published_models():
    """Keys that are in files of the Hub and that transformers' classes do not read."""
    general = {
        "transformers.js_config": {"dtype": "q4"}, "sentence_transformers": {"version": "5.0"}, "xla_device": None,
        "custom_pipelines": {}, "eos_token_ids": 0, "name": "Roberta", "adapters": {"adapters": {}},
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    }  # fmt: skip
    for family, keys in (
        ("bert", general),
        ("llama", {"is_llama_config": True, "max_sequence_length": 2048}),
        ("qwen2", {"use_mrope": False}),
        ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
        ("gemma2", {"sliding_window_size": 4096}),
        ("smollm3", {"max_window_layers": 28}),
        ("starcoder2", {
            "activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True,
        }),
        ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
        ("opt", {"learned_embeddings": True, "scale_embeddings": False}),
        ("gpt_neox", {"num_steps": "global_step320000"}),
        ("bart", {"replacing_rate": 0, "student_encoder_layers": None, "student_decoder_layers": None}),
    ):  # fmt: skip
        config = FAMILIES[family].config
        assert fields_of(config, keys) == fields_of(config, {})


def test_old_names_of_classes():
    for family, name, task in (
        ("bert", "BertForCausalLM", "causal-lm"), ("t5", "T5WithLMHeadModel", "seq2seq-lm"), ("llama", "LLaMAForCausalLM", "causal-lm"),
    ):  # fmt: skip
        assert FAMILIES[family].config.from_hf({"architectures": [name]}).task == task


def test_original_positions_of_phi3():
    """The key beside `rope_parameters` goes before that in it, also where it has only its default."""
    rope = LONG | {"original_max_position_embeddings": 8, "partial_rotary_factor": 0.0625}
    for keys in ({}, {"original_max_position_embeddings": 16}):
        keys |= {"rope_parameters": rope}
        theirs = transformers.Phi3Config(**keys).to_dict()
        ours = FAMILIES["phi3"].config.from_hf(keys, task="base")
        assert ours.rope.original_max_positions == theirs["rope_parameters"]["original_max_position_embeddings"]


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
