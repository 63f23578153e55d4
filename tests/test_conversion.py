"""Conversion: every format into every other and back, inside a gigabyte, over a kill, and with what it refuses."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import fmodels as fm
from fmodels import conversion
from fmodels.weights import read_file, read_folder

LACKING = {
    "llama/causal-lm": ("tf", "tf-checkpoint"),
    "gpt2/causal-lm": ("tf-checkpoint",),
    "bert/masked-lm": ("gguf",),
    "t5/seq2seq-lm": ("gguf", "tf-checkpoint"),
}
"""Row -> formats that have no place for the family: llama.cpp, TensorFlow's classes or google-research never had it."""
CASES = ("llama/causal-lm", "gpt2/causal-lm", "bert/masked-lm", "t5/seq2seq-lm")


@pytest.mark.parametrize("name", CASES)
def test_every_format_into_every_other(case, tmp_path, name):
    """Bytes are equal when they come back, through any two formats."""
    folder = tmp_path / "safetensors"
    first = fm.convert(case(name).folder, folder)
    for one in LACKING.get(name, ()):
        with pytest.raises(ValueError, match=r"not supported in GGUF|had no class|those of google-research"):
            fm.convert(folder, tmp_path / one, format=one)
    formats = [format for format in fm.FORMATS if format not in LACKING.get(name, ())]
    for one in formats:
        if one != "safetensors":
            assert fm.convert(folder, tmp_path / one, format=one).sha256 == first.sha256
    for one in formats:
        for other in formats:
            if one != other and "safetensors" not in (one, other):
                made = fm.convert(tmp_path / one, tmp_path / f"{one}-{other}", format=other, verify=False)
                if other != "orbax":  # whose files have random names
                    for path in (tmp_path / other).iterdir():
                        assert (Path(made.folder) / path.name).read_bytes() == path.read_bytes()
                back = fm.convert(made.folder, tmp_path / f"{one}-{other}-back")
                assert back.sha256 == first.sha256
                assert (Path(back.folder) / "model.safetensors").read_bytes() == (
                    folder / "model.safetensors"
                ).read_bytes()


def test_bfloat16_and_cast(case, tmp_path):
    source = case("llama/causal-lm").folder
    half = fm.convert(source, tmp_path / "half", dtype="bfloat16", format="npz")
    assert half.cast == half.tensors
    with np.load(tmp_path / "half" / "model.npz") as theirs, np.errstate(all="ignore"):
        want = read_folder(source)[0]
        for name, tensor in want.items():
            got = theirs[name].view(ml_dtypes.bfloat16)
            assert np.array_equal(got.view(np.uint16), tensor.array().astype(ml_dtypes.bfloat16).view(np.uint16))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_several_formats_are_there(case, tmp_path, caplog):
    loaded = case("gpt2/causal-lm")
    for format in ("npz", "torch"):
        fm.save(loaded.params, loaded.config, tmp_path, format=format)
    other = fm.cast(loaded.params, "float16")
    fm.save(other, loaded.config, tmp_path / "other", format="npz")
    (tmp_path / "other" / "model.npz").replace(tmp_path / "model.npz")
    with caplog.at_level(logging.INFO, "fmodels"):
        assert fm.load(tmp_path)[0]["embed"]["tokens"].dtype == "float32"  # pytorch_model.bin is looked for first
    assert "is read as 'torch'; format= takes one of npz" in caplog.text
    assert fm.load(tmp_path, format="npz")[0]["embed"]["tokens"].dtype == "float16"
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        fm.load(tmp_path, format="safetensors")
    with pytest.raises(ValueError, match="format 'h5' is not known; use one of safetensors, torch"):
        fm.load(tmp_path, format="h5")
    with pytest.raises(ValueError, match="is a file of format 'npz', not 'torch'"):
        read_file(tmp_path / "model.npz", "torch")


def test_orbax_that_others_wrote(case, tmp_path):
    """A tree that StandardCheckpointer saved, beside config.json; and ours, restored by orbax."""
    import orbax.checkpoint as ocp

    loaded = case("llama/causal-lm")
    for layers in (loaded.params, fm.unstack_layers(loaded.params)):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(type(layers["layers"]).__name__) / "params", layers)
    for kind in ("dict", "tuple"):
        (tmp_path / kind / "config.json").write_bytes((loaded.folder / "config.json").read_bytes())
        params, config = fm.load(tmp_path / kind)
        assert config == loaded.config
        assert all(np.array_equal(fm.tree.flatten(params)[k], v) for k, v in fm.tree.flatten(loaded.params).items())
    fm.save(loaded.params, loaded.config, tmp_path / "ours", format="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore(tmp_path / "ours" / "params", loaded.params)
    assert all(np.array_equal(fm.tree.flatten(theirs)[k], v) for k, v in fm.tree.flatten(loaded.params).items())


def test_orbax_on_a_full_disk(case, tmp_path, monkeypatch):
    """TensorStore's error is no ValueError of ours, which would say that the checkpoint is at fault."""
    import orbax.checkpoint as ocp

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    with pytest.raises(OSError, match=r"orbax could not write .*No space left"):
        fm.convert(case("llama/causal-lm").folder, tmp_path / "new", format="orbax")
    assert not list(tmp_path.iterdir())


def test_verification_reads_each_leaf_of_orbax_once(case, tmp_path, monkeypatch):
    """And not once for each layer."""
    from fmodels.weights import orbax

    restore, read = orbax._restore, []
    monkeypatch.setattr(orbax, "_restore", lambda path, tree, keys: read.append(keys) or restore(path, tree, keys))
    fm.convert(case("llama/causal-lm").folder, tmp_path / "new", format="orbax")
    assert len(read) == len(set(read)) > 10


KILLED = """
import sys, fmodels as fm
from fmodels.weights import safetensors
write = safetensors.write
count = 0
def slow(path, *args, **given):
    global count
    count += 1
    if count == 3:
        print("now", flush=True)
        import time; time.sleep(60)
    write(path, *args, **given)
safetensors.write = slow
fm.convert(sys.argv[1], sys.argv[2], max_shard_size="20kB")
"""


def test_goes_on_after_a_kill(case, tmp_path):
    source = case("llama/causal-lm").folder
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, source, tmp_path / "new"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "new").exists()
    done = fm.convert(source, tmp_path / "new", max_shard_size="20kB")
    assert done.resumed == 2
    assert done.sha256 == fm.convert(source, tmp_path / "whole").sha256
    assert not list(tmp_path.glob(".*"))


def test_another_conversion_starts_anew(case, tmp_path):
    """Files that a killed run left are used for the same conversion only."""
    source = case("llama/causal-lm").folder
    stage = tmp_path / ".new.converting"
    stage.mkdir()
    (stage / "conversion.json").write_text("{}")
    (stage / "model.safetensors").write_bytes(b"of another")
    assert fm.convert(source, tmp_path / "new").resumed == 0


def test_what_a_killed_run_left(case, tmp_path):
    """Half a file is not in the new folder, and files that were made of another config, or of other leaves, are not used."""

    def killed(source):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversion, "copy_others", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fm.convert(source, tmp_path / "new", format="gguf")
        (tmp_path / ".new.converting" / ".model.gguf.0a1b2c3d.tmp").write_bytes(b"half of it")

    def interrupted(*_):
        raise KeyboardInterrupt

    source = tmp_path / "source"
    fm.convert(case("llama/causal-lm").folder, source, format="orbax")
    killed(source)
    assert fm.convert(source, tmp_path / "new", format="gguf").resumed == 1
    assert not list((tmp_path / "new").glob(".*"))
    shutil.rmtree(tmp_path / "new")
    killed(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    assert fm.convert(source, tmp_path / "new", format="gguf").resumed == 0
    assert read_folder(tmp_path / "new")[1]["llama.context_length"] == 77
    shutil.rmtree(tmp_path / "new")
    killed(source)
    params, config = fm.load(source)
    shutil.rmtree(source / "params")
    fm.save(fm.cast(params, "float16"), config, source, format="orbax")
    assert fm.convert(source, tmp_path / "new", format="gguf").resumed == 0


def test_killed_while_it_removed_what_was_there(case, tmp_path):
    """Half of a folder of weights is not taken for the whole when the first conversion is started once more."""
    source = case("llama/causal-lm").folder
    remove = shutil.rmtree

    def interrupted(*_):
        raise KeyboardInterrupt

    def half(path, **given):
        remove(Path(path) / ("d" if Path(path).name == "params" else "params/d"), **given)
        raise KeyboardInterrupt

    def killed(dtype, *changes):
        with pytest.MonkeyPatch.context() as patch:
            for change in changes:
                patch.setattr(*change)
            with pytest.raises(KeyboardInterrupt):
                fm.convert(source, tmp_path / "new", format="orbax", dtype=dtype)

    for dtype in ("float16", None):  # for another conversion, and after the verification
        killed(None, (conversion, "copy_others", interrupted))
        killed(dtype, (conversion, "_verify", lambda *_, **__: 1 / 0), (shutil, "rmtree", half))
        assert fm.convert(source, tmp_path / "new", format="orbax").resumed == 0
        remove(tmp_path / "new")
        assert not list(tmp_path.iterdir())


def test_a_file_that_comes_out_wrong_is_not_left(case, tmp_path, monkeypatch):
    from fmodels.weights import safetensors

    write = safetensors.write

    def wrong(path, tensors, *args, **given):
        write(path, tensors, *args, **given)
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    monkeypatch.setattr(safetensors, "write", wrong)
    with pytest.raises(ValueError, match=r"nothing was written: '.*' was not written as it is"):
        fm.convert(case("llama/causal-lm").folder, tmp_path / "new")
    assert not os.listdir(tmp_path)


def write_sparse(path, shapes):
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, leaf in shapes.items():
        size = 4 * math.prod(leaf.shape)
        header[name] = {"dtype": "F32", "shape": list(leaf.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


LARGE = """
import re, sys, fmodels as fm
fm.convert(sys.argv[1], sys.argv[2], format=sys.argv[3])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("format", ["safetensors", "flax"])
def test_three_gigabytes_inside_of_one(tmp_path, format):
    """A checkpoint of 3 GB is converted, and read again, inside of 1 GB, libraries included."""
    config = fm.models.llama.Config(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=16, num_heads=16, num_kv_heads=16,
        head_dim=128, task="causal-lm", tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    write_sparse(
        folder / "model.safetensors", jax.eval_shape(lambda params: fm.to_disk(params, config), fm.abstract(config))
    )
    assert (folder / "model.safetensors").stat().st_size > 3e9
    command = [sys.executable, "-c", LARGE, folder, tmp_path / "new", format]
    # Not ru_maxrss: a process inherits that of the one that started it.
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < 1e6  # KiB
