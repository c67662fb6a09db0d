"""Rows of a frame: some of them, with the strings that they use, and their size. Loop-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from coral.collectors.contract import EventRows, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from coral.wire.kinds import field_of, is_string_index
from coral.wire.rows import RowLayout, row_layout

Rows = TypeVar("Rows", EventRows, Summaries)


def row_bytes(rows: EventRows) -> int:
    """What each row takes in a message."""
    return layout_of(rows).dtype.itemsize


def row_sizes(rows: Summaries) -> NDArray[np.int64]:
    """What each row takes in a message at most, in bytes, of shape (n,). Strings count for each row
    that refers to them, as they do where summaries are sent as messages."""
    lengths = np.array([len(text.encode()) for text in rows.strings] or [0], np.int64)
    sizes = np.full(len(rows), _ROW_OVERHEAD_BYTES, np.int64)
    for name, column in columns_layout(rows.message.DESCRIPTOR).columns.items():
        values = rows.columns.get(name)
        if values is None or column.per_batch or not len(values):
            continue
        sizes += values[0].size * column.dtype.itemsize
        if column.string_index:
            sizes += lengths[values].reshape(len(rows), -1).sum(axis=1)
    return sizes


_ROW_OVERHEAD_BYTES: Final = 64


def take(rows: EventRows | Summaries, keep: NDArray[Any]) -> EventRows | Summaries:
    """The rows at KEEP, row numbers or a mask of shape (n,), with the strings they use alone."""
    if isinstance(rows, EventRows):
        records = _as_bytes(rows.records)[keep].view(rows.records.dtype)
        return with_used_strings(replace(rows, records=records))
    return with_used_strings(rows.take(keep))


def with_used_strings(rows: Rows) -> Rows:
    """ROWS without the strings that none of them points to."""
    values: Any = rows.records if isinstance(rows, EventRows) else rows.columns
    there_are = values.dtype.names or () if isinstance(rows, EventRows) else values
    indices = {
        field.name: values[field.name]
        for field in rows.message.DESCRIPTOR.fields
        if is_string_index(field) and field.name in there_are
    }
    if not indices:
        return rows
    is_used = np.zeros(len(rows.strings), bool)
    for each in indices.values():
        is_used[each] = True
    if is_used.all():
        return rows
    renumbered = np.cumsum(is_used) - 1
    fewer = {name: renumbered[each] for name, each in indices.items()}
    strings = [rows.strings[at] for at in np.flatnonzero(is_used).tolist()]
    if isinstance(rows, Summaries):
        return replace(rows, columns={**rows.columns, **fewer}, strings=strings)
    # As bytes, because a copy of the fields leaves out what lies between them.
    records = _as_bytes(rows.records).copy().view(rows.records.dtype)
    for name, each in fewer.items():
        records[name] = each
    return replace(rows, records=records, strings=strings)


def _as_bytes(records: NDArray[Any]) -> NDArray[Any]:
    """RECORDS without their fields: to copy them one by one would take five times as long."""
    return records.view(f"V{records.itemsize}")


def compact(rows: Summaries) -> Summaries:
    """ROWS with each column in the width that the contract gives it."""
    layout = columns_layout(rows.message.DESCRIPTOR).columns
    columns = {
        name: np.ascontiguousarray(values, layout[name].dtype)
        for name, values in rows.columns.items()
    }
    return replace(rows, columns=columns)


def layout_of(rows: EventRows) -> RowLayout:
    """How they lie in a message."""
    return row_layout(pb.EbpfEventBatch.DESCRIPTOR, field_of(rows.message.DESCRIPTOR).name)
