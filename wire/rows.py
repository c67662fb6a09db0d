"""Rows of fixed width as numpy sees them: the contract's wire form of individual events.

A message of fixed-width fields only, all of them always sent in the order of their numbers, has
one length and constant tag bytes. So a repeated field of such messages is an array of records on
the wire; writing it is a copy, reading it is a view. Any protobuf parser still reads plain rows.

This is part of the contract, like the generated classes beside it: it knows descriptors and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from numpy.typing import NDArray

_FORMATS: Final = {
    FieldDescriptor.TYPE_FIXED64: "<u8",
    FieldDescriptor.TYPE_SFIXED64: "<i8",
    FieldDescriptor.TYPE_FIXED32: "<u4",
    FieldDescriptor.TYPE_SFIXED32: "<i4",
    FieldDescriptor.TYPE_DOUBLE: "<f8",
    FieldDescriptor.TYPE_FLOAT: "<f4",
}
_WIRE_VARINT, _WIRE_64, _WIRE_BYTES, _WIRE_32 = 0, 1, 2, 5


class NotFixedError(ValueError):
    """Bytes that are good protobuf, perhaps, and not rows of fixed width."""


@dataclass(frozen=True)
class RowLayout:
    """How rows of one repeated field lie on the wire.

    `dtype` has the row's fields by name, with gaps where the constant bytes are; `head` is what
    every row begins with: the repeated field's tag and the row's length.
    """

    dtype: np.dtype[np.void]
    head: bytes
    template: NDArray[np.uint8]  # (row bytes,): the constant bytes, and zeros
    constant: NDArray[np.intp]  # positions of the constant bytes

    def encode(self, records: NDArray[Any]) -> bytes:
        """RECORDS, of shape (n,) with fields of the same names, as n rows."""
        wire = np.empty((len(records), len(self.template)), np.uint8)
        wire[:] = self.template
        rows = wire.reshape(-1).view(self.dtype)
        for name in self.dtype.names or ():
            rows[name] = records[name]
        return wire.tobytes()

    def view(self, wire: bytes) -> tuple[int, NDArray[Any]]:
        """Where the rows in an encoded message begin, and the rows, of shape (n,), without a copy.

        They have to be the last thing in the message. Raises `NotFixedError` where they are not,
        or are not in their fixed form.
        """
        offset = _offset_of(wire, self.head[:-1])
        if (len(wire) - offset) % self.dtype.itemsize:
            raise NotFixedError("the rows are not of the expected length")
        rows = np.frombuffer(wire, self.dtype, offset=offset)
        raw = np.frombuffer(wire, np.uint8, offset=offset).reshape(-1, self.dtype.itemsize)
        if not (raw[:, self.constant] == self.template[self.constant]).all():
            raise NotFixedError("the rows are not in their fixed form")
        return offset, rows


@cache
def row_layout(container: Descriptor, field_name: str) -> RowLayout:
    """The layout of the rows in CONTAINER's repeated field. Raises TypeError where a row has a
    field that is not of fixed width."""
    field = container.fields_by_name[field_name]
    row = field.message_type
    if row is None:
        raise TypeError(f"{field.full_name} has no rows")
    names, formats, offsets, body = [], [], [], b""
    for row_field in sorted(row.fields, key=lambda f: f.number):
        wire_format = _FORMATS.get(row_field.type)
        if wire_format is None or row_field.is_repeated:
            raise TypeError(f"{row_field.full_name} is not of fixed width")
        size = np.dtype(wire_format).itemsize
        body += _varint(row_field.number << 3 | (_WIRE_64 if size == 8 else _WIRE_32))  # noqa: PLR2004
        names.append(row_field.name)
        formats.append(wire_format)
        offsets.append(len(body))
        body += bytes(size)
    head = _varint(field.number << 3 | _WIRE_BYTES) + _varint(len(body))
    dtype = np.dtype(
        {
            "names": names,
            "formats": formats,
            "offsets": [len(head) + offset for offset in offsets],
            "itemsize": len(head) + len(body),
        }
    )
    is_value = np.zeros(dtype.itemsize, bool)
    for wire_format, offset in zip(formats, offsets, strict=True):
        start = len(head) + offset
        is_value[start : start + np.dtype(wire_format).itemsize] = True
    template = np.frombuffer(head + body, np.uint8)
    return RowLayout(dtype, head, template, np.flatnonzero(~is_value))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(wire: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = wire[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004
            return value, position
        shift += 7


def first_varint(wire: bytes, number: int) -> int:
    """The value of the first field NUMBER of an encoded message, which has it near its start and is
    an integer or an enum; 0 where there is none."""
    position = 0
    try:
        while position < len(wire):
            key, position = _read_varint(wire, position)
            if key == number << 3 | _WIRE_VARINT:
                return _read_varint(wire, position)[0]
            position = _skip(wire, position, key & 7)
    except (IndexError, NotFixedError):
        pass
    return 0


def _skip(wire: bytes, position: int, kind: int) -> int:
    """Where the field ends whose value begins at POSITION."""
    if kind == _WIRE_VARINT:
        return _read_varint(wire, position)[1]
    if kind == _WIRE_64:
        return position + 8
    if kind == _WIRE_32:
        return position + 4
    if kind == _WIRE_BYTES:
        length, position = _read_varint(wire, position)
        return position + length
    raise NotFixedError(f"wire type {kind} at byte {position}")


def _offset_of(wire: bytes, tag: bytes) -> int:
    """Where the first field with that tag begins; the end where there is none."""
    position = 0
    try:
        while position < len(wire) and not wire.startswith(tag, position):
            key, position = _read_varint(wire, position)
            position = _skip(wire, position, key & 7)
    except IndexError:
        raise NotFixedError("the message is cut short") from None
    return min(position, len(wire))
