"""Rows of a frame: some of them, with the strings and resources that they use, their size, and as
messages. Loop-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from coral.collectors.contract import EventRows, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from coral.wire.kinds import field_of, is_string_index, resource_field_of
from coral.wire.rows import RowLayout, row_layout

Rows = TypeVar("Rows", EventRows, Summaries)


def row_bytes(rows: EventRows) -> int:
    """What each row takes in a message."""
    return layout_of(rows).dtype.itemsize


def row_sizes(rows: Summaries) -> NDArray[np.int64]:
    """What each row takes in a message at most, in bytes, of shape (n,). Strings and resources
    count for each row that refers to them, as strings do where summaries are sent as messages."""
    lengths = np.array([len(text.encode()) for text in rows.strings] or [0], np.int64)
    sizes = np.full(len(rows), _ROW_OVERHEAD_BYTES, np.int64)
    for name, column in columns_layout(rows.message.DESCRIPTOR).columns.items():
        values = rows.columns.get(name)
        if values is None or column.per_batch or not len(values):
            continue
        sizes += values[0].size * column.dtype.itemsize
        if column.string_index:
            sizes += lengths[values].reshape(len(rows), -1).sum(axis=1)
    if rows.resources:
        of_each = np.array([0, *(each.ByteSize() for each in rows.resources)], np.int64)
        sizes += of_each[rows.columns[resource_field_of(rows.message.DESCRIPTOR)]]
    return sizes


_ROW_OVERHEAD_BYTES: Final = 64


def take(rows: EventRows | Summaries, keep: NDArray[Any]) -> EventRows | Summaries:
    """The rows at KEEP, row numbers or a mask of shape (n,), with the strings and the resources
    that they use alone."""
    if isinstance(rows, EventRows):
        records = _as_bytes(rows.records)[keep].view(rows.records.dtype)
        return with_used_resources(with_used_strings(replace(rows, records=records)))
    return with_used_resources(with_used_strings(rows.take(keep)))


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


def with_used_resources(rows: Rows) -> Rows:
    """ROWS without the resources that none of them points to."""
    if not rows.resources:
        return rows
    name = resource_field_of(rows.message.DESCRIPTOR)
    values: Any = rows.records if isinstance(rows, EventRows) else rows.columns
    used, of_row = np.unique(values[name], return_inverse=True)
    resources = tuple(rows.resources[at - 1] for at in used.tolist() if at)
    if len(resources) == len(rows.resources):
        return rows
    fewer = np.where(used > 0, np.cumsum(used > 0), 0)[of_row]
    if isinstance(rows, Summaries):
        return replace(rows, columns={**rows.columns, name: fewer}, resources=resources)
    records = _as_bytes(rows.records).copy().view(rows.records.dtype)
    records[name] = fewer
    return replace(rows, records=records, resources=resources)


def as_messages(rows: Summaries) -> Sequence[Message]:
    """ROWS as messages, one Python object each: with their resources, which those with labels for
    clients that know no other fields name there, too."""
    messages = rows.as_messages()
    if not rows.resources:
        return messages
    name = resource_field_of(rows.message.DESCRIPTOR)
    told = [{}, *(_labels(each) for each in rows.resources)]
    for message, at in zip(messages, rows.columns[name].tolist(), strict=True):
        row: Any = message
        row.resource = at
        if at and "labels" in message.DESCRIPTOR.fields_by_name:
            row.labels.update(told[at])
    return messages


def _labels(resource: pb.Resource) -> dict[str, str]:
    return {name: text for name in _LABELS if (text := resource.attributes.get(name, ""))}


# What tells rows of pods apart.
_LABELS: Final = ("k8s.namespace.name", "k8s.pod.name", "k8s.container.name", "container.id")


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
    message = rows.message.DESCRIPTOR
    of_pods = resource_field_of(message) in (rows.records.dtype.names or ())
    return row_layout(pb.EbpfEventBatch.DESCRIPTOR, field_of(message).name, of_pods=of_pods)
