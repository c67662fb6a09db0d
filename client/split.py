"""An encoded EbpfEventBatch taken apart: rows and columns as arrays, the rest as a message.

Which fields carry rows, and in which form, is read from the contract; no kind is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from coral.client.errors import ContractError
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.mesh.v1 import options_pb2 as options
from coral.wire.columns import columns_layout
from coral.wire.encoding import NotFixedError, fields
from coral.wire.kinds import RowsField, fields_of_kind, resource_field_of, rows_fields
from coral.wire.rows import RowLayout, layout_at, row_layout

_BATCH: Final = pb.EbpfEventBatch.DESCRIPTOR
_BY_NUMBER: Final[Mapping[int, RowsField]] = {
    field.number: field
    for field in rows_fields().values()
    if field.form in (options.ROW_FORM_EVENTS, options.ROW_FORM_COLUMNS)
}
_NO_EVENTS: Final[NDArray[Any]] = np.empty(0, np.dtype([]))


class Parts(NamedTuple):
    """What a batch is made of. `field` carries the rows, in whatever form; None where there are
    none."""

    message: pb.EbpfEventBatch
    field: RowsField | None
    events: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Raw:
    """Fields sorted out, and not decoded: `rest` in pieces, runs of rows, and bodies of columns."""

    rest: list[memoryview]
    field: RowsField | None
    runs: list[NDArray[Any]]
    bodies: list[memoryview]


def split(wire: bytes) -> Parts:
    """Takes an encoded batch apart. `events` and `columns` are read-only views of WIRE where the
    rows lie together in the contract's fixed form; else protobuf's own parser reads them. Raises
    `ContractError` for bytes that are no batch, and where there are not as many rows as `count`
    says."""
    try:
        parts = _quick(wire) or _decode(_sort(wire))
    except NotFixedError:
        parts = _parse(wire)
    except DecodeError as error:
        raise ContractError(f"the agent sent bytes that are no batch: {error}") from error
    _check_count(parts)
    return parts


def _quick(wire: bytes) -> Parts | None:
    """A batch whose rows or columns come first, in one piece, as the agent of this project sends
    them: the rest is left to protobuf's own parser. None for any other."""
    there_are = fields(wire)
    number, _, body = next(there_are, (0, 0, memoryview(b"")))
    carrier = _BY_NUMBER.get(number)
    if carrier is None:
        return None
    events = _NO_EVENTS
    if carrier.form == options.ROW_FORM_EVENTS:
        events = _run(layout_at(_layouts(carrier.name), wire, 0), wire, 0)
        end = events.nbytes
    else:
        _, end, _ = next(there_are, (0, len(wire), body))
    message = pb.EbpfEventBatch.FromString(wire[end:])
    if any(field.number in _BY_NUMBER for field, _ in message.ListFields()):
        return None
    if carrier.form == options.ROW_FORM_EVENTS:
        return Parts(message, carrier, events, {})
    columns = _columns(carrier, body, message.count)
    return Parts(message, carrier, _no_events(message.kind), columns)


def _sort(wire: bytes) -> _Raw:
    """One pass over the fields, in any order. A run of rows is found by its first tag and passed
    over whole. Raises `NotFixedError`."""
    raw = _Raw([], None, [], [])
    view = memoryview(wire)
    field: RowsField | None = None
    start = rest_from = 0
    in_columns = False
    while start < len(view):
        for number, began, body in fields(view[start:]):
            at = start + began
            if in_columns:
                rest_from, in_columns = at, False
            carrier = _BY_NUMBER.get(number)
            if carrier is None:
                continue
            if field not in (None, carrier):
                raise ContractError(f"a batch carries both {field} and {carrier}")
            field = carrier
            raw.rest.append(view[rest_from:at])
            if carrier.form == options.ROW_FORM_COLUMNS:
                raw.bodies.append(body)
                in_columns = True
                continue
            run = _run(layout_at(_layouts(carrier.name), wire, at), wire, at)
            raw.runs.append(run)
            start = rest_from = at + run.nbytes
            break
        else:
            break
    if not in_columns:
        raw.rest.append(view[rest_from:])
    return _Raw(raw.rest, field, raw.runs, raw.bodies)


def _run(layout: RowLayout, wire: bytes, offset: int) -> NDArray[Any]:
    """The rows in fixed form that follow one another from OFFSET, at least one. Each begins where
    the one before ends, so bytes that match the form are rows. Raises `NotFixedError`."""
    size = layout.dtype.itemsize
    count = (len(wire) - offset) // size
    raw = np.frombuffer(wire, np.uint8, count * size, offset).reshape(count, size)
    fixed = (raw[:, layout.constant] == layout.template[layout.constant]).all(axis=1)
    length = count if fixed.all() else int(fixed.argmin())
    if not length:
        raise NotFixedError("a row is not in its fixed form")
    return np.frombuffer(wire, layout.dtype, length, offset)


def _decode(raw: _Raw) -> Parts:
    """Raises `NotFixedError` and DecodeError."""
    message = pb.EbpfEventBatch.FromString(b"".join(raw.rest))
    events = _no_events(message.kind)
    if raw.runs:
        if len({run.dtype for run in raw.runs}) > 1:
            raise NotFixedError("the rows are not of one form")
        events = raw.runs[0] if len(raw.runs) == 1 else np.concatenate(raw.runs)
    if not (raw.field and raw.bodies):
        return Parts(message, raw.field or _summaries(message), events, {})
    body = raw.bodies[0] if len(raw.bodies) == 1 else memoryview(b"".join(raw.bodies))
    return Parts(message, raw.field, events, _columns(raw.field, body, message.count))


def _parse(wire: bytes) -> Parts:
    """The same by protobuf's parser: for rows in another order, or without their zeros."""
    try:
        message = pb.EbpfEventBatch.FromString(wire)
    except DecodeError as error:
        raise ContractError(f"the agent sent bytes that are no batch: {error}") from error
    field, events = _summaries(message), _no_events(message.kind)
    columns: Mapping[str, NDArray[Any]] = {}
    for carrier in _BY_NUMBER.values():
        value: Any = getattr(message, carrier.name)
        if carrier.form == options.ROW_FORM_COLUMNS:
            if not message.HasField(carrier.name):
                continue
            columns = _columns(carrier, memoryview(value.SerializeToString()), message.count)
        elif value:
            resource = resource_field_of(carrier.message)
            of_pods = bool(resource) and any(getattr(row, resource) for row in value)
            layout = row_layout(_BATCH, carrier.name, of_pods=of_pods)
            names = layout.dtype.names or ()
            rows = [tuple(getattr(row, name) for name in names) for row in value]
            events = np.array(rows, layout.dtype)
        else:
            continue
        field = carrier
        message.ClearField(carrier.name)
    return Parts(message, field, events, columns)


def _columns(field: RowsField, body: memoryview, count: int) -> Mapping[str, NDArray[Any]]:
    try:
        return columns_layout(field.message).decode(body, count)
    except NotFixedError as error:
        raise ContractError(f"{field.name}: {error}") from error


def _summaries(message: pb.EbpfEventBatch) -> RowsField | None:
    for field in fields_of_kind(message.kind, options.ROW_FORM_SUMMARIES):
        if len(getattr(message, field.name)):
            return field
    return None


@cache
def _layouts(name: str) -> tuple[RowLayout, RowLayout]:
    """Of the rows in a field, those of sessions that do not watch pods first."""
    return row_layout(_BATCH, name), row_layout(_BATCH, name, of_pods=True)


@cache
def _no_events(kind: int) -> NDArray[Any]:
    """No rows of single events, with their fields, so that callers need not ask first."""
    for field in fields_of_kind(kind, options.ROW_FORM_EVENTS):
        return np.empty(0, row_layout(_BATCH, field.name).dtype)
    return _NO_EVENTS


def _check_count(parts: Parts) -> None:
    field, count = parts.field, parts.message.count
    if field is None:
        found = 0
    elif field.form == options.ROW_FORM_EVENTS:
        found = len(parts.events)
    elif field.form == options.ROW_FORM_COLUMNS:
        return  # decoded with that count
    else:
        found = len(getattr(parts.message, field.name))
    if found != count:
        raise ContractError(
            f"a batch of events {parts.message.first_seq} to {parts.message.last_seq} has {found} "
            f"rows, and says that it has {count}"
        )
