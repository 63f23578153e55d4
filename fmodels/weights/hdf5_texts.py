"""The texts in an attribute of HDF5, those of variable length looked up here.

Where a reference to such a text is wrong, libhdf5 fails half way through the list, and h5py frees what it never had; in some
damaged heaps libhdf5 searches for ever. So h5py says only what kind an attribute is and where its group lies.
Source: HDF5 File Format Specification 3.0, III.E (global heap), IV.A.1.a (object header), IV.A.2.m (attribute message).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from fmodels.weights.tensors import File

HEAP = b"GCOL\x01\0\0\0"  # how one begins, with the version of its form
ATTRIBUTE, CONTINUATION = 0x0C, 0x10  # kinds of messages in the header of an object
SHARED = 2  # flag of a message that lies elsewhere
REFERENCE = struct.Struct("<IQI")  # bytes of the text, address of the heap, number in it


def texts_in(group: Any, key: str, file: File) -> list[str]:
    """The texts in an attribute, in their order.

    Args:
        group: of h5py.
        key: name of the attribute, which is there.
        file: the same as the group's.

    Raises:
        ValueError: it holds no texts, or is damaged.
        UnicodeDecodeError: they are not in UTF-8.
    """
    import h5py

    attribute = group.attrs.get_id(key)
    kind, space = attribute.get_type(), attribute.get_space()
    if not isinstance(kind, h5py.h5t.TypeStringID):
        raise ValueError("it holds no texts")
    count, size = space.get_simple_extent_npoints(), 16 if kind.is_variable_str() else kind.get_size()
    if count * size > file.size:
        raise ValueError(f"it has {count} texts, more than the file can hold")
    header = h5py.h5o.get_info(group.id).addr  # pyright: ignore[reportAttributeAccessIssue]
    raw = _data(header, key.encode(), file)
    if raw is None or len(raw) < count * size:
        raise ValueError("it is not where its group is")
    parts = [raw[i : i + size] for i in range(0, count * size, size)]
    if not kind.is_variable_str():
        return [part.rstrip(b" \0" if kind.get_strpad() == h5py.h5t.STR_SPACEPAD else b"\0").decode() for part in parts]
    heaps = _Heaps(file)
    return [heaps.text(*REFERENCE.unpack(part)).decode() for part in parts]


def _data(address: int, key: bytes, file: File) -> bytes | None:
    """The bytes of an attribute of the object whose header lies there."""
    for kind, flags, body in _messages(address, file):
        if kind != ATTRIBUTE or flags & SHARED or len(body) < 9:
            continue
        version, _, *sizes = struct.unpack_from("<BBHHH", body)
        start, step = (8, 8) if version == 1 else (8, 1) if version == 2 else (9, 1)
        if body[start : start + sizes[0]].rstrip(b"\0") == key and 1 <= version <= 3:
            return body[start + sum(size + -size % step for size in sizes) :]
    return None


def _messages(address: int, file: File) -> Iterator[tuple[int, int, bytes]]:
    """Kind, flags and body of the messages of a header of version 1, which is what Keras' files have."""
    head = file.read(address, 16)
    if len(head) < 16 or head[0] != 1:
        raise ValueError("its group has no header of version 1")
    blocks, seen = [(address + 16, struct.unpack_from("<I", head, 8)[0])], set()
    while blocks:
        start, length = blocks.pop(0)
        if start in seen or len(seen) > 65535 or start + length > file.size:
            raise ValueError(f"the header of its group is wrong at byte {start}")
        seen.add(start)
        block, position = file.read(start, length), 0
        while position + 8 <= len(block):
            kind, size, flags = struct.unpack_from("<HHB", block, position)
            body = block[position + 8 : position + 8 + size]
            if kind == CONTINUATION and len(body) >= 16:
                blocks.append(struct.unpack_from("<QQ", body))
            yield kind, flags, body
            position += 8 + size


class _Heaps:
    """The heaps of a file, each read once."""

    def __init__(self, file: File):
        self.file, self.left = file, file.size
        self.found: dict[int, dict[int, bytes]] = {}

    def text(self, size: int, address: int, number: int) -> bytes:
        """The text that a reference means."""
        if size == 0:
            return b""
        if address not in self.found:
            self.found[address] = self._read(address)
        text = self.found[address].get(number)
        if text is None or len(text) < size:
            raise ValueError(f"the heap at byte {address} has no text {number} of {size} bytes")
        return text[:size]

    def _read(self, address: int) -> dict[int, bytes]:
        """The texts of a heap by their numbers; what has number 0 is free."""
        head = self.file.read(address, 16) if address < self.file.size else b""
        if len(head) < 16 or not head.startswith(HEAP):
            raise ValueError(f"there is no heap at byte {address}")
        (size,) = struct.unpack_from("<Q", head, 8)
        if size > min(self.left, self.file.size - address):
            raise ValueError(f"the heap at byte {address} has {size} bytes, more than the file")
        self.left -= size  # no two share any
        raw, texts, position = self.file.read(address, size), {}, 16
        while position + 16 <= size:
            number, length = struct.unpack_from("<H6xQ", raw, position)
            if number == 0:
                break
            if length > size - position - 16:
                raise ValueError(f"an entry of {length} bytes in the heap at byte {address}")
            texts[number] = raw[position + 16 : position + 16 + length]
            position += 16 + length + -length % 8
        return texts
