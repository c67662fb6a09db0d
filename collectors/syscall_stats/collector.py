"""System calls by process and name: calls, errors by class, latency. Source: syscall_stats.bpf.c.

The kernel's figures only grow; each drain reads them all at once and subtracts the drain before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject, Features, HashMap
from coral.collectors.contract import Coverage, EventRows, ServiceProcesses, Summaries
from coral.collectors.kernel_collector import KernelCollector, KernelOptions
from coral.collectors.options import (
    OptionError,
    boolean,
    duration,
    format_duration,
    integer,
    items,
    option,
)
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.calls import CallRows
from coral.collectors.syscall_stats.counters import Counters
from coral.collectors.syscall_stats.measures import SyscallMeasures
from coral.collectors.syscall_stats.rows import summaries
from coral.mesh.v1 import ebpf_pb2 as pb

_PROGRAMS: Final = ("coral_fork", "coral_exec", "coral_gone", "coral_exit", "coral_enter")


def _syscall(name: str) -> str:
    if name not in syscall_table.numbers():
        raise ValueError(f"names of system calls, comma-separated; this kernel has no {name!r}")
    return name


@dataclass(frozen=True)
class SyscallStatsOptions(KernelOptions):
    """The options of `syscall_stats`."""

    include: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"), "", "count only these calls"
    )
    exclude: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"),
        "",
        "count all calls except these",
    )
    top: int = option(
        integer(0, 10240),
        "0",
        "how many rows to send for each interval: those that took most time, then the row `other`, "
        "which adds up the rest; 0: all rows",
    )
    entries: int = option(
        integer(1, 10240),
        "10240",
        "how many pairs of process and call to keep; calls of further pairs are lost at the stage "
        "MAP_FULL",
    )
    min_duration: float = option(
        duration(0, 3600), "0s", "with mode=events: send only calls that took at least this long"
    )
    errors_only: bool = option(boolean(), "false", "with mode=events: send only calls that failed")
    sample: int = option(
        integer(1, 1_000_000), "1", "with mode=events: send one call in this many, on each CPU"
    )

    def check(self, service: ServiceProcesses | None) -> None:
        """Raises `OptionError`, too, for a filter of single events without single events."""
        super().check(service)
        for name, value in (
            ("min_duration", format_duration(self.min_duration) if self.min_duration else ""),
            ("errors_only", "true" if self.errors_only else ""),
            ("sample", str(self.sample) if self.sample > 1 else ""),
        ):
            if value and not self.single_events:
                raise OptionError(name, value, "it with mode=events only")

    @property
    def event_filter(self) -> Mapping[str, object]:
        """The read-only globals that select the single events to send."""
        return {
            "single_events": self.single_events,
            "errors_only": self.errors_only,
            "min_duration_ns": int(self.min_duration * 1e9),
            "sample_every": self.sample,
        }

    @property
    def syscall_filter(self) -> Mapping[str, object]:
        """The read-only globals that select the calls to count."""
        names = self.include or self.exclude
        mask = np.zeros(syscall_table.NR_UNKNOWN // 64, np.uint64)
        for name in names:
            number = syscall_table.numbers()[name]
            mask[number // 64] |= np.uint64(1 << number % 64)
        return {
            "filter_syscalls": bool(names),
            "filter_includes": bool(self.include),
            "syscall_mask": mask,
        }


class SyscallStatsCollector(KernelCollector[SyscallStatsOptions]):
    """Counts the system calls of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
    options_type = SyscallStatsOptions
    thread_state = True

    def _make_object(self, features: Features) -> BpfObject:  # noqa: ARG002  the rung says it all
        options = self._options
        self._counters = Counters()
        self._calls = CallRows(self._targets, options.sample)
        return self._rung.object(
            "syscall_stats",
            programs=_PROGRAMS,
            options={
                **self._object_options,
                "active_at_exec": False,  # the exec counts, when it returns
                **options.syscall_filter,
                **options.event_filter,
                "error_class": errno_class.table(),
            },
            map_entries={"stats": options.entries},
            preallocated=("stats", "targets"),
            records=options.ring if options.single_events else 0,
        )

    @classmethod
    def measures(cls, max_series: int) -> SyscallMeasures:
        return SyscallMeasures(max_series)

    @property
    def coverage(self) -> Coverage:
        options = self._options
        part = options.include or options.exclude or options.top
        return min(super().coverage, Coverage.PART if part else Coverage.WHOLE)

    def _open_maps(self) -> None:
        self._stats: HashMap = self._object.map("stats")
        if self._options.single_events:
            self._open_records({"syscall_call": "ended_ns"})

    def _read_events(self) -> EventRows:
        return self._calls.rows(self._drain_records()["syscall_call"])

    def _read_summaries(self) -> Summaries:
        interval = int(self._object.read_variable("interval"))
        self._object.write_variable("interval", (interval + 1) & 0xFFFFFFFF)
        # Read who has ended before the counters, which are then their last, and names after the
        # counters, so that every process in them has a name.
        ended = self._targets.read().ended
        keys, values = self._stats.read()
        members = self._targets.read()
        increase = self._counters.advance(keys, values, interval)
        if len(ended):
            self._forget(ended, keys)
        return summaries(increase, members, self._options.top)

    def _forget(self, tgids: NDArray[np.uint32], keys: NDArray[Any]) -> None:
        self._stats.delete(keys[np.isin(keys["tgid"], tgids)])
        self._counters.forget(tgids)
        self._targets.forget(tgids)


COLLECTOR: Final = SyscallStatsCollector
