"""The Prometheus metrics of system calls, by service and call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from coral.collectors.columns import group, sum_by_group
from coral.collectors.contract import Batch, EventRows, Measures
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats.counters import (
    COLUMNS,
    ERRORS,
    LATENCY,
    LATENCY_FIRST,
    TOTAL_NS,
)
from coral.collectors.syscall_stats.rows import OTHER
from coral.wire.series import SeriesTable, le

# Upper bounds of the Prometheus histogram, as exponents of two, in ns: 256 ns to 17 s, times four.
_BUCKET_EXPONENTS: Final = tuple(range(8, 35, 2))
# The kernel's slot SLOT counts latencies below 2**(LATENCY_FIRST + SLOT + 1) ns.
_BUCKETS: Final = tuple(
    (le(2**exponent / 1e9), exponent - LATENCY_FIRST - 1) for exponent in _BUCKET_EXPONENTS
)


class SyscallMeasures(Measures):
    """Calls, errors and latency by service and system call, for as long as the agent lives."""

    def __init__(self, max_series: int) -> None:
        self._series = SeriesTable(max_series, (OTHER, OTHER))

    def observe(self, service: str, batch: Batch) -> None:
        rows = batch.rows
        if isinstance(rows, EventRows):
            return  # filtered and sampled events do not measure the whole
        syscall = rows.columns["syscall"]
        first, of_row = group(syscall)
        figures = np.zeros((len(rows), COLUMNS), np.uint64)
        latency = rows.columns["latency_ns"]
        figures[:, TOTAL_NS] = rows.columns["total_duration_ns"]
        figures[:, ERRORS:LATENCY] = rows.columns["errors_by_class"]
        figures[:, LATENCY : LATENCY + latency.shape[1]] = latency
        added = sum_by_group(figures, of_row, len(first))
        for call, counters in zip(syscall[first].tolist(), added, strict=True):
            self._series.add((service, rows.strings[call]), counters)

    def collect(self) -> Iterable[Metric]:
        return _families(self._series.copy())


def _families(series: Mapping[tuple[str, str], NDArray[np.uint64]]) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        "coral_syscall_calls", "System calls that ended.", labels=("service", "syscall")
    )
    errors = CounterMetricFamily(
        "coral_syscall_errors",
        "System calls that failed, by class of errno.",
        labels=("service", "syscall", "class"),
    )
    seconds = HistogramMetricFamily(
        "coral_syscall_duration_seconds",
        "Time from a system call's start to its end.",
        labels=("service", "syscall"),
    )
    for labels, counters in series.items():
        latency = counters[LATENCY:].cumsum()
        calls.add_metric(labels, int(latency[-1]))
        buckets = [(bound, float(latency[slot])) for bound, slot in _BUCKETS]
        buckets.append(("+Inf", float(latency[-1])))
        seconds.add_metric(labels, buckets, float(counters[TOTAL_NS]) / 1e9)
        for index, name in enumerate(errno_class.NAMES):
            if counters[ERRORS + index]:
                errors.add_metric((*labels, name), int(counters[ERRORS + index]))
    yield from (calls, errors, seconds)
