"""`flax_model.msgpack` against Flax's own serialization, and against files that lie."""

import struct

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmodels.weights import flax_msgpack, read_file
from fmodels.weights.tensors import Tensor

RNG = np.random.default_rng(0)
TREE = {
    "h": {str(i): {"kernel": RNG.normal(size=(3, 5)).astype(np.float32), "bias": np.arange(i)} for i in range(3)},
    "long " + "name" * 80: {"é": RNG.normal(size=(70_000,)).astype(ml_dtypes.bfloat16)},
    "bits": np.array([True, False]),
    "half": RNG.normal(size=(2, 1, 4)).astype(np.float16),
    "nothing": np.zeros((0, 4), np.float32),
    "one": np.array(7, np.int8),
    "small": np.array([1], np.int8),  # an extension of 16 bytes, which has a code of its own
    "wide": np.zeros((300, 2), np.uint8),
}
LEAF = serialization.to_bytes({"x": np.arange(3, dtype=np.int32)})


def lazy(tree, path=""):
    """The leaves of a tree as tensors, by names joined by "/"."""
    found = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        found |= lazy(value, name + "/") if isinstance(value, dict) else {name: tensor(name, value)}
    return found


def tensor(name, array):
    return Tensor.lazy(name, array.dtype, array.shape, lambda: array)


@pytest.fixture(params=[2**30, 100, 8], ids=lambda size: f"pieces of {size}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", request.param)
    return request.param


def test_bytes_are_those_of_flax_in_both_directions(tmp_path, chunk):
    path, want = tmp_path / "x", serialization.to_bytes(TREE)
    done = []
    flax_msgpack.write(path, lazy(TREE), {"format": "flax"}, advance=done.append, max_chunk=chunk)
    assert path.read_bytes() == want
    assert sum(done) == sum(leaf.nbytes for leaf in jax.tree.leaves(TREE))

    tensors, metadata = flax_msgpack.read(path)
    assert metadata == {}
    flat = lazy(TREE)
    assert list(tensors) == list(flat)
    for name, found in tensors.items():
        leaf = flat[name].array()
        assert (found.name, found.dtype, found.shape) == (name, leaf.dtype, leaf.shape)
        assert found.array().tobytes() == leaf.tobytes()
        out = np.empty(leaf.shape, leaf.dtype)
        found.read_into(out)
        assert out.tobytes() == leaf.tobytes()
    flax_msgpack.write(tmp_path / "y", tensors, max_chunk=chunk)
    assert (tmp_path / "y").read_bytes() == want


def test_arrays_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    path = tmp_path / "x"
    path.write_bytes(serialization.to_bytes({"a": np.arange(4, dtype=np.float32), "b": np.arange(9, dtype=np.float32)}))
    tensors, _ = flax_msgpack.read(path)
    assert tensors["a"].file is not None
    assert path.read_bytes()[tensors["a"].offset :][:16] == np.arange(4, dtype=np.float32).tobytes()
    with pytest.raises(ValueError, match="read_into: expected a writable C-contiguous"):
        tensors["b"].read_into(np.empty((9, 2), np.float32)[:, 0])


def test_a_scalar_of_numpy_is_an_array_without_axes(tmp_path):
    (tmp_path / "x").write_bytes(serialization.msgpack_serialize({"x": np.float32(2.5)}))
    found = flax_msgpack.read(tmp_path / "x")[0]["x"]
    assert found.shape == ()
    assert found.array().item() == 2.5


def test_an_empty_map_is_a_file_without_tensors(tmp_path):
    flax_msgpack.write(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == serialization.to_bytes({}) == b"\x80"
    assert flax_msgpack.read(tmp_path / "x") == ({}, {})
    assert read_file(tmp_path / "x") == ({}, {"format": "flax"})


def inner(shape=(3,), dtype="int32", data=bytes(12)):
    return msgpack.packb((shape, dtype, data))


def leaf(payload, kind=1):
    return msgpack.packb({"x": msgpack.ExtType(kind, payload)})


def bomb(depth):
    return b"\x81\xa1a" * depth + b"\x80"


PIECES = {
    "__msgpack_chunked_array__": True,
    "shape": {"0": 2},
    "chunks": {"0": msgpack.ExtType(1, inner((2,), "int8", b"ab"))},
}


def pieces(**changed):
    return msgpack.packb({"x": {**PIECES, **changed}})


LIES = {
    "empty": (b"", "expected map|more bytes"),
    "no map": (msgpack.packb([1, 2]), "expected map"),
    "array at the top": (msgpack.packb(msgpack.ExtType(1, inner())), "expected map"),
    "bytes behind": (LEAF + b"\0", "1 bytes follow"),
    "cut": (LEAF[:-1], "needs|extension of|more bytes"),
    "cut in a key": (b"\x81\xa5ab", "more bytes"),
    "twice": (b"\x82" + LEAF[1:] + LEAF[1:], "twice"),
    "slash": (msgpack.packb({"a/b": {}}), "twice or has a '/'"),
    "key of bytes": (msgpack.packb({b"a": {}}), "expected text"),
    "key of number": (msgpack.packb({1: {}}), "expected text"),
    "key no text": (b"\x81\xa1\xff\x80", "is no text"),
    "2^32 - 1 entries": (b"\xdf\xff\xff\xff\xff\xa1a\x80", "does not fit"),
    "nested": (bomb(65), "nested more than 64"),
    "nested deep": (bomb(300_000), "nested more than 64"),
    "number": (msgpack.packb({"step": 7}), "'step' is no array"),
    "nothing": (msgpack.packb({"x": None}), "'x' is no array"),
    "list": (msgpack.packb({"x": [1, 2]}), "'x' is no array"),
    "complex number": (leaf(msgpack.packb((1.0, 2.0)), 2), "extension of kind 2"),
    "object": (leaf(inner(dtype="object")), "dtype b'object'"),
    "structure": (leaf(inner(dtype="void96")), "dtype b'void96'"),
    "text array": (leaf(inner(dtype="str96")), "dtype b'str96'"),
    "code as dtype": (leaf(inner(dtype="i4,O")), "dtype b'i4,O'"),
    "too few bytes": (leaf(inner((4,))), "has 12 bytes"),
    "too many bytes": (leaf(inner((2,))), "has 12 bytes"),
    "bytes behind the array": (leaf(inner() + b"\0"), "in an extension of"),
    "negative axis": (leaf(inner((-3,))), "expected integer"),
    "huge axes": (leaf(inner((2**62, 2**62))), "larger than any file"),
    "overflow to fit": (leaf(inner((2**63, 2), data=b"")), "larger than any file"),
    "many axes": (leaf(inner((1,) * 65, "int8", b"a")), "not made of"),
    "2^32 - 1 axes": (leaf(b"\x93\xdd\xff\xff\xff\xff"), "not made of"),
    "two parts": (leaf(msgpack.packb(((3,), "int32"))), "not made of"),
    "extension of 2^32 - 1": (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01" + inner(), "in an extension of"),
    "no pieces": (pieces(chunks={}), "not flat"),
    "piece missing": (pieces(shape={"0": 3}), "pieces of 2 numbers"),
    "piece misnamed": (pieces(chunks={"1": PIECES["chunks"]["0"]}), "key '1'"),
    "piece not flat": (pieces(chunks={"0": msgpack.ExtType(1, inner((1, 2), "int8", b"ab"))}), "not flat"),
    "pieces of two dtypes": (pieces(chunks={"0": PIECES["chunks"]["0"], "1": msgpack.ExtType(1, inner())}), "not flat"),
    "shape of text": (pieces(shape={"0": "a"}), "expected integer"),
    "more in a piece's map": (pieces(more={}), "not made of"),
    "flag off": (pieces(__msgpack_chunked_array__=False), "not made of"),
    "pieces at the top": (msgpack.packb(PIECES), "no array"),
    "names larger than the file": (msgpack.packb({"k" * 9_000: {"l" * 9_000: {f"{i}": {} for i in range(3)}}}), None),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(tmp_path, name):
    raw, message = LIES[name]
    (tmp_path / "x").write_bytes(raw)
    if message is None:
        assert flax_msgpack.read(tmp_path / "x")[0] == {}
        return
    with pytest.raises(ValueError, match=message) as error:
        flax_msgpack.read(tmp_path / "x")
    assert str(error.value).startswith("read: ")
    assert len(str(error.value)) < 700


def test_long_names_and_many_entries_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(flax_msgpack, "MAX_NAMES", 1000)
    monkeypatch.setattr(flax_msgpack, "MAX_ENTRIES", 30)
    small = np.zeros(1, np.int8)
    (tmp_path / "x").write_bytes(serialization.to_bytes({"k" * 200: {f"{i}": small for i in range(9)}}))
    with pytest.raises(ValueError, match="more than 1000 characters"):
        flax_msgpack.read(tmp_path / "x")
    (tmp_path / "x").write_bytes(serialization.to_bytes({f"{i}": {"x": small} for i in range(20)}))
    with pytest.raises(ValueError, match="in the 30 that are read"):
        flax_msgpack.read(tmp_path / "x")


WHOLE = serialization.to_bytes({**TREE, "long " + "name" * 80: {}})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_files_give_only_our_errors(tmp_path, data):
    raw = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from([0x81, 0x93, 0xC1, 0xC9, 0xD9, 0xDD, 0xDF, 0xFF, 0]) | st.integers(0, 255))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    (tmp_path / "x").write_bytes(raw)
    try:
        tensors, _ = flax_msgpack.read(tmp_path / "x")
    except ValueError as error:
        if not str(error).startswith("read: "):
            raise
        return
    for found in tensors.values():
        found.array()


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a/__msgpack_chunked_array__"], ["a/" * 70]])
def test_names_that_are_no_tree(tmp_path, names):
    array = np.zeros(2, np.int8)
    with pytest.raises(ValueError, match="cannot be a name in a tree"):
        flax_msgpack.write(tmp_path / "x", {name: tensor(name, array) for name in names})
    assert not (tmp_path / "x").exists()


def test_a_dtype_that_flax_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="is datetime64"):
        flax_msgpack.write(tmp_path / "x", {"x": tensor("x", np.zeros(2, "datetime64[s]"))})


def test_every_dtype(tmp_path):
    tree = {name: np.arange(6).astype(dtype) for name, dtype in flax_msgpack.DTYPES.items()}
    flax_msgpack.write(tmp_path / "x", lazy(tree))
    raw = (tmp_path / "x").read_bytes()
    assert raw == serialization.to_bytes(tree)
    for name, array in serialization.msgpack_restore(raw).items():
        assert array.dtype == tree[name].dtype, name
        assert array.tobytes() == tree[name].tobytes(), name
    assert struct.unpack(">H", raw[1:3]) == (len(tree),)
