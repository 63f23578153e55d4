"""Messages of protocol buffers: their fields by number, and back."""

from __future__ import annotations

import struct

Fields = dict[int, list]


def varint(raw: bytes, position: int) -> tuple[int, int]:
    """The number of seven bits a byte that begins at a position, and the position behind it.

    Example:
        >>> varint(as_varint(300), 0)
        (300, 2)
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")


def message(raw: bytes | int) -> Fields:
    """The fields of a message: number -> values, integers or bytes.

    Raises:
        ValueError, IndexError: it is none.
    """
    if not isinstance(raw, bytes):
        raise ValueError(f"the number {raw} in place of a message")
    fields: Fields = {}
    position = 0
    while position < len(raw):
        tag, position = varint(raw, position)
        kind = tag & 7
        if kind == 0:
            value, position = varint(raw, position)
        else:
            if kind == 2:
                length, position = varint(raw, position)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"a field of kind {kind}")
            if position + length > len(raw):
                raise ValueError("a field that is longer than its message")
            value, position = raw[position : position + length], position + length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def integer(fields: Fields, number: int, default: int = 0) -> int:
    """An integer of 64 bits with a sign; the last one if there are several."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no integer")
    return value - 2**64 if value >= 2**63 else value


def octets(fields: Fields, number: int) -> bytes:
    """Bytes, or nothing if the field is not there; those of messages in several pieces follow each other."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError(f"field {number} is a number in place of bytes")
    return b"".join(values)


def real(fields: Fields, number: int) -> float:
    """A number of float32, 0 if it is not there."""
    value = fields.get(number, [bytes(4)])[-1]
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError(f"field {number} is no float32")
    return struct.unpack("<f", value)[0]


def field(number: int, value: int | bytes) -> bytes:
    """A field; nothing for the integer 0, which is what a missing one means."""
    if isinstance(value, bytes):
        return as_varint(number << 3 | 2) + as_varint(len(value)) + value
    return as_varint(number << 3) + as_varint(value) if value else b""


def as_varint(value: int) -> bytes:
    """The inverse of `varint`."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
