"""Damaged files of every format: a clean error or tensors, and bounded memory."""

import random

import pytest

import fmodels as fm
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
