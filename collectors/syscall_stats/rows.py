"""Summaries of system calls: as columns, made by array, and as row messages for subscribers that
want rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings, split_top
from coral.collectors.contract import Summaries
from coral.collectors.members import Members, comm_text
from coral.collectors.resources import ResourceTable, with_resources
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.counters import (
    ERRORS,
    LATENCY,
    LATENCY_FIRST,
    LATENCY_SLOTS,
    TOTAL_NS,
    Increase,
)
from coral.mesh.v1 import ebpf_pb2 as pb

OTHER: Final = "other"


def summaries(
    increase: Increase,
    members: Members,
    top: int = 0,
    groups: NDArray[np.uint32] | None = None,
    table: ResourceTable | None = None,
) -> Summaries:
    """A row for each pair of process and system call, those that took most time first. With TOP > 0
    only the first TOP, then the row `other`, which adds up the rest. With TABLE, each row has the
    resource of its process, whose group is in GROUPS, of shape (n,)."""
    strings = Strings()
    busiest, rest = split_top(increase.counters[:, TOTAL_NS], top)
    shown = increase.take(busiest)
    syscall = strings.indices(shown.numbers, syscall_table.name_of)
    comm = strings.indices(members.comms_of(shown.tgids, shown.born), comm_text)
    resource = table.indices(groups[busiest]) if table and groups is not None else None
    if len(rest):
        shown = shown.with_sum_of(increase.take(rest))
        syscall = np.append(syscall, np.uint32(strings.index(OTHER)))
        comm = np.append(comm, np.uint32(strings.index("")))
    errors = shown.counters[:, ERRORS:LATENCY]
    latency = shown.counters[:, LATENCY:]
    columns = {
        "syscall": syscall,
        "syscall_number": shown.numbers,
        "pid": shown.tgids,
        "comm": comm,
        "call_count": shown.calls,
        "error_count": errors.sum(axis=1),
        "total_duration_ns": shown.counters[:, TOTAL_NS],
        "max_duration_ns": shown.max_ns,
        "errors_by_class": errors,
        "latency_ns": latency[:, : _slots_used(latency.max(axis=0, initial=0))],
        "error_classes": np.array([strings.index(name) for name in errno_class.NAMES], np.uint32),
        "latency_first_exponent": np.array([LATENCY_FIRST], np.uint32),
        "latency_slots": np.array([LATENCY_SLOTS], np.uint32),
    }
    made = Summaries(pb.SyscallStatsColumns, columns, strings.table, messages, len(syscall))
    return with_resources(made, resource, table)


def _slots_used(counts: NDArray[Any]) -> int:
    """How many slots there are up to the last that is not empty; COUNTS is of shape (slots,)."""
    return int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0


def messages(columns: Mapping[str, NDArray[Any]], strings: Sequence[str]) -> list[pb.SyscallStats]:
    """The rows of COLUMNS, a pb.SyscallStatsColumns as arrays, as messages."""
    classes = [strings[index] for index in columns["error_classes"].tolist()]
    first_exponent, slots = (
        int(columns[name][0]) if len(columns[name]) else 0
        for name in ("latency_first_exponent", "latency_slots")
    )
    latency = columns["latency_ns"]
    rows = []
    for (syscall, number, pid, comm, calls, errors, total_ns, max_ns), by_class, counts in zip(
        zip(*(columns[name].tolist() for name in _SCALARS), strict=True),
        columns["errors_by_class"].tolist(),
        latency,
        strict=True,
    ):
        row = pb.SyscallStats(
            syscall_name=strings[syscall],
            call_count=calls,
            error_count=errors,
            total_duration_us=total_ns // 1000,
            pid=pid,
            syscall_number=number,
            total_duration_ns=total_ns,
            max_duration_ns=max_ns,
            latency_ns=pb.Log2Histogram(
                first_exponent=first_exponent,
                slots=slots,
                counts=counts[: _slots_used(counts)].tolist(),
            ),
        )
        if pid:
            row.labels["pid"], row.labels["comm"] = str(pid), strings[comm]
        if errors:
            for name, count in zip(classes, by_class, strict=False):
                if count:
                    row.errors_by_class[name] = count
        rows.append(row)
    return rows


_SCALARS: Final = (
    "syscall", "syscall_number", "pid", "comm", "call_count", "error_count", "total_duration_ns",
    "max_duration_ns",
)  # fmt: skip
