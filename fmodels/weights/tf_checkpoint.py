"""Checkpoints of TensorFlow 1 and 2, `model.ckpt.index` beside `model.ckpt.data-00000-of-00001`, read without TensorFlow.

The index is a table of LevelDB: sorted names, each with dtype, shape and place in a data file, where the numbers lie as they
are. Only read: TensorFlow itself refuses data without a checksum, and nothing but the first BERTs needs such files.
Source: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/table (format.cc, block.cc), tensor_bundle.proto.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import File, Tensor, brief, is_lfs_pointer, lfs_error, listing, parse_json, shape_problem

MAGIC = 0xDB4775248B80FB57
MAX_INDEX = 256 * 2**20  # bytes; that of a model with 100 000 tensors has 10 MB
DTYPES = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 8: np.complex64, 9: np.int64,
    10: np.bool_, 14: ml_dtypes.bfloat16, 17: np.uint16, 18: np.complex128, 19: np.float16, 22: np.uint32, 23: np.uint64,
    24: ml_dtypes.float8_e5m2, 25: ml_dtypes.float8_e4m3fn,
}  # fmt: skip
"""The numbers of `tensorflow.DataType`."""
STRING = 7
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # how TensorFlow 2 describes the objects that were saved; text and no tensor
CONFIGS = ("bert_config.json", "albert_config.json")
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
        header = _message(entries.pop(b"", b""))
        if header.get(2, [0])[0] != 0:
            raise ValueError("it was written on a big-endian machine")
        count = _integer(header, 1)
        data = _data_files(file.path, count)
        tensors: dict[str, Tensor] = {}
        problems: list[str] = []
        for raw, entry in entries.items():
            name = raw.decode()
            try:
                if (tensor := _tensor(name, _message(entry), data)) is not None:
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


def _data_files(path: Path, count: int) -> list[File]:
    if not 1 <= count <= 10_000:
        raise ValueError(f"it has {count} data files")
    stem = path.name.removesuffix(".index")
    names = [path.with_name(f"{stem}.data-{i:05d}-of-{count:05d}") for i in range(count)]
    if missing := [name.name for name in names if not name.is_file()]:
        raise FileNotFoundError(
            f"read: {str(path)!r} needs the data files {listing(missing)} beside it; copy or download them, too"
        )
    return [File(name) for name in names]


def _tensor(name: str, entry: dict[int, list], data: list[File]) -> Tensor | None:
    """Where a variable lies; None for what is no array."""
    kind = _integer(entry, 1)
    if kind == STRING and name == GRAPH:
        return None
    if kind not in DTYPES:
        raise ValueError(f"dtype {kind} of TensorFlow is not read, only numbers")
    if 7 in entry:
        raise ValueError("it is cut in slices; load it with TensorFlow and save it whole")
    dtype = np.dtype(DTYPES[kind])
    shape = [_integer(_message(dim), 1) for dim in _message(_bytes(entry, 2)).get(2, [])]
    if problem := shape_problem(shape, dtype.itemsize):
        raise ValueError(problem)
    number, offset, size = (_integer(entry, key) for key in (3, 4, 5))
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
    _, position = _varint(footer, position)
    _, position = _varint(footer, position)
    offset, position = _varint(footer, position)
    size, _ = _varint(footer, position)
    last = None
    for _, handle in _block(raw, offset, size):
        start, position = _varint(handle, 0)
        length, _ = _varint(handle, position)
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
    if _masked(_crc32c(raw[offset : offset + size + 1])) != checksum:
        raise ValueError(f"the checksum of the block at {offset} is wrong")
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    end, position, key = size - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise ValueError(f"the block at {offset} is shorter than its own table")
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + own + length > end or shared + own > 2**16:
            raise ValueError(f"the block at {offset} has an entry that is too long")
        key = key[:shared] + block[position : position + own]
        position += own + length
        yield key, block[position - length : position]


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")


def _message(raw: bytes) -> dict[int, list]:
    """The fields of a protocol buffer: number -> values, integers or bytes."""
    fields: dict[int, list] = {}
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(raw, position)
        else:
            if kind == 2:
                length, position = _varint(raw, position)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"a field of kind {kind}")
            if position + length > len(raw):
                raise ValueError("a field that is longer than its message")
            value, position = raw[position : position + length], position + length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _integer(fields: dict[int, list], number: int) -> int:
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int) or value >= 2**63:
        raise ValueError(f"field {number} is no size")
    return value


def _bytes(fields: dict[int, list], number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is no message")
    return value


@functools.cache
def _steps() -> list[int]:
    """CRC-32C of each byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def _crc32c(raw: bytes) -> int:
    """The checksum that LevelDB has (Castagnoli's).

    Example:
        >>> hex(_crc32c(b"123456789"))
        '0xe3069283'
    """
    table, value = _steps(), 0xFFFFFFFF
    for byte in raw:
        value = table[(value ^ byte) & 255] ^ value >> 8
    return value ^ 0xFFFFFFFF


def _masked(value: int) -> int:
    """As LevelDB stores a checksum."""
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
