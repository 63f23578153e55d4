"""Flax's `flax_model.msgpack`: nested maps of arrays, as `flax.serialization.to_bytes` writes them.

An array is an extension of msgpack (1, or 3 for a scalar of numpy) that holds its shape, the name of its dtype and its
bytes; larger than 2^30 bytes it is a map of flat pieces. Names join the keys on the way to an array by "/". Our own reader
and writer: the bytes of the arrays stay on disk, and a file can be larger than the memory.

Source: flax/serialization.py of Flax 0.8 and 0.12, which are equal in this, and the specification of msgpack.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from fmodels.weights.tensors import (
    File,
    Tensor,
    aligned_empty,
    as_bytes,
    brief,
    is_lfs_pointer,
    lfs_error,
    put,
    replacing,
    shape_problem,
)

DTYPES: dict[str, np.dtype] = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3b11fnuz),
        *(ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu, ml_dtypes.float4_e2m1fn),
        *(ml_dtypes.int4, ml_dtypes.uint4),
    )
}
SIZED: dict[
    str, tuple[int, int, dict[int, str]]
] = {  # kind: code of size 0, how many sizes are codes, codes of the others
    "map": (0x80, 16, {0xDE: ">H", 0xDF: ">I"}),
    "list": (0x90, 16, {0xDC: ">H", 0xDD: ">I"}),
    "text": (0xA0, 32, {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}),
    "bytes": (0xC4, 0, {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}),
    "extension": (0xC7, 0, {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}),
    "integer": (0x00, 128, {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}),
}
EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # code of an extension whose size needs no number: its size
ARRAY, SCALAR = 1, 3  # kinds of extensions
TRUE = 0xC3
CHUNKED = "__msgpack_chunked_array__"
MAX_CHUNK = 2**30  # bytes of an array above which Flax writes it in pieces
MAX_DEPTH = 64  # of maps
MAX_ENTRIES = 500_000  # of all maps
MAX_NAMES = 100_000_000  # characters of all names


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the maps of the file; the bytes of the arrays stay on disk until they are asked for.

    Args:
        path: the file.

    Returns:
        The tensors by name (`"h/0/ln_1/scale"`), in the file's order, and no metadata: the format has none.

    Raises:
        ValueError: the file is cut, contradicts itself, or holds something other than arrays.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> from flax import serialization
        >>> path = tempfile.mkdtemp() + "/flax_model.msgpack"
        >>> with open(path, "wb") as file:
        ...     _ = file.write(serialization.to_bytes({"dense": {"bias": np.arange(3, dtype=np.int32)}}))
        >>> tensors, _ = read(path)
        >>> tensors["dense/bias"].array()
        array([0, 1, 2], dtype=int32)
    """
    file = File(path)
    if is_lfs_pointer(file.read(0, 200)):
        raise lfs_error(file.path)
    return _Reader(file).run(), {}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    advance: Callable[[int], object] | None = None,
    max_chunk: int = MAX_CHUNK,
) -> None:
    """Writes the bytes that `flax.serialization.to_bytes` gives for the tree with these names, one tensor at a time.

    Args:
        path: the file, replaced only when all is written.
        tensors: by name, keys joined by "/"; maps have their keys in the order in which the names come.
        metadata: ignored, the format has no place for it.
        advance: called with the number of bytes written after each tensor.
        max_chunk: bytes of an array above which it is written in pieces of that size.

    Raises:
        ValueError: a dtype that Flax does not have, or names that are no tree.

    Example:
        >>> import tempfile
        >>> from flax import serialization
        >>> path = tempfile.mkdtemp() + "/flax_model.msgpack"
        >>> write(path, {"dense/bias": Tensor.lazy("bias", np.int8, (2,), lambda: np.ones(2, np.int8))})
        >>> with open(path, "rb") as file:
        ...     serialization.msgpack_restore(file.read())
        {'dense': {'bias': array([1, 1], dtype=int8)}}
    """
    tree = _tree(tensors)
    with replacing(path) as out:
        _write_tree(out, tree, advance, max_chunk)


class _Reader:
    """Walks through a file. Whatever a size says, no more is read than the file has, and nothing is allocated by it."""

    def __init__(self, file: File):
        self.file, self.position, self.end = file, 0, file.size
        self.tensors: dict[str, Tensor] = {}
        self.entries = self.characters = 0

    def run(self) -> dict[str, Tensor]:
        self.walk("", 0)
        if self.position != self.end:
            self.fail(f"{self.end - self.position} bytes follow on the tree")
        return self.tensors

    def fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"read: {str(self.file.path)!r}: {what}, at byte {self.position}; the file is damaged or no tree of arrays "
            "that Flax saved, copy or download it again"
        )

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            self.fail(f"{count} more bytes are expected, {self.end - self.position} are left")
        begin, self.position = self.position, self.position + count
        return self.file.read(begin, count)

    def next_is(self, kind: str) -> bool:
        """Whether something of that kind begins here."""
        first, count, codes = SIZED[kind]
        code = self.file.read(self.position, 1)
        return code != b"" and (first <= code[0] < first + count or code[0] in codes)

    def size(self, kind: str) -> int:
        """The size of what begins here, which must be of that kind; of an integer its value."""
        known = self.next_is(kind)
        first, _, codes = SIZED[kind]
        code = self.take(1)[0]
        if not known:
            self.fail(f"expected {kind}, got the code 0x{code:02x}")
        return struct.unpack(codes[code], self.take(struct.calcsize(codes[code])))[0] if code in codes else code - first

    def key(self) -> str:
        raw = self.take(self.size("text"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"the key {brief(raw)} is no text")

    def map(self) -> int:
        """How many entries the map has that begins here."""
        count = self.size("map")
        self.entries += count
        if count > (self.end - self.position) // 2 or self.entries > MAX_ENTRIES:
            self.fail(f"a map of {count} entries does not fit in the file, or in the {MAX_ENTRIES} that are read")
        return count

    def walk(self, path: str, depth: int) -> None:
        """Reads the map that begins here and all that is in it; `path` ends in "/" or is empty."""
        if depth == MAX_DEPTH:
            self.fail(f"maps are nested more than {MAX_DEPTH} deep")
        seen: set[str] = set()
        for left in range(self.map(), 0, -1):
            key = self.key()
            if key == CHUNKED and path and not seen:
                return self.add(self.pieces(path[:-1], left))
            if key in seen or "/" in key:
                self.fail(f"the key {brief(key)} is there twice or has a '/'")
            seen.add(key)
            if self.next_is("map"):
                self.walk(f"{path}{key}/", depth + 1)
            else:
                self.add(self.array(f"{path}{key}"))

    def add(self, tensor: Tensor) -> None:
        self.characters += len(tensor.name)
        if self.characters > MAX_NAMES:
            self.fail(f"the names have more than {MAX_NAMES} characters")
        self.tensors[tensor.name] = tensor

    def array(self, name: str) -> Tensor:
        """The array that begins here."""
        code = self.take(1)[0]
        if code in EXTENSIONS:
            length = EXTENSIONS[code]
        else:
            self.position -= 1
            if not self.next_is("extension"):
                self.fail(f"{brief(name)} is no array but has the code 0x{code:02x}")
            length = self.size("extension")
        kind, end = self.take(1)[0], self.position + length
        if kind not in (ARRAY, SCALAR):
            self.fail(f"{brief(name)} is an extension of kind {kind}, arrays have {ARRAY} or {SCALAR}")
        if self.size("list") != 3 or (axes := self.size("list")) > 64:
            self.fail(f"{brief(name)} is not made of a shape, a dtype and bytes")
        shape = tuple(self.size("integer") for _ in range(axes))
        code = self.take(self.size("text"))
        dtype = DTYPES.get(code.decode("latin-1"))
        if dtype is None:
            self.fail(f"{brief(name)} has the dtype {brief(code)}, known are {' '.join(DTYPES)}")
        count = self.size("bytes")
        if problem := shape_problem(shape, dtype.itemsize):
            self.fail(f"{brief(name)}: {problem}")
        if count != math.prod(shape) * dtype.itemsize or not self.position + count == end <= self.end:
            self.fail(f"{brief(name)}, {dtype}{list(shape)}, has {count} bytes in an extension of {length}")
        begin, self.position = self.position, end
        return Tensor.in_file(name, dtype, shape, self.file, begin)

    def pieces(self, name: str, left: int) -> Tensor:
        """The array in pieces, behind the first key of its map."""
        if left != 3 or self.take(1)[0] != TRUE or self.key() != "shape":
            self.fail(f"{brief(name)} is not made of a shape and pieces")
        shape = tuple(self.size("integer") for _ in self.numbered(name, 64))
        if self.key() != "chunks":
            self.fail(f"{brief(name)} has no pieces")
        parts = [self.array(f"{name}/{number}") for number in self.numbered(name, MAX_ENTRIES)]
        dtypes = {part.dtype for part in parts}
        if len(dtypes) != 1 or any(len(part.shape) != 1 for part in parts):
            self.fail(f"the pieces of {brief(name)} are not flat and of one dtype")
        if problem := shape_problem(shape, parts[0].dtype.itemsize):
            self.fail(f"{brief(name)}: {problem}")
        if sum(part.size for part in parts) != math.prod(shape):
            self.fail(
                f"{brief(name)} has the shape {list(shape)} and pieces of {sum(part.size for part in parts)} numbers"
            )
        tensor = _Pieces(name, parts[0].dtype, shape, lambda: _joined(tensor), parts=tuple(parts))
        return tensor

    def numbered(self, name: str, limit: int) -> Iterator[int]:
        """Reads the keys "0", "1", … of the map that begins here; its values are read between them."""
        count = self.map()
        if count > limit:
            self.fail(f"{brief(name)} has {count} axes or pieces")
        for number in range(count):
            if (key := self.key()) != str(number):
                self.fail(f"the axes or pieces of {brief(name)} have the key {brief(key)} in the place of {number}")
            yield number


@dataclass(frozen=True, eq=False)
class _Pieces(Tensor):
    """A tensor whose elements lie in several places of a file."""

    parts: tuple[Tensor, ...] = ()

    def read_into(self, out: np.ndarray) -> None:
        self.check_target(out)
        flat, begin = out.reshape(-1), 0
        for part in self.parts:
            part.read_into(flat[begin : begin + part.size])
            begin += part.size


def _joined(tensor: Tensor) -> np.ndarray:
    out = aligned_empty(tensor.shape, tensor.dtype)
    tensor.read_into(out)
    return out


Tree = dict[str, "Tree | Tensor"]


def _tree(tensors: Mapping[str, Tensor]) -> Tree:
    """The nested maps with these names."""
    root: Tree = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"write: tensor {name!r} is {tensor.dtype}, Flax has {' '.join(DTYPES)}; cast it")
        *keys, last = name.split("/")
        node: Tree | Tensor = root
        for key in keys:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node or CHUNKED in (*keys, last) or len(keys) >= MAX_DEPTH:
            raise ValueError(
                f"write: {brief(name)} cannot be a name in a tree of at most {MAX_DEPTH} maps beside the other names; rename it"
            )
        node[last] = tensor
    return root


def _write_tree(out: BinaryIO, tree: Tree, advance: Callable[[int], object] | None, max_chunk: int) -> None:
    out.write(_head("map", len(tree)))
    for key, value in tree.items():
        out.write(_text(key))
        if isinstance(value, dict):
            _write_tree(out, value, advance, max_chunk)
            continue
        if value.nbytes <= max_chunk:
            _begin_array(out, value.shape, value.dtype, value.nbytes)
            put(out, value)
        else:
            data = as_bytes(value)
            step = max(1, max_chunk // value.dtype.itemsize) * value.dtype.itemsize
            out.write(
                _head("map", 3) + _text(CHUNKED) + bytes([TRUE]) + _text("shape") + _head("map", len(value.shape))
            )
            out.write(b"".join(_text(str(axis)) + _head("integer", size) for axis, size in enumerate(value.shape)))
            out.write(_text("chunks") + _head("map", -(-value.nbytes // step)))
            for number, begin in enumerate(range(0, value.nbytes, step)):
                piece = data[begin : begin + step]
                out.write(_text(str(number)))
                _begin_array(out, (len(piece) // value.dtype.itemsize,), value.dtype, len(piece))
                out.write(piece)
        if advance is not None:
            advance(value.nbytes)


def _begin_array(out: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, count: int) -> None:
    """What comes before the `count` bytes of an array."""
    sizes = b"".join(_head("integer", size) for size in shape)
    inner = _head("list", 3) + _head("list", len(shape)) + sizes + _text(dtype.name) + _head("bytes", count)
    length = len(inner) + count
    fixed = next((bytes([code]) for code, size in EXTENSIONS.items() if size == length), None)
    out.write((fixed or _head("extension", length)) + bytes([ARRAY]) + inner)


def _text(text: str) -> bytes:
    return _head("text", len(text.encode())) + text.encode()


def _head(kind: str, size: int) -> bytes:
    """The code of something of that size, in the shortest form."""
    first, count, codes = SIZED[kind]
    if size < count:
        return bytes([first + size])
    code, form = next((c, f) for c, f in codes.items() if size < 256 ** struct.calcsize(f))
    return bytes([code]) + struct.pack(form, size)
