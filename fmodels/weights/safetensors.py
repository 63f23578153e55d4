"""The safetensors format: 8 bytes of header length, a JSON header, the bytes of all tensors without holes.

Our own reader and writer, because the package gives numpy neither bfloat16 nor float8 and does not align its files.
Source: the format's description and the Rust crate `safetensors`, whose checks are all made here; elements of 4 and 6
bits are packed from the lowest bit on, as in torch's `float4_e2m1fn_x2`, and shapes count elements, not bytes.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import (
    ALIGNMENT,
    File,
    Tensor,
    as_bytes,
    brief,
    by_kind,
    is_lfs_pointer,
    lfs_error,
    listing,
    parse_json,
    replacing,
    send,
    shape_problem,
)

DTYPES: dict[str, tuple[np.dtype, int]] = {  # code in the header: dtype, bits of an element on disk
    code: (np.dtype(dtype), bits)
    for code, dtype, bits in [
        ("BOOL", np.bool_, 8),
        ("U8", np.uint8, 8),
        ("I8", np.int8, 8),
        ("U16", np.uint16, 16),
        ("I16", np.int16, 16),
        ("F16", np.float16, 16),
        ("BF16", ml_dtypes.bfloat16, 16),
        ("U32", np.uint32, 32),
        ("I32", np.int32, 32),
        ("F32", np.float32, 32),
        ("U64", np.uint64, 64),
        ("I64", np.int64, 64),
        ("F64", np.float64, 64),
        ("C64", np.complex64, 64),
        ("F8_E5M2", ml_dtypes.float8_e5m2, 8),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn, 8),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu, 8),
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz, 8),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz, 8),
        ("F4", ml_dtypes.float4_e2m1fn, 4),
        ("F6_E2M3", ml_dtypes.float6_e2m3fn, 6),
        ("F6_E3M2", ml_dtypes.float6_e3m2fn, 6),
    ]
}
CODES = {dtype: code for code, (dtype, _) in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the limit of the Rust crate


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the header of a safetensors file; the bytes of the tensors stay on disk until they are asked for.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the header's order, and the metadata.

    Raises:
        ValueError: the file is cut, or its header contradicts itself or the file; all bad tensors are named.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> write(path, {"x": Tensor.lazy("x", np.int32, (3,), lambda: np.arange(3, dtype=np.int32))})
        >>> tensors, metadata = read(path)
        >>> tensors["x"].array(), metadata
        (array([0, 1, 2], dtype=int32), {'format': 'pt'})
    """
    file = File(path)
    header, start = _header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"read: {str(path)!r}: __metadata__ must map text to text, got {brief(metadata)}; "
            "write the file again with text only"
        )
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, bits, shape, begin, end = _entry(entry, file.size - start)
        except ValueError as error:
            problems.append(f"tensor {brief(name)}: {error}")
            continue
        spans.append((begin, end, name))
        tensors[name] = _tensor(name, dtype, bits, shape, file, start + begin)
    if not problems:  # a bad entry leaves a hole of its own
        problems = _gaps(spans, file.size - start)
    if problems:
        raise ValueError(
            f"read: {str(path)!r} has a header that does not fit its data: {listing(problems, sep='; ')}; "
            "the file is damaged or was cut, copy or download it again"
        )
    return tensors, metadata


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes a safetensors file, one tensor at a time, replacing an older file only when all is written.

    The format allows no holes, so alignment comes from the order: tensors whose size is a multiple of 64 bytes first,
    then the odd ones. All but the latter lie on 64-byte boundaries and can be mapped without a copy. Within each, names
    that differ only in their numbers follow each other, so that the layers of a kind lie in one piece.

    Args:
        path: the file.
        tensors: by name; the names on disk are the keys.
        metadata: text by text; `{"format": "pt"}`, which transformers asks for, if None.
        advance: called with the number of bytes written after each tensor.

    Raises:
        ValueError: a name, dtype or piece of metadata that the format does not have.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> tensor = Tensor.lazy("x", np.float32, (16,), lambda: np.ones(16, np.float32))
        >>> write(path, {"a": tensor, "b": tensor}, metadata={"format": "pt", "made by": "hand"})
        >>> [tensor.offset % 64 for tensor in read(path)[0].values()]
        [0, 0]
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    if any(not isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError(f"write: expected metadata of text by text, got {brief(metadata)}; convert them with str()")
    sizes = {name: _size_on_disk(name, tensor) for name, tensor in tensors.items()}
    # The odd ones go by falling size of their elements: each then lies at a multiple of its own element.
    odd = {name: size % ALIGNMENT != 0 for name, size in sizes.items()}
    order = sorted(sizes, key=lambda name: (odd[name], -tensors[name].dtype.itemsize * odd[name], *by_kind(name)))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + sizes[name]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"write: the header of {str(path)!r} has {len(text)} bytes, the format allows {MAX_HEADER}")
    with replacing(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            send(out, tensors[name]) if DTYPES[CODES[tensors[name].dtype]][1] >= 8 else out.write(_pack(tensors[name]))
            if advance is not None:
                advance(tensors[name].nbytes)


def _header(file: File) -> tuple[dict, int]:
    """The header's object, and where the data start."""
    path = file.path
    head = file.read(0, 200)
    if is_lfs_pointer(head):
        raise lfs_error(path)
    if len(head) < 8:
        raise ValueError(
            f"read: {str(path)!r} has {file.size} bytes, a safetensors file begins with 8 bytes of header length; "
            "copy or download it again"
        )
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER or length > file.size - 8 or head[8:9] != b"{":
        raise ValueError(
            f"read: {str(path)!r} is cut or no safetensors file: expected a JSON header of at most "
            f"{min(MAX_HEADER, file.size - 8)} bytes, got one of {length} that begins with {head[8:16]!r}; "
            "copy or download it again"
        )
    return parse_json(file.read(8, length), f"read: header of {str(path)!r}"), 8 + length


def _entry(entry: object, available: int) -> tuple[np.dtype, int, tuple[int, ...], int, int]:
    """Checks one tensor's lines of the header: dtype, bits of an element, shape, begin, end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets, got {brief(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"dtype {brief(code)} is unknown, known are {' '.join(DTYPES)}")
    dtype, bits = DTYPES[code]
    if problem := shape_problem(shape, dtype.itemsize):
        raise ValueError(problem)
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise ValueError(f"data_offsets must be two integers, got {brief(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end <= available:
        raise ValueError(f"data_offsets {brief(offsets)} lie outside of the {available} bytes of data")
    need = int(np.prod(shape, dtype=object)) * bits
    if need != 8 * (end - begin):
        raise ValueError(f"{code}{brief(shape)} needs {need / 8:g} bytes, data_offsets {offsets} give {end - begin}")
    return dtype, bits, tuple(shape), begin, end


def _gaps(spans: list[tuple[int, int, str]], available: int) -> list[str]:
    """What keeps the tensors from covering the data exactly once."""
    problems: list[str] = []
    position, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin < position:
            problems.append(f"tensor {brief(name)} begins at {begin}, inside of {last} that ends at {position}")
        elif begin > position:
            problems.append(f"{begin - position} bytes between {last} and tensor {brief(name)} belong to nobody")
        position, last = max(position, end), f"tensor {brief(name)}"
    if position != available:
        problems.append(f"{available - position} bytes after {last} belong to nobody")
    return problems


def _tensor(name: str, dtype: np.dtype, bits: int, shape: tuple[int, ...], file: File, offset: int) -> Tensor:
    if bits >= 8:
        return Tensor.in_file(name, dtype, shape, file, offset)
    count = int(np.prod(shape)) * bits // 8

    def get() -> np.ndarray:
        stream = np.unpackbits(file.mapped[offset : offset + count], bitorder="little").reshape(-1, bits)
        return np.packbits(stream, axis=1, bitorder="little").reshape(shape).view(dtype)

    return Tensor.lazy(name, dtype, shape, get)


def _pack(tensor: Tensor) -> bytes:
    """Elements of 4 or 6 bits without the bits between them."""
    bits = DTYPES[CODES[tensor.dtype]][1]
    stream = np.unpackbits(np.frombuffer(as_bytes(tensor), np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(stream[:, :bits].reshape(-1), bitorder="little").tobytes()


def _size_on_disk(name: str, tensor: Tensor) -> int:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"write: {brief(name)} cannot be the name of a tensor, the format keeps it; rename it")
    if tensor.dtype not in CODES:
        raise ValueError(
            f"write: tensor {name!r} is {tensor.dtype}, safetensors has {' '.join(str(d) for d in CODES)}; cast it"
        )
    count = tensor.size * DTYPES[CODES[tensor.dtype]][1]
    if count % 8:
        raise ValueError(
            f"write: tensor {name!r} of {tensor.dtype}{list(tensor.shape)} does not fill its last byte; pad it"
        )
    return count // 8


def looks_like(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as a safetensors file does.

    Example:
        >>> looks_like(__file__)
        False
    """
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= Path(path).stat().st_size - 8
