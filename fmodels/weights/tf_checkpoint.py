"""Checkpoints of TensorFlow 1 and 2, `model.ckpt.index` beside `model.ckpt.data-00000-of-00001`, without TensorFlow.

The index is a table of LevelDB: sorted names, each with dtype, shape, place in a data file and checksum; the numbers lie in
the data file as they are. What is written is what TensorFlow's `SaveV2` writes, byte for byte, a tensor at a time.
Source: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io (format.cc, block.cc, block_builder.cc, table_builder.cc),
tensor_bundle.proto.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fmodels.weights.crc32c import crc32c, masked
from fmodels.weights.protobuf import Fields, as_varint, field, integer, message, varint
from fmodels.weights.tensors import (
    File,
    Tensor,
    as_bytes,
    brief,
    is_lfs_pointer,
    lfs_error,
    listing,
    parse_json,
    replacing,
    shape_problem,
)

MAGIC = 0xDB4775248B80FB57
MAX_INDEX = 256 * 2**20  # bytes; that of a model with 100 000 tensors has 10 MB
DTYPES = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 8: np.complex64, 9: np.int64,
    10: np.bool_, 14: ml_dtypes.bfloat16, 17: np.uint16, 18: np.complex128, 19: np.float16, 22: np.uint32, 23: np.uint64,
    24: ml_dtypes.float8_e5m2, 25: ml_dtypes.float8_e4m3fn,
}  # fmt: skip
"""The numbers of `tensorflow.DataType`."""
NUMBERS = {np.dtype(dtype): number for number, dtype in DTYPES.items()}
STRING = 7
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # how TensorFlow 2 describes the objects that were saved; text and no tensor
CONFIGS = ("bert_config.json", "albert_config.json")
MAX_NAME = 2**16  # bytes
RESTART = 16  # entries of a block, of which the first has its whole key
AGAIN = "copy or download it again"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the index of a checkpoint; the numbers stay in the data files until they are asked for.

    Args:
        path: the file `….index`; the data files lie beside it.

    Returns:
        The variables by name, sorted, and as metadata the configs of google-research's models that lie beside, by file name.

    Raises:
        ValueError: no such index, or one that is damaged or contradicts the data files; variables that are cut in slices.
        FileNotFoundError: a data file is not there.
    """
    file = File(path)
    where = f"read: {str(path)!r}"
    if is_lfs_pointer(file.read(0, 200)):
        raise lfs_error(file.path)
    if file.size > MAX_INDEX:
        raise ValueError(f"{where} has {file.size} bytes, an index of at most {MAX_INDEX} is read")
    try:
        entries = dict(_table(file.read(0, file.size)))
        header = message(entries.pop(b"", b""))
        if header.get(2, [0])[0] != 0:
            raise ValueError("it was written on a big-endian machine")
        count = _size(header, 1)
        data = _data_files(file.path, count)
        tensors: dict[str, Tensor] = {}
        problems: list[str] = []
        for raw, entry in entries.items():
            name = raw.decode()
            try:
                if (tensor := _tensor(name, message(entry), data)) is not None:
                    tensors[name] = tensor
            except ValueError as error:
                problems.append(f"variable {brief(name)}: {error}")
        if problems:
            raise ValueError(listing(problems, sep="; "))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is no index of a TensorFlow checkpoint, or damaged: {error}; {AGAIN}") from None
    configs = {name: file.path.with_name(name) for name in CONFIGS}
    there = {name: path.read_bytes() for name, path in configs.items() if path.is_file()}
    return tensors, {name: parse_json(content, f"read: {name} beside {str(path)!r}") for name, content in there.items()}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes the data file of a checkpoint, one tensor at a time, then its index, which makes it one.

    Args:
        path: the file `….index`.
        tensors: by the variables' names.
        metadata: as of other formats; the index has no place for any.
        advance: called with the number of bytes written after each tensor.

    Raises:
        ValueError: a dtype or name that the format does not have.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.ckpt.index"
        >>> write(path, {"dense/bias": Tensor.lazy("", np.float32, (3,), lambda: np.ones(3, np.float32))})
        >>> tensors, _ = read(path)
        >>> tensors["dense/bias"].array()
        array([1., 1., 1.], dtype=float32)
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            raise ValueError(
                f'write: tensor {name!r} is {tensor.dtype}, which TensorFlow does not have; cast it to "float32"'
            )
        if not 0 < len(name.encode(errors="replace")) < MAX_NAME or not name.isprintable():
            raise ValueError(f"write: {brief(name)} cannot be the name of a variable; rename it")
    entries = {b"": field(1, 1) + field(3, field(1, 1))}  # one data file; the version of the form
    with replacing(_data_names(Path(path), 1)[0]) as out:
        for name in sorted(tensors, key=str.encode):
            tensor, offset = tensors[name], out.tell()
            raw = as_bytes(tensor)
            out.write(raw)
            shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
            entry = field(1, NUMBERS[tensor.dtype]) + field(2, shape) + field(4, offset) + field(5, len(raw))
            entries[name.encode()] = entry + b"\x35" + struct.pack("<I", masked(crc32c(raw)))
            if advance is not None:
                advance(tensor.nbytes)
    with replacing(path) as out:
        out.write(_as_table(entries))


def _data_names(path: Path, count: int) -> list[Path]:
    stem = path.name.removesuffix(".index")
    return [path.with_name(f"{stem}.data-{i:05d}-of-{count:05d}") for i in range(count)]


def _data_files(path: Path, count: int) -> list[File]:
    if not 1 <= count <= 10_000:
        raise ValueError(f"it has {count} data files")
    names = _data_names(path, count)
    if missing := [name.name for name in names if not name.is_file()]:
        raise FileNotFoundError(
            f"read: {str(path)!r} needs the data files {listing(missing)} beside it; copy or download them, too"
        )
    return [File(name) for name in names]


def _tensor(name: str, entry: Fields, data: list[File]) -> Tensor | None:
    """Where a variable lies; None for what is no array."""
    kind = _size(entry, 1)
    if kind == STRING and name == GRAPH:
        return None
    if kind not in DTYPES:
        raise ValueError(f"dtype {kind} of TensorFlow is not read, only numbers")
    if 7 in entry:
        raise ValueError("it is cut in slices; load it with TensorFlow and save it whole")
    dtype = np.dtype(DTYPES[kind])
    shape = [_size(message(dim), 1) for dim in message(entry.get(2, [b""])[-1]).get(2, [])]
    if problem := shape_problem(shape, dtype.itemsize):
        raise ValueError(problem)
    number, offset, size = (_size(entry, key) for key in (3, 4, 5))
    need = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if number >= len(data):
        raise ValueError(f"it is in data file {number} of {len(data)}")
    if size != need or offset + size > data[number].size:
        raise ValueError(
            f"{dtype}{shape} needs {need} bytes, the index says {size} at {offset} of the {data[number].size} in "
            f"{data[number].path.name!r}"
        )
    return Tensor.in_file(name, dtype, shape, data[number], offset)


def _table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table of LevelDB."""
    if len(raw) < 48 or struct.unpack("<Q", raw[-8:])[0] != MAGIC:
        raise ValueError("it does not end as a table does")
    footer, position = raw[-48:], 0
    _, position = varint(footer, position)
    _, position = varint(footer, position)
    offset, position = varint(footer, position)
    size, _ = varint(footer, position)
    last = None
    for _, handle in _block(raw, offset, size):
        start, position = varint(handle, 0)
        length, _ = varint(handle, position)
        for key, value in _block(raw, start, length):
            if last is not None and key <= last:  # so no block is read twice, however the index is made
                raise ValueError("its names are not sorted")
            yield key, value
            last = key


def _block(raw: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block, of which each key is stored without what it shares with the one before."""
    if offset + size + 5 > len(raw) - 48:
        raise ValueError(f"a block of {size} bytes at {offset} lies outside of the file")
    block, kind = raw[offset : offset + size], raw[offset + size]
    if kind != 0:
        raise ValueError(
            "it is compressed, which TensorFlow's own writer never does; load it with TensorFlow and save it again"
        )
    (checksum,) = struct.unpack_from("<I", raw, offset + size + 1)
    if masked(crc32c(raw[offset : offset + size + 1])) != checksum:
        raise ValueError(f"the checksum of the block at {offset} is wrong")
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    end, position, key = size - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise ValueError(f"the block at {offset} is shorter than its own table")
    while position < end:
        shared, position = varint(block, position)
        own, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or position + own + length > end or shared + own > MAX_NAME:
            raise ValueError(f"the block at {offset} has an entry that is too long")
        key = key[:shared] + block[position : position + own]
        position += own + length
        yield key, block[position - length : position]


def _size(fields: Fields, number: int) -> int:
    value = integer(fields, number)
    if value < 0:
        raise ValueError(f"field {number} is no size")
    return value


# What is written is the inverse.


def _as_table(entries: Mapping[bytes, bytes]) -> bytes:
    """A table of LevelDB with one block, whatever its size: `entries` must be sorted."""
    block = _as_block(entries)
    last = [*entries][-1]
    index = _as_block({bytes([last[0] + 1]) if last else b"": _handle(0, block)})  # a name after all of the block's
    nothing = _as_block({})
    places, end = b"", len(block) + 5
    for other in (nothing, index):
        places += _handle(end, other)
        end += len(other) + 5
    closed = [part + b"\0" + struct.pack("<I", masked(crc32c(part + b"\0"))) for part in (block, nothing, index)]
    return b"".join(closed) + places.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def _handle(offset: int, block: bytes) -> bytes:
    return as_varint(offset) + as_varint(len(block))


def _as_block(entries: Mapping[bytes, bytes]) -> bytes:
    out, restarts, last = bytearray(), [0], b""
    for number, (key, value) in enumerate(entries.items()):
        if number and number % RESTART == 0:
            restarts.append(len(out))
            last = b""
        differ = (i for i, (a, b) in enumerate(zip(last, key, strict=False)) if a != b)
        shared = next(differ, min(len(last), len(key)))
        out += as_varint(shared) + as_varint(len(key) - shared) + as_varint(len(value)) + key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
