"""Protobuf's wire format, as far as rows and columns need it: tags, lengths, skipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

# https://protobuf.dev/programming-guides/encoding: the low three bits of a tag.
WIRE_VARINT: Final = 0
WIRE_64: Final = 1
WIRE_BYTES: Final = 2
WIRE_32: Final = 5
_SIZES: Final = {WIRE_64: 8, WIRE_32: 4}
_MORE: Final = 0x80
_MOST_BYTES: Final = 10  # of a varint

# The numpy types of the fields whose width is fixed.
FORMATS: Final[Mapping[int, np.dtype[Any]]] = {
    FieldDescriptor.TYPE_FIXED64: np.dtype("<u8"),
    FieldDescriptor.TYPE_SFIXED64: np.dtype("<i8"),
    FieldDescriptor.TYPE_FIXED32: np.dtype("<u4"),
    FieldDescriptor.TYPE_SFIXED32: np.dtype("<i4"),
    FieldDescriptor.TYPE_DOUBLE: np.dtype("<f8"),
    FieldDescriptor.TYPE_FLOAT: np.dtype("<f4"),
}


class NotFixedError(ValueError):
    """The bytes are not in the fixed form; they may still be good protobuf."""


def varint(value: int) -> bytes:
    """VALUE, at least 0, as a varint."""
    out = bytearray()
    while value >= _MORE:
        out.append(value & (_MORE - 1) | _MORE)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(wire: bytes | memoryview, position: int) -> tuple[int, int]:
    """The varint at POSITION, and where it ends. Raises `NotFixedError`."""
    value = 0
    for shift in range(0, 7 * _MOST_BYTES, 7):
        if position >= len(wire):
            raise NotFixedError("the message is cut short")
        byte = wire[position]
        position += 1
        value |= (byte & (_MORE - 1)) << shift
        if byte < _MORE:
            return value, position
    raise NotFixedError("a varint is too long")


def fields(wire: bytes | memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of an encoded message in their order: number, where its tag begins, and the bytes
    of the value, without the length that stands before them. Raises `NotFixedError`."""
    view, position = memoryview(wire), 0
    size = len(view)
    while position < size:
        began = position
        # Tags of one and two bytes and lengths of one are nearly all there are: no call for those.
        key = view[position]
        position += 1
        if key >= _MORE:
            if position < size and (high := view[position]) < _MORE:
                key += (high - 1) << 7
                position += 1
            else:
                key, position = read_varint(view, began)
        kind = key & 7
        if kind == WIRE_BYTES:
            if position < size and (length := view[position]) < _MORE:
                position += 1
            else:
                length, position = read_varint(view, position)
            end = position + length
        elif kind == WIRE_VARINT:
            end = read_varint(view, position)[1]
        elif kind in _SIZES:
            end = position + _SIZES[kind]
        else:
            raise NotFixedError(f"wire type {kind} at byte {began}")
        if end > size:
            raise NotFixedError("the message is cut short")
        yield key >> 3, began, view[position:end]
        position = end
