"""PyTorch's files, against torch; and files that want more than to be read."""

import collections
import io
import os
import pickle
import struct
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmodels.weights import Tensor, torch_bin

FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}


def state():
    base = torch.arange(24.0).reshape(2, 3, 4)
    made = collections.OrderedDict(torch.nn.LSTM(3, 2).state_dict())
    made |= {f"d.{str(d)[6:]}": torch.arange(4).to(d) for d in DTYPES}
    made |= {
        "transposed": base.transpose(0, 2),
        "slice": base[1, :, 1:],
        "offset": base[1],
        "expanded": torch.arange(4).expand(3, 4),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tensor.ü": torch.ones(1),
    }
    made._metadata = collections.OrderedDict({"": {"version": 1}, "x": None})
    return made


DTYPES = [
    getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
]
LATER = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


def same(got, want):
    raw = want.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return got.shape == tuple(want.shape) and np.ascontiguousarray(got).tobytes() == raw


@pytest.mark.parametrize("form", FORMS)
def test_equals_torch(tmp_path, form):
    made = state()
    if form != "legacy":
        made |= {str(d): torch.ones(4).to(d) for d in LATER}
    torch.save(made, tmp_path / "a", **FORMS[form])
    got, _ = torch_bin.read(tmp_path / "a")
    assert list(got) == list(made)
    for name, want in made.items():
        assert same(got[name].array(), want), name
        out = np.empty(got[name].shape, got[name].dtype)
        got[name].read_into(out)
        assert same(out, want), name
    torch_bin.write(tmp_path / "b", got)
    loaded = torch.load(tmp_path / "b", weights_only=True)
    mapped = torch.load(tmp_path / "b", weights_only=True, mmap=True)
    for name, want in made.items():
        assert loaded[name].dtype == mapped[name].dtype == want.dtype
        assert loaded[name].stride() == want.contiguous().stride()
        assert same(got[name].array(), loaded[name])
        assert same(got[name].array(), mapped[name])
    torch_bin.write(tmp_path / "c", torch_bin.read(tmp_path / "b")[0])
    assert (tmp_path / "c").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(t.offset % 64 == 0 for t in torch_bin.read(tmp_path / "b")[0].values())


def test_views_share_bytes(tmp_path):
    base = torch.zeros(4, 4)
    torch.save({"all": base, "row": base[1], "column": base[:, 1]}, tmp_path / "a")
    got, _ = torch_bin.read(tmp_path / "a")
    got["row"].array()[:] = 5
    assert got["all"].array()[1].tolist() == [5] * 4
    assert got["column"].array().tolist() == [0, 5, 0, 0]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_wrapped(tmp_path, key):
    torch.save({key: {"x": torch.ones(1)}, "epoch": 3, "best": None}, tmp_path / "a")
    assert list(torch_bin.read(tmp_path / "a")[0]) == ["x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": torch.ones(1), "step": 3}, "'step': 3"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a _View"),
        ({"a": {"x": torch.ones(1)}}, "'a': {"),
        ({1: torch.ones(1)}, "1: "),
    ],
)
def test_no_state_dict(tmp_path, value, message):
    torch.save(value, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match=message) as caught:
        torch_bin.read(tmp_path / "bad.bin")
    assert "bad.bin" in str(caught.value)


class Runs:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch /tmp/fmodels-was-here"), "system"),
        (Runs(eval, "1"), "eval"),
        (Runs(getattr, "x", "upper"), "getattr"),
        (types.SimpleNamespace(a=1), "SimpleNamespace"),
        (torch.nn.Linear(1, 1), "Linear"),
        (np.ones(3), "numpy"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_runs_nothing(tmp_path, form, value, name):
    torch.save({"x": value, "y": torch.ones(1)}, tmp_path / "bad.bin", **FORMS[form])
    with pytest.raises(pickle.UnpicklingError, match=name) as caught:
        torch_bin.read(tmp_path / "bad.bin")
    assert "bad.bin" in str(caught.value)
    assert "never runs code" in str(caught.value)
    assert not os.path.exists("/tmp/fmodels-was-here")


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"archive/{name}", data)


def entries(**changes):
    stream = io.BytesIO()
    torch.save({"x": torch.arange(4.0)}, stream)
    with zipfile.ZipFile(stream) as file:
        found = {i.filename.removeprefix("archive/"): file.read(i) for i in file.infolist()}
    found |= {name.replace("_", "/") if name.startswith("data_") else name: data for name, data in changes.items()}
    return {name: data for name, data in found.items() if data is not None}


PROGRAM = entries()["data.pkl"]
LOAD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_0": None}, "'x': storage '0' is missing"),
        ({"data_0": b"1234"}, "should have 4 elements of float32, has 4 bytes"),
        ({"byteorder": b"big"}, "byteorder little"),
        ({"byteorder": b"?" * 9999}, "byteorder little"),
        ({"data.pkl": None}, "0 files data.pkl"),
        ({"data.pkl": PROGRAM.replace(b"K\x04\x85", b"K\x05\x85")}, "reaches element 4 of a storage that has 4"),
        ({"data.pkl": PROGRAM.replace(b"K\x01\x85", b"K\x02\x85")}, "reaches element 6"),
        ({"data.pkl": PROGRAM.replace(b"QK\x00", b"QK\x01")}, "reaches element 4"),
        ({"data.pkl": PROGRAM.replace(b"QK\x00", b"QN")}, "do not go together"),
        ({"data.pkl": PROGRAM.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85")}, ">= 0"),
    ],
)
def test_lying_archives(tmp_path, changes, message):
    archive(tmp_path / "bad.bin", entries(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        torch_bin.read(tmp_path / "bad.bin")
    assert "bad.bin" in str(caught.value)


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02X\xff\xff\xff\xff",
        b"\x80\x04\x8d" + b"\xff" * 8,
        b"\x80\x02(t" * 3 + b"u.",
        b"\x80\x02})s.",
        b"\x80\x02}}N" + b"s.",
        b"\x80\x02h\x05.",
        b"\x80\x02ccollections\nOrderedDict\n}b.",
        b"\x80\x02" + LOAD + b")R.",
        b"\x80\x02" + b"ctorch._tensor\n_rebuild_from_type_v2\n" * 3 + b")R.",
        b"\x80\x02ctorch\nSize\nK\x01R.",
        b"\x80\x02(lp0\n.",
        b"cos\nsystem\n.",
    ],
)
def test_damaged_programs(tmp_path, program):
    archive(tmp_path / "bad.bin", entries(**{"data.pkl": program}))
    with pytest.raises(pickle.UnpicklingError, match=r"bad\.bin"):
        torch_bin.read(tmp_path / "bad.bin")


def test_sparse_memo_costs_nothing(tmp_path):
    archive(tmp_path / "a", entries(**{"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."}))  # pickle would take 64 GiB
    assert torch_bin.read(tmp_path / "a") == ({}, {})


def test_compressed_and_cut_files(tmp_path):
    path = tmp_path / "bad.bin"
    archive(path, entries(data_0=bytes(2**24)), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        torch_bin.read(path)
    for form in ("zip", "legacy"):
        torch.save({"x": torch.arange(400.0)}, path, **FORMS[form])
        whole = path.read_bytes()
        for size in (2, 30, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises((ValueError, pickle.UnpicklingError), match=r"bad\.bin"):
                torch_bin.read(path)
    for data in (b"", b"hello", pickle.dumps({"x": 1}), b"version https git-lfs"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.bin"):
            torch_bin.read(path)


def test_what_cannot_be_written(tmp_path):
    import ml_dtypes

    x = np.zeros(2, ml_dtypes.float4_e2m1fn)
    with pytest.raises(ValueError, match="float4_e2m1fn"):
        torch_bin.write(tmp_path / "a", {"x": Tensor.lazy("x", x.dtype, x.shape, lambda: x)})
    assert not list(tmp_path.iterdir())


def test_reader_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, fmodels.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=3)), max_size=4), data=st.data()
)
def test_fuzz(tmp_path_factory, changes, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    form = data.draw(st.sampled_from(["program", "zip", "legacy"]))
    if form == "program":
        whole = bytearray(PROGRAM)
    else:
        torch.save({"x": torch.arange(4.0), "y": torch.ones(2, 2).T}, path, **FORMS[form])
        whole = bytearray(path.read_bytes())
    for where, what in changes:
        whole[where % len(whole) : where % len(whole) + len(what)] = what
    if form == "program":
        archive(path, entries(**{"data.pkl": bytes(whole)}))
    else:
        path.write_bytes(whole)
    try:
        for tensor in torch_bin.read(path)[0].values():
            if tensor.nbytes < 2**20:
                assert tensor.array().shape == tensor.shape
    except (ValueError, pickle.UnpicklingError) as error:
        assert "fuzz.bin" in str(error)  # noqa: PT017


def test_legacy_sizes_are_bounded(tmp_path):
    path = tmp_path / "bad.bin"
    torch.save({"x": torch.arange(4.0)}, path, **FORMS["legacy"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-24] + struct.pack("<Q", 2**62) + whole[-16:])
    with pytest.raises(ValueError, match="ends inside"):
        torch_bin.read(path)
