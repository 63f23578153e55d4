"""The GGUF format of llama.cpp: a header, metadata with types, the descriptions of the tensors, and their aligned bytes.

Metadata are a dict in the file's order, typed by numpy: scalars (`np.uint32`, `np.float32`, `np.bool_`, …), `str`, and arrays as
`np.ndarray`, as `list` where they are of text, as `tuple` where they are of arrays. So what was read is written back as it was.
Tensors of quantised types are `Blocks`: their array is dequantised, and `write` copies their bytes.

llama.cpp computes with one-dimensional tensors, norms, routers and positions in float32 and wants them so; `write` widens
them, and notes in the metadata `fmodels.float16` and `fmodels.bfloat16` what `read` has to make narrow again.

Source: docs/gguf.md of ggml and gguf-py of llama.cpp; the checks are those of llama.cpp's gguf.cpp, and more.
"""

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from fmodels.weights import ggml
from fmodels.weights.ggml import Blocks, Widened
from fmodels.weights.tensors import (
    File,
    Tensor,
    brief,
    cast,
    computed,
    is_floating,
    is_lfs_pointer,
    lfs_error,
    listing,
    replacing,
    send,
    shape_problem,
)

MAGIC = b"GGUF"
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # the name of a part of several
VERSIONS = (2, 3)
SCALARS: dict[int, np.dtype] = {  # code of a value's type
    code: np.dtype(dtype)
    for code, dtype in [
        (0, np.uint8),
        (1, np.int8),
        (2, np.uint16),
        (3, np.int16),
        (4, np.uint32),
        (5, np.int32),
        (6, np.float32),
        (7, np.bool_),
        (10, np.uint64),
        (11, np.int64),
        (12, np.float64),
    ]
}
SCALAR_CODES = {dtype: code for code, dtype in SCALARS.items()}
TEXT, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_HEADER = 100_000_000  # bytes, as of safetensors; that of a large vocabulary has 10 MB
MAX_ITEMS = 2**22  # of all arrays of text and of arrays together: each becomes an object
MAX_DEPTH = 4  # of arrays in arrays
MAX_AXES = 4
MAX_NAME = 63  # bytes, of llama.cpp
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
WRITABLE = ("f32", "f16", "bf16", "q8_0")  # what numbers can be written as; other blocks are copied
WIDE = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "token_types.weight",
)
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
    kept = {**metadata, **_file_type(everything)} if number == 0 else {}
    alignment = {key: metadata[key] for key in ("general.alignment",) if key in metadata}
    split = {"no": np.uint16(number), "count": np.uint16(len(shards)), "tensors.count": np.int32(len(everything))}
    return {**kept, **alignment, **{f"split.{key}": value for key, value in split.items()}}


def _read(path: str | os.PathLike[str]) -> tuple["_Header", dict[str, Tensor], Metadata]:
    """One file, of which the names and tensors are checked."""
    file = File(path)
    header = _Header(file)
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


class _Header:
    """What stands before the tensors, read from the front; nothing is made before the file is known to be large enough."""

    def __init__(self, file: File):
        self.file, self.position, self.items = file, 0, 0
        self.data = file.mapped[:MAX_HEADER].data

    def refuse(self, what: str, instead: str = "the file is damaged or was cut, copy or download it again") -> NoReturn:
        raise ValueError(f"read: GGUF file {str(self.file.path)!r}: {what}; {instead}")

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            self.refuse(f"{count} bytes are announced at {begin} of a header of at most {len(self.data)}")
        return self.data[begin : self.position]

    def need(self, count: int, least: int, what: str) -> None:
        """Refuses a count of things that have at least so many bytes each."""
        if count * least > len(self.data) - self.position:
            self.refuse(
                f"{count} {what} are announced at {self.position} of a header of at most {len(self.data)} bytes"
            )

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """A string; bytes that are no UTF-8, which some vocabularies have, become surrogates that are written as they were."""
        return bytes(self.take(self.number("<Q"))).decode("utf-8", "surrogateescape")

    def texts(self, count: int) -> list[str]:
        """So many strings: as `text`, for vocabularies in half of the time."""
        found: list[str] = []
        data, at, end = self.data, self.position, len(self.data) - 8
        for _ in range(count):
            start = at + 8
            at = start + LENGTH.unpack_from(data, at)[0] if at <= end else end + 9
            if at > end + 8:
                self.refuse(f"{count} texts are announced at {self.position}, the header ends before")
            found.append(str(data[start:at], "utf-8", "surrogateescape"))
        self.position = at
        return found

    def begin(self) -> tuple[int, int]:
        """How many tensors and pieces of metadata follow."""
        head = self.file.read(0, 200)
        if is_lfs_pointer(head):
            raise lfs_error(self.file.path)
        if not head.startswith(MAGIC) or len(head) < 24:
            self.refuse(f"expected {MAGIC!r} and a header, got {head[:8]!r} and {self.file.size} bytes in all")
        self.position = 4
        version = self.number("<I")
        if version & 0xFFFF == 0:
            self.refuse("it is big-endian", "convert it with `gguf-convert-endian`")
        if version not in VERSIONS:
            self.refuse(
                f"version {version} is not supported, only {VERSIONS}", "convert the model again with a new llama.cpp"
            )
        return self.number("<Q"), self.number("<Q")

    def value(self, code: int, where: str, depth: int = 0) -> Any:
        """A value of metadata."""
        if code == TEXT:
            return self.text()
        if code in SCALARS:
            return self.numbers(code, 1, where)[0]
        if code != ARRAY:
            return self.refuse(f"{where} has a value of the unknown type {code}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            self.need(count, SCALARS[inner].itemsize, f"numbers of {where}")
            return self.numbers(inner, count, where)
        self.items += count
        self.need(count, 8 if inner == TEXT else 12, f"values of {where}")
        if self.items > MAX_ITEMS or depth == MAX_DEPTH:
            self.refuse(f"{where} has more than {MAX_ITEMS} values, or arrays nested deeper than {MAX_DEPTH}")
        if inner == TEXT:
            return self.texts(count)
        return tuple(self.value(inner, where, depth + 1) for _ in range(count))

    def numbers(self, code: int, count: int, where: str) -> np.ndarray:
        raw = np.frombuffer(self.take(count * SCALARS[code].itemsize), np.uint8).copy()
        if SCALARS[code] == np.bool_ and (raw > 1).any():
            self.refuse(f"{where} has a truth value that is neither 0 nor 1")
        return raw.view(SCALARS[code])

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset."""
        name, axes = self.text(), self.number("<I")
        if axes > MAX_AXES:
            self.refuse(f"tensor {brief(name)} has {axes} axes, at most {MAX_AXES} are possible")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")


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


def _narrowed(tensors: Mapping[str, Tensor], metadata: Metadata, header: _Header) -> dict[str, Tensor]:
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
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    if "split.count" not in metadata:  # else that of all parts is in the first
        metadata |= _file_type(tensors, type)
    if any(ggml.TYPES[kind].dtype is None for kind in kinds.values()):
        metadata.setdefault("general.quantization_version", np.uint32(2))
    for key, dtype in NARROW.items():
        if names := [n for n, t in tensors.items() if t.dtype == dtype and kinds[n] == "f32" and is_wide(n, t.shape)]:
            metadata[key] = names
    alignment = _alignment(metadata, _refuse)
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        code = _code(value, key)
        parts += [_packed_text(key), struct.pack("<I", code), _packed(value, code, key)]
    offset = 0
    for name, tensor in tensors.items():
        parts += [_packed_text(name), struct.pack("<I", len(tensor.shape))]
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


def _file_type(tensors: Mapping[str, Tensor], type: str | None = None) -> Metadata:
    """The type that most numbers have where llama.cpp does not want float32, as metadata, if there is a word for it."""
    most: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = _kind(name, tensor)
        most[kind] = most.get(kind, 0) + (0 if is_wide(name, tensor.shape) else tensor.size)
    main = type or max(most, key=lambda kind: most[kind], default="f32")
    return {"general.file_type": np.uint32(FILE_TYPES[main])} if main in FILE_TYPES else {}


def of_type(tensors: Mapping[str, Tensor], type: str) -> dict[str, Tensor]:
    """The tensors as files of llama.cpp's converter with `--outtype` have them, but that nothing is rounded that need not be.

    Args:
        tensors: by the names in the file.
        type: `"f32"`, `"f16"`, `"bf16"` or `"q8_0"` of those that llama.cpp does not want in float32. Rows that are no
            multiple of q8_0's 32 numbers keep their type.

    Raises:
        ValueError: another type.
    """
    if type not in WRITABLE:
        raise ValueError(f"write: type {type!r} of GGUF cannot be written, only {', '.join(WRITABLE)}")
    return {name: _of_type(name, tensor, type) for name, tensor in tensors.items()}


def _of_type(name: str, tensor: Tensor, type: str) -> Tensor:
    known, own = ggml.TYPES[type], tensor.type if isinstance(tensor, Blocks) else None
    if not is_floating(tensor.dtype) or own == type or (own is None and is_wide(name, tensor.shape)):
        return tensor
    if known.dtype is not None:
        return cast(tensor if own is None else computed(tensor), known.dtype)
    if tensor.shape[-1] % known.size:
        return tensor
    row = (*tensor.shape[:-1], tensor.shape[-1] // known.size * known.nbytes)
    return Blocks.of(name, type, Tensor.lazy(name, np.uint8, row, lambda: ggml.quantize_q8_0(tensor.array())))


def _refuse(what: str) -> None:
    raise ValueError(f"write: {what}")


def is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in float32, whatever the others are: biases, norms, routers, positions, token types."""
    return len(shape) < 2 or name.endswith(WIDE)


def _problem(name: object, tensor: Tensor) -> str | None:
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME:
        return f"{brief(name)} is no name of 1 to {MAX_NAME} bytes"
    if len(tensor.shape) > MAX_AXES:
        return f"{name!r} has {len(tensor.shape)} axes, at most {MAX_AXES} are possible"
    if not isinstance(tensor, Blocks) and tensor.dtype not in ggml.BY_DTYPE:
        return f"{name!r} is {tensor.dtype}, GGUF has {' '.join(str(dtype) for dtype in ggml.BY_DTYPE)}"
    return None


def _kind(name: str, tensor: Tensor) -> str:
    """The type that a tensor is written in."""
    if isinstance(tensor, Blocks):
        return tensor.type
    if is_floating(tensor.dtype) and is_wide(name, tensor.shape):
        return "f64" if tensor.dtype == np.float64 else "f32"
    return ggml.BY_DTYPE.get(tensor.dtype, "")


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


def _code(value: object, key: str) -> int:
    """The type of a value of metadata."""
    if isinstance(value, str):
        return TEXT
    if isinstance(value, (np.ndarray, list, tuple)):
        return ARRAY
    if isinstance(value, np.generic) and value.dtype in SCALAR_CODES:
        return SCALAR_CODES[value.dtype]
    raise ValueError(f"write: metadata {key!r} is {brief(value)}; GGUF has text, numpy's scalars and arrays of them")


def _packed(value: Any, code: int, key: str) -> bytes:
    if code == TEXT:
        return _packed_text(value)
    if code != ARRAY:
        return value.tobytes()
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype not in SCALAR_CODES:
            raise ValueError(
                f"write: metadata {key!r} is an array {value.dtype}{list(value.shape)}; GGUF has rows of numbers"
            )
        return struct.pack("<IQ", SCALAR_CODES[value.dtype], len(value)) + value.tobytes()
    codes = {_code(one, key) for one in value} or {TEXT if isinstance(value, list) else ARRAY}
    if codes != {TEXT if isinstance(value, list) else ARRAY}:
        raise ValueError(
            f"write: metadata {key!r} is {brief(value)}; a list holds text, a tuple arrays, np.ndarray numbers"
        )
    (inner,) = codes
    return struct.pack("<IQ", inner, len(value)) + b"".join(_packed(one, inner, key) for one in value)


def _packed_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
