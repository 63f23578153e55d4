"""GGUF files: those of the package `gguf` are read, ours are read by it, and damaged ones are refused."""

import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmodels.weights import Tensor, find_weights, ggml, read_file
from fmodels.weights import gguf as ours

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 64)).astype(np.float32)


def tensor(array, name="x"):
    return Tensor.lazy(name, array.dtype, array.shape, lambda: array)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8).tobytes()


GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "llama_cpp" / "types.json").read_text())
"""Types that the package cannot dequantise, of llama.cpp."""


@pytest.mark.parametrize("name", GOLDEN)
def test_types_are_those_of_llama_cpp(name):
    packed = np.frombuffer(bytes.fromhex(GOLDEN[name]["packed"]), np.uint8)
    assert bits(ggml.dequantize(packed, name)) == bits(np.array(GOLDEN[name]["numbers"], np.float32))


@pytest.mark.parametrize("name", sorted(ggml.TYPES.keys() - GOLDEN.keys()))
def test_types_are_those_of_the_package(name):
    kind, ours_ = gguf.GGMLQuantizationType[name.upper()], ggml.TYPES[name]
    assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (ours_.code, (ours_.size, ours_.nbytes))
    if ours_.dtype is not None:
        return
    packed = RANDOM.integers(0, 256, (5, 3 * ours_.nbytes), dtype=np.uint8)  # any scales, infinite ones and NaN too
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(packed, kind)
    found = ggml.dequantize(packed, name)
    assert found.shape == want.shape
    assert bits(found) == bits(want)


def test_unknown_to_us_are_only_types_that_no_file_has():
    known = {name.upper() for name in ggml.TYPES}
    assert set(gguf.GGMLQuantizationType.__members__) - known == {"Q8_1"}  # of intermediate results


def test_q8_0_has_the_bits_of_the_package():
    x = np.concatenate([X, np.zeros((1, 64), np.float32), np.full((1, 64), 1e-30, np.float32), X * 1e4])
    x[0, :4] = [127, 0.5, -1.5, 2.5]  # halves are rounded away from zero
    assert bits(ggml.quantize_q8_0(x)) == bits(gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0))
    for large in (8.4e6, np.inf, np.nan):  # which the package writes as numbers that are none
        x[3, 40] = large
        with pytest.raises(ValueError, match="q8_0 holds numbers up to 8319008, got"):
            ggml.quantize_q8_0(x)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A file of the package with all types of values, all that it can quantise, and an alignment of its own."""
    path = tmp_path_factory.mktemp("gguf") / "golden.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -5, "uint32": 7, "int32": -7, "uint64": 2**63, "int64": -(2**62),
              "float32": 0.1, "float64": 0.1, "bool": True}  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_string("a.text", "é\n")
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.reals", [0.5, 1.5])
    writer.add_array("a.truths", [True, False])
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "ä"])
    writer.add_tensor("f32", X)
    writer.add_tensor("f16", X.astype(np.float16))
    writer.add_tensor("i32", np.arange(6, dtype=np.int32).reshape(1, 2, 3))
    wide = RANDOM.standard_normal((2, 3, 256)).astype(np.float32)
    quantised = {}
    for kind in gguf.GGMLQuantizationType:
        try:
            quantised[kind.name.lower()] = packed = gguf.quants.quantize(wide, kind)
        except NotImplementedError:
            continue
        if kind.name not in ("F32", "F16"):
            writer.add_tensor(f"wide.{kind.name.lower()}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


def test_reads_the_package(golden):
    path, values = golden
    tensors, metadata = ours.read(path)
    assert metadata["format"] == "gguf"
    assert read_file(path)[1].keys() == metadata.keys()
    assert {name: metadata[f"a.{name}"].item() for name in values} == values | {"float32": np.float32(0.1).item()}
    assert all(metadata[f"a.{name}"].dtype == name for name in values)
    assert (metadata["a.text"], metadata["tokenizer.ggml.tokens"]) == ("é\n", ["<s>", "", "ä"])
    assert [metadata[f"a.{n}"].dtype for n in ("numbers", "reals", "truths")] == [np.int32, np.float32, np.bool_]
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert list(tensors) == list(theirs)
    assert len(theirs) > 8
    for name, found in tensors.items():
        assert found.shape == tuple(theirs[name].shape.tolist()[::-1])
        if found.dtype == np.int32:
            assert bits(found.array()) == bits(theirs[name].data)
        elif name != "f16":
            assert bits(found.array().astype(np.float32)) == bits(
                gguf.dequantize(theirs[name].data, theirs[name].tensor_type)
            )
        out = np.empty(found.shape, found.dtype)
        found.read_into(out)
        assert bits(out) == bits(found.array())
    assert tensors["f16"].array().dtype == np.float16
    assert tensors["wide.bf16"].dtype == ml_dtypes.bfloat16


def test_copy_is_the_same_file(golden, tmp_path):
    """Metadata with their types and order, quantised tensors, alignment: byte for byte, but for the type of the file."""
    path, _ = golden
    tensors, metadata = ours.read(path)
    assert "general.file_type" not in metadata
    ours.write(tmp_path / "1.gguf", tensors, metadata)
    again, more = ours.read(tmp_path / "1.gguf")
    ours.write(tmp_path / "2.gguf", again, more)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    theirs, own = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "1.gguf")
    added = set(own.fields) - set(theirs.fields)
    assert added == {"general.quantization_version"} | ({"general.file_type"} & added)
    counts = "GGUF.kv_count"
    assert all(theirs.fields[k].contents() == own.fields[k].contents() for k in theirs.fields if k != counts)
    assert [(t.name, t.tensor_type, bits(t.data)) for t in theirs.tensors] == [
        (t.name, t.tensor_type, bits(t.data)) for t in own.tensors
    ]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_writes_types_as_the_package(kind, tmp_path):
    x = X.astype(ml_dtypes.bfloat16).astype(np.float32)
    given = {"a.weight": tensor(x), "odd.weight": tensor(x[:, :7]), "a.bias": tensor(x[0]), "a_norm.weight": tensor(x)}
    done = []
    ours.write(
        tmp_path / "x.gguf", given, {"a.nested": (["x"], np.arange(2, dtype=np.int8))}, type=kind, advance=done.append
    )
    assert sum(done) == sum(t.nbytes for t in given.values())
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {t.name: t for t in reader.tensors}
    assert (
        reader.fields["general.file_type"].contents()
        == gguf.LlamaFileType[
            {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
        ]
    )
    want = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
    assert found["a.weight"].tensor_type.name.lower() == kind
    assert bits(found["a.weight"].data) == bits(want)
    assert found["a.bias"].tensor_type.name == found["a_norm.weight"].tensor_type.name == "F32"
    assert found["odd.weight"].tensor_type.name.lower() == ("f32" if kind == "q8_0" else kind)
    metadata = ours.read(tmp_path / "x.gguf")[1]
    assert metadata["a.nested"][0] == ["x"]
    assert metadata["a.nested"][1].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_norms_come_back(dtype, tmp_path):
    given = {"x.weight": tensor(X.astype(dtype)), "x.bias": tensor(X[0].astype(dtype))}
    ours.write(tmp_path / "x.gguf", given, {})
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}["x.bias"] == "F32"
    tensors, metadata = ours.read(tmp_path / "x.gguf")
    assert not [key for key in metadata if key.startswith("fmodels")]
    assert all(t.dtype == dtype and bits(t.array()) == bits(given[n].array()) for n, t in tensors.items())


def test_refused_to_write(tmp_path):
    path = tmp_path / "x.gguf"
    for tensors, metadata, options, message in (
        ({"x" * 64: tensor(X)}, {}, {}, "no name of 1 to 63 bytes"),
        ({"x": tensor(X.reshape(1, 1, 1, 3, 64))}, {}, {}, "5 axes"),
        ({"x": tensor(X.astype(np.uint32))}, {}, {}, "is uint32"),
        ({"x": tensor(X * 1e6)}, {}, {"type": "f16"}, "cannot hold"),
        ({"x": tensor(X)}, {}, {"type": "q4_k"}, "only f32, f16, bf16, q8_0"),
        ({}, {"a": 1}, {}, "numpy's scalars"),
        ({}, {"a": ["x", np.uint8(1)]}, {}, "a list holds text"),
        ({}, {"a": np.zeros((2, 2))}, {}, "rows of numbers"),
        ({}, {"general.alignment": np.uint32(48)}, {}, "a power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.write(path, tensors, metadata, **options)
    assert not list(tmp_path.iterdir())


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def file(pairs=b"", entries=b"", *, counts=None, version=3, tail=bytes(64)):
    """A file whose parts may lie."""
    counts = (bool(entries), bool(pairs)) if counts is None else counts
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + pairs + entries
    return head + bytes(-len(head) % 32) + tail


def entry(name="x", shape=(4, 4), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**62
BAD = {
    "empty": (b"", "expected b'GGUF'"),
    "other": (b"not a model" * 9, "expected b'GGUF'"),
    "version 1": (file(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "many tensors": (file(counts=(HUGE, 0)), "tensors are announced"),
    "many pairs": (file(counts=(0, HUGE)), "metadata are announced"),
    "long key": (file(struct.pack("<Q", HUGE) + b"x"), "bytes are announced"),
    "long text": (file(text("k") + struct.pack("<IQ", 8, HUGE)), "bytes are announced"),
    "many numbers": (file(text("k") + struct.pack("<IIQ", 9, 10, HUGE)), "numbers of"),
    "many texts": (file(text("k") + struct.pack("<IIQ", 9, 8, HUGE)), "values of"),
    "nested": (
        file(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + struct.pack("<IQ", 0, 0)),
        "nested deeper",
    ),
    "type of value": (file(text("k") + struct.pack("<I", 13)), "unknown type 13"),
    "type in array": (file(text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(16)), "unknown type 77"),
    "truth": (file(text("k") + struct.pack("<IB", 7, 2)), "neither 0 nor 1"),
    "key twice": (file(2 * (text("k") + struct.pack("<IB", 0, 2)), counts=(0, 2)), "twice"),
    "alignment": (file(text("general.alignment") + struct.pack("<II", 4, 3)), "power of two"),
    "alignment 0": (file(text("general.alignment") + struct.pack("<II", 4, 0)), "power of two"),
    "alignment text": (file(text("general.alignment") + struct.pack("<I", 8) + text("x")), "power of two"),
    "split": (file(text("split.count") + struct.pack("<IH", 2, 3)), "one of 3 parts"),
    "axes": (file(entries=entry(shape=(1,) * 5)), "5 axes"),
    "many axes": (file(entries=text("x") + struct.pack("<I", 2**31) + bytes(64)), "axes"),
    "type": (file(entries=entry(kind=99)), "unknown type 99"),
    "removed type": (file(entries=entry(kind=4)), "unknown type 4"),
    "large": (file(entries=entry(shape=(2**40, 2**40))), "larger than any file"),
    "cut": (file(entries=entry(), tail=bytes(63)), "needs 64 bytes"),
    "offset": (file(entries=entry(offset=2**63)), "needs 64 bytes"),
    "unaligned": (file(entries=entry(offset=4), tail=bytes(256)), "multiple of 32"),
    "rows": (file(entries=entry(kind=8)), "blocks of 32"),
    "twice": (file(entries=2 * entry(), counts=(2, 0)), "is there twice"),
    "overlap": (file(entries=entry() + entry("y", offset=32), counts=(2, 0), tail=bytes(256)), "inside of 'x'"),
    "narrow": (file(text("fmodels.bfloat16") + struct.pack("<I", 8) + text("x")), "no tensor of float32"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 90, "git-lfs"),
}


@pytest.mark.parametrize("name", BAD)
def test_lies_are_refused(name, tmp_path):
    raw, message = BAD[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        ours.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_parts_are_joined(golden, tmp_path):
    """Those of llama.cpp's `gguf-split`: metadata are in the first."""
    tensors, metadata = ours.read(golden[0])
    names = list(tensors)
    for i in range(2):
        part = {n: tensors[n] for n in names[i::2]}
        split = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(len(names))}
        ours.write(tmp_path / f"x-Q8-0000{i + 1}-of-00002.gguf", part, {**(metadata if i == 0 else {}), **split})
    for i in (1, 2):
        found, said = ours.read(tmp_path / f"x-Q8-0000{i}-of-00002.gguf")
        assert {n: bits(t.array()) for n, t in found.items()} == {n: bits(t.array()) for n, t in tensors.items()}
        assert said["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
        assert not [key for key in said if key.startswith("split.")]
    assert find_weights([f"x-Q8-0000{i}-of-00002.gguf" for i in (1, 2)]) == ("gguf", "x-Q8-00001-of-00002.gguf")
    (tmp_path / "x-Q8-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError):
        ours.read(tmp_path / "x-Q8-00001-of-00002.gguf")


def test_old_version_and_texts_that_are_no_utf8(tmp_path):
    raw = file(text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", entry(), version=2)
    (tmp_path / "x.gguf").write_bytes(raw)
    tensors, metadata = ours.read(tmp_path / "x.gguf")
    ours.write(tmp_path / "y.gguf", tensors, metadata)
    assert ours.read(tmp_path / "y.gguf")[1]["k"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_files_give_clean_errors(golden, tmp_path_factory, data):
    raw = bytearray(golden[0].read_bytes())
    end = 1500  # of the header
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    try:
        tensors, _ = ours.read(path)
    except ValueError:
        return
    for found in tensors.values():
        found.array()
