"""Quantised tensors of GGUF: kept as leaves they have gguf-py's numbers and bytes, and what is written has gguf-py's bytes."""

import gguf
import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import fmodels as fm
from fmodels.arrays import Quantized
from fmodels.checkpoint import disk_tensors
from fmodels.dialects import gguf as dialect
from tests import families, gguf_files
from tests.families import BLOOM, FALCON, GPT2, LLAMA, MIXTRAL, NEOX, SMALL

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 61}
FEW = {"hidden_size": 64, "ffn_hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = {
    "llama": ("LlamaForCausalLM", LLAMA | WIDE | {"num_attention_heads": 4, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", SMALL | WIDE | {"tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", SMALL | WIDE | {"sliding_window": None}),
    "bloom": ("BloomForCausalLM", BLOOM | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX | WIDE | {"num_attention_heads": 4}),
    "falcon": ("FalconForCausalLM", FALCON | FEW | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"n_embd": 64, "n_inner": 96, "n_layer": 2}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL | WIDE | {"num_attention_heads": 4, "head_dim": 16, "num_local_experts": 3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A model of transformers and a file of it by gguf-py, all of whose matrices are quantised but for routers."""
    root = tmp_path_factory.mktemp("gguf")

    def get(name, kind):
        loaded = families.load(families.Case(f"{name}/causal-lm", *ROWS[name]), root)
        path = loaded.folder / f"{kind}.gguf"
        if not path.exists():
            tensors = gguf_files.convert(loaded.model, loaded.folder)
            named = [n for n, a in tensors.items() if a.ndim > 1 and "gate_inp" not in n and "position" not in n]
            gguf_files.write(path, loaded.model, tensors, dict.fromkeys(named, kind))
        return loaded, path

    return get


def is_kept(leaf):
    return isinstance(leaf, Quantized)


def contents(path):
    """Name -> type and bytes, by gguf-py."""
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "q8_0"),
        ("llama", "q4_0"),
        ("qwen2", "q4_0"),
        ("phi3", "q8_0"),
        ("mixtral", "q4_0"),
        ("bloom", "q8_0"),
        ("gpt_neox", "q4_0"),
        ("falcon", "q8_0"),
        ("gpt2", "q8_0"),
        ("gpt2", "q4_0"),
    ],
)
def test_kept(name, kind, rows, tmp_path):
    loaded, path = rows(name, kind)
    plain, config = fm.load(path)
    params, same_config = fm.load(path, dequantize=False)
    assert same_config == config
    assert not any(map(is_kept, fm.tree.flatten(plain).values()))
    leaves = fm.tree.flatten(params)
    assert all(
        is_kept(leaf) == (not any(word in at for word in ("norm", "router", "bias", "positions")))
        for at, leaf in leaves.items()
    )
    size = {"q8_0": 34, "q4_0": 18}[kind]
    assert leaves["layers.attention.output.weight"].nbytes == 2 * 64 * 64 // 32 * size

    # The arrays are those of gguf-py, rows in PyTorch's order.
    by_gguf = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    own = dialect.write(disk_tensors(fm.dequantize(params), config), config)
    assert own.keys() == by_gguf.keys()
    assert all(np.array_equal(tensor.array(), by_gguf[n].reshape(tensor.shape)) for n, tensor in own.items())
    expanded = fm.tree.flatten(fm.dequantize(params))
    assert all(np.array_equal(leaf, expanded[at]) for at, leaf in fm.tree.flatten(plain).items())

    tokens = loaded.inputs()["tokens"]
    want = np.asarray(fm.forward(plain, config, tokens).logits)
    got = np.asarray(fm.forward(params, config, tokens).logits)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())

    # The same bytes go into a new file, from both forms of the tree.
    for form in (params, fm.unstack_layers(params)):
        fm.save(form, config, tmp_path / "new", format="gguf")
        assert contents(tmp_path / "new" / "model.gguf") == contents(path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_transformers_has_the_same_logits(name, rows):
    loaded, path = rows(name, "q8_0")
    params, config = fm.load(path, dequantize=False)
    model = type(loaded.model).from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation="eager", dtype=torch.float32, config=loaded.model.config
    )
    tokens = loaded.inputs()["tokens"]
    want = families.reference(model, loaded.inputs())["logits"]
    got = np.asarray(fm.forward(params, config, tokens).logits)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))


def test_other_types_are_arrays(rows, tmp_path):
    """A layer with another type makes layers a tuple; what has no leaf of its own is dequantised; dtype is what leaves stand for."""
    loaded, path = rows("llama", "q8_0")
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    types = dict.fromkeys([n for n, a in tensors.items() if a.ndim > 1], "q8_0")
    types |= {"blk.1.ffn_up.weight": "q4_0", "output.weight": "q5_1"}
    gguf_files.write(tmp_path / "mixed.gguf", loaded.model, tensors, types)
    params, config = fm.load(tmp_path / "mixed.gguf", dequantize=False, dtype="bfloat16")
    up = [layer["mlp"]["up"]["weight"] for layer in params["layers"]]
    assert [leaf.codec.type for leaf in up] == ["q8_0", "q4_0"]
    assert not is_kept(params["lm_head"]["weight"])
    assert params["lm_head"]["weight"].dtype == up[0].dtype == np.dtype("bfloat16")
    fm.save(params, config, tmp_path / "new", format="gguf")
    new, old = contents(tmp_path / "new" / "model.gguf"), contents(tmp_path / "mixed.gguf")
    assert all(new[n] == old[n] for n, kind in types.items() if kind in ("q8_0", "q4_0"))
    with pytest.raises(ValueError, match=r"which format 'safetensors' .* as \"gguf\", or use fm.dequantize"):
        fm.save(params, config, tmp_path / "no")
    fm.save(fm.dequantize(params), config, tmp_path / "plain")


def test_kept_leaves_are_split_in_whole_blocks(rows):
    _, path = rows("llama", "q4_0")
    _, config = fm.load(path)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    letters = {"h": "model", "g": "model", "f": "model", "v": "model"}
    specs = fm.partition_specs(fm.abstract(config), letters)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    params, _ = fm.load(path, dequantize=False, sharding=placed)
    assert params["layers"]["mlp"]["down"]["weight"].parts["blocks"].sharding.spec == PartitionSpec(
        None, None, "model", None
    )
    assert params["layers"]["mlp"]["up"]["weight"].parts["blocks"].sharding.spec == PartitionSpec(
        None, "model", None, None
    )


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_fused_by_the_converter(name, rows, tmp_path):
    """Files of `--fuse-qkv` and `--fuse-gate-up-exps`, as llama.cpp computes with them, are read as those of neither."""
    loaded, path = rows(name, "q8_0")
    tensors = gguf_files.convert(loaded.model, loaded.folder)
    for layer in range(2):
        for fused, parts, axis in (
            ("attn_qkv.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight"), 0),
            ("attn_qkv.bias", ("attn_q.bias", "attn_k.bias", "attn_v.bias"), 0),
            ("ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), 1),
        ):
            if f"blk.{layer}.{parts[0]}" in tensors:
                joined = np.concatenate([tensors.pop(f"blk.{layer}.{part}") for part in parts], axis)
                tensors[f"blk.{layer}.{fused}"] = joined
    kinds = {n: "q8_0" for n, a in tensors.items() if a.ndim > 1 and "gate_inp" not in n}
    gguf_files.write(tmp_path / "fused.gguf", loaded.model, tensors, kinds)
    params, config = fm.load(tmp_path / "fused.gguf", dequantize=False)
    fm.save(params, config, tmp_path / "new", format="gguf")
    assert contents(tmp_path / "new" / "model.gguf") == contents(path)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_written_as_q8_0(name, rows, tmp_path):
    """`save` and `convert` quantise what llama.cpp's converter does, to the bytes of gguf-py."""
    loaded, _ = rows(name, "q8_0")
    theirs = gguf_files.convert(loaded.model, loaded.folder)
    fm.save(loaded.params, loaded.config, tmp_path / "saved", format="gguf", dtype="q8_0")
    done = fm.convert(loaded.folder, tmp_path / "converted", format="gguf", dtype="q8_0")
    assert done.cast == sum(a.ndim > 1 and "gate_inp" not in n for n, a in theirs.items())
    for folder in ("saved", "converted"):
        reader = gguf.GGUFReader(tmp_path / folder / "model.gguf")
        assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
        found = {t.name: t for t in reader.tensors}
        assert found.keys() == theirs.keys()
        for n, array in theirs.items():
            kind = "F32" if array.ndim < 2 or "norm" in n or "gate_inp" in n else "Q8_0"
            assert found[n].tensor_type.name == kind, n
            want = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind])
            assert found[n].data.tobytes() == want.tobytes(), n
    back = fm.convert(tmp_path / "converted", tmp_path / "back", format="gguf", dtype="float32")
    assert back.sha256 == done.sha256
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "back" / "model.gguf").tensors} == {"F32"}


def test_types_of_other_formats_are_refused(rows, tmp_path):
    loaded, path = rows("llama", "q8_0")
    with pytest.raises(
        ValueError, match="convert: 'q8_0' is a type of format 'gguf', which 'safetensors' does not have"
    ):
        fm.convert(loaded.folder, tmp_path / "no", dtype="q8_0")
    with pytest.raises(ValueError, match="save: expected a floating dtype such as 'bfloat16', got 'q4_k'"):
        fm.save(loaded.params, loaded.config, tmp_path / "no", format="gguf", dtype="q4_k")
    assert not (tmp_path / "no").exists()
    fm.save(loaded.params, loaded.config, tmp_path / "half", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in fm.tree.flatten(fm.load(tmp_path / "half")[0]).values()} == {"bfloat16"}
    fm.save(*fm.load(path, dequantize=False), tmp_path / "wide", format="gguf", dtype="float32")
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "wide" / "model.gguf").tensors} == {"F32"}


def test_routers_and_positions_are_wide(rows, tmp_path):
    """In bfloat16, too, as by llama.cpp's converter; they come back as they were."""
    loaded, _ = rows("mixtral", "q8_0")
    params = fm.cast(loaded.params, "bfloat16")
    fm.save(params, loaded.config, tmp_path, format="gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_gate_inp.weight"], kinds["blk.0.ffn_up_exps.weight"]) == ("F32", "BF16")
    again = fm.tree.flatten(fm.load(tmp_path)[0])
    assert all(
        np.array_equal(leaf, again[at]) and leaf.dtype == again[at].dtype
        for at, leaf in fm.tree.flatten(params).items()
    )


def test_parts(rows, tmp_path):
    """Split as llama.cpp's `gguf-split` and gguf-py split, only if it is asked for; read whole; another save leaves nothing."""
    loaded, _ = rows("llama", "q8_0")
    fm.save(loaded.params, loaded.config, tmp_path / "one", format="gguf", dtype="q8_0")
    whole = contents(tmp_path / "one" / "model.gguf")
    largest = sum(len(raw) for _, raw in whole.values()) // 3
    ours = tmp_path / "ours"
    fm.save(loaded.params, loaded.config, ours, format="gguf", dtype="q8_0", max_shard_size=largest)
    names = sorted(path.name for path in ours.glob("*.gguf"))
    assert names == [f"model-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]

    writer = gguf.GGUFWriter(tmp_path / "theirs" / "model.gguf", "llama", split_max_tensors=6)
    for n, (kind, raw) in whole.items():
        writer.add_tensor(n, np.frombuffer(raw, np.uint8).reshape(1, -1), raw_dtype=kind)
    (tmp_path / "theirs").mkdir()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = [gguf.GGUFReader(path) for path in sorted((tmp_path / "theirs").iterdir())]
    own = [gguf.GGUFReader(ours / name) for name in names]
    assert len(theirs) == 4
    for one, other in zip(own, theirs, strict=True):
        for key in ("split.no", "split.count", "split.tensors.count"):
            assert one.fields[key].types == other.fields[key].types
            assert one.fields[key].contents() == other.fields[key].contents()
        assert sum(tensor.n_bytes for tensor in one.tensors) <= largest
    assert own[0].fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert "llama.block_count" not in own[1].fields
    assert {n: raw for name in names for n, raw in contents(ours / name).items()} == whole

    for source in (ours, ours / names[2]):
        params, config = fm.load(source, dequantize=False)
        fm.save(params, config, tmp_path / "back", format="gguf")
        assert contents(tmp_path / "back" / "model.gguf") == whole
    done = fm.convert(ours, tmp_path / "two", format="gguf", max_shard_size=2 * largest)
    assert len(list((tmp_path / "two").glob("model-0000?-of-00002.gguf"))) == 2
    assert done.sha256 == fm.convert(tmp_path / "one", tmp_path / "again", format="gguf").sha256
    (ours / "mine.gguf").write_bytes(b"")  # which is not ours, and does not come between
    assert fm.load(ours)[1] == loaded.config
    fm.save(loaded.params, loaded.config, ours, format="gguf", max_shard_size="1GB")
    assert sorted(path.name for path in ours.glob("*.gguf")) == ["mine.gguf", "model.gguf"]


def test_shards_of_other_formats_count_what_they_hold(rows, tmp_path):
    """Not the bytes of the blocks that it came from."""
    _, path = rows("llama", "q4_0")
    done = fm.convert(path, tmp_path / "out", max_shard_size="60KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    sizes = [sum(a.nbytes for a in load_file(file).values()) for file in files]
    assert sum(sizes) == done.bytes
    assert max(sizes) <= 60_000
