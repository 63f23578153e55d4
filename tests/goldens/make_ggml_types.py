"""Writes `tests/goldens/llama_cpp/types.json`: numbers in the types that llama.cpp has and the package `gguf` cannot dequantise.

Each has the bytes that llama.cpp makes of random numbers, and what it makes of these. Beside it, llama.cpp quantises a whole
model to each of its file types, and the numbers that fmodels loads must be those of llama.cpp, bit for bit.

In the environment of `make_llama_cpp.py`:

    JAX_PLATFORMS=cpu PYTHONPATH=. llama_cpp/bin/python tests/goldens/make_ggml_types.py
"""

import ctypes
import json
import tempfile
from pathlib import Path

import jax
import llama_cpp
import numpy as np

import fmodels as fm
from fmodels.weights import ggml, read_file

OUT = Path(__file__).parent / "llama_cpp" / "types.json"
GGML = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
TYPES = ("q1_0", "q2_0", "q8_k")
FILES = {
    name: number
    for name, number in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_") and isinstance(number, int) and number < 1024
}
FLOATS = ctypes.POINTER(ctypes.c_float)


def dequantize(packed, name):
    """By llama.cpp: of bytes, a row of float32."""
    kind = ggml.TYPES[name]
    out = np.empty(packed.size // kind.nbytes * kind.size, np.float32)
    by = getattr(GGML, f"dequantize_row_{name.replace('_k', '_K')}")
    by(packed.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(FLOATS), ctypes.c_int64(out.size))
    return out


def quantize(numbers, name):
    kind = ggml.TYPES[name]
    out = np.empty(numbers.size // kind.size * kind.nbytes, np.uint8)
    by = getattr(GGML, f"quantize_row_{name.replace('_k', '_K')}_ref")
    by(numbers.ctypes.data_as(FLOATS), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(numbers.size))
    return out


def check(path):
    """That fmodels loads a file, and reads its numbers as llama.cpp does; the types that it has."""
    fm.load(path)
    found = set()
    for tensor in read_file(path)[0].values():
        if isinstance(tensor, ggml.Blocks):
            found.add(tensor.type)
            assert dequantize(tensor.packed.array(), tensor.type).tobytes() == tensor.array().tobytes(), tensor.name
    return found


def model(folder):
    """A Llama whose rows fill the blocks of all types, as float32 GGUF."""
    config = fm.models.llama.Config(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        max_positions=32, task="causal-lm",
    )  # fmt: skip
    fm.save(fm.init(config, jax.random.key(0)), config, folder, format="gguf")
    return folder / "model.gguf"


if __name__ == "__main__":
    found = {}
    random = np.random.default_rng(0)
    for name in TYPES:
        packed = quantize(random.standard_normal(2 * ggml.TYPES[name].size, dtype=np.float32), name)
        found[name] = {"packed": packed.tobytes().hex(), "numbers": dequantize(packed, name).tolist()}
    OUT.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")

    work = Path(tempfile.mkdtemp())
    source = model(work)
    for name, number in FILES.items():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = number
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(work / name).encode(), options)
        print(name, "llama.cpp refuses" if failed else sorted(check(work / name)))
