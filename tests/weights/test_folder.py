"""Folders of weights: what is read, what is refused, and saves that are killed."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmodels.weights import FORMATS, Tensor, find_weights, read_file, read_folder, write_folder
from fmodels.weights import folder as module


def make(value=1.0, names="abcd"):
    return {name: Tensor.lazy(name, np.float32, (32,), lambda: np.full(32, value, np.float32)) for name in names}


def values(path, **options):
    return {float(v) for t in read_folder(path, **options)[0].values() for v in t.array()}


def tree(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def content(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


SHARDED = [f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")]


@pytest.mark.parametrize("format", ["safetensors", "torch"])
@pytest.mark.parametrize("size", ["5GB", 128, 256])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_transformers_reads_what_we_write_and_the_reverse(tmp_path, format, size, variant):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    model = BertModel(config)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    tensors = {k: Tensor.lazy(k, v.dtype, v.shape, lambda v=v: v) for k, v in state.items()}
    files = {"config.json": config.to_json_string().encode()}
    write_folder(tmp_path, tensors, format=format, max_shard_size=size, variant=variant, files=files)
    loaded, info = BertModel.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not any(info.values())
    assert all(np.array_equal(v.numpy(), state[k]) for k, v in loaded.state_dict().items())
    if format == "torch":
        return
    theirs = tmp_path / "theirs"
    loaded.save_pretrained(theirs, max_shard_size=size, variant=variant)
    got, metadata = read_folder(theirs, variant=variant)
    assert metadata["format"] == "pt"
    assert all(np.array_equal(t.array(), state[k]) for k, t in got.items())
    index = FORMATS[format].index(variant)
    assert (theirs / index).exists() == (tmp_path / index).exists() == (size != "5GB")
    if size != "5GB":
        ours, other = (json.loads((path / index).read_text()) for path in (tmp_path, theirs))
        assert ours["metadata"] == other["metadata"]
        assert ours["weight_map"].keys() == other["weight_map"].keys()


def test_order_of_preference(tmp_path):
    torch.save({"x": torch.full((1,), 4.0)}, tmp_path / "a.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    assert values(tmp_path) == {4.0}
    torch.save({"x": torch.full((1,), 3.0)}, tmp_path / "pytorch_model.bin")
    assert values(tmp_path) == {3.0}
    save_file({"x": torch.full((1,), 2.0)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert values(tmp_path) == {2.0}
    save_file({"x": torch.full((1,), 1.0)}, tmp_path / "model.safetensors")
    assert values(tmp_path) == {1.0}
    assert find_weights([]) is None
    with pytest.raises(FileNotFoundError, match=r"model\.v\.safetensors"):
        read_folder(tmp_path, variant="v")


def test_content_not_name_decides(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert values(tmp_path) == {1.0}
    torch.save({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_file(tmp_path / "model.safetensors")[0]["x"].shape == (2,)
    (tmp_path / "text").write_bytes(b"hello, this is a text")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_file(tmp_path / "text")
    (tmp_path / "text").write_bytes(b"version https git-lfs")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_file(tmp_path / "text")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:x", "a\\b", "", "x\0"])
def test_index_that_points_outside(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": "a", "x": "b"}}']
)
def test_bad_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index"):
        read_folder(tmp_path)


def test_index_that_does_not_fit(tmp_path):
    write_folder(tmp_path, make(), max_shard_size=128)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (tmp_path / SHARDED[3]).rename(tmp_path / "last")
    (tmp_path / SHARDED[2]).rename(tmp_path / "third")
    with pytest.raises(FileNotFoundError, match=r"2 are missing: .*00003.*00004"):
        read_folder(tmp_path)
    (tmp_path / "last").rename(tmp_path / SHARDED[3])
    shutil.copy(tmp_path / SHARDED[0], tmp_path / SHARDED[2])
    index["weight_map"]["e"] = SHARDED[3]
    del index["weight_map"]["b"]
    index["weight_map"]["z"] = SHARDED[1]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit") as caught:
        read_folder(tmp_path)
    for part in ("'a' is in model-00001", "'b' is in model-00002", "'c' is not in", "'e' is not in", "'z' is not in"):
        assert part in str(caught.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "q4.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors.*q4\.onnx, weights\.pth"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="use read_file"):
        read_folder(tmp_path / "q4.onnx")
    with pytest.raises(FileNotFoundError, match="check the path"):
        read_folder(tmp_path / "absent")


def test_links_of_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    write_folder(blobs, make())
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    (snapshot / "vocab.txt").symlink_to("../../blobs/vocab.txt")
    (blobs / "vocab.txt").write_text("v")
    assert values(snapshot) == {1.0}
    write_folder(snapshot, make(2.0))
    assert values(snapshot) == {2.0}
    assert values(blobs) == {1.0}
    assert (snapshot / "vocab.txt").is_symlink()
    assert (snapshot / "vocab.txt").read_text() == "v"


def test_only_weights_are_replaced(tmp_path):
    keep = {
        "README.md": b"r",
        "tokenizer.json": b"t",
        "sub/deep/file": b"f",
        "model.fp16.safetensors": b"v",
        "pytorch_model.bin": b"p",
    }
    for name, data in keep.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "sub").chmod(0o750)
    tmp_path.chmod(0o711)
    write_folder(tmp_path, make(1), max_shard_size=128, files={"config.json": b"1"})
    assert tree(tmp_path) == sorted([*keep, "sub", "sub/deep", "config.json", "model.safetensors.index.json", *SHARDED])
    write_folder(tmp_path, make(2), files={"config.json": b"2", "1_Pooling/config.json": b"p"})
    assert values(tmp_path) == {2.0}
    assert tree(tmp_path) == sorted(
        [*keep, "sub", "sub/deep", "config.json", "1_Pooling", "1_Pooling/config.json", "model.safetensors"]
    )
    assert {name: (tmp_path / name).read_bytes() for name in keep} == keep
    assert (tmp_path / "sub").stat().st_mode & 0o777 == 0o750
    assert tmp_path.stat().st_mode & 0o777 == 0o711
    write_folder(tmp_path, make(3), format="torch")  # the safetensors file would hide it
    assert values(tmp_path) == {3.0}
    write_folder(tmp_path, make(4), max_shard_size=256)
    assert values(tmp_path) == {4.0}
    assert values(tmp_path, variant=None) == {4.0}


@pytest.mark.parametrize("way", ["exchange", "inside", "no exchange"])
def test_saving_over_what_is_read(tmp_path, monkeypatch, way):
    force(monkeypatch, way)
    path = tmp_path / "model"
    write_folder(path, make(1) | make(2, "xy"), max_shard_size=128)
    tensors, _ = read_folder(path)
    mapped = tensors["x"].array()
    write_folder(path, tensors, max_shard_size=128)
    assert read_folder(path)[0].keys() == tensors.keys()
    write_folder(path, tensors)
    assert tree(path) == ["model.safetensors"]
    assert mapped[0] == 2
    assert {t.array()[0] for t in tensors.values()} == {1, 2}
    assert os.listdir(tmp_path) == ["model"]


def force(monkeypatch, way):
    if way == "inside":
        monkeypatch.setattr(module, "_exchangeable", lambda target: False)
    if way == "no exchange":
        monkeypatch.setattr(module, "_exchange", lambda *_: False)


def test_current_directory(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", make(1))
    monkeypatch.chdir(tmp_path / "m")
    write_folder(".", make(2))
    assert values(tmp_path / "m") == {2.0}
    assert os.path.exists("model.safetensors")


def test_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", make(2))
    assert (tmp_path / "link").is_symlink()
    assert values(tmp_path / "real") == {2.0}


def test_bad_arguments_change_nothing(tmp_path):
    write_folder(tmp_path / "m", make(1), files={"config.json": b"1"})
    before = content(tmp_path)
    bad = [
        {"format": "onnx"},
        {"max_shard_size": "5"},
        {"max_shard_size": 0},
        {"max_shard_size": "5 apples"},
        {"max_shard_size": True},
        {"variant": "../x"},
        {"files": {"../x": b""}},
        {"files": {"model.safetensors": b""}},
    ]
    for options in bad:
        with pytest.raises(ValueError, match=r"write|max_shard_size"):
            write_folder(tmp_path / "m", make(2), **options)
    with pytest.raises(NotADirectoryError, match="is a file"):
        write_folder(tmp_path / "m" / "config.json", make(2))
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "m", {"x": Tensor.lazy("x", np.int8, (), lambda: 1 / 0)})
    (tmp_path / "m" / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        write_folder(tmp_path / "m", make(2), files={"d": b""})
    (tmp_path / "m" / "d").rmdir()
    assert content(tmp_path) == before


def test_what_dead_processes_left_is_swept(tmp_path):
    path = tmp_path / "m"
    write_folder(path, make(1))
    dead, inside, alive = tmp_path / ".m.saving-dead", path / ".m.saving-dead", tmp_path / ".m.saving-alive"
    for stage in (dead, inside, alive):
        (stage / "sub").mkdir(parents=True)
    lock = module.lock(alive)
    write_folder(path, make(2))
    assert sorted(os.listdir(tmp_path)) == [".m.saving-alive", "m"]
    assert os.listdir(path) == ["model.safetensors"]
    module.unlock(lock)


CALLS = ["open", "fsync", "replace", "rename", "link", "mkdir", "symlink", "close", "listdir", "scandir", "chown"]


class FaultError(OSError):
    pass


@pytest.mark.parametrize("way", ["exchange", "inside", "no exchange"])
def test_every_call_may_fail(tmp_path, monkeypatch, way):
    """Fails the n-th call to the system, for each n, and finds the old checkpoint whole or the new one."""
    path = tmp_path / "m"
    write_folder(path, make(1), max_shard_size=256, files={"config.json": b"1"})
    (path / "sub").mkdir()
    (path / "sub" / "kept").write_bytes(b"k")
    (path / "alias").symlink_to("sub/kept")
    old = content(path)
    tensors = make(2)
    tensors["a"] = read_folder(path)[0]["a"]
    count, outcomes = 0, set()
    while True:
        with monkeypatch.context() as patch:
            force(patch, way)
            calls = 0

            def failing(real, name):
                def call(*args, **options):
                    nonlocal calls
                    calls += 1
                    if calls == count:  # noqa: B023
                        raise FaultError(errno.ENOSPC, f"{name} has no space")
                    return real(*args, **options)

                return call

            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name), name))
            try:
                write_folder(path, tensors, max_shard_size=128, files={"config.json": b"2"}, progress=False)
                failed = False
            except FaultError:
                failed = True
        for rest in [*tmp_path.glob(".m.saving-*"), *path.glob(".m.saving-*")]:  # when the clean-up itself failed
            shutil.rmtree(rest)
        now = content(path)
        if count > 0 and now == old:
            assert failed
            outcomes.add("old")
        else:
            got, _ = read_folder(path)
            assert {t.array()[0] for t in got.values()} == {1, 2}
            assert now["config.json"] == b"2"
            assert now["sub/kept"] == b"k"
            assert now["alias"] == b"k"
            assert sorted(now) == sorted(["alias", "config.json", "sub/kept", "model.safetensors.index.json", *SHARDED])
            outcomes.add("new")
            shutil.rmtree(path)
            path.mkdir()
            for name, data in old.items():
                (path / name).parent.mkdir(exist_ok=True)
                if name != "alias":
                    (path / name).write_bytes(data)
            (path / "alias").symlink_to("sub/kept")
        if count > calls:
            break
        count += 1
    assert outcomes == {"old", "new"}
    assert count > 20


KILLED = """
import os, random, signal, sys, time, numpy as np
from fmodels.weights import Tensor, read_folder, write_folder

path, chance = sys.argv[1], random.Random(0)
for _ in range(15):
    reader, writer = os.pipe()
    child = os.fork()
    while child == 0:
        step = chance.randrange(10**6)
        make = lambda name: Tensor.lazy(name, np.float32, (4096,), lambda: np.full(4096, step, np.float32))
        write_folder(path, {n: make(n) for n in "abcd"}, max_shard_size=(2**14, "1GB", 2**15)[step % 3],
                     files={"config.json": str(step).encode()}, progress=False)
        os.write(writer, b"saved")
    os.read(reader, 1)  # at least one save went through
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    got = {float(v) for t in read_folder(path)[0].values() for v in t.array()}
    assert len(got) == 1, got
    assert open(path + "/config.json").read() == str(int(got.pop()))
    assert open(path + "/tokenizer.json").read() == "t"
print("whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged on Linux")
def test_killed_at_any_time(tmp_path):
    path = tmp_path / "m"
    write_folder(path, make(0), files={"config.json": b"0", "tokenizer.json": b"t"})
    result = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert result.stdout == "whole\n", result.stderr
    write_folder(path, make(0))
    assert os.listdir(tmp_path) == ["m"]


def test_sizes():
    cases = {"1KB": 1000, "2MiB": 2 * 2**20, "3gb": 3 * 10**9 // 8, "3GiB": 3 * 2**30, "1 TB": 10**12, 12: 12}
    assert {size: module.parse_size(size) for size in cases} == cases
    for wrong in ("", "GB", "-1GB", "1XB", 1.5, -1, None):
        with pytest.raises(ValueError, match="max_shard_size"):
            module.parse_size(wrong)


def test_nothing_to_write(tmp_path):
    write_folder(tmp_path, {})
    assert load_file(tmp_path / "model.safetensors") == {}
    assert read_folder(tmp_path)[0] == {}
