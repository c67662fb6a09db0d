"""System calls by process and name: calls, errors by class, latency. Source: syscall_stats.bpf.c.

The kernel's figures only grow; each drain reads them all at once and subtracts the drain before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import Features
from coral.collectors.contract import Coverage, EventRows, Summaries
from coral.collectors.hubs import Plan
from coral.collectors.kernel_collector import (
    EventCollector,
    KernelOptions,
    errors_only_option,
    min_duration_option,
    top_option,
)
from coral.collectors.members import process_keys
from coral.collectors.options import (
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

_OBJECT: Final = "syscall_stats"
_PROGRAMS: Final = ("coral_leave", "coral_enter")


def _syscall(name: str) -> str:
    if not syscall_table.is_name(name):
        raise ValueError(f"names of system calls, comma-separated; this kernel has no {name!r}")
    return name


@dataclass(frozen=True)
class SyscallStatsOptions(KernelOptions):
    """The options of `syscall_stats`."""

    selecting = ("min_duration", "errors_only", "sample")

    include: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"), "", "count only these calls"
    )
    exclude: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"),
        "",
        "count all calls except these",
    )
    top: int = top_option("those that took most time")
    entries: int = option(
        integer(1, 10240),
        "10240",
        "how many pairs of process and call to keep; calls of further pairs are lost at the stage "
        "MAP_FULL",
    )
    min_duration: float = min_duration_option("calls")
    errors_only: bool = errors_only_option("calls that failed")
    sample: int = option(
        integer(1, 1_000_000), "1", "with mode=events: send one call in this many, by chance"
    )

    @property
    def wanted(self) -> NDArray[np.uint64]:
        """The calls to count as bits by number, of native and of 32-bit calls: of shape (2, 16)."""
        names = self.include or self.exclude
        bits = np.zeros((2, syscall_table.NR_UNKNOWN), np.uint8)
        for name in names:
            for number in syscall_table.numbers_of(name):
                compat, at = divmod(number, syscall_table.NR_COMPAT)
                bits[compat, at] = 1
        if not self.include:
            bits ^= 1
        return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


class SyscallStatsCollector(EventCollector[SyscallStatsOptions]):
    """Counts the system calls of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
    options_type = SyscallStatsOptions
    thread_state = True

    def _plan(self, features: Features) -> Plan:
        rung = self._rung
        typed = rung.hook.taken == "tp_btf"
        return Plan(
            _OBJECT,
            features,
            rung,
            programs=_PROGRAMS,
            options={
                "error_class": errno_class.table(),
                "typed_registers": typed,
                "has_spare_stats": self._has_spare,
            },
            sizes=self._sizes,
            preallocated=("stats",),
            without_maps=() if self._has_spare else ("spare_stats",),
        )

    @property
    def _has_spare(self) -> bool:
        """Whether calls whose elements the kernel has no per-CPU memory for count in `spare_stats`;
        elements that are allocated beforehand need none."""
        return self._rung.on_demand.available

    @property
    def _own_maps(self) -> Mapping[str, int]:
        names = ("stats", "spare_stats") if self._has_spare else ("stats",)
        return {} if self._options.single_events else dict.fromkeys(names, self._options.entries)

    @classmethod
    def measures(cls, max_series: int) -> SyscallMeasures:
        return SyscallMeasures(max_series)

    @property
    def coverage(self) -> Coverage:
        options = self._options
        part = options.include or options.exclude or options.top
        return min(super().coverage, Coverage.PART if part else Coverage.WHOLE)

    def _open_maps(self) -> None:
        self._session = self._options_of_session()
        self._session["since"] = self._slot.never
        self._write_session()
        if self._options.single_events:
            self._open_records({"syscall_call": "ended_ns", "process_change": "time_ns"})
            self._calls = CallRows(self._targets, self._options.sample)
        else:
            self._stats = [(self._slot.map(name), Counters()) for name in self._own_maps]

    def _on_followed(self) -> None:
        self._session["since"] = self._slot.since
        self._write_session()

    def _write_session(self) -> None:
        self._slot.own("syscall_sessions", self._session)

    def _options_of_session(self) -> NDArray[Any]:
        """The session's struct syscall_session."""
        options = self._options
        session = np.zeros((), self._slot.object.map("syscall_sessions").value_dtype)
        session["min_duration_ns"] = int(options.min_duration * 1e9)
        session["wanted"] = options.wanted
        session["sample_every"] = options.sample
        session["single_events"] = options.single_events
        session["errors_only"] = options.errors_only
        session["filters"] = bool(options.include or options.exclude)
        session["wants_others"] = not options.include
        return session

    def _read_events(self) -> EventRows:
        records = self._drain_records()
        return self._calls.rows(records["syscall_call"], records["process_change"])

    def _read_summaries(self) -> Summaries:
        interval = int(self._session["interval"])
        self._session["interval"] = (interval + 1) & 0xFFFFFFFF
        self._write_session()
        # Read who has ended before the counters, which are then their last, and names after the
        # counters, so that every process in them has a name.
        ended = self._targets.read().ended
        keys, increases = [], []
        for stats, counters in self._stats:
            read, values = stats.read()
            if values.ndim == 1:  # one for all CPUs
                values = values[:, np.newaxis]
            keys.append(read)
            increases.append(counters.advance(read, values, interval))
        every = np.concatenate(keys)
        members = self._targets.read_with(every["tgid"], every["born"])
        increase = increases[0].with_others(increases[1:])
        if len(ended):
            self._forget(ended, keys)
        table = self._targets.resource_table()
        groups = None
        if table:
            groups = self._targets.groups_of(members, increase.tgids, increase.born)
        return summaries(increase, members, self._options.top, groups, table)

    def _events_in(self, rows: Summaries) -> int:
        return int(rows.columns["call_count"].sum())

    def _forget(self, ended: NDArray[np.uint64], keys: Sequence[NDArray[Any]]) -> None:
        """KEYS are those that were read, of each of the maps."""
        for (stats, counters), read in zip(self._stats, keys, strict=True):
            stats.delete(read[np.isin(process_keys(read["tgid"], read["born"]), ended)])
            counters.forget(ended)
        self._targets.forget(ended)


COLLECTOR: Final = SyscallStatsCollector
