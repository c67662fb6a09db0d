"""Summaries as columns: the packed fields of one message as numpy arrays, and back.

Every field of such a message is a repeated number of fixed width, so an array's own bytes are the
wire form: encoding copies them, decoding is a view. A column whose values are all zero is left
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor
from numpy.typing import NDArray

from coral.mesh.v1 import options_pb2 as options
from coral.wire.encoding import FORMATS, WIRE_BYTES, NotFixedError, fields, varint
from coral.wire.kinds import is_string_index, said


@dataclass(frozen=True, slots=True)
class ColumnFormat:
    """One column: its number in the message, its numpy type, and its shape for n rows: (n,), or
    (n, width) of a matrix, or (k,) where it is not by row."""

    number: int
    dtype: np.dtype[Any]
    matrix: bool
    per_batch: bool
    string_index: bool


@dataclass(frozen=True)
class ColumnsLayout:
    """The columns of one message type, by name."""

    columns: Mapping[str, ColumnFormat]

    def encode(self, values: Mapping[str, NDArray[Any]]) -> bytes:
        """The message of these columns. Raises KeyError for a column that there is not."""
        parts = []
        for name, array in values.items():
            column = self.columns[name]
            if not array.size or not (column.matrix or column.per_batch or array.any()):
                continue
            body = np.ascontiguousarray(array, column.dtype).tobytes()
            parts += [varint(column.number << 3 | WIRE_BYTES), varint(len(body)), body]
        return b"".join(parts)

    def decode(self, message: bytes | memoryview, count: int) -> dict[str, NDArray[Any]]:
        """The columns of an encoded message of COUNT rows: views of it, read-only. Every column is
        there; one that was not sent is zeros, a matrix that was not sent has the width 0. Raises
        `NotFixedError` where a column has another length, or none has any rows."""
        chunks: dict[int, list[memoryview]] = {}
        for number, _, body in fields(message):
            chunks.setdefault(number, []).append(body)
        # Without a column to show for it, COUNT could be any number, and take any memory.
        if count and not any(
            any(chunks.get(column.number, ()))
            for column in self.columns.values()
            if not column.per_batch
        ):
            raise NotFixedError(f"no column has any of {count} rows")
        return {
            name: self._decode(name, chunks.get(column.number, []), count)
            for name, column in self.columns.items()
        }

    def _decode(self, name: str, chunks: list[memoryview], count: int) -> NDArray[Any]:
        column = self.columns[name]
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if len(body) % column.dtype.itemsize:
            raise NotFixedError(f"column {name} is cut short")
        array = np.frombuffer(body, column.dtype)
        if column.per_batch:
            return array
        if column.matrix:
            width, left = divmod(len(array), count) if count else (0, len(array))
            if left:
                raise NotFixedError(f"column {name} has {len(array)} values for {count} rows")
            return array.reshape(count, width)
        if not len(array):
            return np.zeros(count, column.dtype)
        if len(array) != count:
            raise NotFixedError(f"column {name} has {len(array)} values for {count} rows")
        return array


@cache
def columns_layout(message: Descriptor) -> ColumnsLayout:
    """The layout of a message type of columns. Raises TypeError where a field is none."""
    columns = {}
    for field in message.fields:
        wire_format = FORMATS.get(field.type)
        if wire_format is None or not field.is_repeated:
            raise TypeError(f"{field.full_name} is not a column of fixed width")
        columns[field.name] = ColumnFormat(
            field.number,
            wire_format,
            said(field, options.matrix),
            said(field, options.per_batch),
            is_string_index(field),
        )
    return ColumnsLayout(columns)
