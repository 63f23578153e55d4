"""Damaged files of every format: a clean error or tensors, and bounded memory."""

import random
import shutil

import numpy as np
import pytest

import fmodels as fm
from fmodels.weights import Tensor, orbax
from tests.weights import fuzz

FILES = [name for name, kind in fm.FORMATS.items() if not kind.directory]


@pytest.mark.parametrize("format", FILES)
def test_damaged_files(tmp_path, format):
    whole = fuzz.valid(format)
    assert fuzz.check(format, whole, tmp_path / "file")
    readable = 0
    for seed in range(400):
        draw = random.Random(seed).randrange
        readable += fuzz.check(format, fuzz.damage(whole, draw), tmp_path / "file")
    assert readable < 400


@pytest.mark.parametrize("format", FILES)
def test_files_of_nothing(tmp_path, format):
    """Any bytes, and those that begin as a file of the format does."""
    whole = fuzz.valid(format)
    for seed in range(200):
        source = random.Random(seed)
        data = source.randbytes(source.randrange(200))
        fuzz.check(format, data, tmp_path / "file")
        fuzz.check("any", data, tmp_path / "file")
        fuzz.check(format, whole[: source.randrange(64)] + data, tmp_path / "file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves tasks of the file behind
def test_damaged_folders(tmp_path):
    """A checkpoint of orbax, a file of which is damaged."""
    arrays = {"a.weight": np.arange(24, dtype=np.float32).reshape(4, 6), "b.bias": np.zeros(6, np.float16)}
    orbax.write(
        tmp_path / "whole",
        {name: Tensor.lazy(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()},
    )
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    readable = 0
    for seed in range(60):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / draw.choice(files)
        path.write_bytes(fuzz.damage(path.read_bytes(), draw.randrange))
        try:
            for tensor in orbax.read(folder)[0].values():
                tensor.array()
            readable += 1
        except fuzz.CLEAN:
            pass
    assert 0 < readable < 60
