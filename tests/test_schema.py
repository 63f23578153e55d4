"""The axes table: complete, and enough for abstract trees, checks, sizes and sharding."""

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fmodels as fm
from fmodels import schema, tree
from fmodels.models import FAMILIES, _template


def every_rule(family):
    """Of the files and, where it has others, of PyTorch's module."""
    return {*family.weights.rules, *family.weights.of_module.rules}


def test_table_is_complete_and_small():
    """Every leaf of every family is in it, nothing else is, and every letter has its line in the legend."""
    rules = [rule for family in [*FAMILIES.values(), _template.FAMILY] for rule in every_rule(family)]
    leaves = {schema.line(leaf) for rule in rules for leaf in rule.leaves}
    assert leaves == set(schema.AXES)
    assert {letter for axes in schema.AXES.values() for letter in axes.split()} <= set(schema.LETTERS)
    assert {letter for axes in schema.AXES.values() for letter in axes.split()} == set(schema.SIZES)
    assert len(schema.AXES) < 100
    for path, axes in schema.AXES.items():
        assert axes.startswith("l ") == path.startswith("layers.")


@pytest.mark.parametrize("family", [*FAMILIES.values(), _template.FAMILY], ids=lambda f: f.config.model_type)
def test_disk_layouts_use_the_letters_of_the_table(family):
    """Each layout names each axis of its leaf once, so that the map can be inverted."""
    for rule in every_rule(family):
        for leaf, groups in zip(rule.leaves, rule.layouts, strict=True):
            assert sorted("".join(groups)) == sorted(rule.letters(leaf)), rule.name


LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
GPT2_XL = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
BERT_LARGE = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 4096,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 16,
    "num_hidden_layers": 24, "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True,
    "vocab_size": 30522,
}  # fmt: skip


T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "vocab_size": 32128,
    "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
}  # fmt: skip
FLAN_T5_BASE = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_decoder_layers": 12,
    "num_heads": 12, "num_layers": 12, "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
BART_LARGE_CNN = {
    "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "gelu", "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 0, "classif_dropout": 0.0,
    "classifier_dropout": 0.0, "d_model": 1024, "decoder_attention_heads": 16, "decoder_ffn_dim": 4096,
    "decoder_layerdrop": 0.0, "decoder_layers": 12, "decoder_start_token_id": 2, "dropout": 0.1, "early_stopping": True,
    "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_layerdrop": 0.0, "encoder_layers": 12, "eos_token_id": 2,
    "force_bos_token_to_be_generated": True, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "init_std": 0.02, "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "length_penalty": 2.0, "max_length": 142,
    "max_position_embeddings": 1024, "min_length": 56, "model_type": "bart", "no_repeat_ngram_size": 3,
    "normalize_before": False, "num_beams": 4, "num_hidden_layers": 12, "output_past": True, "pad_token_id": 1,
    "prefix": " ", "scale_embedding": False, "use_cache": True, "vocab_size": 50264,
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (LLAMA_2_7B, 6738415616), (LLAMA_3_1_8B, 8030261248), (GPT2_XL, 1557611200), (BERT_LARGE, 335141888),
        (T5_SMALL, 60506624), (FLAN_T5_BASE, 247577856), (BART_LARGE_CNN, 406290432 + 50264),
    ],
    ids=["llama-2-7b", "llama-3.1-8b", "gpt2-xl", "bert-large", "t5-small", "flan-t5-base", "bart-large-cnn"],
)  # fmt: skip
def test_published_configs_have_their_published_size(data, count):
    config = FAMILIES[data["model_type"]].config.from_hf(data)
    shapes = fm.abstract(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    fm.check(shapes, config)


def test_check_lists_everything():
    config = fm.models.gpt2.Config(task="causal-lm")
    params = fm.abstract(config)
    fm.check(params, config)
    broken = tree.update(
        params, {"embed.tokens": jax.ShapeDtypeStruct((7, 768), "float32"), "lm_head.bias": params["embed"]["tokens"]}
    )
    broken = tree.remove(broken, "final_norm.scale")
    with pytest.raises(ValueError, match="3 problems") as error:
        fm.check(broken, config)
    for words in (
        "missing 'final_norm.scale'",
        "unexpected 'lm_head.bias'",
        "'embed.tokens' has shape (7, 768)",
        "(v e) = (50257, 768)",
    ):
        assert words in str(error.value)
    fixed = fm.match_config(tree.update(params, {"embed.tokens": jax.ShapeDtypeStruct((7, 768), "float32")}), config)
    assert fixed == dataclasses.replace(config, vocab_size=7)


def test_unknown_leaf():
    with pytest.raises(KeyError, match=r"'layers\.glue' is not in the table of axes"):
        schema.axes("layers.glue")


def test_map_axes_is_by_letter():
    config = fm.models.bert.Config(task="masked-lm", tie_word_embeddings=False)
    touched = []
    schema.map_axes(lambda path, leaf, axis: touched.append((path, leaf.shape[axis])) or leaf, fm.abstract(config), "v")
    assert dict(touched) == {"embed.tokens": 30522, "lm_head.weight": 30522, "lm_head.bias": 30522}


def test_sizes_measured_from_arrays(loaded):
    """Letter by letter, the arrays agree with transformers' own config."""
    found, theirs = schema.measured(loaded.params), loaded.model.config
    size = getattr(theirs, "word_embed_proj_dim", theirs.hidden_size)  # OPT's name
    assert found["e"] == {getattr(theirs, "embedding_size", size)}
    assert found.get("d", {theirs.hidden_size}) == {theirs.hidden_size}
    assert found["v"] == {theirs.vocab_size}
    for part in {schema.stack(path) for path in tree.stacks(loaded.params)}:
        part = part and f"{part}."
        heads = theirs.num_attention_heads
        depth = getattr(theirs, "num_hidden_groups", theirs.num_hidden_layers)
        if part == "decoder.":
            heads = getattr(theirs, "decoder_attention_heads", heads)
            depth = getattr(theirs, "num_decoder_layers", getattr(theirs, "decoder_layers", depth))
        assert found[f"{part}h"] == {heads}
        assert found[f"{part}l"] == {depth} == schema.measured(loaded.unstacked)[f"{part}l"]
        groups = getattr(theirs, "num_key_value_heads", heads)
        if theirs.model_type == "falcon":
            groups = 1 if theirs.multi_query and not theirs.new_decoder_architecture else theirs.num_kv_heads
        assert found.get(f"{part}g", {groups}) == {groups}  # latent attention has none


def test_partition_specs():
    specs = fm.partition_specs(
        fm.abstract(fm.models.llama.Config()), {"h": "model", "g": "model", "f": "model", "v": "model", "d": "data"}
    )
    assert specs["layers"]["attention"]["query"]["weight"] == PartitionSpec(None, "model", None, "data")
    assert specs["layers"]["attention"]["output"]["weight"] == PartitionSpec(None, "data", "model", None)
    assert specs["embed"]["tokens"] == PartitionSpec("model", "data")
    assert specs["final_norm"]["scale"] == PartitionSpec("data")
    square = fm.partition_specs({"pooler": {"weight": jax.ShapeDtypeStruct((4, 4), "float32")}}, {"d": "data"})
    assert square["pooler"]["weight"] == PartitionSpec("data", None)  # a mesh axis once per leaf


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import fmodels as fm

folder, inputs, out = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
given = dict(np.load(inputs))
results = {}
for layers in ("stacked", "list"):
    params, config = fm.load(folder, layers=layers)
    specs = fm.partition_specs(params, {"h": "model", "f": "model", "v": "model", "d": "data"})
    is_spec = lambda x: isinstance(x, PartitionSpec)
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
    sharded, _ = fm.load(folder, layers=layers, sharding=sharding)
    query = fm.tree.flatten(sharded)["layers.attention.query.weight" if layers == "stacked" else "layers.0.attention.query.weight"]
    assert len(query.sharding.device_set) == 8 and query.addressable_shards[0].data.size * 8 == query.size, query.sharding
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(sharded), strict=True):
        assert np.array_equal(one, two)
    tokens = jax.device_put(given["tokens"], NamedSharding(mesh, PartitionSpec("data")))
    results[layers] = fm.forward(sharded, config, tokens, mask=given["mask"]).logits
    results[f"{layers} generate"] = fm.generate(sharded, config, tokens, mask=given["mask"], max_new_tokens=4).tokens
whole, config = fm.load(folder, sharding=NamedSharding(mesh, PartitionSpec()))
results["replicated"] = fm.forward(whole, config, given["tokens"], mask=given["mask"]).logits
assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
np.savez(out, **{name: np.asarray(a) for name, a in results.items()})
"""


def test_sharded_on_eight_devices(tmp_path, monkeypatch):
    """`load(sharding=…)` places each leaf by its letters; the logits are transformers' still."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=320,  # more than the candidates of which is drawn
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_inner=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "m")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 6))
    np.savez(tmp_path / "in.npz", tokens=tokens, mask=np.ones_like(tokens))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "m"), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
        longer = model.generate(torch.tensor(tokens), max_new_tokens=4, do_sample=False, pad_token_id=2).numpy()
    for name, got in np.load(tmp_path / "out.npz").items():
        if "generate" in name:
            assert np.array_equal(got, longer), name
        else:
            assert np.abs(got - want).max() < 1e-5, name
