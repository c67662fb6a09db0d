"""One message of a stream: rows, losses, an end. Encoded once for each form, filtered by array,
loop-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from coral.agent.streams.filter import Filter
from coral.agent.streams.masking import masked
from coral.agent.streams.rows import as_messages, compact, layout_of, take
from coral.collectors.contract import NO_ATTRIBUTES, EventRows, Summaries, Unread
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from coral.wire.encoding import WIRE_BYTES, varint
from coral.wire.kinds import event_field_of, field_of, is_string_index, resource_field_of
from coral.wire.resources import of_resource

Counts = Mapping[int, int]  # by pb.Loss.Stage
_NOTHING: Final[Counts] = {}


@dataclass(frozen=True, slots=True)
class Header:
    """What every message of a session says about the session."""

    collector_id: str
    kind: pb.EbpfCollectorKind
    agent_id: str
    service_name: str


@dataclass(slots=True)
class _Made:
    """What was made of a frame's rows, to be shared while the frame is recent."""

    events: bytes = b""  # the encoding that individual events lie in
    encoded: dict[bool, bytes] = field(default_factory=dict)  # by whether as columns
    # Only while a subscriber holds them: there can be as many filters as subscribers over time.
    # None until the first, because an empty one takes as much as a few rows.
    filtered: WeakValueDictionary[Filter | str, Any] | None = None
    is_shared: bool = True
    is_encoded: bool = False  # its rows are part of another frame's, as they lie on the wire
    holders: int = 0
    held_in: Held | None = None


@dataclass(slots=True)
class Held:
    """The memory of all frames that are held in one place or several, each counted once."""

    size_bytes: int = 0


@dataclass(frozen=True)
class Frame:
    """Accounts for the events FIRST_SEQ to LAST_SEQ, or only for losses, or for the end.

    A frame is shared by every subscriber that it goes to, and so are its encodings. With a filter,
    `rows` can be fewer than the numbers it covers; `seqs`, of shape (rows,), are then theirs.
    Individual events are encoded when the frame is made, and `rows` is a view of those bytes.
    """

    header: Header
    first_seq: int
    last_seq: int
    interval_start_ns: int
    interval_end_ns: int
    rows: EventRows | Summaries | None = None
    losses: Counts = field(default_factory=dict)  # since the frame before
    lost_in_kernel: Counts = field(default_factory=dict)  # so far, those of this frame included
    unread: Mapping[str, Unread] = field(default_factory=dict)  # so far
    # Of the pods that the rows are of.
    attributes: Mapping[str, str] = field(default_factory=lambda: NO_ATTRIBUTES)
    seqs: NDArray[np.int64] | None = None
    end: pb.SessionEnd | None = None
    _made: _Made = field(default_factory=_Made)

    def __post_init__(self) -> None:
        rows = self.rows
        if isinstance(rows, EventRows):
            # The rows come first, so that a reader finds them without a look at the rest.
            layout = layout_of(rows)
            is_encoded, records = self._made.is_encoded, rows.records
            body = records.view(np.uint8).data if is_encoded else layout.encode(records)
            wire = b"".join((body, self._head()))
            self._made.events = wire
            records = np.frombuffer(wire, layout.dtype, len(rows))
            object.__setattr__(self, "rows", replace(rows, records=records))
        elif rows is not None:
            object.__setattr__(self, "rows", compact(rows))

    @property
    def count(self) -> int:
        """Rows in it."""
        return 0 if self.rows is None else len(self.rows)

    @property
    def covered(self) -> int:
        """How many numbers it accounts for."""
        return self.last_seq - self.first_seq + 1

    @cached_property
    def size_bytes(self) -> int:
        """What it takes in memory, about what it takes on the wire as columns."""
        if isinstance(self.rows, EventRows):
            return len(self._made.events)
        if self.rows is None:
            return len(self.wire())
        tables = sum(map(len, self.rows.strings))
        tables += sum(each.ByteSize() for each in self.rows.resources)
        return _HEAD_BYTES + self._rows_bytes + tables

    @property
    def _rows_bytes(self) -> int:
        """What the rows alone take of `size_bytes`."""
        if isinstance(self.rows, EventRows):
            return self.rows.records.nbytes
        columns = self.rows.columns.values() if self.rows else ()
        return sum(values.nbytes for values in columns)

    def size_with(self, count: int) -> int:
        """About what `size_bytes` of the frame is with COUNT of its rows, and with all strings."""
        return self.size_bytes - self._rows_bytes * (self.count - count) // self.count

    @cached_property
    def kept_bytes(self) -> int:
        """What it takes in memory, as objects of Python too, without its other encodings."""
        columns = len(self.rows.columns) if isinstance(self.rows, Summaries) else 0
        seqs_bytes = 0 if self.seqs is None else self.seqs.nbytes
        return self.size_bytes + seqs_bytes + FRAME_BYTES + columns * COLUMN_BYTES

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory with the encodings that are kept now."""
        return self.kept_bytes + sum(map(len, self._made.encoded.values()))

    def hold(self, held: Held) -> None:
        """Adds it to what is HELD, or one more holder where it is there."""
        made = self._made
        made.holders += 1
        if made.holders == 1:
            held.size_bytes += self.memory_bytes
            made.held_in = held

    def release(self) -> None:
        """Undoes one call of `hold`."""
        made = self._made
        made.holders -= 1
        if not made.holders and made.held_in:
            made.held_in.size_bytes -= self.memory_bytes
            made.held_in = None

    @cached_property
    def event_bytes(self) -> int:
        """About what one of its rows takes as an encoded EbpfEvent: as much as the first."""
        if self.rows is None:
            return 0
        first = self._with(rows=take(self.rows, np.arange(1)), seqs=None, losses=_NOTHING, end=None)
        return len(next(first.events()))

    @property
    def lost_in_kernel_before(self) -> Counts:
        """Lost in the kernel before this frame."""
        return {
            stage: count - self.losses.get(stage, 0) for stage, count in self.lost_in_kernel.items()
        }

    def wire(self, *, columns: bool = False) -> bytes:
        """The frame as an encoded EbpfEventBatch; its summaries as messages, or as COLUMNS."""
        made = self._made
        if made.events:
            return made.events
        as_columns = columns and isinstance(self.rows, Summaries)
        if as_columns in made.encoded:
            return made.encoded[as_columns]
        wire = self._encode(as_columns=as_columns)
        if made.is_shared:
            made.encoded[as_columns] = wire
            if made.held_in:
                made.held_in.size_bytes += len(wire)
        return wire

    def stop_sharing(self) -> None:
        """Frees what `wire` and filters can make again, and keeps it no more: few readers are
        this late."""
        made = self._made
        if made.held_in:
            made.held_in.size_bytes -= sum(map(len, made.encoded.values()))
        made.is_shared = False
        made.encoded.clear()
        made.filtered = None

    def _encode(self, *, as_columns: bool) -> bytes:
        rows = self.rows
        if not isinstance(rows, Summaries):
            return self._head()
        target = field_of(rows.message.DESCRIPTOR)
        if as_columns:
            body = columns_layout(rows.message.DESCRIPTOR).encode(rows.columns)
            tag = varint(target.number << 3 | WIRE_BYTES)
            return tag + varint(len(body)) + body + self._head(rows.strings)
        message = pb.EbpfEventBatch()
        getattr(message, target.same_as).extend(as_messages(rows))
        return self._head() + message.SerializeToString()

    def _head(self, strings: Sequence[str] = ()) -> bytes:
        """Everything but the rows."""
        rows = self.rows
        message = pb.EbpfEventBatch(
            collector_id=self.header.collector_id,
            kind=self.header.kind,
            agent_id=self.header.agent_id,
            service_name=self.header.service_name,
            first_seq=self.first_seq,
            last_seq=self.last_seq,
            count=self.count,
            interval_start_ns=self.interval_start_ns,
            interval_end_ns=self.interval_end_ns,
            losses=loss_messages(self.losses),
            end=self.end,
            produced=self.last_seq,
            lost_in_kernel=loss_messages(self.lost_in_kernel),
            strings=rows.strings if isinstance(rows, EventRows) else strings,
            sample_every=rows.sample_every if isinstance(rows, EventRows) else 0,
            unread=unread_messages(self.unread),
            attributes=self.attributes,
            resources=rows.resources if rows is not None else (),
        )
        return message.SerializeToString()

    @property
    def selections(self) -> WeakValueDictionary[Filter | str, Any] | None:
        """What filters take of it, for equal ones to share while any reader holds it; None once
        the frame is not recent."""
        made = self._made
        if made.filtered is None and made.is_shared:
            made.filtered = WeakValueDictionary()
        return made.filtered

    def with_rows(self, mask: NDArray[np.bool_]) -> Frame:
        """The frame with the rows of MASK, of shape (rows,)."""
        assert self.rows is not None  # noqa: S101  the mask is of its rows
        seqs = self.first_seq + np.flatnonzero(mask)
        return self._with(rows=take(self.rows, mask), seqs=seqs, _made=_Made(is_encoded=True))

    def masked(self) -> Frame:
        """The frame without the other ends of connections; the same one for all readers while it
        is recent and any of them holds it."""
        if not self.rows:
            return self
        shared = self.selections
        if shared is not None and (found := shared.get(_MASK)):
            same: Frame = found
            return same
        rows = masked(self.rows)
        if rows is self.rows:
            return self
        # Rows of single events keep their form on the wire.
        made = self._with(rows=rows, _made=_Made(is_encoded=isinstance(rows, EventRows)))
        if shared is not None:
            shared[_MASK] = made
        return made

    def after(self, seq: int) -> Frame:
        """The frame without the events up to number SEQ, which lies within it."""
        if self.rows is None:
            return self
        keep = np.arange(len(self.rows)) > seq - self.first_seq
        return self._with(first_seq=seq + 1, rows=take(self.rows, keep), losses=_NOTHING)

    def _with(self, **changes: Any) -> Frame:
        return replace(self, **{"_made": _Made(), **changes})

    def events(self, account: pb.StreamAccount | None = None) -> Iterator[bytes]:
        """The frame as encoded EbpfEvents, one for each event; losses, the end, and where the
        stream stands are without one, and have the ACCOUNT."""
        if self.losses or not (self.count or self.end):
            event = self._event(losses=loss_messages(self.losses), account=account)
            yield event.SerializeToString()
        for seq, row in zip(self._seqs(), self._messages(), strict=True):
            event = self._event(seq=seq)
            getattr(event, event_field_of(row.DESCRIPTOR)).CopyFrom(row)
            if isinstance(self.rows, EventRows):
                event.sample_every = self.rows.sample_every
                _send_strings(event, row, self.rows.strings)
            if self.attributes:
                self._name_resource(event, row)
            yield event.SerializeToString()
        if self.end:
            yield self._event(end=self.end, account=account).SerializeToString()

    def _name_resource(self, event: pb.EbpfEvent, row: Message) -> None:
        """Gives EVENT the attributes of its ROW, whose index of a resource is then of no use."""
        own: Mapping[str, str] = NO_ATTRIBUTES
        payload, name = event_field_of(row.DESCRIPTOR), resource_field_of(row.DESCRIPTOR)
        if name and self.rows is not None and (at := getattr(row, name)):
            own = self.rows.resources[at - 1].attributes
            getattr(event, payload).ClearField(name)
        event.attributes.update(of_resource(self.attributes, own))

    def _seqs(self) -> Sequence[int]:
        if self.seqs is not None:
            return [int(seq) for seq in self.seqs]
        return range(self.first_seq, self.first_seq + self.count)

    def _messages(self) -> Sequence[Message]:
        """The rows as messages, one Python object each."""
        rows = self.rows
        if rows is None:
            return ()
        if isinstance(rows, Summaries):
            return as_messages(rows)
        name = field_of(rows.message.DESCRIPTOR).name
        messages: Sequence[Message] = getattr(pb.EbpfEventBatch.FromString(self.wire()), name)
        return messages

    def _event(
        self,
        seq: int = 0,
        losses: list[pb.Loss] | None = None,
        end: pb.SessionEnd | None = None,
        account: pb.StreamAccount | None = None,
    ) -> pb.EbpfEvent:
        event = pb.EbpfEvent(
            collector_id=self.header.collector_id,
            agent_id=self.header.agent_id,
            service_name=self.header.service_name,
            seq=seq,
            losses=losses,
            end=end,
        )
        if not seq:
            event.produced = self.last_seq
            event.lost_in_kernel.extend(loss_messages(self.lost_in_kernel))
            event.unread.extend(unread_messages(self.unread))
            if account and account.ByteSize():
                event.account.CopyFrom(account)
        event.timestamp.FromNanoseconds(self.interval_end_ns)
        return event


_MASK: Final = "masked"  # the key of a frame without the other ends of connections
_HEAD_BYTES: Final = 200
# A frame's objects of Python beside the bytes of its rows, and those of each column of summaries;
# tests/unit/test_streams.py measures them.
FRAME_BYTES: Final = 944
COLUMN_BYTES: Final = 130


def loss_messages(counts: Counts) -> list[pb.Loss]:
    """Counts by stage as messages; stages without a loss are left out."""
    return [
        pb.Loss(stage=stage, count=count)  # type: ignore[arg-type]
        for stage, count in counts.items()
        if count
    ]


def unread_messages(unread: Mapping[str, Unread]) -> list[pb.Unread]:
    """What could not be read as messages, by what that is."""
    return [pb.Unread(what=what, count=it.count, bytes=it.bytes) for what, it in unread.items()]


def _send_strings(event: pb.EbpfEvent, row: Message, strings: Sequence[str]) -> None:
    """Gives EVENT the strings of its ROW alone, and the payload indices of these."""
    payload = getattr(event, event_field_of(row.DESCRIPTOR))
    for it in row.DESCRIPTOR.fields:
        if is_string_index(it):
            text = strings[getattr(row, it.name)]
            if text not in event.strings:
                event.strings.append(text)
            setattr(payload, it.name, list(event.strings).index(text))
