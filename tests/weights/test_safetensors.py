"""The safetensors format, against the safetensors package."""

import json
import os
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmodels.weights import Tensor, safetensors
from fmodels.weights import tensors as tensors_module
from fmodels.weights.tensors import brief, listing

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}


def tensor(array, name="x"):
    return Tensor.lazy(name, array.dtype, array.shape, lambda: array)


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()


def test_every_dtype_is_read_and_written_as_the_package_does(tmp_path):
    assert set(TORCH) | SUB_BYTE == set(safetensors.DTYPES)
    source = {
        code: torch.arange(24, dtype=torch.uint8).repeat(8).view(dtype)
        for code, dtype in TORCH.items()
        if code != "BOOL"
    }
    source["BOOL"] = torch.tensor([True, False, True])
    source |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0), "matrix": torch.rand(3, 5)}
    save_file(source, tmp_path / "a", metadata={"k": "ü"})
    tensors, metadata = safetensors.read(tmp_path / "a")
    assert metadata == {"k": "ü"}
    for name, want in source.items():
        got = tensors[name]
        assert got.shape == tuple(want.shape)
        assert bits(got.array()) == bits(want.reshape(-1).view(torch.uint8).numpy()), name
        out = np.empty(got.shape, got.dtype)
        got.read_into(out)
        assert bits(out) == bits(got.array())
    safetensors.write(tmp_path / "b", tensors, metadata)
    with safe_open(tmp_path / "b", "pt") as file:
        assert file.metadata() == metadata
    for name, got in load_file(tmp_path / "b").items():
        assert got.dtype == source[name].dtype
        assert got.shape == source[name].shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), source[name].reshape(-1).view(torch.uint8)), name
    again, _ = safetensors.read(tmp_path / "b")
    for t in again.values():
        if t.nbytes % 64 == 0:
            assert t.offset % 64 == 0
            assert t.nbytes == 0 or t.array().ctypes.data % 64 == 0
        assert t.offset % t.dtype.itemsize == 0


@pytest.mark.parametrize(("code", "width"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_elements_smaller_than_a_byte(tmp_path, code, width):
    dtype = safetensors.DTYPES[code][0]
    array = (np.arange(48, dtype=np.uint8) % 2**width).view(dtype).reshape(2, 24)
    safetensors.write(tmp_path / "a", {"x": tensor(array), "none": tensor(array[:0])})
    got, _ = safetensors.read(tmp_path / "a")
    assert got["x"].shape == (2, 24)
    assert bits(got["x"].array()) == bits(array)
    out = np.empty_like(array)
    got["x"].read_into(out)
    assert bits(out) == bits(array)
    assert got["none"].array().shape == (0, 24)
    assert sum(1 for _ in safe_open(tmp_path / "a", "np").keys()) == 2  # noqa: SIM118
    with pytest.raises(ValueError, match="last byte"):
        safetensors.write(tmp_path / "b", {"x": tensor(array.reshape(-1)[:3])})


def test_nibbles_are_torchs(tmp_path):
    packed = torch.arange(16, dtype=torch.uint8)
    save_file({"x": packed.view(torch.float4_e2m1fn_x2).reshape(2, 8)}, tmp_path / "a")
    got = safetensors.read(tmp_path / "a")[0]["x"]
    assert got.shape == (2, 16)
    assert got.array().view(np.uint8).reshape(-1, 2)[:, 0].tolist() == list(range(16))  # the low half comes first


def test_map_is_private_and_lives_as_long_as_its_arrays(tmp_path):
    path = tmp_path / "a"
    safetensors.write(path, {"x": tensor(np.arange(16, dtype=np.float32))})
    content = path.read_bytes()
    got, _ = safetensors.read(path)
    array = got["x"].array()
    array[:] = 7
    assert got["x"].array()[3] == 7  # the same map
    del got
    assert array.sum() == 16 * 7
    path.unlink()
    assert array[0] == 7
    path.write_bytes(content)
    assert safetensors.read(path)[0]["x"].array()[3] == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_files_are_closed(tmp_path):
    safetensors.write(tmp_path / "a", {"x": tensor(np.arange(16, dtype=np.float32))})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        got, _ = safetensors.read(tmp_path / "a")
        array = got["x"].array()
    del got, array
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_can_be_written_from_itself(tmp_path):
    path = tmp_path / "a"
    safetensors.write(
        path,
        {n: tensor(np.full(1000, n, np.int32)) for n in map(str, range(0))}
        | {"x": tensor(np.arange(5000, dtype=np.int32)), "y": tensor(np.arange(3, dtype=np.int8))},
    )
    content = path.read_bytes()
    got, metadata = safetensors.read(path)
    safetensors.write(path, got, metadata)
    assert path.read_bytes() == content


def test_lazy_tensors_are_asked_one_at_a_time(tmp_path):
    asked, done = [], []

    def get(name):
        asked.append(name)
        return np.zeros(16, np.float32)

    lazy = {name: Tensor.lazy(name, np.float32, (16,), lambda name=name: get(name)) for name in "cab"}
    safetensors.write(tmp_path / "a", lazy, advance=lambda n: done.append((n, len(asked))))
    assert asked == ["a", "b", "c"]
    assert done == [(64, 1), (64, 2), (64, 3)]


def test_non_contiguous_arrays(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(4, 6).T
    safetensors.write(tmp_path / "a", {"x": tensor(array)})
    assert (safetensors.read(tmp_path / "a")[0]["x"].array() == array).all()


@pytest.mark.parametrize(
    ("made", "metadata", "message"),
    [
        ({"__metadata__": tensor(np.zeros(1))}, None, "rename"),
        ({"x": tensor(np.zeros(1, np.complex128))}, None, "complex128"),
        ({"x": tensor(np.zeros(1, ">f4"))}, None, ">f4"),
        ({"x": tensor(np.zeros(1))}, {"a": 1}, "text by text"),
        (
            {"x": Tensor.lazy("x", np.float32, (2,), lambda: np.zeros(3, np.float32))},
            None,
            r"float32\[2\].*float32\[3\]",
        ),
    ],
)
def test_what_cannot_be_written_changes_nothing(tmp_path, made, metadata, message):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        safetensors.write(tmp_path / "a", made, metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"1234", "4 bytes"),
        (raw({}, length=2**63), "cut"),
        (raw({}, length=99), "cut"),
        (raw(b" {}"), "cut or no"),
        (raw(b'{"a":'), "expected JSON"),
        (raw(b'{"a\xff":1}'), "expected JSON"),
        (raw(b'{"\\ud800":1}'), "expected JSON"),
        (raw(b'{"a":NaN}'), "NaN"),
        (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "too deeply"),
        (raw(b'{"a":' + b"9" * 5000 + b"}"), "expected JSON"),
        (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "'a' is there twice"),
        (raw({"__metadata__": {"a": 1}}), "text to text"),
        (raw({"__metadata__": [1]}), "text to text"),
        (raw({"a": 3}), "tensor 'a'.*expected dtype, shape"),
        (raw({"a": entry() | {"more": 1}}, b"1234"), "expected dtype, shape"),
        (raw({"a": entry("F7")}, b"1234"), "'F7' is unknown"),
        (raw({"a": entry(["F32"])}, b"1234"), "is unknown"),
        (raw({"a": entry(shape=[-1])}, b"1234"), ">= 0"),
        (raw({"a": entry(shape=[1.0])}, b"1234"), ">= 0"),
        (raw({"a": entry(shape=[True])}, b"1234"), ">= 0"),
        (raw({"a": entry() | {"shape": 1}}, b"1234"), ">= 0"),
        (raw({"a": entry(shape=[2**62, 2**62])}, b"1234"), "larger than any file"),
        (raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "larger than any file"),
        (raw({"a": entry(shape=[1] * 65)}, b"1234"), "64 axes"),
        (raw({"a": entry(offsets=[0, 4.0])}, b"1234"), "two integers"),
        (raw({"a": entry(offsets=[0])}, b"1234"), "two integers"),
        (raw({"a": entry(offsets=[4, 0])}, b"1234"), "outside"),
        (raw({"a": entry(offsets=[-4, 0])}, b"1234"), "outside"),
        (raw({"a": entry(offsets=[0, 8], shape=[2])}, b"1234"), "outside of the 4 bytes"),
        (raw({"a": entry(offsets=[0, 2**70])}, b"1234"), "outside"),
        (raw({"a": entry(shape=[2])}, b"1234"), r"F32\[2\] needs 8 bytes.*give 4"),
        (raw({"a": entry(), "b": entry()}, b"1234"), "inside of tensor 'a'"),
        (raw({"a": entry(offsets=[4, 8])}, b"12345678"), "4 bytes between the header and tensor 'a'"),
        (raw({"a": entry()}, b"12345678"), "4 bytes after tensor 'a'"),
        (raw({}, b"1"), "1 bytes after the header"),
        (b"version https git-lfs\noid sha256:1\nsize 5\n", "git-lfs pointer"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        safetensors.read(path)
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_all_bad_tensors_are_named_at_once(tmp_path):
    path = tmp_path / "bad"
    path.write_bytes(raw({"a": entry("F7"), "b": entry(shape=[-1]), "c": entry(), "d": entry(shape=[9])}, b"1234"))
    with pytest.raises(ValueError, match=r"'a'.*'b'.*'d'"):
        safetensors.read(path)
    path.write_bytes(raw({str(i): entry("F7") for i in range(1000)}))
    with pytest.raises(ValueError, match="980 more"):
        safetensors.read(path)


def test_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError):
        safetensors.read(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        safetensors.read(tmp_path)


def test_file_cut_after_it_was_opened(tmp_path):
    safetensors.write(tmp_path / "a", {"x": tensor(np.zeros(4096, np.float32))})
    got, _ = safetensors.read(tmp_path / "a")
    os.truncate(tmp_path / "a", 4096)
    with pytest.raises(OSError, match="was cut"):
        got["x"].read_into(np.empty(4096, np.float32))


@pytest.mark.parametrize(
    "out", [np.empty(4, np.float64), np.empty((2, 2), np.float32), np.empty(8, np.float32)[::2], None]
)
def test_read_into_checks_its_destination(tmp_path, out):
    safetensors.write(tmp_path / "a", {"x": tensor(np.zeros(4, np.float32))})
    if out is None:
        out = np.empty(4, np.float32)
        out.flags.writeable = False
    with pytest.raises(ValueError, match="read_into"):
        safetensors.read(tmp_path / "a")[0]["x"].read_into(out)


@pytest.mark.skipif(sys.platform != "linux", reason="measures with getrusage")
def test_peak_memory_of_read_into_is_the_destination(tmp_path):
    size = 64 * 2**20
    safetensors.write(tmp_path / "a", {"x": tensor(np.zeros(size, np.uint8))})
    code = f"""
import resource, numpy as np
from fmodels.weights import safetensors
out = np.ones({size}, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
safetensors.read({str(tmp_path / "a")!r})[0]["x"].read_into(out)
assert out.sum() == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 8 * 1024  # KiB


def test_messages_stay_short():
    assert brief("a" * 1000).endswith("…")
    assert brief(10**6000) == "an integer of 19932 bits"
    assert listing(["a", "b"]) == "a, b"
    assert ml_dtypes.bfloat16 in {d.type for d in safetensors.CODES}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(safetensors.DTYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    }
)
HEADER = st.dictionaries(st.sampled_from("abc") | st.just("__metadata__"), ENTRY | JSON, max_size=3)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=HEADER | st.binary(max_size=60), data=st.binary(max_size=40), length=st.none() | st.integers(0, 2**64 - 1)
)
def test_fuzz(tmp_path_factory, header, data, length):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw(header, data, length))
    try:
        tensors, _ = safetensors.read(path)
    except ValueError as error:
        assert "fuzz.safetensors" in str(error)  # noqa: PT017
        return
    total = sum(t.size * safetensors.DTYPES[safetensors.CODES[t.dtype]][1] for t in tensors.values())
    assert total == 8 * len(data)
    for t in tensors.values():
        assert t.array().shape == t.shape


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    """By several threads, into memory of its own, on 64-byte boundaries; the last piece is shorter."""
    array = np.random.default_rng(0).integers(0, 2**31, 3001, dtype=np.int32)
    safetensors.write(tmp_path / "a", {"x": tensor(array)})
    monkeypatch.setattr(tensors_module, "CHUNK", 1000)
    monkeypatch.setattr(tensors_module, "LARGE", 4096)
    out = tensors_module.aligned_empty(array.shape, array.dtype)
    safetensors.read(tmp_path / "a")[0]["x"].read_into(out)
    assert out.ctypes.data % 64 == 0
    assert np.array_equal(out, array)
