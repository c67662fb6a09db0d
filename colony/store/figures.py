"""How the store fares, in figures, and as metrics for Prometheus."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from coral.colony.store.settings import Tier

_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class State(StrEnum):
    """What the store is doing."""

    OPENING = "opening"
    STORING = "storing"
    DISK_FULL = "disk_full"
    FAILING = "failing"
    CLOSED = "closed"


@dataclass
class Latency:
    """Durations, as a histogram."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))
    sum_s: float = 0.0
    worst_s: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds
        self.worst_s = max(self.worst_s, seconds)

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, _BOUNDS_S), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


@dataclass
class Figures:
    """Since the store was opened, and as of now. Written by the writing thread, read by any."""

    state: State = State.OPENING
    detail: str = ""
    """What is wrong, where something is."""
    commits: Latency = field(default_factory=Latency)
    seals: Latency = field(default_factory=Latency)
    rows: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=lambda: Counter({"commit": 0, "seal": 0}))
    """By what could not be done: `commit`, `seal`, `retire`, `open`."""
    reopened: int = 0
    repeated: int = 0
    """Deliveries that the store had already."""
    retired: int = 0
    queue_bytes: int = 0
    queue_items: int = 0
    hot_bytes: int = 0
    hot_rows: int = 0
    segments: Mapping[Tier, int] = field(default_factory=dict)
    segment_bytes: Mapping[Tier, int] = field(default_factory=dict)
    readers: int = 0
    committed_ns: int = 0
    moved_aside: str = ""
    missing: set[str] = field(default_factory=set)
    """Segments that questions asked for, and whose files are not there any more."""


def families(figures: Figures) -> Iterator[Metric]:
    """FIGURES as families of metrics, `coral_colony_store_…`."""
    name = "coral_colony_store"
    states = GaugeMetricFamily(
        f"{name}_state", "What the store is doing: 1 for the state it is in.", labels=["state"]
    )
    for state in State:
        states.add_metric([state], float(figures.state is state))
    yield states
    for what, latency, text in (
        ("commit", figures.commits, "Time that transactions took which store rows."),
        ("seal", figures.seals, "Time that it took to seal a generation of rows."),
    ):
        family = HistogramMetricFamily(f"{name}_{what}_duration_seconds", text)
        family.add_metric([], latency.buckets, latency.sum_s)
        yield family
    yield _counted(f"{name}_rows", "Rows stored, by table.", "table", figures.rows)
    yield _counted(f"{name}_failures", "What failed and is tried again.", "what", figures.failures)
    for what, value, text in (
        ("reopened", figures.reopened, "How often the database was opened again."),
        ("repeated", figures.repeated, "Deliveries that came again, and were not stored twice."),
        ("retired", figures.retired, "Segments dropped because of their age or the cap."),
    ):
        yield CounterMetricFamily(f"{name}_{what}", text, value=value)
    for what, value, text in (
        ("queue_bytes", figures.queue_bytes, "Deliveries that wait for a transaction."),
        ("queue_items", figures.queue_items, "How many deliveries wait for a transaction."),
        ("hot_bytes", figures.hot_bytes, "The hot file, with its log and spilled data."),
        ("hot_rows", figures.hot_rows, "Rows that are not sealed yet."),
        ("readers", figures.readers, "Questions being answered."),
        ("moved_aside", bool(figures.moved_aside), "Whether a hot file could not be read."),
        ("missing_segments", len(figures.missing), "Segments whose files are gone or damaged."),
    ):
        yield GaugeMetricFamily(f"{name}_{what}", text, value=float(value))
    yield GaugeMetricFamily(
        f"{name}_committed_timestamp_seconds",
        "When the last transaction was made.",
        value=figures.committed_ns / 1e9,
    )
    for what, by_tier, text in (
        ("segments", figures.segments, "Sealed segments."),
        ("segment_bytes", figures.segment_bytes, "Bytes of sealed segments."),
    ):
        gauge = GaugeMetricFamily(f"{name}_{what}", text, labels=["tier"])
        for tier in Tier:
            gauge.add_metric([tier], by_tier.get(tier, 0))
        yield gauge


def _counted(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in list(counts.items()):
        family.add_metric([value], count)
    return family
