"""TensorFlow's files against those that transformers 4.57.6 and TensorFlow wrote (goldens/make_tensorflow*.py)."""

import gzip
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmodels as fm
from fmodels import dialects
from fmodels.checkpoint import disk_tensors
from fmodels.models import family
from fmodels.weights import Tensor, read_file, read_folder, rules, safetensors, tf_checkpoint, tf_h5
from fmodels.weights.crc32c import crc32c, masked
from tests.goldens import read_back_tensorflow

GOLDENS = Path(__file__).parents[1] / "goldens" / "tensorflow"
TABLE = json.loads(gzip.decompress((GOLDENS / "variables.json.gz").read_bytes()))
READ_BACK = json.loads(read_back_tensorflow.RECORD.read_text())
EXPECTED = np.load(GOLDENS / "expected.npz")
H5 = ("gpt2", "gpt2_sharded", "bert", "t5", "bart", "albert")
ORIGINALS = ("bert_original", "albert_original")
# What transformers itself does not carry over from PyTorch: TensorFlow's MPNet always has a pooler, and its DeBERTa has
# other names for two projections.
NOT_IN_TORCH = re.compile(r"/mpnet/pooler/")
NOT_FILLED = re.compile(r"/(pos_proj|pos_q_proj)/")


def as_tensor(array):
    return Tensor.lazy("", array.dtype, array.shape, lambda: array)


def values(name, shape):
    """As in make_tensorflow_names.py."""
    count = int(np.prod(shape))
    return (np.arange(count) * 7 % 9973 + zlib.crc32(name.encode()) % 9973).astype(np.float32).reshape(shape)


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        x, y = a[name].array(), b[name].array()
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


@pytest.mark.parametrize("architecture", TABLE)
def test_names_of_all_classes(architecture):
    """Names, shapes, values and layers of each variable are those that transformers' class has from the same tensors."""
    row = TABLE[architecture]
    config = family(row["config"]["model_type"]).config.from_hf(row["config"])
    tensors = {}
    for name, place in family(config).weights.places(config).items():
        if not place.rule.optional or name.endswith(("lm_head.weight", "final_logits_bias")) or "pooler" in name:
            shape = rules.disk_shape(place.rule, place.sizes(config))
            tensors[name] = as_tensor(values(name, shape))
    got = dialects.write(tensors, config, "tf")

    def own(name):  # the second model of a class in one process has a number
        return name.replace("_1/", "/", 1) if architecture.endswith("/variant") else name

    want = {own(name): value for name, value in row["variables"].items()}
    want = {name: value for name, value in want.items() if name in got or not NOT_IN_TORCH.search(name)}
    assert sorted(got) == sorted(want)
    for name, (shape, checksum) in want.items():
        assert list(got[name].shape) == shape, name
        if not NOT_FILLED.search(name):
            assert zlib.crc32(np.ascontiguousarray(got[name].array()).tobytes()) == checksum, name
    layers = dialects.metadata_of(config, "tf")["layers"]
    layers = {layer: sorted(name for name in names if name in got) for layer, names in layers.items()}
    named = {
        layer: sorted({*map(own, names)} & {*got}) for layer, names in row["layers"].items() if names or layer in layers
    }
    assert layers == named
    back = dialects.read(got, config, "tf")
    assert sorted(back) == sorted(tensors)
    same({name: back[name] for name in tensors}, tensors)


def logits(folder, name, **options):
    params, config = fm.load(folder, **options)
    more = {"decoder_tokens": jnp.asarray(EXPECTED["decoder_tokens"])} if config.is_encoder_decoder else {}
    out = jax.jit(fm.forward, static_argnums=1)(params, config, jnp.asarray(EXPECTED["tokens"]), **more)
    np.testing.assert_allclose(out.logits, EXPECTED[f"{name}/logits"], atol=1e-5, rtol=1e-5)
    if f"{name}/sequence_logits" in EXPECTED:
        np.testing.assert_allclose(out.sequence_logits, EXPECTED[f"{name}/sequence_logits"], atol=1e-5, rtol=1e-5)
    return params, config


def attributes(group):
    """The attributes of Keras, but for layers without variables, which have a number of the process in their names."""
    found = {}
    for key, value in group.attrs.items():
        kind = h5py.check_string_dtype(group.attrs.get_id(key).dtype)
        if key == "layer_names":
            value = [name for name in value if not name.startswith("dropout")]
        found[key] = (value if isinstance(value, str) else sorted(value), kind)
    return found


def contents(path):
    """Path -> the attributes of a group, or the dtype, shape and bytes of an array."""
    found = {}
    with h5py.File(path) as file:
        found[""] = attributes(file)

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = (item.dtype, item.shape, item[()].tobytes())
            elif not name.startswith("dropout"):
                found[name] = attributes(item)

        file.visititems(visit)
    return found


@pytest.mark.parametrize("name", H5)
def test_h5_of_transformers(tmp_path, name):
    """The same logits; written again, array by array and attribute by attribute the same file."""
    params, config = logits(GOLDENS / name, name)
    many = name.endswith("sharded")
    fm.save(params, config, tmp_path, format="tf", max_shard_size="3KB" if many else "5GB")
    golden = sorted(path.name for path in GOLDENS.joinpath(name).glob("tf_model*"))
    assert sorted(path.name for path in tmp_path.glob("tf_model*")) == golden
    for file in golden:
        if file.endswith(".json"):
            ours, theirs = (json.loads((folder / file).read_text()) for folder in (tmp_path, GOLDENS / name))
            plain = {key.replace("model_1/", "model/"): shard for key, shard in theirs["weight_map"].items()}
            assert ours["weight_map"] == plain  # the second model of its class in one process has a number
        else:
            assert contents(tmp_path / file) == contents(GOLDENS / name / file)
    again, _ = fm.load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, params))
    raw, metadata = read_folder(GOLDENS / name)
    torch = dialects.read(raw, config, metadata["format"])
    same(dict(sorted(torch.items())), dict(sorted(disk_tensors(params, config).items())))
    full = {key.split(":")[0]: tensor for key, tensor in dialects.write(torch, config, "tf").items()}
    short = {tf_h5.in_shard(key) if many else key: tensor for key, tensor in full.items()}
    assert {key.split(":")[0]: key for key in raw}.keys() == short.keys()


@pytest.mark.parametrize("architecture", TABLE)
def test_written_as_transformers_read_it(tmp_path, architecture):
    """What the TensorFlow class read from our files, and computed the right logits with, is what is written today."""
    params, config = read_back_tensorflow.model_of(TABLE[architecture]["config"])
    fm.save(params, config, tmp_path, format="tf")
    found = {}
    with h5py.File(tmp_path / "tf_model.h5") as file:
        for layer in file.attrs["layer_names"]:
            found |= {name: file[layer][name][()] for name in file[layer].attrs["weight_names"]}
    assert read_back_tensorflow.digest(found) == READ_BACK[architecture]


def test_safetensors_of_tensorflow(tmp_path):
    """`safe_serialization=True` of a TensorFlow class: the names of shards, and `format` in the metadata."""
    tensors, _ = read_folder(GOLDENS / "t5")
    shutil.copy(GOLDENS / "t5" / "config.json", tmp_path)
    safetensors.write(
        tmp_path / "model.safetensors", {tf_h5.in_shard(k): t for k, t in tensors.items()}, {"format": "tf"}
    )
    logits(tmp_path, "t5")


@pytest.mark.parametrize("name", ORIGINALS)
def test_checkpoints_of_google(name, tmp_path):
    """With nothing but `bert_config.json` beside; an optimizer's variables are left out. The bytes are TensorFlow's."""
    params, config = logits(GOLDENS / name, name)
    raw, metadata = read_folder(GOLDENS / name)
    assert metadata["format"] == "tf-original"
    assert "global_step" in raw
    torch = dialects.read(raw, config, "tf-original")
    kept = {key: tensor for key, tensor in raw.items() if not re.search("adam_|global_step", key)}
    again = dialects.write(torch, config, "tf-original")
    same(dict(sorted(again.items())), kept)
    same(dialects.read(again, config, "tf-original"), torch)
    tf_checkpoint.write(tmp_path / "model.ckpt.index", raw)
    for file in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / file).read_bytes() == (GOLDENS / name / file).read_bytes()
    fm.save(params, config, tmp_path / "saved", format="tf-checkpoint")
    same(read_folder(tmp_path / "saved")[0], kept)
    base, _ = fm.load(GOLDENS / name / "model.ckpt.index", task="base")
    assert (base["embed"]["tokens"] == params["embed"]["tokens"]).all()


def test_checkpoints_that_tensorflow_reads(tmp_path):
    """Every dtype and kind of shape, more names than a block has restarts, and an array of more than one block of checksums.

    TensorFlow compares the checksums of what it reads, of the index and of each array.
    """
    import tensorflow as tf

    arrays = {
        f"of/{np.dtype(dtype)}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in tf_checkpoint.DTYPES.values()
    }
    arrays |= {"scalar": np.float32(7), "empty": np.zeros((0, 3), np.int32), "transposed": np.ones((2, 300), "f4").T}
    arrays["large/" + "x" * 300] = np.random.default_rng(0).random(700_001)
    tensors = {name: as_tensor(np.asarray(array)) for name, array in arrays.items()}
    sizes = []
    tf_checkpoint.write(tmp_path / "model.ckpt.index", tensors, advance=sizes.append)
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    reader = tf.train.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert reader.get_variable_to_shape_map() == {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        got = reader.get_tensor(name)
        assert (got.dtype, got.tobytes()) == (array.dtype, array.tobytes()), name
    same(tf_checkpoint.read(tmp_path / "model.ckpt.index")[0], dict(sorted(tensors.items())))


def test_saving_over_an_older_checkpoint(case, tmp_path):
    """Data and index are replaced together, and go when a format that is preferred is saved."""
    loaded = case("bert/masked-lm")
    fm.save(loaded.params, loaded.config, tmp_path, format="tf-checkpoint")
    other = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
    fm.save(other, loaded.config, tmp_path, format="tf-checkpoint")
    params, _ = fm.load(tmp_path)
    assert (params["embed"]["tokens"] == other["embed"]["tokens"]).all()
    fm.save(other, loaded.config, tmp_path, format="npz")
    assert not list(tmp_path.glob("model.ckpt*"))


def test_what_no_class_holds(tmp_path):
    params, config = fm.load(fm.assets.TINY_LLAMA)
    with pytest.raises(ValueError, match="no class TFLlamaForCausalLM"):
        fm.save(params, config, tmp_path, format="tf")
    bert = fm.models.bert.Config(task="masked-lm", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"no variables for 1 tensors: cls\.predictions\.decoder\.weight"):
        dialects.write({"cls.predictions.decoder.weight": as_tensor(np.zeros((30522, 768), np.float32))}, bert, "tf")
    with pytest.raises(ValueError, match="BERT and ALBERT"):
        dialects.read({}, config, "tf-original")
    half = as_tensor(np.zeros(2, jnp.bfloat16))
    with pytest.raises(ValueError, match="bfloat16"):
        tf_h5.write(tmp_path / "a.h5", {"m/a/kernel:0": half})
    with pytest.raises(ValueError, match="float4_e2m1fn, which TensorFlow does not have"):
        tf_checkpoint.write(tmp_path / "a.index", {"a": as_tensor(np.zeros(2, ml_dtypes.float4_e2m1fn))})
    with pytest.raises(ValueError, match="'' cannot be the name"):
        tf_checkpoint.write(tmp_path / "a.index", {"": as_tensor(np.zeros(2))})
    assert list(tmp_path.iterdir()) == []


def test_h5_is_mapped_and_deterministic(tmp_path):
    """Arrays are views of the mapped file; long lists of names are cut; copies must agree."""
    names = [f"m/a/{'x' * 200}_{i}/kernel:0" for i in range(400)]
    tensors = {name: as_tensor(np.full((2, 3), i, np.float16)) for i, name in enumerate(names)}
    layers = {"layers": {"a": names, "b": names[:2]}}
    for file in ("a.h5", "b.h5"):
        tf_h5.write(tmp_path / file, tensors, layers)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    got, metadata = tf_h5.read(tmp_path / "a.h5")
    assert metadata == {"backend": "tensorflow", "keras_version": "2.15.0", **layers}
    same(got, tensors)
    assert all(tensor.file is not None and tensor.offset % 64 == 0 for tensor in list(got.values())[2:])
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file["a"].attrs) == ["weight_names0", "weight_names1"]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["b"][names[1]][...] = 7
    got, _ = tf_h5.read(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="twice, with different values"):
        got[names[1]].array()


def hostile(file, kind, tmp_path):
    """Makes the array `a/m/x` of a file what no checkpoint has."""
    group = file["a"]
    if kind == "external link":
        group["m/x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/y")
    elif kind == "soft link":
        group["m/x"] = h5py.SoftLink("/b/y")
    elif kind == "link to a group":
        group["m"] = h5py.SoftLink("/b")
    elif kind == "external storage":
        group.create_dataset("m/x", (4,), "u1", external=[("/etc/hostname", 0, 4)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "y", (4,))
        group.create_virtual_dataset("m/x", layout)
    elif kind == "bomb":
        group.create_dataset("m/x", (2**40,), "f4", chunks=(2**20,), compression="gzip")
    elif kind == "unwritten":
        group.create_dataset("m/x", (2**50,), "f4")
    elif kind == "references":
        group.create_dataset("m/x", (2,), h5py.ref_dtype)
    elif kind == "text":
        group.create_dataset("m/x", data=["a", "b"])
    elif kind == "compound":
        group.create_dataset("m/x", (2,), [("a", "f4"), ("b", "i4")])
    elif kind == "group":
        group.create_group("m/x")
    elif kind == "no name":
        group.attrs["weight_names"] = ["../b/y"]
    elif kind == "twice":
        group.attrs["weight_names"] = ["m/y", "m/y"]
    elif kind == "numbers":
        group.attrs["weight_names"] = [1.0, 2.0]
    elif kind == "layers":
        del file.attrs["layer_names"]


@pytest.mark.parametrize(
    "kind",
    [
        "external link", "soft link", "link to a group", "external storage", "virtual", "bomb", "unwritten", "references", "text",
        "compound", "group", "no name", "twice", "numbers", "layers", "missing",
    ],
)  # fmt: skip
def test_hostile_h5(tmp_path, kind):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["y"] = np.ones(4, np.float32)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file.attrs["layer_names"] = ["a"]
        file.create_group("a").attrs["weight_names"] = ["m/x"]
        file["b/y"] = np.ones(4, np.float32)
        hostile(file, kind, tmp_path)
    with pytest.raises(ValueError, match=r"^read: '.*tf_model\.h5'"):
        read_file(tmp_path / "tf_model.h5")


def test_heaps_in_which_hdf5_searches_for_ever(tmp_path):
    """A free piece of no bytes, which the library takes again and again; by the fuzzer."""
    raw = bytearray((GOLDENS / "gpt2" / "tf_model.h5").read_bytes())
    heap = raw.index(b"GCOL")
    raw[heap + 16 : heap + 32] = bytes(16)
    (tmp_path / "tf_model.h5").write_bytes(raw)
    with pytest.raises(ValueError, match=r"^read: .*has no text 1 of \d+ bytes"):
        read_file(tmp_path / "tf_model.h5")


def test_references_at_which_h5py_crashes(tmp_path):
    """A reference to a name that points to no heap: h5py would free what it never had; by the fuzzer."""
    raw = bytearray((GOLDENS / "gpt2" / "tf_model.h5").read_bytes())
    place = raw.index(struct.pack("<QI", raw.index(b"GCOL"), 1))
    raw[place : place + 8] = (8).to_bytes(8, "little")
    (tmp_path / "tf_model.h5").write_bytes(raw)
    with pytest.raises(ValueError, match=r"^read: .*there is no heap at byte 8"):
        read_file(tmp_path / "tf_model.h5")


FILES = {"tf_model.h5": GOLDENS / "gpt2", "model.ckpt.index": GOLDENS / "bert_original"}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10**6), changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3))
def test_damaged_files(tmp_path_factory, name, cut, changes):
    """Whatever is cut or changed: numbers, or a clean error, and no more memory than the file has."""
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray((FILES[name] / name).read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    (folder / name).write_bytes(raw if cut % 2 else raw[: cut % len(raw)])
    if name.endswith("index"):
        shutil.copy(FILES[name] / "model.ckpt.data-00000-of-00001", folder)
    try:
        tensors, _ = (tf_h5 if name.endswith("h5") else tf_checkpoint).read(folder / name)
        for tensor in tensors.values():
            assert tensor.array().nbytes <= 2 * len(raw) + 10**5
    except ValueError as error:
        assert str(error).startswith("read: ")  # noqa: PT017
    shutil.rmtree(folder)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def table(entries):
    """An index of a checkpoint with these entries, name -> fields, with right checksums."""

    def block(items):
        body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in items) + struct.pack("<II", 0, 1)
        crc = masked(crc32c(body + b"\0"))
        return body + b"\0" + struct.pack("<I", crc), len(body)

    data, size = block(entries)
    index, length = block([(b"z", varint(0) + varint(size))])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(length)
    return data + index + footer.ljust(40, b"\0") + struct.pack("<Q", tf_checkpoint.MAGIC)


def entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, more=b""):
    dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in shape))
    numbers = b"\x18" + varint(shard) + b"\x20" + varint(offset) + b"\x28" + varint(size)
    return b"\x08" + varint(dtype) + b"\x12" + varint(len(dims)) + dims + numbers + more


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"dtype": 7}, "dtype 7"),
        ({"shape": (2**62,)}, "larger than any file"),
        ({"shape": (2**40,), "size": 2**42}, "needs 4398046511104 bytes"),
        ({"size": 4}, "needs 8 bytes, the index says 4"),
        ({"offset": 9}, "at 9 of the 16"),
        ({"offset": 2**63}, "no size"),
        ({"shard": 3}, "data file 3 of 1"),
        ({"more": b"\x3a\x00"}, "slices"),
        ({"more": b"\x12\x02\x10\x01"}, "the number 1 in place of a message"),  # an axis of the shape; by the fuzzer
        ({"more": b"\x10\x01"}, "the number 1 in place of a message"),
    ],
)
def test_lying_indexes(tmp_path, fields, message):
    path = tmp_path / "model.ckpt.index"
    path.write_bytes(table([(b"", b"\x08\x01"), (b"x", entry(**fields))]))
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(bytes(16))
    if message is None:
        assert read_file(path)[0]["x"].array().tolist() == [0, 0]
        return
    with pytest.raises(ValueError, match=rf"^read: .*{message}"):
        read_file(path)
