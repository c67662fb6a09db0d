"""What a subscriber wants to see, compiled once, applied to arrays or to summary rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from coral.mesh.v1 import ebpf_pb2 as pb

_MAX_ERRNO: Final = 4095


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that must all hold; one that is empty is not asked about. Hashable: equal filters
    share one encoding."""

    pids: frozenset[int] = frozenset()
    tids: frozenset[int] = frozenset()
    comms: frozenset[str] = frozenset()
    syscalls: frozenset[str] = frozenset()
    errors_only: bool = False
    min_duration_ns: int = 0

    @classmethod
    def of(cls, wanted: pb.EventFilter) -> Self:
        """From a request."""
        return cls(
            frozenset(wanted.pids),
            frozenset(wanted.tids),
            frozenset(wanted.comms),
            frozenset(wanted.syscalls),
            wanted.errors_only,
            wanted.min_duration_ns,
        )

    def __bool__(self) -> bool:
        return self != EVERYTHING

    def mask(self, records: NDArray[Any], strings: Sequence[str]) -> NDArray[np.bool_]:
        """Which of RECORDS it takes, of shape (n,); indices in them point into STRINGS. A column
        that the records do not have is not asked about."""
        columns = records.dtype.names or ()
        keep = np.ones(len(records), bool)
        for column, numbers in (("pid", self.pids), ("tid", self.tids)):
            if numbers and column in columns:
                keep &= np.isin(records[column], list(numbers))
        for column, names in (("comm", self.comms), ("syscall", self.syscalls)):
            if names and column in columns:
                wanted = np.array([string in names for string in strings], bool)
                keep &= wanted[records[column]]
        if self.errors_only and "return_value" in columns:
            values = records["return_value"]
            keep &= (values < 0) & (values >= -_MAX_ERRNO)
        elif self.errors_only and "error" in columns:
            keep &= records["error"] != 0
        if self.min_duration_ns and "duration_ns" in columns:
            keep &= records["duration_ns"] >= self.min_duration_ns
        return keep

    def takes(self, row: Message) -> bool:
        """Whether it takes a summary row. Of what is added up in it, one that fits is enough; a
        thread's id is not asked about, because a summary is of processes, and neither is what the
        row does not have."""
        duration_ns = _value(row, *_DURATIONS)
        return (
            (not self.pids or _value(row, "pid") in (None, *self.pids))
            and (not self.comms or _comm(row) in (None, *self.comms))
            and (not self.syscalls or _value(row, "syscall_name") in (None, *self.syscalls))
            and (not self.errors_only or _value(row, *_ERRORS) not in (0, ""))
            and (not isinstance(duration_ns, int) or duration_ns >= self.min_duration_ns)
        )


# Fields of summaries, of which each kind has one or none.
_ERRORS: Final = ("error_count", "error", "connections_failed")
_DURATIONS: Final = ("max_duration_ns", "duration_ns")


def _value(row: Message, *names: str) -> int | str | None:
    """The value of the one field of ROW that has one of NAMES; None where there is none."""
    fields = row.DESCRIPTOR.fields_by_name
    return next((getattr(row, name) for name in names if name in fields), None)


def _comm(row: Message) -> str | None:
    labels = getattr(row, "labels", None)
    name: str | None = getattr(row, "comm", None) if labels is None else labels.get("comm", "")
    return name


EVERYTHING: Final = Filter()
