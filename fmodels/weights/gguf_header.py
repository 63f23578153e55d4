"""What stands before the tensors of a GGUF file: values with types, from bytes and back.

Source: docs/gguf.md of ggml; the checks are those of llama.cpp's gguf.cpp, and more.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

import numpy as np

from fmodels.weights.tensors import File, brief, is_lfs_pointer, lfs_error

MAGIC = b"GGUF"
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
MAX_HEADER = 100_000_000  # bytes, as of safetensors; that of a large vocabulary has 10 MB
MAX_ITEMS = 2**22  # of all arrays of text and of arrays together: each becomes an object
MAX_DEPTH = 4  # of arrays in arrays
MAX_AXES = 4


class Header:
    """A header, read from the front; nothing is made before the file is known to be large enough."""

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


def code_of(value: object, key: str) -> int:
    """The number of the type of a value of metadata.

    Raises:
        ValueError: the format does not have it.
    """
    if isinstance(value, str):
        return TEXT
    if isinstance(value, (np.ndarray, list, tuple)):
        return ARRAY
    if isinstance(value, np.generic) and value.dtype in SCALAR_CODES:
        return SCALAR_CODES[value.dtype]
    raise ValueError(f"write: metadata {key!r} is {brief(value)}; GGUF has text, numpy's scalars and arrays of them")


def packed(value: Any, code: int, key: str) -> bytes:
    """The inverse of `Header.value`.

    Raises:
        ValueError: the format does not have the value.
    """
    if code == TEXT:
        return packed_text(value)
    if code != ARRAY:
        return value.tobytes()
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype not in SCALAR_CODES:
            raise ValueError(
                f"write: metadata {key!r} is an array {value.dtype}{list(value.shape)}; GGUF has rows of numbers"
            )
        return struct.pack("<IQ", SCALAR_CODES[value.dtype], len(value)) + value.tobytes()
    codes = {code_of(one, key) for one in value} or {TEXT if isinstance(value, list) else ARRAY}
    if codes != {TEXT if isinstance(value, list) else ARRAY}:
        raise ValueError(
            f"write: metadata {key!r} is {brief(value)}; a list holds text, a tuple arrays, np.ndarray numbers"
        )
    (inner,) = codes
    return struct.pack("<IQ", inner, len(value)) + b"".join(packed(one, inner, key) for one in value)


def packed_text(text: str) -> bytes:
    """The inverse of `Header.text`."""
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
