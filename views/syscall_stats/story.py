"""What a tap of `syscall_stats` shows: rows of batches added up by system call, and drawn."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from rich.table import Table
from rich.text import Text

from coral.client import Batch, Histogram
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.intervals import Intervals
from coral.views.text import bar, format_ns, safe
from coral.wire.kinds import kind_name

_SLOTS: Final = 64
_MAX_ERRNO: Final = 4095
_BAR_WIDTH: Final = 20
_QUANTILES: Final = {"P50": 0.5, "P95": 0.95, "P99": 0.99}


@dataclass
class SyscallRow:
    """One system call, added up over processes and intervals."""

    calls: int = 0
    errors: int = 0
    total_ns: int = 0
    latency: Histogram = field(default_factory=Histogram)


@dataclass
class SyscallTotals:
    """Rows by the name of the system call, and how long they were gathered."""

    rows: dict[str, SyscallRow] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, batch: pb.EbpfEventBatch) -> None:
        """Adds a batch."""
        for stats in batch.syscall_stats:
            row = self.rows.setdefault(stats.syscall_name, SyscallRow())
            row.calls += stats.call_count
            row.errors += stats.error_count
            row.total_ns += stats.total_duration_ns
            row.latency.add(stats.latency_ns, stats.max_duration_ns)

    def add_calls(self, batch: Batch) -> None:
        """Adds single calls; each counts for as many as its sample stands for."""
        events, weight = batch.events, batch.message.sample_every or 1
        for index in np.unique(events["syscall"]).tolist():
            of_call = events[events["syscall"] == index]
            values, durations = of_call["return_value"], of_call["duration_ns"]
            row = self.rows.setdefault(str(batch.strings[index]), SyscallRow())
            row.calls += weight * len(of_call)
            row.errors += weight * int(((values < 0) & (values >= -_MAX_ERRNO)).sum())
            row.total_ns += weight * int(durations.sum())
            slots = np.log2(durations.clip(1)).astype(int)
            counts = weight * np.bincount(slots, minlength=_SLOTS)
            latency = pb.Log2Histogram(first_exponent=0, slots=_SLOTS, counts=counts.tolist())
            row.latency.add(latency, int(durations.max()))

    def busiest(self) -> list[tuple[str, SyscallRow]]:
        """By time spent."""
        return sorted(self.rows.items(), key=lambda item: -item[1].total_ns)

    def table(self, most_rows: int | None = None) -> Table:
        """For a terminal."""
        table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
        table.add_column("SYSCALL")
        for column in ("CALLS", "CALLS/S", "ERRORS", *_QUANTILES, "MAX", "TIME"):
            table.add_column(column, justify="right")
        table.add_column("", width=_BAR_WIDTH)
        all_ns = sum(row.total_ns for row in self.rows.values()) or 1
        busiest = self.busiest()
        for name, row in busiest[:most_rows]:
            share = row.total_ns / all_ns
            table.add_row(
                name,
                f"{row.calls:,}",
                f"{row.calls / self.seconds:,.0f}" if self.seconds else "",
                Text(f"{row.errors:,}", "red" if row.errors else "dim"),
                *(format_ns(row.latency.quantile_ns(q)) for q in _QUANTILES.values()),
                format_ns(row.latency.max_ns),
                f"{share:.1%}",
                Text(bar(share, _BAR_WIDTH), "cyan"),
            )
        if most_rows is not None and len(busiest) > most_rows:
            table.add_row(Text(f"and {len(busiest) - most_rows} more", "dim"))
        return table

    def lines(self) -> Iterator[str]:
        """For a pipe: columns of fixed width, no colour."""
        all_ns = sum(row.total_ns for row in self.rows.values()) or 1
        for name, row in self.busiest():
            quantiles = " ".join(
                f"{format_ns(row.latency.quantile_ns(q)):>8}" for q in _QUANTILES.values()
            )
            rate = row.calls / self.seconds if self.seconds else 0
            yield (
                f"{name:<20} {row.calls:>10} {rate:>10.0f} {row.errors:>8} {quantiles} "
                f"{format_ns(row.latency.max_ns):>8} {row.total_ns / all_ns:>6.1%}"
            )


HEADER: Final = (
    f"{'SYSCALL':<20} {'CALLS':>10} {'CALLS/S':>10} {'ERRORS':>8} "
    f"{'P50':>8} {'P95':>8} {'P99':>8} {'MAX':>8} {'TIME':>6}"
)


class SyscallStory:
    """The last interval, and all of them."""

    def __init__(self) -> None:
        self._intervals = Intervals()
        self._latest = SyscallTotals()
        self._totals = SyscallTotals()

    @property
    def seconds(self) -> float:
        """How long it has gathered."""
        return self._totals.seconds

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single calls."""
        if self._intervals.begins(batch.message):
            self._latest = SyscallTotals(seconds=self._intervals.latest_s)
            self._totals.seconds = self._intervals.seconds
        if len(batch.events):
            self._totals.add_calls(batch)
            return
        self._latest.add(batch.message)
        self._totals.add(batch.message)

    def interval_table(self, _width: int, most_lines: int) -> Table:
        """The last interval, for a terminal."""
        return self._latest.table(most_lines)

    def interval_lines(self) -> Iterator[str]:
        """The last interval, for a pipe."""
        yield HEADER
        yield from self._latest.lines()

    def end_table(self, _width: int) -> Table:
        """All of it, for a terminal."""
        return self._totals.table()

    def end_lines(self) -> Iterator[str]:
        """All of it, for a pipe."""
        yield HEADER
        yield from self._totals.lines()

    def event_lines(self, batch: Batch) -> Iterator[str]:
        """A line for each single call."""
        yield from map(call_line, call_records(batch))

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Each row as plain data: a summary with its quantiles, or a single call."""
        yield from _summary_records(batch.message)
        yield from call_records(batch)


def call_records(batch: Batch) -> Iterator[dict[str, Any]]:
    """Each single call as plain data."""
    events = batch.events
    if not len(events):
        return
    syscalls, comms = batch.strings[events["syscall"]], batch.strings[events["comm"]]
    sample_every = batch.message.sample_every or 1
    for event, syscall, comm in zip(
        events.tolist(), syscalls.tolist(), comms.tolist(), strict=True
    ):
        call = dict(zip(events.dtype.names or (), event, strict=True))
        yield {
            "collector": kind_name(batch.message.kind),
            "service": batch.message.service_name,
            "ended_ns": call["ended_ns"],
            "pid": call["pid"],
            "tid": call["tid"],
            "comm": comm,
            "syscall": syscall,
            "return_value": call["return_value"],
            "duration_ns": call["duration_ns"],
            "sample_every": sample_every,
        }


def call_line(call: Mapping[str, Any]) -> str:
    """A single call for people: when, who, what, what came out, how long it took."""
    seconds, ns = divmod(call["ended_ns"], 10**9)
    clock = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{ns // 1000:06d}"
    value = call["return_value"]
    failed = -_MAX_ERRNO <= value < 0
    outcome = errno.errorcode.get(-value, str(value)) if failed else str(value)
    who = f"{safe(call['comm'])}/{call['tid']}"
    return (
        f"{clock}  {who:<22} {call['syscall']:<20} = {outcome:<12} "
        f"{format_ns(call['duration_ns']):>8}"
    )


def _summary_records(batch: pb.EbpfEventBatch) -> Iterator[dict[str, Any]]:
    for index, stats in enumerate(batch.syscall_stats):
        latency = Histogram()
        latency.add(stats.latency_ns, stats.max_duration_ns)
        yield {
            "collector": kind_name(batch.kind),
            "service": batch.service_name,
            "seq": batch.first_seq + index,
            "interval_start_ns": batch.interval_start_ns,
            "interval_end_ns": batch.interval_end_ns,
            "pid": stats.pid,
            "comm": stats.labels.get("comm", ""),
            "syscall": stats.syscall_name,
            "calls": stats.call_count,
            "errors": stats.error_count,
            "errors_by_class": dict(stats.errors_by_class),
            "total_ns": stats.total_duration_ns,
            "max_ns": stats.max_duration_ns,
            **{
                f"{name.lower()}_ns": round(latency.quantile_ns(q))
                for name, q in _QUANTILES.items()
            },
        }
