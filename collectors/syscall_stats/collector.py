"""System calls by process and name: calls, errors by class, latency. Source: syscall_stats.bpf.c.

The kernel's figures only grow; each drain reads them all at once and subtracts the drain before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject, Features, HashMap, RecordReader, Rung, climb
from coral.bpf.buffers.maps import sum_over_cpus
from coral.collectors.contract import Batch, Collector, ServiceProcesses, Support
from coral.collectors.options import (
    Option,
    OptionError,
    boolean,
    choice,
    describe,
    duration,
    integer,
    items,
    option,
    parse_options,
    size,
)
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.calls import CallReader
from coral.collectors.syscall_stats.counters import (
    ERRORS,
    LATENCY,
    LATENCY_FIRST,
    LATENCY_SLOTS,
    TOTAL_NS,
    Counters,
    Increase,
)
from coral.collectors.syscall_stats.measures import SyscallMeasures
from coral.collectors.targets import TargetOptions, Targets, refused_options
from coral.mesh.v1 import ebpf_pb2 as pb

OTHER: Final = "other"

# Single events: how long one waits at most before it is sent, and how full the ring may get before
# a program asks for a drain. An event is to be with its subscriber within 20 ms; a drain that finds
# anything costs half a millisecond to a whole one, up to the write to a subscriber.
_RING_INTERVAL_S: Final = 0.018
_RING_WAKEUP_SHARE: Final = 4
_HOOKS: Final = ("tp_btf", "raw_tp", "tracepoint")  # best first
_PROGRAMS: Final = ("coral_fork", "coral_exec", "coral_gone", "coral_exit", "coral_enter")


def _syscall(name: str) -> str:
    if name not in syscall_table.numbers():
        raise ValueError(f"names of system calls, comma-separated; this kernel has no {name!r}")
    return name


@dataclass(frozen=True)
class SyscallStatsOptions(TargetOptions):
    """The options of `syscall_stats`."""

    interval: float = option(duration(0.1, 60), "1s", "how often figures are sent")
    include: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"), "", "count these calls only"
    )
    exclude: tuple[str, ...] = option(
        items(_syscall, "names of system calls, comma-separated"), "", "count all but these calls"
    )
    top: int = option(
        integer(0, 10240),
        "0",
        "rows an interval: the busiest by time, the rest added up in one row `other`; 0: all",
    )

    entries: int = option(
        integer(1, 10240),
        "10240",
        "pairs of process and call that are kept; calls of further ones are losses of MAP_FULL",
    )
    mode: str = option(
        choice("summaries", "events"), "summaries", "figures of each interval, or every single call"
    )
    min_duration: float = option(
        duration(0, 3600), "0s", "of single events: calls that took at least so long"
    )
    errors_only: bool = option(boolean(), "false", "of single events: calls that failed")
    sample: int = option(
        integer(1, 1_000_000), "1", "of single events: one in so many, on each CPU"
    )
    ring: int = option(
        size(64 << 10, 256 << 20), "4MiB", "of single events: the ring buffer, a power of two"
    )

    @property
    def single_events(self) -> bool:
        """Whether every call is an event."""
        return self.mode == "events"

    @property
    def event_filter(self) -> Mapping[str, object]:
        """The read-only globals that say which single events to send."""
        return {
            "single_events": self.single_events,
            "errors_only": self.errors_only,
            "min_duration_ns": int(self.min_duration * 1e9),
            "sample_every": self.sample,
        }

    @property
    def syscall_filter(self) -> Mapping[str, object]:
        """The read-only globals that say which calls to count."""
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


class SyscallStatsCollector(Collector):
    """Counts the system calls of the processes it was asked to watch."""

    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS

    def __init__(
        self, options: SyscallStatsOptions, service: ServiceProcesses | None, features: Features
    ) -> None:
        self._options = options
        self._targets = Targets(options, service)
        self._rung = climb(features, _HOOKS)
        refused = _refused_options(features, self._rung)
        for name in ("mode", "until_exit"):
            if refused.get(name) and getattr(options, name) not in ("summaries", False):
                raise OptionError(name, str(getattr(options, name)), refused[name])
        self._object = self._rung.object(
            "syscall_stats",
            programs=_PROGRAMS,
            options={
                **self._targets.object_options,
                **options.syscall_filter,
                **options.event_filter,
                "error_class": errno_class.table(),
                "ring_wakeup_bytes": options.ring // _RING_WAKEUP_SHARE,
            },
            map_entries={"stats": options.entries},
            preallocated=("stats", "targets"),
            records=options.ring if options.single_events else 0,
        )
        self._calls: CallReader | None = None
        self._counters = Counters()
        self._map_full = 0
        self._read_at_ns = 0

    @classmethod
    def options(cls) -> Sequence[Option]:
        return describe(SyscallStatsOptions)

    @classmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> SyscallStatsCollector:
        return cls(parse_options(SyscallStatsOptions, config), service, features)

    @classmethod
    def support(cls, features: Features) -> Support:
        if features.obstacle:
            return Support(False, reason=features.obstacle)
        rung = climb(features, _HOOKS)
        return Support.by(rung, _refused_options(features, rung))

    @classmethod
    def measures(cls, max_series: int) -> SyscallMeasures:
        return SyscallMeasures(max_series)

    @property
    def label(self) -> str:
        return self._targets.label

    @property
    def bpf_object(self) -> BpfObject:
        return self._object

    @property
    def interval_s(self) -> float:
        return _RING_INTERVAL_S if self._options.single_events else self._options.interval

    @property
    def records(self) -> RecordReader | None:
        return self._calls.records if self._calls else None

    def exit_fds(self) -> Sequence[int]:
        return self._targets.exit_fds

    def open(self) -> None:
        self._object.load()
        self._stats: HashMap = self._object.map("stats")
        self._account = self._object.map("account")
        if self._options.single_events:
            records = self._rung.reader(
                self._object,
                "syscall_call",
                buffer_bytes=self._options.ring,
                wakeup_bytes=self._options.ring // _RING_WAKEUP_SHARE,
                order_by="ended_ns",
            )
            self._calls = CallReader(records, self._account, self._targets, self._options.sample)
        self._object.attach()
        self._targets.fill(self._object)
        self._read_at_ns = time.time_ns()

    def drain(self) -> Batch:
        return self._drain_calls(self._calls) if self._calls else self._drain_summaries()

    def _drain_calls(self, calls: CallReader) -> Batch:
        started_at_ns, self._read_at_ns = self._read_at_ns, time.time_ns()
        losses = self._losses()
        # Before the drain: a record that is refused in between is told next time.
        if lost := calls.lost():
            losses[pb.Loss.STAGE_KERNEL_BUFFER] = lost
        return Batch(calls.drain(), started_at_ns, self._read_at_ns, losses)

    def _drain_summaries(self) -> Batch:
        interval = int(self._object.read_variable("interval"))
        self._object.write_variable("interval", (interval + 1) & 0xFFFFFFFF)
        # Before the counters, who has ended: these counters are then their last. After them, the
        # names: no process is in the counters that is not named.
        _, ended = self._targets.read()
        keys, values = self._stats.read()
        names, _ = self._targets.read()
        started_at_ns, self._read_at_ns = self._read_at_ns, time.time_ns()
        increase = self._counters.advance(keys, values, interval)
        if ended:
            self._forget(ended, keys)
        return Batch(
            rows_of(increase, names, self._options.top),
            started_at_ns,
            self._read_at_ns,
            self._losses(),
        )

    def _forget(self, tgids: Sequence[int], keys: NDArray[Any]) -> None:
        self._stats.delete(keys[np.isin(keys["tgid"], tgids)])
        self._counters.forget(tgids)
        self._targets.forget(tgids)

    def _losses(self) -> dict[int, int]:
        _, account = self._account.read()
        uncounted = int(sum_over_cpus(account, "map_full")[0])
        total = uncounted + self._targets.unfollowed(self._object)
        lost, self._map_full = total - self._map_full, total
        return {pb.Loss.STAGE_MAP_FULL: lost} if lost else {}

    def close(self) -> None:
        self._calls = None
        self._targets.close()
        self._object.close()


def _refused_options(features: Features, rung: Rung) -> Mapping[str, str]:
    """The options that cannot be had on this rung, with what can."""
    if rung.buffer.taken:
        return refused_options(features)
    no_buffer = f"`summaries`: there is no buffer for events ({rung.buffer.why_not})"
    return {"mode": no_buffer, **refused_options(features)}


def rows_of(increase: Increase, names: Mapping[int, str], top: int = 0) -> list[pb.SyscallStats]:
    """Messages, busiest first by time; of TOP > 0, at most so many, the last the rest's sum."""
    order = np.argsort(increase.counters[:, TOTAL_NS])[::-1]
    rest = order[max(top - 1, 0) :] if top and len(order) > top else order[:0]
    shown = increase.take(order[: len(order) - len(rest)])
    rows = [
        _row(
            syscall_table.name_of(number),
            max_ns,
            counters,
            tgid=tgid,
            comm=names.get(tgid, ""),
            number=number,
        )
        for tgid, number, max_ns, counters in zip(
            shown.tgids.tolist(),
            shown.numbers.tolist(),
            shown.max_ns.tolist(),
            shown.counters,
            strict=True,
        )
    ]
    if len(rest):
        rows.append(
            _row(OTHER, int(increase.max_ns[rest].max()), increase.counters[rest].sum(axis=0))
        )
    return rows


def _row(
    name: str,
    max_ns: int,
    counters: NDArray[np.uint64],
    *,
    tgid: int = 0,
    comm: str = "",
    number: int = 0,
) -> pb.SyscallStats:
    total_ns = int(counters[TOTAL_NS])
    latency = counters[LATENCY:]
    slots_used = int(latency.nonzero()[0][-1]) + 1
    errors = counters[ERRORS:LATENCY]
    row = pb.SyscallStats(
        syscall_name=name,
        call_count=int(latency.sum()),
        total_duration_us=total_ns // 1000,
        total_duration_ns=total_ns,
        max_duration_ns=max_ns,
        latency_ns=pb.Log2Histogram(
            first_exponent=LATENCY_FIRST, slots=LATENCY_SLOTS, counts=latency[:slots_used].tolist()
        ),
    )
    if tgid:
        row.pid, row.syscall_number = tgid, number
        row.labels["pid"], row.labels["comm"] = str(tgid), comm
    if errors.any():
        row.error_count = int(errors.sum())
        for index in errors.nonzero()[0].tolist():
            row.errors_by_class[errno_class.NAMES[index]] = int(errors[index])
    return row
