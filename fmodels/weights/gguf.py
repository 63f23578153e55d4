"""The GGUF format of llama.cpp: a header, metadata with types, the descriptions of the tensors, and their aligned bytes.

Metadata are a dict in the file's order, typed by numpy: scalars (`np.uint32`, `np.float32`, `np.bool_`, …), `str`, and arrays as
`np.ndarray`, as `list` where they are of text, as `tuple` where they are of arrays. So what was read is written back as it was.
Tensors of quantised types are `Blocks`: their array is dequantised, and `write` copies their bytes.

llama.cpp computes with one-dimensional tensors, norms, routers and positions in float32 and wants them so; `write` widens
them, and notes in the metadata `fmodels.float16` and `fmodels.bfloat16` what `read` has to make narrow again.

Source: docs/gguf.md of ggml and gguf-py of llama.cpp.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fmodels.weights import ggml
from fmodels.weights.ggml import Blocks, Widened
from fmodels.weights.gguf_header import MAGIC, MAX_AXES, MAX_HEADER, VERSIONS, Header, code_of, packed, packed_text
from fmodels.weights.gguf_types import file_type, is_wide, kind_of, of_type
from fmodels.weights.tensors import File, Tensor, brief, cast, listing, replacing, send, shape_problem

__all__ = ["of_part", "of_type", "parts", "read", "write"]

PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # the name of a part of several
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_NAME = 63  # bytes, of llama.cpp
NARROW = {"fmodels.float16": np.dtype(np.float16), "fmodels.bfloat16": np.dtype(ml_dtypes.bfloat16)}

Metadata = dict[str, Any]


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Metadata]:
    """Reads the header of a GGUF file; the bytes of the tensors stay on disk until they are asked for.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the file's order, axes as in PyTorch (the last is contiguous), and the metadata, with the entry
        `"format": "gguf"` beside those of the file.

    Raises:
        ValueError: the file is cut, is of another version, is big-endian, or contradicts itself.
        OSError: the file, or one of the others if it is a part of several (`name-00001-of-00003.gguf`), cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/model.gguf"
        >>> x = Tensor.lazy("x", np.float32, (2, 3), lambda: np.ones((2, 3), np.float32))
        >>> write(path, {"x": x}, {"general.architecture": "llama", "llama.block_count": np.uint32(2)})
        >>> tensors, metadata = read(path)
        >>> tensors["x"].shape, metadata["llama.block_count"], metadata["format"]
        ((2, 3), np.uint32(2), 'gguf')
    """
    header, tensors, metadata = _read(path)
    count = metadata.get("split.count", 0)
    if not isinstance(count, np.integer) or count < 2:
        return tensors, _whole(metadata)
    names = parts(Path(path).name)
    if len(names) != count:
        header.refuse(f"it is one of {count} parts", f"give it back its name, which ends in -00001-of-{count:05d}.gguf")
    read_parts = [_read(Path(path).with_name(name)) for name in names]
    joined: dict[str, Tensor] = {}
    for number, (one, found, said) in enumerate(read_parts):
        if said.get("split.no") != number or said.get("split.count") != count:
            one.refuse(f"expected part {number} of {count}, counted from 0, got {brief(said.get('split.no'))}")
        if twice := joined.keys() & found.keys():
            one.refuse(f"tensor {brief(min(twice))} is in another part, too")
        joined |= found
    return joined, _whole(read_parts[0][2])


def _whole(metadata: Metadata) -> Metadata:
    """The metadata without what is said of parts."""
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}


def parts(name: str) -> list[str]:
    """The names of all files of which this is one.

    Example:
        >>> parts("x-00001-of-00002.gguf"), parts("x.gguf")
        (['x-00001-of-00002.gguf', 'x-00002-of-00002.gguf'], ['x.gguf'])
    """
    named = PART.fullmatch(name)
    if named is None:
        return [name]
    return [f"{named[1]}-{number:05d}-of-{named[2]}.gguf" for number in range(1, int(named[2]) + 1)]


def of_part(metadata: Metadata, number: int, shards: Sequence[Mapping[str, Tensor]]) -> Metadata:
    """The metadata of one of several files, counted from 0: the first has those of the model.

    Source: src/llama-model-loader.cpp of llama.cpp, and `GGUFWriter.add_shard_kv_data` of gguf-py.
    """
    everything = {name: tensor for shard in shards for name, tensor in shard.items()}
    kept = {**metadata, **file_type(everything)} if number == 0 else {}
    alignment = {key: metadata[key] for key in ("general.alignment",) if key in metadata}
    split = {"no": np.uint16(number), "count": np.uint16(len(shards)), "tensors.count": np.int32(len(everything))}
    return {**kept, **alignment, **{f"split.{key}": value for key, value in split.items()}}


def _read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor], Metadata]:
    """One file, of which the names and tensors are checked."""
    file = File(path)
    header = Header(file)
    tensor_count, pair_count = header.begin()
    metadata: Metadata = {"format": "gguf"}
    header.need(pair_count, 13, "pieces of metadata")
    for _ in range(pair_count):
        key = header.text()
        if key in metadata:
            header.refuse(f"metadata {brief(key)} is there twice or is a word of ours")
        metadata[key] = header.value(header.number("<I"), f"metadata {brief(key)}")
    header.need(tensor_count, 24, "tensors")
    entries = [header.entry() for _ in range(tensor_count)]
    alignment = _alignment(metadata, header.refuse)
    start = -(-header.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    for name, shape, code, offset in entries:
        try:
            kind, nbytes = _size(shape, code)
            if name in tensors:
                raise ValueError("is there twice")
            if offset % alignment or start + offset + nbytes > file.size:
                raise ValueError(
                    f"{kind}{list(shape)} at {offset} needs {nbytes} bytes on a multiple of {alignment}, the file has "
                    f"{max(file.size - start, 0)} for tensors"
                )
        except ValueError as error:
            problems.append(f"tensor {brief(name)} {error}")
            continue
        spans.append((offset, offset + nbytes, name))
        tensors[name] = _tensor(name, kind, shape, file, start + offset)
    last = (0, 0, "")
    for span in sorted(span for span in spans if span[0] < span[1]):
        if span[0] < last[1]:
            problems.append(f"tensor {brief(span[2])} begins at {span[0]}, inside of {brief(last[2])}")
        last = max(last, span, key=lambda one: one[1])
    if problems:
        header.refuse(f"its header does not fit its data: {listing(problems, sep='; ')}")
    return header, {**tensors, **_narrowed(tensors, metadata, header)}, metadata


def _alignment(metadata: Metadata, refuse: Callable[[str], object]) -> int:
    found = metadata.get("general.alignment", np.uint32(DEFAULT_ALIGNMENT))
    if (
        getattr(found, "dtype", None) != np.uint32
        or np.ndim(found)
        or not 0 < found <= MAX_ALIGNMENT
        or found & (found - 1)
    ):
        refuse(f"general.alignment must be a np.uint32, a power of two up to {MAX_ALIGNMENT}, got {brief(found)}")
    return int(found)


def _size(shape: tuple[int, ...], code: int) -> tuple[str, int]:
    """The type's name, and the bytes of a tensor; or why it cannot be."""
    if code not in ggml.BY_CODE:
        raise ValueError(f"has the unknown type {code}")
    kind = ggml.BY_CODE[code]
    known = ggml.TYPES[kind]
    if problem := shape_problem(shape, known.nbytes):
        raise ValueError(problem)
    if (shape[-1] if shape else 1) % known.size:
        raise ValueError(f"has rows of {shape[-1] if shape else 1}, {kind} has blocks of {known.size}")
    return kind, int(np.prod(shape, dtype=object)) // known.size * known.nbytes


def _tensor(name: str, kind: str, shape: tuple[int, ...], file: File, offset: int) -> Tensor:
    known = ggml.TYPES[kind]
    if known.dtype is not None:
        return Tensor.in_file(name, known.dtype, shape, file, offset)
    row = (*shape[:-1], shape[-1] // known.size * known.nbytes)
    return Blocks.of(name, kind, Tensor.in_file(name, np.uint8, row, file, offset))


def _narrowed(tensors: Mapping[str, Tensor], metadata: Metadata, header: Header) -> dict[str, Tensor]:
    """The tensors that `write` made wider, as they were; the notes of them are taken out of the metadata."""
    found: dict[str, Tensor] = {}
    for key, dtype in NARROW.items():
        names = metadata.pop(key, [])
        for name in names if isinstance(names, list) else [None]:
            wide = tensors.get(name) if isinstance(name, str) else None
            if name is None or wide is None or wide.dtype != np.float32 or isinstance(wide, Blocks):
                return header.refuse(f"metadata {key!r} lists {brief(name)}, which is no tensor of float32")
            found[name] = Widened.of(wide, dtype)
    return found


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    type: str | None = None,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Writes a GGUF file of version 3, one tensor at a time, replacing an older file only when all is written.

    Args:
        path: the file.
        tensors: by name; the names in the file are the keys. Those of `read` that are quantised are copied.
        metadata: as `read` gives them, and kept in their order; numbers of Python are refused, as their types are not known.
        type: as in `of_type`, None to keep those that the tensors have.
        advance: called with the number of bytes in memory after each tensor.

    Raises:
        ValueError: a name, dtype, shape or piece of metadata that the format does not have, or a value too large for f16.

    Example:
        >>> import tempfile, numpy as np
        >>> path = tempfile.mkdtemp() + "/model.gguf"
        >>> x = Tensor.lazy("x", np.float32, (2, 32), lambda: np.full((2, 32), 127, np.float32))
        >>> write(path, {"x.weight": x, "x.bias": x}, {"general.architecture": "llama"}, type="q8_0")
        >>> tensors, metadata = read(path)
        >>> tensors["x.weight"].type, tensors["x.weight"].array()[0, 0].item(), metadata["general.file_type"].item()
        ('q8_0', 127.0, 7)
    """
    given, tensors = tensors, tensors if type is None else of_type(tensors, type)
    metadata = {key: value for key, value in (metadata or {}).items() if key != "format" and key not in NARROW}
    problems = [problem for name, tensor in tensors.items() if (problem := _problem(name, tensor))]
    if problems:
        raise ValueError(f"write: {len(problems)} tensors cannot be in a GGUF file: {listing(problems, sep='; ')}")
    kinds = {name: kind_of(name, tensor) for name, tensor in tensors.items()}
    if "split.count" not in metadata:  # else that of all parts is in the first
        metadata |= file_type(tensors, type)
    if any(ggml.TYPES[kind].dtype is None for kind in kinds.values()):
        metadata.setdefault("general.quantization_version", np.uint32(2))
    for key, dtype in NARROW.items():
        if names := [n for n, t in tensors.items() if t.dtype == dtype and kinds[n] == "f32" and is_wide(n, t.shape)]:
            metadata[key] = names
    alignment = _alignment(metadata, _refuse)
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        code = code_of(value, key)
        parts += [packed_text(key), struct.pack("<I", code), packed(value, code, key)]
    offset = 0
    for name, tensor in tensors.items():
        parts += [packed_text(name), struct.pack("<I", len(tensor.shape))]
        parts.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape[::-1], ggml.TYPES[kinds[name]].code, offset))
        offset += _padded(_size(tensor.shape, ggml.TYPES[kinds[name]].code)[1], alignment)
    head = b"".join(parts)
    if len(head) > MAX_HEADER:
        raise ValueError(
            f"write: the header of {str(path)!r} has {len(head)} bytes, at most {MAX_HEADER} are read again"
        )
    with replacing(path) as out:
        out.write(head.ljust(_padded(len(head), alignment), b"\0"))
        for name, tensor in tensors.items():
            stored = _stored(tensor, kinds[name])
            send(out, stored)
            out.write(bytes(_padded(stored.nbytes, alignment) - stored.nbytes))
            if advance is not None:
                advance(given[name].nbytes)


def _refuse(what: str) -> None:
    raise ValueError(f"write: {what}")


def _problem(name: object, tensor: Tensor) -> str | None:
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME:
        return f"{brief(name)} is no name of 1 to {MAX_NAME} bytes"
    if len(tensor.shape) > MAX_AXES:
        return f"{name!r} has {len(tensor.shape)} axes, at most {MAX_AXES} are possible"
    if not isinstance(tensor, Blocks) and tensor.dtype not in ggml.BY_DTYPE:
        return f"{name!r} is {tensor.dtype}, GGUF has {' '.join(str(dtype) for dtype in ggml.BY_DTYPE)}"
    return None


def _stored(tensor: Tensor, kind: str) -> Tensor:
    """The tensor whose elements are what lies in the file."""
    if isinstance(tensor, Blocks) and tensor.packed is not None:
        return tensor.packed
    if isinstance(tensor, Widened) and tensor.wide is not None and kind == "f32":
        return tensor.wide
    dtype = ggml.TYPES[kind].dtype
    return tensor if dtype is None else cast(tensor, dtype)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
