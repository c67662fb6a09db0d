"""One message of a stream: rows, losses, an end; encoded once, filtered by array, loop-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from coral.agent.streams.filter import Filter
from coral.collectors.contract import Batch, EventRows
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.rows import RowLayout, row_layout


def _fields_by_row_type(message: type[Message], least_number: int) -> dict[str, str]:
    return {
        field.message_type.full_name: field.name
        for field in message.DESCRIPTOR.fields
        if field.message_type and field.number >= least_number
    }


# Where rows of each message type go. A new collector's message is found here by itself.
_BATCH_FIELDS: Final = _fields_by_row_type(pb.EbpfEventBatch, 100)
_EVENT_FIELDS: Final = _fields_by_row_type(pb.EbpfEvent, 10)


@dataclass(frozen=True, slots=True)
class Header:
    """What every message of one session says of it."""

    collector_id: str
    kind: pb.EbpfCollectorKind
    agent_id: str
    service_name: str


@dataclass(frozen=True)
class Frame:
    """A message of a stream: events `first_seq` to `last_seq`, or only losses, or the end.

    `wire` is made once, and shared by every subscriber that it goes to; `count` is how many rows
    are in it, fewer than the numbers it covers where a filter left some out.
    """

    header: Header
    first_seq: int
    last_seq: int
    count: int
    wire: bytes
    batch: Batch  # of arrays without the records: those are in `wire` alone
    seqs: NDArray[np.int64] | None = None  # (count,): the rows' numbers where some are left out
    end: pb.SessionEnd | None = None
    _filtered: dict[Filter, Frame] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        header: Header,
        first_seq: int,
        batch: Batch,
        *,
        last_seq: int | None = None,
        seqs: NDArray[np.int64] | None = None,
        end: pb.SessionEnd | None = None,
    ) -> Frame:
        """Encodes a batch whose first row has the number FIRST_SEQ."""
        rows = batch.rows
        count = len(rows)
        last_seq = first_seq + count - 1 if last_seq is None else last_seq
        message = pb.EbpfEventBatch(
            collector_id=header.collector_id,
            kind=header.kind,
            agent_id=header.agent_id,
            service_name=header.service_name,
            first_seq=first_seq,
            last_seq=last_seq,
            count=count,
            interval_start_ns=batch.interval_start_ns,
            interval_end_ns=batch.interval_end_ns,
            losses=_losses(batch),
            end=end,
        )
        if isinstance(rows, EventRows):
            message.strings.extend(rows.strings)
            message.sample_every = rows.sample_every
            # Rows go last: then they are one array at the end of the bytes.
            wire = message.SerializeToString() + _layout(rows).encode(rows.records)
            batch = replace(batch, rows=replace(rows, records=rows.records[:0]))
        else:
            if rows:
                name = _BATCH_FIELDS[rows[0].DESCRIPTOR.full_name]
                getattr(message, name).extend(rows)
            wire = message.SerializeToString()
        return cls(header, first_seq, last_seq, count, wire, batch, seqs, end)

    @property
    def covered(self) -> int:
        """How many numbers it stands for."""
        return self.last_seq - self.first_seq + 1

    @cached_property
    def records(self) -> NDArray[np.void]:
        """The rows of individual events, of shape (count,), as a view of `wire`."""
        rows = self.batch.rows
        assert isinstance(rows, EventRows)  # noqa: S101  callers have asked
        records: NDArray[np.void] = _layout(rows).view(self.wire)[1]
        return records

    def filtered(self, wanted: Filter) -> Frame:
        """The frame with the rows that WANTED takes; made once for each distinct filter."""
        if not self.count or not wanted:
            return self
        if wanted not in self._filtered:
            self._filtered[wanted] = self._filter(wanted)
        return self._filtered[wanted]

    def _filter(self, wanted: Filter) -> Frame:
        rows = self.batch.rows
        left: Sequence[Message] | EventRows
        if isinstance(rows, EventRows):
            keep = wanted.mask(self.records, rows.strings)
            left = replace(rows, records=self.records[keep])
        else:
            keep = np.array([wanted.takes(row) for row in rows], bool)
            left = [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept]
        return Frame.of(
            self.header,
            self.first_seq,
            replace(self.batch, rows=left),
            last_seq=self.last_seq,
            seqs=self.first_seq + np.flatnonzero(keep),
        )

    def after(self, seq: int) -> Frame:
        """The frame without the events up to number SEQ, which lies within it."""
        rows, skipped = self.batch.rows, seq - self.first_seq + 1
        left: Sequence[Message] | EventRows
        if isinstance(rows, EventRows):
            left = replace(rows, records=self.records[skipped:])
        else:
            left = rows[skipped:]
        return Frame.of(self.header, seq + 1, replace(self.batch, rows=left, losses={}))

    def events(self) -> Iterator[bytes]:
        """The frame as encoded EbpfEvents, one for each event; losses and the end stand alone."""
        if self.batch.losses:
            yield self._event(losses=_losses(self.batch)).SerializeToString()
        for seq, row in zip(self._seqs(), self._rows(), strict=True):
            event = self._event(seq=seq)
            getattr(event, _EVENT_FIELDS[row.DESCRIPTOR.full_name]).CopyFrom(row)
            if isinstance(self.batch.rows, EventRows):
                event.strings.extend(self.batch.rows.strings)
            yield event.SerializeToString()
        if self.end:
            yield self._event(end=self.end).SerializeToString()

    def _seqs(self) -> Sequence[int]:
        if self.seqs is not None:
            return [int(seq) for seq in self.seqs]
        return range(self.first_seq, self.first_seq + self.count)

    def _rows(self) -> Sequence[Message]:
        """The rows as messages, one Python object each."""
        rows = self.batch.rows
        if not isinstance(rows, EventRows):
            return rows
        field_name = _BATCH_FIELDS[rows.message.DESCRIPTOR.full_name]
        messages: Sequence[Message] = getattr(pb.EbpfEventBatch.FromString(self.wire), field_name)
        return messages

    def _event(
        self,
        seq: int = 0,
        losses: list[pb.Loss] | None = None,
        end: pb.SessionEnd | None = None,
    ) -> pb.EbpfEvent:
        event = pb.EbpfEvent(
            collector_id=self.header.collector_id,
            agent_id=self.header.agent_id,
            service_name=self.header.service_name,
            seq=seq,
            losses=losses,
            end=end,
        )
        event.timestamp.FromNanoseconds(self.batch.interval_end_ns)
        return event


def _losses(batch: Batch) -> list[pb.Loss]:
    return [
        pb.Loss(stage=stage, count=count)  # type: ignore[arg-type]
        for stage, count in batch.losses.items()
    ]


def row_bytes(rows: EventRows) -> int:
    """What each of ROWS takes in a message."""
    return _layout(rows).dtype.itemsize


def _layout(rows: EventRows) -> RowLayout:
    field_name = _BATCH_FIELDS[rows.message.DESCRIPTOR.full_name]
    return row_layout(pb.EbpfEventBatch.DESCRIPTOR, field_name)
