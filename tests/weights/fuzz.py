"""What every reader must hold for every file: it gives tensors or a clean error, and takes no more memory than the file.

`tests/weights/test_fuzz.py` tries some thousand damaged files. With coverage to guide it, for hours:

    pip install atheris && python -m tests.weights.fuzz gguf -max_total_time=600

It starts from a valid file and from those in the folders that are named after the format, of which the first gets the files
that reached something new. The checksums of archives and indexes are not compared, since no fuzzer guesses them.
"""

import gc
import importlib
import pickle
import struct
import sys
import tempfile
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fmodels as fm
from fmodels.weights import Tensor, read_file, tf_checkpoint

CLEAN = (ValueError, OSError, pickle.UnpicklingError)
"""What a reader may raise."""
ROOM = 2**24
"""Bytes of memory beside a thousand times the file, which a compressed one may hold."""


def valid(format: str) -> bytes:
    """A small file of a format, with several types and shapes."""
    kind = fm.FORMATS[format]
    arrays = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
        "a.bias": np.zeros(6, np.float16),
        "b.weight": np.ones((2, 3, 4), np.float32),
    }
    tensors = {name: Tensor.lazy(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind.single()
        kind.write(path, tensors, METADATA.get(format, {"format": "pt"}))
        return path.read_bytes()


METADATA: dict[str, dict] = {}
"""Format -> what its writer wants to know, if that is more than the dialect."""


def check(format: str, data: bytes, path: Path) -> bool:
    """Reads `data` as a file; returns whether it could be read.

    Raises:
        AssertionError: the reader took too much memory.
        Exception: of any other kind than those in `CLEAN`: the reader is wrong.
    """
    path.unlink(missing_ok=True)  # some file systems flush what is written over, which takes longer than all else
    path.write_bytes(data)
    if format == "tf-checkpoint":  # of which `data` is the index
        path.with_name(f"{path.name}.data-00000-of-00001").write_bytes(bytes(1024))
    tracemalloc.start()
    try:
        tensors, _ = fm.FORMATS[format].read(path) if format != "any" else read_file(path)
        for tensor in tensors.values():
            assert tensor.nbytes <= 1100 * len(data), f"{tensor.name!r} has {tensor.nbytes} bytes"
            tensor.array()
        return True
    except CLEAN:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < ROOM + 2200 * len(data), f"{peak} bytes for a file of {len(data)}"


def damage(data: bytes, draw: Callable[[int], int]) -> bytes:
    """A damaged copy; `draw(n)` gives a number below `n`."""
    out = bytearray(data)
    for _ in range(1 + draw(4)):
        at = draw(max(1, len(out)))
        kind = draw(6)
        if kind == 0:
            out[at : at + 1] = bytes([draw(256)])
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = out[at : at + draw(64)]
        elif kind == 3:  # sizes that lie
            width = (1, 2, 4, 8)[draw(4)]
            value = (0, 1, 2**7, 2**15, 2**31, 2**63 - 1, 2**64 - 1)[draw(7)] % 2 ** (8 * width)
            out[at : at + width] = struct.pack("<Q", value)[:width]
        elif kind == 4:
            del out[at : at + 1 + draw(16)]
        else:
            other = draw(max(1, len(out)))
            out[at : at + 8] = out[other : other + 8]
    return bytes(out)


class Anything:
    """What differs from nothing."""

    def __ne__(self, other: object) -> bool:
        return False


def main() -> None:
    """Fuzzes a format with atheris."""
    atheris: Any = importlib.import_module("atheris")
    format = sys.argv[1]
    whole = {name: valid(name) for name in fm.FORMATS if not fm.FORMATS[name].directory}  # which imports the readers
    zipfile.ZipExtFile._update_crc = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    tf_checkpoint.masked = lambda _: Anything()  # pyright: ignore[reportAttributeAccessIssue]
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and str(function.__module__).startswith(
            ("fmodels.weights", "zipfile")
        ):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for name in whole if format == "any" else (format,):
            (seeds / name).write_bytes(whole[name])
        path = Path(folder) / "file"
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds)], lambda data: check(format, data, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
