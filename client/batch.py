"""One batch as a subscriber reads it: its head as a message, its rows as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from coral.client.results import Kind, SessionEnd, by_stage
from coral.client.split import split
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.resources import of_resource


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Events of one session, in order; there are `count` of them. Where the rows are depends on
    the collector and on what the stream asked for:

    `events`: single events, an array of shape (count,) with the fields of the row's message.
    `columns`: summaries as columns, by name: arrays of shape (count,); matrices of (count, n);
    a few that belong to the batch as a whole. Empty for a batch without them.
    `message`: everything else. Summaries as rows are in the field that `rows` names, as messages.

    Arrays are read-only, without a Python object for each row.
    """

    message: pb.EbpfEventBatch
    events: NDArray[Any]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rows: str = ""
    """What the rows are, by the contract's field for them as messages: `syscall_stats`,
    `syscall_calls`, `tcp_peers`; empty where there are none."""
    wire: bytes = b""
    """The whole batch as the agent sent it."""

    @classmethod
    def parse(cls, wire: bytes) -> Self:
        """From the bytes of an EbpfEventBatch, written by any protobuf library. Raises
        `ContractError`."""
        parts = split(wire)
        rows = (parts.field.same_as or parts.field.name) if parts.field else ""
        return cls(parts.message, parts.events, parts.columns, rows, wire)

    def __repr__(self) -> str:
        numbers = f"first_seq={self.first_seq}, last_seq={self.last_seq}, count={self.count}"
        end = f", end={self.end.reason}" if self.end else ""
        return f"Batch({self.kind}, {numbers}, rows={self.rows!r}{end})"

    @property
    def kind(self) -> Kind:
        """The kind of collector."""
        return Kind(self.message.kind)

    @property
    def first_seq(self) -> int:
        """The number of the first event that the batch accounts for."""
        return self.message.first_seq

    @property
    def last_seq(self) -> int:
        """The number of the last event that the batch accounts for; `first_seq` - 1 where it
        accounts for none. To resume after this batch, subscribe with `after_seq=last_seq`."""
        return self.message.last_seq

    @property
    def count(self) -> int:
        """How many rows there are. A filter and losses leave out others between `first_seq` and
        `last_seq`."""
        return self.message.count

    @property
    def sample_every(self) -> int:
        """How many events each row stands for: the collector samples one in this number."""
        return self.message.sample_every or 1

    @property
    def lost(self) -> Mapping[str, int]:
        """Events lost since the batch before, by stage: `subscriber_queue`, `kernel_buffer` and
        so on. Over a reconnect use `Stream.account`, which is exact."""
        return by_stage(self.message.losses)

    @property
    def unread(self) -> Mapping[str, tuple[int, int]]:
        """What the session's processes used so far that the collector cannot read, by what it is:
        `tls`, `http2` and so on; how many connections, and their bytes."""
        return {it.what: (it.count, it.bytes) for it in self.message.unread}

    @property
    def attributes(self) -> Mapping[str, str]:
        """Of a session that watches pods or containers: what all of them have in common, by
        OpenTelemetry's names, such as `k8s.pod.name`."""
        return dict(self.message.attributes)

    @cached_property
    def resources(self) -> Sequence[Mapping[str, str]]:
        """Of such a session: `attributes`, for rows of which no more is known, and then those of
        each container that the rows are of."""
        common = self.attributes
        return (common, *(of_resource(common, it.attributes) for it in self.message.resources))

    @cached_property
    def row_resources(self) -> NDArray[np.uint32]:
        """Which of `resources` each row is of, of shape (count,)."""
        messages: Any = getattr(self.message, self.rows) if self.rows else ()
        if len(messages):
            rows = [getattr(row, "resource", 0) for row in messages]
            return np.array(rows, np.uint32)
        if self.columns or not len(self.events):
            found = self.columns.get("resource")
            return np.zeros(self.count, np.uint32) if found is None else found
        if "resource" not in (self.events.dtype.names or ()):
            return np.zeros(len(self.events), np.uint32)
        single: NDArray[np.uint32] = self.events["resource"]
        return single

    @property
    def end(self) -> SessionEnd | None:
        """How the session ended, in its last batch; else None."""
        return SessionEnd.of(self.message.end) if self.message.HasField("end") else None

    @cached_property
    def strings(self) -> NDArray[np.str_]:
        """The strings that indices in `events` and `columns` of this batch point into:
        `batch.strings[batch.events["syscall"]]`. Another batch has other indices."""
        return np.array(list(self.message.strings), str)
