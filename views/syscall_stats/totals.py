"""Batches of `syscall_stats` added up by system call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.client import Batch, Histogram
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.errnos import MAX_ERRNO, class_words, errno_name, is_failure, is_failure_class
from coral.views.pods import pod_words, row_pods

OTHER: Final = "other"  # the agent's name for the row that adds up what `top` left out
_SLOTS: Final = 64


@dataclass
class SyscallRow:
    """One system call, added up over processes and intervals. `causes` are its errors by what went
    wrong, and `failures` those errors that are not ordinary."""

    calls: int = 0
    errors: int = 0
    failures: int = 0
    total_ns: int = 0
    latency: Histogram = field(default_factory=Histogram)
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def mostly_failed(self) -> bool:
        """Whether more than half of the calls failed, by errors that are not ordinary."""
        return 2 * self.failures > self.calls

    def merge(self, more: SyscallRow) -> None:
        """Adds another system call."""
        self.calls += more.calls
        self.errors += more.errors
        self.failures += more.failures
        self.total_ns += more.total_ns
        self.latency.add(
            pb.Log2Histogram(
                first_exponent=more.latency.first_exponent,
                slots=len(more.latency.counts),
                counts=more.latency.counts.tolist(),
            ),
            more.latency.max_ns,
        )
        self.causes.update(more.causes)


class Call(NamedTuple):
    """A system call by its name, of one pod where the session watches several."""

    name: str
    pod: str = ""


_Named = tuple[Call, SyscallRow]


class SyscallTotals:
    """Rows by the system call."""

    def __init__(self) -> None:
        self._rows: dict[Call, SyscallRow] = {}

    @property
    def has_pods(self) -> bool:
        """Whether they are of more than one pod."""
        return len({call.pod for call in self._rows if call.pod}) > 1

    def add(self, batch: Batch) -> None:
        """Adds figures, or single calls."""
        for stats, pod in zip(batch.message.syscall_stats, row_pods(batch), strict=False):
            self._add_figures(stats, pod)
        if len(batch.events):
            of_row = batch.row_resources
            for at, pod in enumerate(pod_words(batch)):
                self._add_calls(batch, batch.events[of_row == at], pod)

    def _add_figures(self, stats: pb.SyscallStats, pod: str) -> None:
        name = stats.syscall_name
        row = self._rows.setdefault(Call(name, pod), SyscallRow())
        row.calls += stats.call_count
        row.errors += stats.error_count
        row.total_ns += stats.total_duration_ns
        row.latency.add(stats.latency_ns, stats.max_duration_ns)
        for error_class, count in stats.errors_by_class.items():
            row.causes[class_words(name, error_class)] += count
            row.failures += count * is_failure_class(name, error_class)

    def _add_calls(self, batch: Batch, events: NDArray[Any], pod: str) -> None:
        """EVENTS of a pod; each call counts for as many as its sample stands for."""
        weight = batch.message.sample_every or 1
        for index in np.unique(events["syscall"]).tolist():
            of_call = events[events["syscall"] == index]
            values, durations = of_call["return_value"], of_call["duration_ns"]
            name = str(batch.strings[index])
            row = self._rows.setdefault(Call(name, pod), SyscallRow())
            row.calls += weight * len(of_call)
            row.total_ns += weight * int(durations.sum())
            slots = np.log2(durations.clip(1)).astype(int)
            counts = weight * np.bincount(slots, minlength=_SLOTS)
            latency = pb.Log2Histogram(first_exponent=0, slots=_SLOTS, counts=counts.tolist())
            row.latency.add(latency, int(durations.max()))
            failed = -values[(values < 0) & (values >= -MAX_ERRNO)]
            for number, count in zip(*np.unique(failed, return_counts=True), strict=True):
                error = errno_name(int(number))
                row.errors += weight * int(count)
                row.causes[error] += weight * int(count)
                row.failures += weight * int(count) * is_failure(name, error)

    @property
    def total_ns(self) -> int:
        """Time in all system calls."""
        return sum(row.total_ns for row in self._rows.values())

    def busiest(self) -> list[_Named]:
        """By time spent, and last the agent's sum of what it left out."""

        def busy(item: _Named) -> tuple[bool, int]:
            return item[0].name == OTHER, -item[1].total_ns

        return sorted(self._rows.items(), key=busy)

    def choose(self, lines: int | None = None) -> tuple[list[_Named], list[_Named]]:
        """The rows to show, busiest first, and the rest, which needs one of the LINES. Rows whose
        calls mostly failed get up to half of the lines before others, however little time they
        took."""
        busiest = self.busiest()
        if lines is None or len(busiest) <= lines:
            return busiest, []
        failing = [item for item in busiest if item[0].name != OTHER and item[1].mostly_failed]
        failing.sort(key=lambda item: -item[1].failures)
        first = {call for call, _ in failing[: (lines - 1) // 2]}
        ordered = sorted(busiest, key=lambda item: item[0] not in first)
        shown = {call for call, _ in ordered[: lines - 1]}
        return (
            [item for item in busiest if item[0] in shown],
            [item for item in busiest if item[0] not in shown],
        )


def sum_of(rows: Iterable[SyscallRow]) -> SyscallRow:
    """Several system calls as one row."""
    total = SyscallRow()
    for row in rows:
        total.merge(row)
    return total
