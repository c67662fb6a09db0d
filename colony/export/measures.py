"""The metrics that rollups become: names, labels and buckets are those of the agents' own /metrics,
so that dashboards and alerts fit both. The one file of the export that names kinds.

A colony knows of all agents, so a series is of a service, not of a machine. Series count from the
colony's start, and their number is bounded as on an agent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)

from coral.colony.export.adding import Buckets, Group, groups
from coral.wire.http import BOUNDS_NS
from coral.wire.series import SeriesTable

OTHER: Final = "other"

Key = tuple[str, ...]

_SERVER_FAILED: Final = 500  # the first status of its class
_RTT_BOUNDS_US: Final = (
    500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
)  # fmt: skip
_ERROR_TYPES: Final = {
    "none": "",
    "econnrefused": "refused",
    "econnreset": "reset",
    "etimedout": "timed_out",
    "ehostunreach": "host_unreachable",
    "enetunreach": "net_unreachable",
}
_ERROR_OTHER: Final = "_OTHER"


class Measures(ABC):
    """The metrics of some tables, for as long as the colony lives. `dropped` counts what went to
    the series `other`, because there are MAX_SERIES."""

    keys: tuple[str, ...]
    rest: Key

    def __init__(self, max_series: int) -> None:
        self.dropped = 0
        self._most = max_series
        self._series: SeriesTable[Key] = SeriesTable(max_series, self.rest)

    def add(self, rows: pa.Table) -> None:
        """Adds rows of a rollup."""
        for group in groups(rows, self.keys):
            for key, figures in self.series_of(group):
                if not self._series.has_room(key, self._most):
                    self.dropped += 1
                self._series.add(key, figures)

    def collect(self) -> Iterable[Metric]:
        """The metrics as of now."""
        return self.families(self._series.copy())

    @abstractmethod
    def series_of(self, group: Group) -> Iterator[tuple[Key, NDArray[np.float64]]]:
        """What GROUP adds to which series."""

    @abstractmethod
    def families(self, series: dict[Key, NDArray[np.float64]]) -> Iterator[Metric]:
        """The metrics of SERIES."""


class SyscallMeasures(Measures):
    """Calls, errors and times by service and system call."""

    keys = ("syscall",)
    rest = (OTHER, OTHER)
    _buckets = Buckets("latency", tuple(2**exponent for exponent in range(8, 35, 2)), 1e9)
    _classes = (
        "other", "not_found", "permission", "again", "interrupted", "invalid", "exhausted",
        "connection",
    )  # fmt: skip

    def series_of(self, group: Group) -> Iterator[tuple[Key, NDArray[np.float64]]]:  # noqa: D102
        figures = group.figures
        errors = [figures.get(f"errors_{name}", 0) for name in self._classes]
        counts = self._buckets.of(figures)
        values = (figures.get("total_duration_ns", 0), *errors, *counts)
        yield (group.service, *group.keys), np.array(values, np.float64)

    def families(self, series: dict[Key, NDArray[np.float64]]) -> Iterator[Metric]:  # noqa: D102
        labels = ("service", "syscall")
        calls = CounterMetricFamily(
            "coral_syscall_calls", "System calls that ended.", labels=labels
        )
        errors = CounterMetricFamily(
            "coral_syscall_errors",
            "System calls that failed, by class of errno.",
            labels=(*labels, "class"),
        )
        seconds = HistogramMetricFamily(
            "coral_syscall_duration_seconds",
            "Time from a system call's start to its end.",
            labels=labels,
        )
        failures = 1 + len(self._classes)
        for key, figures in series.items():
            counts = figures[failures:].tolist()
            calls.add_metric(key, sum(counts))
            seconds.add_metric(key, self._buckets.cumulative(counts), float(figures[0]) / 1e9)
            for name, count in zip(self._classes, figures[1:failures].tolist(), strict=True):
                if count:
                    errors.add_metric((*key, name), count)
        yield from (calls, errors, seconds)


class HttpMeasures(Measures):
    """Times and sizes of requests by service, method, route and status."""

    keys = ("role", "method", "status", "route", "tls", "version")
    rest = ("server", OTHER, *[""] * 6)
    _buckets = Buckets("duration", BOUNDS_NS, 1e9)
    _labels = (
        "service", "http_request_method", "http_response_status_code", "http_route", "error_type",
        "url_scheme", "network_protocol_version",
    )  # fmt: skip

    def series_of(self, group: Group) -> Iterator[tuple[Key, NDArray[np.float64]]]:  # noqa: D102
        role, method, status, route, tls, version = group.keys
        figures = group.figures
        values = [
            figures.get(name, 0) for name in ("sum_ns", "request_body_bytes", "response_body_bytes")
        ]
        key: Key = (role, group.service, "", "", route, "", "", "")
        if method:  # else requests of several methods and so on
            key = (
                role, group.service, method, str(status or ""), route,
                _error_type(int(status or 0), group), "https" if tls else "http", f"1.{version}",
            )  # fmt: skip
        yield key, np.array((*values, *self._buckets.of(figures)), np.float64)

    def families(self, series: dict[Key, NDArray[np.float64]]) -> Iterator[Metric]:  # noqa: D102
        for role in ("server", "client"):
            seconds = HistogramMetricFamily(
                f"http_{role}_request_duration_seconds",
                "Time from the first byte of a request to the last byte of its response.",
                labels=self._labels,
            )
            asked, answered = (
                SummaryMetricFamily(
                    f"http_{role}_{side}_body_size_bytes",
                    f"Payload of the body of a {side}, without the framing of chunks.",
                    labels=self._labels,
                )
                for side in ("request", "response")
            )
            for (of_role, *labels), figures in series.items():
                if of_role != role:
                    continue
                sum_ns, request_bytes, response_bytes, *counts = figures.tolist()
                seconds.add_metric(labels, self._buckets.cumulative(counts), sum_ns / 1e9)
                count = int(sum(counts))
                asked.add_metric(labels, count, request_bytes)
                answered.add_metric(labels, count, response_bytes)
            yield from (seconds, asked, answered)


def _error_type(status: int, group: Group) -> str:
    """`error.type` of OpenTelemetry. Of requests without a response, the most frequent outcome:
    rollups add up those of all."""
    if status:
        return str(status) if status >= _SERVER_FAILED else ""
    prefix = "outcomes_"
    outcomes = {n: count for n, count in group.figures.items() if n.startswith(prefix) and count}
    word = max(outcomes, key=lambda name: outcomes[name], default="").removeprefix(prefix)
    return "" if word in ("unknown", "unspecified", "complete") else word


class TcpMeasures(Measures):
    """Connections, bytes, retransmits, resets and times by service and role."""

    keys = ("role", "error")
    rest = (OTHER, OTHER)
    _rtt = Buckets("rtt_us", _RTT_BOUNDS_US, 1e6)
    _handshake = Buckets("connect_us", _RTT_BOUNDS_US, 1e6)
    _attempts = (*_ERROR_TYPES.values(), _ERROR_OTHER)
    _counters = (
        ("io_bytes", "Payload, each byte once.", "direction",
         {"transmit": "bytes_sent", "receive": "bytes_received"}),
        ("retransmits", "Segments sent again, by what made the kernel do it.", "type",
         {"fast": "retransmits_fast", "timeout": "retransmits_timeout",
          "tail_loss_probe": "retransmits_tail_probe", "handshake": "retransmits_handshake"}),
        ("resets", "Resets sent and received.", "direction",
         {"transmit": "resets_sent", "receive": "resets_received"}),
    )  # fmt: skip
    _columns = (*(name for *_, columns in _counters for name in columns.values()), "listen_drops")
    _sums = ("rtt_us_delta_sum", "connect_us_delta_sum")

    def series_of(self, group: Group) -> Iterator[tuple[Key, NDArray[np.float64]]]:  # noqa: D102
        role, error = group.keys
        figures = dict(group.figures)
        if role == "listener":
            # Listeners count what is sent again for their connections, and what they drop.
            kept = ("resets_sent", "resets_received", "listen_drops")
            handshake = figures.get("syn_ack_retransmits", 0)
            figures = {name: figures.get(name, 0) for name in kept}
            figures["retransmits_handshake"] = handshake
            role = "server"
        elif role == "server":
            figures["retransmits_handshake"] = figures["listen_drops"] = 0
        yield (
            (group.service, role or OTHER),
            np.array(
                (
                    *(figures.get(name, 0) for name in self._columns),
                    *(figures.get(name, 0) for name in self._sums),
                    *self._attempts_of(figures, str(error)),
                    *self._rtt.of(figures),
                    *self._handshake.of(figures),
                ),
                np.float64,
            ),
        )

    def _attempts_of(self, figures: dict[str, int], error: str) -> list[int]:
        """Attempts to connect by how they ended, of rows by peer or by connection."""
        counts = dict.fromkeys(self._attempts, 0)
        counts[""] = figures.get("connections_established", 0) + figures.get("established", 0)
        failed = {error.lower(): figures.get("failed", 0)}
        prefix = "failures_"
        failed |= {
            name.removeprefix(prefix): count
            for name, count in figures.items()
            if name.startswith(prefix) and name != "failures_none"
        }
        for name, count in failed.items():
            kind = _ERROR_TYPES.get(name) or _ERROR_OTHER
            counts[kind] += count
        return list(counts.values())

    def families(self, series: dict[Key, NDArray[np.float64]]) -> Iterator[Metric]:  # noqa: D102
        prefix, labels = "system_network_tcp_", ("service", "role")
        counters = {
            name: CounterMetricFamily(prefix + name, text, labels=(*labels, label))
            for name, text, label, _ in self._counters
        }
        connections = CounterMetricFamily(
            f"{prefix}connections",
            "Attempts to connect that ended, by what failed.",
            labels=(*labels, "error_type"),
        )
        drops = CounterMetricFamily(
            f"{prefix}listen_drops",
            "Attempts to connect that a listener dropped: its backlog is full.",
            labels=labels,
        )
        rtt = HistogramMetricFamily(
            f"{prefix}rtt_duration_seconds",
            "Round trips, one for each acknowledgement of something new.",
            labels=labels,
        )
        handshake = HistogramMetricFamily(
            f"{prefix}handshake_duration_seconds",
            "Time from a client's first SYN to the connection, where sessions add up by peer.",
            labels=labels,
        )
        for key, values in series.items():
            left = iter(values.tolist())
            figures = {name: next(left) for name in self._columns}
            sums = {name: next(left) for name in self._sums}
            for name, _, _, columns in self._counters:
                for label, column in columns.items():
                    counters[name].add_metric((*key, label), figures[column])
            drops.add_metric(key, figures["listen_drops"])
            for kind in self._attempts:
                if (count := next(left)) or not kind:
                    connections.add_metric((*key, kind), count)
            for family, buckets, total in zip(
                (rtt, handshake), (self._rtt, self._handshake), sums.values(), strict=True
            ):
                counts = [next(left) for _ in range(buckets.size)]
                family.add_metric(key, buckets.cumulative(counts), total / 1e6)
        yield from (connections, *counters.values(), drops, rtt, handshake)


class ProfileMeasures(Measures):
    """CPU time by service."""

    keys = ()
    rest = (OTHER,)

    def series_of(self, group: Group) -> Iterator[tuple[Key, NDArray[np.float64]]]:  # noqa: D102
        names = ("cpu_ns", "cycles", "samples_lost")
        yield (group.service,), np.array([group.figures.get(it, 0) for it in names], np.float64)

    def families(self, series: dict[Key, NDArray[np.float64]]) -> Iterator[Metric]:  # noqa: D102
        for column, name, text, scale in (
            (0, "cpu_seconds", "CPU time of the watched processes, by samples.", 1e9),
            (1, "cpu_cycles",
             "Cycles of CPUs, in sessions with event=cycles, of the watched processes, by samples.",
             1),
            (2, "samples_lost", "Samples for which there was no room in the ring buffer.", 1),
        ):  # fmt: skip
            family = CounterMetricFamily(f"coral_profile_{name}", text, labels=("service",))
            for key, figures in series.items():
                family.add_metric(key, float(figures[column]) / scale)
            yield family


TABLES: Final[dict[str, type[Measures]]] = {
    "syscall_stats_1m": SyscallMeasures,
    "http_latency_1m": HttpMeasures,
    "tcp_metrics_1m": TcpMeasures,
    "tcp_peers_1m": TcpMeasures,
    "cpu_profile_1m": ProfileMeasures,
}
"""The measures of each rollup. Those of one class are added up in one place."""


class Totals:
    """All of them. At most MAX_SERIES label sets of each kind."""

    def __init__(self, max_series: int) -> None:
        self._measures = {made: made(max_series) for made in dict.fromkeys(TABLES.values())}

    @property
    def dropped(self) -> int:
        """How often something was added to `other`."""
        return sum(it.dropped for it in self._measures.values())

    def add(self, table: str, rows: pa.Table) -> None:
        """Adds rows of the rollup TABLE; other tables are left alone."""
        if made := TABLES.get(table):
            self._measures[made].add(rows)

    def collect(self) -> Iterator[Metric]:
        """All metrics as of now."""
        for each in self._measures.values():
            yield from each.collect()
