"""One batch as a subscriber reads it: its head as a message, its rows as an array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.rows import NotFixedError, first_varint, row_layout

# Where rows of individual events are, by kind; a kind that has none has no such rows either.
_EVENTS: Final[Mapping[int, str]] = {
    pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS: "syscall_calls",
    pb.EBPF_COLLECTOR_KIND_TCP_METRICS: "tcp_state_changes",
}
_KIND: Final = pb.EbpfEventBatch.KIND_FIELD_NUMBER


@dataclass(frozen=True)
class Batch:
    """`message` is all of it but the rows of individual events: these are in `events`, an array of
    shape (n,) with the fields of the row's message, without a Python object a row."""

    message: pb.EbpfEventBatch
    events: NDArray[Any]

    @classmethod
    def parse(cls, wire: bytes) -> Self:
        """From the bytes of an EbpfEventBatch. Raises protobuf's DecodeError."""
        field = _EVENTS.get(first_varint(wire, _KIND), "syscall_calls")
        layout = row_layout(pb.EbpfEventBatch.DESCRIPTOR, field)
        try:
            offset, events = layout.view(wire)
        except NotFixedError:
            # Another agent may write rows as any protobuf library does.
            message = pb.EbpfEventBatch.FromString(wire)
            names = layout.dtype.names or ()
            found = getattr(message, field)
            rows = [tuple(getattr(r, name) for name in names) for r in found]
            message.ClearField(field)
            return cls(message, np.array(rows, layout.dtype))
        return cls(pb.EbpfEventBatch.FromString(wire[:offset]), events)

    @property
    def first_seq(self) -> int:
        """The number of the first event that it tells of."""
        return self.message.first_seq

    @property
    def last_seq(self) -> int:
        """The number of the last; ask for what comes after it to resume."""
        return self.message.last_seq

    @property
    def count(self) -> int:
        """Rows in it."""
        return self.message.count

    @property
    def lost(self) -> Mapping[str, int]:
        """What was lost since the batch before, by stage: `subscriber_queue` and its like."""
        return {
            pb.Loss.Stage.Name(loss.stage).removeprefix("STAGE_").lower(): loss.count
            for loss in self.message.losses
        }

    @property
    def end(self) -> pb.SessionEnd | None:
        """Why the session ended, in its last batch."""
        return self.message.end if self.message.HasField("end") else None

    @cached_property
    def strings(self) -> NDArray[np.str_]:
        """What indices in `events` point into: `batch.strings[batch.events["syscall"]]`."""
        return np.array(list(self.message.strings), str)
