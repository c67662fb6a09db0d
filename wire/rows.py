"""Rows of fixed width as numpy sees them: the contract's wire form of individual events.

A message of fixed-width fields only, all of them always sent in the order of their numbers, has
one length and constant tag bytes. A repeated field of such messages is therefore an array of
records on the wire: writing it is a copy, reading it a view. Any protobuf parser still reads
ordinary rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor
from numpy.typing import NDArray

from coral.wire.encoding import FORMATS, WIRE_32, WIRE_64, WIRE_BYTES, NotFixedError, varint
from coral.wire.kinds import resource_field_of


@dataclass(frozen=True)
class RowLayout:
    """How rows of one repeated field lie on the wire.

    `dtype` has the row's fields by name, with gaps where the constant bytes are. Every row begins
    with `head`.
    """

    dtype: np.dtype[np.void]
    head: bytes  # the repeated field's tag and the row's length
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

    def view(self, wire: bytes, offset: int) -> NDArray[Any]:
        """The rows from OFFSET to the end of an encoded message, of shape (n,), without a copy.
        Raises `NotFixedError` where they are not in their fixed form."""
        if (len(wire) - offset) % self.dtype.itemsize:
            raise NotFixedError("the rows are not of the expected length")
        rows = np.frombuffer(wire, self.dtype, offset=offset)
        raw = np.frombuffer(wire, np.uint8, offset=offset).reshape(-1, self.dtype.itemsize)
        if not (raw[:, self.constant] == self.template[self.constant]).all():
            raise NotFixedError("the rows are not in their fixed form")
        return rows


def layout_at(layouts: Iterable[RowLayout], wire: bytes, offset: int) -> RowLayout:
    """That of LAYOUTS which the row has that begins at OFFSET. Raises `NotFixedError` where it has
    none of them."""
    for layout in layouts:
        if wire.startswith(layout.head, offset):
            return layout
    raise NotFixedError("the row is not of the expected length")


@cache
def row_layout(container: Descriptor, field_name: str, *, of_pods: bool = False) -> RowLayout:
    """The layout of the rows in CONTAINER's repeated field: those that are OF PODS have the field
    that points into the resources of the batch, and others not. Raises TypeError where a row has a
    field that is not of fixed width."""
    field = container.fields_by_name[field_name]
    row = field.message_type
    if row is None:
        raise TypeError(f"{field.full_name} has no rows")
    names, formats, offsets, body = [], [], [], b""
    left_out = "" if of_pods else resource_field_of(row)
    for row_field in sorted(row.fields, key=lambda f: f.number):
        if row_field.name == left_out:
            continue
        wire_format = FORMATS.get(row_field.type)
        if wire_format is None or row_field.is_repeated:
            raise TypeError(f"{row_field.full_name} is not of fixed width")
        size = wire_format.itemsize
        body += varint(row_field.number << 3 | (WIRE_64 if size == 8 else WIRE_32))  # noqa: PLR2004
        names.append(row_field.name)
        formats.append(wire_format)
        offsets.append(len(body))
        body += bytes(size)
    tag = varint(field.number << 3 | WIRE_BYTES)
    head = tag + varint(len(body))
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
        is_value[start : start + wire_format.itemsize] = True
    template = np.frombuffer(head + body, np.uint8)
    return RowLayout(dtype, head, template, np.flatnonzero(~is_value))
