"""The Prometheus metrics of profiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coral.collectors.contract import Batch, EventRows, Measures
from coral.collectors.cpu_profile.naming import CODES
from coral.collectors.cpu_profile.ragged import Ragged
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.series import SeriesTable

_OTHER: Final = "other"
_UNKNOWN: Final = "[unknown]"  # in no module
_METHODS: Final = {
    pb.CPU_UNWINDING_UNSPECIFIED: "none",
    pb.CPU_UNWINDING_FRAME_POINTERS: "frame_pointers",
    pb.CPU_UNWINDING_EH_FRAME: "eh_frame",
}
_ENDS: Final = len(pb.CpuStackEnd.values())
_FIGURES: Final = 3  # taken, lost, truncated, before those by method
_PERIODS: Final = ("period_ns", "period_cycles")
# By the columns of what was used: the end of the metrics' names, the words, and the factor.
_UNITS: Final = (
    ("cpu_seconds", "CPU time", 1e9),
    ("cpu_cycles", "Cycles of CPUs, in sessions with event=cycles,", 1.0),
)


class ProfileMeasures(Measures):
    """CPU time by service and function, and an account of the samples, for as long as the agent
    lives."""

    def __init__(self, max_series: int) -> None:
        self._accounts = SeriesTable(max_series, _OTHER)  # by service
        self._used = SeriesTable(max_series, _OTHER)  # CPU time and cycles
        self._functions = SeriesTable(max_series, (_OTHER, _OTHER))

    def observe(self, service: str, batch: Batch) -> None:
        rows = batch.rows
        if isinstance(rows, EventRows) or not len(rows.columns["period_ns"]):
            return
        columns = rows.columns
        period = np.array([columns[name][0] for name in _PERIODS], np.uint64)
        counts = columns["count"].astype(np.uint64)
        figures = [columns[name][0] for name in ("samples", "samples_lost", "samples_truncated")]
        methods = np.bincount(columns["unwinding"], counts, len(_METHODS))
        self._accounts.add(service, np.array([*figures, *methods], np.uint64))
        self._used.add(service, counts.sum() * period)
        functions, samples = _by_leaf(columns, counts, len(rows.strings))
        order = np.argsort(samples)[::-1]
        for number, count in zip(functions[order].tolist(), samples[order].tolist(), strict=True):
            self._functions.add((service, _label(number, rows.strings)), np.uint64(count) * period)

    def collect(self) -> Iterable[Metric]:
        return chain(
            _account(self._accounts.copy()),
            _used(self._used.copy(), self._functions.copy()),
            _memory([code.memory_bytes for code in list(CODES)]),
        )


def _by_leaf(
    columns: Mapping[str, NDArray[Any]], counts: NDArray[np.uint64], strings: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The functions that samples were in, and how many were in each. A function is the number of
    its name among the STRINGS; those without names are one by module, because each of their samples
    may have an address of its own: the number of the module, plus STRINGS."""
    stacks = Ragged(columns["stack_frames"], columns["stack_length"].astype(np.int64))
    has_frames = stacks.lengths[columns["stack"]] > 0
    stack = columns["stack"][has_frames]
    leaves = stacks.flat[(stacks.starts + stacks.lengths - 1)[stack]]
    unnamed = columns["frame_flags"][leaves].astype(np.int64) & pb.CPU_FRAME_FLAG_UNNAMED != 0
    modules = columns["frame_module"][leaves].astype(np.int64) + strings
    keys = np.where(unnamed, modules, columns["frame_function"][leaves].astype(np.int64))
    functions, of_row = np.unique(keys, return_inverse=True)
    return functions, np.bincount(of_row, counts[has_frames], len(functions))


def _label(number: int, strings: Sequence[str]) -> str:
    """A function of `_by_leaf` by its name; `[libfoo.so]` for those of a module without names."""
    if number < len(strings):
        return strings[number]
    module = strings[number - len(strings)]
    if module.startswith("["):
        return module
    return f"[{module.rpartition('/')[2]}]" if module else _UNKNOWN


def _account(accounts: Mapping[str, NDArray[np.uint64]]) -> Iterator[Metric]:
    labels = ("service",)
    taken, lost, truncated = (
        CounterMetricFamily(f"coral_profile_samples_{name}", text, labels=labels)
        for name, text in (
            ("taken", "Samples of threads on a CPU."),
            ("lost", "Samples for which there was no room in the ring buffer."),
            ("truncated", "Samples whose user stack was copied in part, because it was too long."),
        )
    )
    unwound = CounterMetricFamily(
        "coral_profile_samples_unwound",
        "Samples by how the callers on their user stacks were found.",
        labels=("service", "method"),
    )
    for service, figures in accounts.items():
        for family, figure in zip((taken, lost, truncated), figures.tolist(), strict=False):
            family.add_metric((service,), figure)
        for method, figure in zip(_METHODS.values(), figures[_FIGURES:].tolist(), strict=True):
            unwound.add_metric((service, method), figure)
    yield from (taken, lost, truncated, unwound)


def _used(
    services: Mapping[str, NDArray[np.uint64]],
    functions: Mapping[tuple[str, str], NDArray[np.uint64]],
) -> Iterator[Metric]:
    """CPU time, and cycles of those sessions that count them, in place of time."""
    for column, (unit, what, scale) in enumerate(_UNITS):
        by_service = CounterMetricFamily(
            f"coral_profile_{unit}",
            f"{what} of the watched processes, by samples.",
            labels=("service",),
        )
        by_function = CounterMetricFamily(
            f"coral_profile_function_{unit}",
            f"{what} in functions themselves, without those they call, by samples; functions "
            "without names are one by module.",
            labels=("service", "function"),
        )
        for service, figures in services.items():
            if figures[column] or (not column and not figures.any()):
                by_service.add_metric((service,), float(figures[column]) / scale)
        for key, figures in functions.items():
            if figures[column]:
                by_function.add_metric(key, float(figures[column]) / scale)
        yield from (by_service, by_function)


def _memory(caches: Sequence[Mapping[str, int]]) -> Iterator[Metric]:
    size = GaugeMetricFamily(
        "coral_profile_cache_bytes",
        "Memory that symbols, names and unwind tables take now.",
        labels=("cache",),
    )
    for cache, total in sum(map(Counter, caches), Counter[str]()).items():
        size.add_metric((cache,), total)
    yield size
