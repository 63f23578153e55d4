"""What every reader must hold for every file: it gives tensors or a clean error, and takes no more memory than the file.

`tests/weights/test_fuzz.py` tries some thousand damaged files with hypothesis. With coverage to guide it, for hours:

    pip install atheris && python -m tests.weights.fuzz gguf seeds/ -max_total_time=600
"""

import pickle
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fmodels as fm
from fmodels.weights import Tensor, read_file

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
    path.write_bytes(data)
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


def main() -> None:
    """Fuzzes a format with atheris."""
    import atheris  # pyright: ignore[reportMissingImports]

    format = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        atheris.Setup(sys.argv, lambda data: check(format, data, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
