"""Models in GGUF: files as llama.cpp makes them are read with transformers' numbers, and ours are equal to them, and read by it."""

import dataclasses
import types

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmodels as fm
from fmodels import dialects, tree
from fmodels.checkpoint import disk_tensors
from fmodels.dialects import gguf as dialect
from fmodels.dialects.gguf_names import names
from fmodels.nn.positions import Rope
from fmodels.weights import Tensor
from fmodels.weights import gguf as ours
from fmodels.weights.ggml import Blocks
from tests import families, gguf_files
from tests.families import BLOOM, FALCON, GEMMA2, GPT2, GRANITE, LLAMA, MIXTRAL, NEOX, QWEN2_MOE, QWEN_MOE, SMALL, YARN

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
ROWS = {
    "llama": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "llama/factors": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "qwen2_moe": ("Qwen2MoeForCausalLM", QWEN2_MOE | {"head_dim": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN_MOE | {"norm_topk_prob": True}),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2 | {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 1.5}),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA2 | {"query_pre_attn_scalar": 10, "num_hidden_layers": 7}),
    "phi3": ("Phi3ForCausalLM", SMALL | {"sliding_window": 4}),
    "phi": ("PhiForCausalLM", SMALL | {"hidden_size": 32}),
    "starcoder2": ("Starcoder2ForCausalLM", SMALL | {"sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "stablelm": ("StableLmForCausalLM", SMALL | {"hidden_size": 32, "use_qkv_bias": True}),
    "stablelm/parallel": ("StableLmForCausalLM", SMALL | {"hidden_size": 32, "use_parallel_residual": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX | {"hidden_size": 32}),
    "falcon": ("FalconForCausalLM", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon/one-key": ("FalconForCausalLM", FALCON),
    "bloom": ("BloomForCausalLM", BLOOM),
    "olmo2": ("Olmo2ForCausalLM", LLAMA | {"head_dim": 4}),
    "cohere": ("CohereForCausalLM", LLAMA | {"logit_scale": 0.3, "head_dim": 4}),
    "cohere/norms": (
        "CohereForCausalLM", LLAMA | {"use_qk_norm": True, "logit_scale": 0.3, "head_dim": 4, "num_hidden_layers": 64},
    ),
    "granite": ("GraniteForCausalLM", GRANITE | {"attention_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"num_hidden_layers": 4}),
}  # fmt: skip
# transformers does not read the other architectures, mixtral's experts, falcon's with several keys, or mistral's own name.
READ_BY_TRANSFORMERS = (
    "llama", "llama/factors", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "starcoder2", "gpt2",
    "stablelm", "stablelm/parallel", "falcon/one-key", "bloom",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")

    def get(name):
        architecture, config = ROWS[name]
        case = families.Case(f"{name.split('/')[0]}/causal-lm/{name.replace('/', '-')}", architecture, config)
        loaded = families.load(case, root)
        path = loaded.folder / "llama.cpp.gguf"
        if not path.exists():
            tensors = gguf_files.convert(loaded.model, loaded.folder)
            if name == "llama/factors":
                tensors["rope_freqs.weight"] = gguf_files.llama3_factors(LLAMA3, 10)
            gguf_files.write(path, loaded.model, tensors)
        return loaded, path

    return get


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}


def same(first, second):
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", ROWS)
def test_files_of_llama_cpp(name, rows):
    loaded, path = rows(name)
    params, config = fm.load(path)
    logits = np.asarray(fm.forward(params, config, loaded.inputs()["tokens"]).logits)
    np.testing.assert_allclose(logits, loaded.reference()["logits"], rtol=0, atol=1e-5)
    theirs = flat(loaded.params)
    for leaf, array in flat(params).items():
        if name.startswith("gemma") and leaf.endswith("scale"):
            np.testing.assert_allclose(array, theirs[leaf], rtol=0, atol=2**-23)  # 1 + x, less 1
        else:
            assert same(array, theirs[leaf]), leaf

    # What we write of the model has the names and bytes of what llama.cpp's converter writes, and both ways are inverse.
    tensors, metadata = ours.read(path)
    own = dialect.write(disk_tensors(loaded.params, loaded.config), loaded.config)
    assert own.keys() == tensors.keys()
    for one, tensor in own.items():
        close = one == "rope_freqs.weight"
        assert (
            np.allclose(tensor.array(), tensors[one].array()) if close else same(tensor.array(), tensors[one].array())
        ), one
    again = dialect.write(dialect.read(tensors, config), config)
    assert again.keys() == tensors.keys()
    assert all(same(a.array(), tensors[n].array()) for n, a in again.items() if n != "rope_freqs.weight")
    said = dialect.metadata(loaded.config, metadata)
    for key, value in metadata.items():
        if key not in said:  # which is at its default, or is said by tensors
            assert key.endswith(("use_parallel_residual", "rope.scaling.original_context_length")), key
        elif not key.startswith(("tokenizer.ggml.", "general.")):
            assert type(value) is type(said[key]), key
            assert value == said[key], key
    assert said["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_ours(name, rows, tmp_path):
    loaded, path = rows(name)
    config = dataclasses.replace(loaded.config, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    said = dialect.metadata(config, ours.read(path)[1])
    ours.write(tmp_path / "model.gguf", dialect.write(disk_tensors(loaded.params, config), config), said)
    model = type(loaded.model).from_pretrained(
        tmp_path, gguf_file="model.gguf", attn_implementation="eager", dtype=torch.float32, config=loaded.model.config
    )
    theirs = loaded.model.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        if name.startswith("gemma") and "norm" in key:
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=2**-23)
        else:
            assert torch.equal(tensor, theirs[key]), key
    logits = families.reference(model, loaded.inputs())["logits"]
    np.testing.assert_allclose(
        logits, loaded.reference()["logits"], rtol=0, atol=1e-5 if name.startswith("gemma") else 0
    )


@pytest.mark.parametrize("name", ["llama/factors", "gemma2"])
def test_saved_and_loaded(name, rows, tmp_path):
    """`fm.save` and `fm.load`; a file without config.json; bfloat16 that comes back as it was."""
    loaded, _ = rows(name)
    params = fm.cast(loaded.params, "bfloat16")
    fm.save(params, loaded.config, tmp_path / "a", format="gguf")
    for source in (tmp_path / "a", tmp_path / "a" / "model.gguf"):
        again, config = fm.load(source)
        assert config == loaded.config
        assert all(same(a, flat(params)[path]) for path, a in flat(again).items())
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a" / "model.gguf").tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == "BF16"
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "a" / "generation_config.json").unlink(missing_ok=True)
    again, config = fm.load(tmp_path / "a")
    assert config.generation.eos_token_id == loaded.config.eos_token_id == config.eos_token_id
    assert all(same(a, flat(params)[path]) for path, a in flat(again).items())
    head = fm.load(tmp_path / "a", task="sequence-classification", key=jax.random.key(0))[0]
    assert head["classifier"]["weight"].shape == (2, 24)


def test_converted(rows, tmp_path):
    """To safetensors and back; a copy keeps the tokenizer and the quantised blocks."""
    loaded, path = rows("llama")
    tensors = gguf_files.convert(loaded.model, loaded.folder)
    wide = np.linspace(-1, 1, 61 * 32, dtype=np.float32).reshape(61, 32)
    (tmp_path / "x").mkdir()
    fm.convert(path, tmp_path / "st")
    fm.convert(tmp_path / "st", tmp_path / "gguf", format="gguf")
    own, _ = ours.read(tmp_path / "gguf" / "model.gguf")
    assert own.keys() == tensors.keys()
    assert all(same(own[n].array(), a) for n, a in tensors.items())
    said = ours.read(path)[1]
    config = dataclasses.replace(loaded.config, hidden_size=32)
    params = fm.init(config, jax.random.key(0)) | {"embed": {"tokens": wide}}
    own = dialect.write(disk_tensors(params, config), config)
    ours.write(tmp_path / "x" / "x.gguf", own, dialect.metadata(config, said), type="q8_0")
    fm.convert(tmp_path / "x" / "x.gguf", tmp_path / "copy", format="gguf")
    theirs, copied = (gguf.GGUFReader(tmp_path / p) for p in ("x/x.gguf", "copy/model.gguf"))
    assert copied.fields["tokenizer.ggml.tokens"].contents() == theirs.fields["tokenizer.ggml.tokens"].contents()
    blocks = {t.name: (t.tensor_type, t.data.tobytes()) for t in theirs.tensors}
    assert blocks["token_embd.weight"][0] == gguf.GGMLQuantizationType.Q8_0
    assert {t.name: (t.tensor_type, t.data.tobytes()) for t in copied.tensors} == blocks


def test_scales_that_one_added_rounds(rows, tmp_path):
    """What `save` writes rounded, as llama.cpp's converter does, `convert` writes only where exactness is not asked for."""
    loaded, _ = rows("gemma")
    with pytest.raises(ValueError, match=r"format 'gguf' rounds \d+ tensors: .*verify=False \(--no-verify\)"):
        fm.convert(loaded.folder, tmp_path / "new", format="gguf", from_format="safetensors")
    assert not list(tmp_path.iterdir())
    fm.convert(loaded.folder, tmp_path / "new", format="gguf", from_format="safetensors", verify=False)
    fm.save(loaded.params, loaded.config, tmp_path / "saved", format="gguf")
    (new, _), (saved, _) = (ours.read(tmp_path / name / "model.gguf") for name in ("new", "saved"))
    assert new.keys() == saved.keys()
    assert all(same(tensor.array(), saved[n].array()) for n, tensor in new.items())


def test_quantised_files(rows, tmp_path):
    """q8_0 and q4_0 of llama.cpp: their numbers are dequantised, turned rows are turned before; copies have the same blocks."""
    loaded, _ = rows("mixtral")
    config = dataclasses.replace(loaded.config, hidden_size=64, intermediate_size=32)
    params = fm.init(config, jax.random.key(0))
    own = dialect.write(disk_tensors(params, config), config)
    ours.write(tmp_path / "x.gguf", own, dialect.metadata(config), type="q8_0")
    reader = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert (
        reader["blk.0.attn_q.weight"].tensor_type.name == reader["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    )
    tensors, _ = ours.read(tmp_path / "x.gguf")
    torch_names = dialect.read(tensors, config)
    expert = torch_names["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    theirs = reader["blk.1.ffn_up_exps.weight"]
    assert same(expert.array(), gguf.dequantize(theirs.data[2], theirs.tensor_type))
    query = torch_names["model.layers.0.self_attn.q_proj.weight"]
    wide = gguf.dequantize(reader["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    assert same(gguf_files.turn(query.array(), config.num_heads), wide)
    assert isinstance(query, Blocks)
    assert isinstance(expert, Blocks)
    again = dialect.write(torch_names, config)
    for n, one in tensors.items():
        assert type(again[n]) is type(one), n
        assert same(again[n].array(), one.array()), n
    assert (
        fm.load(tmp_path / "x.gguf", dtype="bfloat16")[0]["layers"]["moe"]["up"]["weight"].dtype == ml_dtypes.bfloat16
    )


def test_axes_of_one(rows, tmp_path):
    """llama.cpp's converter has written the gate of Qwen2's shared expert with and without one."""
    loaded, path = rows("qwen2_moe")
    tensors, metadata = ours.read(path)
    name = "blk.0.ffn_gate_inp_shexp.weight"
    assert tensors[name].shape == (24,)
    one = Tensor.lazy(name, np.float32, (1, 24), lambda: tensors[name].array()[None])
    ours.write(tmp_path / "x.gguf", {**tensors, name: one}, metadata)
    own, theirs = flat(fm.load(tmp_path / "x.gguf")[0]), flat(loaded.params)
    assert all(same(array, theirs[leaf]) for leaf, array in own.items())


def test_tokenizer_is_kept(rows, tmp_path):
    loaded, path = rows("llama")
    tensors, metadata = ours.read(path)
    said = dialects.metadata_of(loaded.config, "gguf", metadata)
    ours.write(tmp_path / "x.gguf", tensors, said)
    theirs, own = (gguf.GGUFReader(p).fields for p in (path, tmp_path / "x.gguf"))
    kept = [key for key in theirs if key.startswith("tokenizer.ggml.")]
    assert "tokenizer.ggml.tokens" in kept
    assert all(own[key].contents() == theirs[key].contents() and own[key].types == theirs[key].types for key in kept)
    assert dialect.metadata(loaded.config)["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"activation": "gelu"}, "activation: 'gelu', llama.cpp has 'silu'"),
        ("mistral", {"sliding_window": 64}, "windows of the layers"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "windows of the layers"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"renormalise": False}, "renormalise"),
        ("qwen2_moe", {"mlp_only_layers": (0,)}, "mlp_only_layers"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm: True, llama.cpp has False"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("gemma2", {"attention_cap": None}, "attention_cap"),
        ("gemma2", {"layer_types": ("full_attention",) * 26}, "windows of the layers"),
        ("falcon", {"alibi": True}, "alibi"),
        ("bloom", {"norm_residual": True}, "norm_residual"),
        ("smollm3", {"no_rope_layer_interval": 3}, "rotary settings of the layers"),
        ("gpt2", {"scale_attention": False}, "scale_attention"),
        ("llama", {"eos_token_id": (1, 2, 3, 4)}, "eos_token_id"),
        ("llama", {"rope": Rope(type="dynamic", factor=2.0)}, "rotary settings"),
        ("qwen2", {"head_dim": 64}, "key_length=64 of 32 heads must make embedding_length=4096"),
        ("llama", {"task": "base"}, "task='causal-lm'"),
        ("gptj", {}, "model_type 'gptj' is not supported in GGUF"),
    ],
)
def test_what_llama_cpp_cannot_say(family, changes, message):
    config = getattr(fm.models, family).Config(**{"task": "causal-lm"} | changes)
    with pytest.raises(ValueError, match=message):
        dialect.metadata(config)


@pytest.mark.parametrize("family", [name for name in ROWS if "/" not in name])
def test_defaults_can_be_said(family):
    """Those of transformers, which are the published models'; with all kinds of end tokens."""
    published = {"mistral": {"sliding_window": None}, "qwen3_moe": {"renormalise": True}}.get(family, {})
    config = getattr(fm.models, family).Config(task="causal-lm", eos_token_id=(5, 6, 7), **published)
    found = dialect.metadata(config)
    assert found["general.architecture"] == gguf_files.ARCHITECTURES[family]
    groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
    keys = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    assert {key.replace(found["general.architecture"], "{arch}") for key in found} <= keys


def test_metadata_that_are_not_understood():
    good = dialect.metadata(fm.models.llama.Config(task="causal-lm", num_layers=2))
    table = {
        name: Tensor.lazy("", np.float32, (7, 4096), lambda: np.zeros(0)) for name in ("token_embd.weight", "x", "y")
    }
    assert dialect.config_from_gguf(good, table).vocab_size == 7
    for changes, message in (
        ({"general.architecture": "mamba"}, "'mamba' of the GGUF file is not supported"),
        ({"general.architecture": None}, "None of the GGUF file is not supported"),
        ({"llama.block_count": "3"}, "llama.block_count must be a positive integer"),
        ({"llama.block_count": np.uint32(0)}, "llama.block_count must be a positive integer"),
        ({"llama.block_count": np.uint32(2**31)}, "block_count=2147483648, the file has 3 tensors"),
        ({"llama.expert_count": np.uint32(2**31)}, "expert_count=2147483648, the file has no experts"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id must be the number of a token"),
        ({"llama.rope.freq_base": np.float32(0)}, "freq_base must be a positive number"),
        ({"llama.attention.head_count_kv": np.arange(3)}, "differs between layers"),
        ({"llama.attention.value_length": np.uint32(3)}, "value_length"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": np.float32("nan")}, "must be a positive number"),
        ({"llama.rope.dimension_count": np.uint32(8)}, "rope.dimension_count=8 of head_dim=128"),
        ({"llama.rope.scaling.type": "other", "llama.rope.scaling.factor": np.float32(2)}, "'other' with a factor 2.0"),
        ({"llama.attention.sliding_window": np.uint32(8)}, "unknown key 'llama.attention.sliding_window'"),
        ({"llama.attention.causal": np.bool_(False)}, "causal=np.False_ is not supported, only True"),
        ({"llama.attention.head_count": np.uint32(3)}, "num_heads=3 is not a multiple"),
    ):
        said = {key: value for key, value in (good | changes).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            dialect.config_from_gguf(said, table)


VALUES = st.one_of(
    st.integers(0, 2**32 - 1).map(np.uint32), st.floats(width=32).map(np.float32), st.booleans().map(np.bool_), st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=3).map(lambda items: np.array(items, np.int32)), st.just(["x"]), st.just((["x"],)),
    st.sampled_from(["yarn", "linear", "none"]), st.none(),
)  # fmt: skip
FAMILIES = ("llama", "mixtral", "gemma3_text", "phi3", "falcon", "bloom", "gpt2", "qwen2_moe")


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_wrong_metadata_give_clean_errors(family, data):
    config = getattr(fm.models, family).Config(task="causal-lm", num_layers=2)
    good = dialect.metadata(config)
    keys = [
        *good,
        f"{good['general.architecture']}.rope.scaling.type",
        f"{good['general.architecture']}.rope.scaling.factor",
    ]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    said = {key: value for key, value in (good | changes).items() if value is not None}
    row = np.linspace(1, 4, 64, dtype=np.float32)
    tensors = {
        name: Tensor.lazy(name, np.float32, (8, 8), lambda: np.zeros((8, 8), np.float32)) for name in names(config)
    }
    tensors |= {
        name: Tensor.lazy(name, np.float32, row.shape, lambda: row)
        for name in ("rope_freqs.weight",)
        if data.draw(st.booleans())
    }
    try:
        found = dialect.config_from_gguf(said, tensors)
        dialect.read(tensors, found)
    except ValueError:
        pass


def test_tensors_that_do_not_fit(rows):
    loaded, path = rows("llama")
    tensors, _ = ours.read(path)
    cut = dict(tensors) | {"output_norm.weight": Tensor.lazy("", np.float32, (3,), lambda: np.zeros(3, np.float32))}
    with pytest.raises(ValueError, match=r"'output_norm.weight' has shape \[3\], expected \[24\]"):
        dialect.read(cut, loaded.config)
    more = dict(tensors) | {"blk.0.other.weight": tensors["output_norm.weight"]}
    assert "blk.0.other.weight" in dialect.read(more, loaded.config)
    fewer = dialect.read({n: t for n, t in tensors.items() if n != "blk.1.attn_q.weight"}, loaded.config)
    assert "model.layers.1.self_attn.q_proj.weight" not in fewer
    wrong = types.SimpleNamespace(shape=(2,))
    with pytest.raises(ValueError, match="use match_config"):
        dialect.write({"model.norm.weight": wrong}, loaded.config)
