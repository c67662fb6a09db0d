"""What Prometheus is told of connections: added up by service and role, for the agent's life.

Names are those of OpenTelemetry's proposal for `system.network.tcp.*` (semantic-conventions, issue
3682), in Prometheus form. There are addresses in labels only where a request asks for them.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from coral.collectors.contract import Batch, EventRows, Measures
from coral.mesh.v1 import ebpf_pb2 as pb

OTHER: Final = "other"
_PREFIX: Final = "system_network_tcp_"
_LABELS: Final = ("service", "role")
# Of servers, the port is the one that they listen on.
_PEER_LABELS: Final = ("network_peer_address", "server_port")
# Of round trips and handshakes; all of them are ends of the slots that the kernel counts in.
_BUCKETS_US: Final = (
    500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
)  # fmt: skip
_DURATIONS_US: Final = tuple(
    seconds * 1_000_000 for seconds in (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600)
)
_ROLES: Final = {
    pb.TCP_ROLE_CLIENT: "client",
    pb.TCP_ROLE_SERVER: "server",
    pb.TCP_ROLE_LISTENER: "server",
}
# How a connection failed that was never established: error.type of the proposal.
_ERROR_TYPES: Final = {
    "ECONNREFUSED": "refused",
    "ECONNRESET": "reset",
    "ETIMEDOUT": "timed_out",
    "EHOSTUNREACH": "host_unreachable",
    "ENETUNREACH": "net_unreachable",
}
_ERROR_OTHER: Final = "_OTHER"


class _Histogram:
    """Counts by upper bounds, and the sum, in microseconds."""

    def __init__(self, bounds_us: Sequence[float]) -> None:
        self.bounds_us = bounds_us
        self.counts = [0] * (len(bounds_us) + 1)
        self.sum_us = 0.0

    def observe(self, value_us: float) -> None:
        self.counts[bisect.bisect_left(self.bounds_us, value_us)] += 1
        self.sum_us += value_us

    def add(self, other: pb.BucketHistogram) -> None:
        """Adds one whose bounds are finer, and have all of these."""
        self.sum_us += other.sum
        for bound, count in zip((*other.bounds, None), other.counts, strict=False):
            at = len(self.bounds_us) if bound is None else bisect.bisect_left(self.bounds_us, bound)
            self.counts[at] += count

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: cumulative, by seconds."""
        ends = [f"{bound / 1e6:.9g}" for bound in self.bounds_us] + ["+Inf"]
        total, buckets = 0, []
        for end, count in zip(ends, self.counts, strict=True):
            total += count
            buckets.append((end, float(total)))
        return buckets


class _Series:
    """What there is of one service and role."""

    def __init__(self) -> None:
        self.counters = pb.TcpCounters()
        self.connections: Counter[str] = Counter()  # by error type, "" where it was established
        self.rtt = _Histogram(_BUCKETS_US)
        self.handshake = _Histogram(_BUCKETS_US)
        self.duration = _Histogram(_DURATIONS_US)

    def add_counters(self, delta: pb.TcpCounters, role: pb.TcpRole) -> None:
        for field, value in delta.ListFields():
            setattr(self.counters, field.name, getattr(self.counters, field.name) + value)
        if role == pb.TCP_ROLE_SERVER:  # the listener has them, and those that led to nothing
            self.counters.retransmits_handshake -= delta.retransmits_handshake

    def add_listener(self, delta: pb.TcpCounters) -> None:
        self.counters.retransmits_handshake += delta.syn_ack_retransmits
        self.counters.resets_sent += delta.resets_sent
        self.counters.resets_received += delta.resets_received

    def add_connection(self, row: pb.TcpMetrics) -> None:
        self.add_counters(row.delta, row.role)
        self.rtt.add(row.rtt_us_delta)
        self.connections[""] += row.established
        if row.established and row.connect_ns:
            self.handshake.observe(row.connect_ns / 1000)
        if row.end == pb.TCP_END_OPEN or row.preexisting:
            return
        if row.was_established:
            self.duration.observe((row.duration_ns - row.connect_ns) / 1000)
        else:
            self.connections[_ERROR_TYPES.get(row.error, _ERROR_OTHER)] += 1

    def add_peer(self, row: pb.TcpPeerMetrics) -> None:
        self.add_counters(row.delta, row.role)
        self.rtt.add(row.rtt_us_delta)
        self.handshake.add(row.connect_us_delta)
        self.connections[""] += row.connections_established
        for error, count in row.failures.items():
            self.connections[_ERROR_TYPES.get(error, _ERROR_OTHER)] += count


class _Key(NamedTuple):
    service: str
    role: str
    address: str = ""
    port: str = ""


class TcpMeasures(Measures):
    """Connections, bytes, retransmits, resets and times by service and role, and by peer where that
    is asked for."""

    def __init__(self, max_series: int) -> None:
        self._max_series = max_series
        self._lock = threading.Lock()  # a scrape runs in a thread of its own
        self._series: dict[_Key, _Series] = {}

    def observe(self, service: str, batch: Batch) -> None:
        if isinstance(batch.rows, EventRows):
            return  # no figures
        with self._lock:
            for row in batch.rows:
                if not isinstance(row, pb.TcpMetrics | pb.TcpPeerMetrics):
                    continue
                listens = row.role == pb.TCP_ROLE_LISTENER
                series = self._of(service, row, by_peer=batch.in_detail and not listens)
                if listens:
                    series.add_listener(row.delta)
                elif isinstance(row, pb.TcpMetrics):
                    series.add_connection(row)
                else:
                    series.add_peer(row)

    def _of(
        self, service: str, row: pb.TcpMetrics | pb.TcpPeerMetrics, *, by_peer: bool
    ) -> _Series:
        key = _Key(service, _ROLES.get(row.role, OTHER))
        if by_peer:
            # Peers are anybody: they leave room for services.
            peer = key._replace(address=row.remote_address, port=_server_port(row))
            room = peer in self._series or len(self._series) < self._max_series // 2
            key = peer if room else key._replace(address=OTHER)
        if key not in self._series and len(self._series) >= self._max_series:
            key = _Key(OTHER, OTHER)
        return self._series.setdefault(key, _Series())

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            peers = any(key.address for key in self._series)
            labels = (*_LABELS, *_PEER_LABELS) if peers else _LABELS
            families = _families(labels)
            for key, series in self._series.items():
                _expose(*families, key[: len(labels)], series)
        return (*families[0].values(), *families[1].values())


def _families(
    labels: Sequence[str],
) -> tuple[dict[str, CounterMetricFamily], dict[str, HistogramMetricFamily]]:
    counters = {
        name: CounterMetricFamily(_PREFIX + name, text, labels=(*labels, label))
        for name, text, label in (
            ("connections", "Attempts to connect that ended, by what failed.", "error_type"),
            ("io_bytes", "Payload, each byte once.", "direction"),
            ("retransmits", "Segments sent again, by what made the kernel do it.", "type"),
            ("resets", "Resets sent and received.", "direction"),
        )
    }
    histograms = {
        name: HistogramMetricFamily(f"{_PREFIX}{name}_duration_seconds", text, labels=labels)
        for name, text in (
            ("rtt", "Round trips, one for each acknowledgement of something new."),
            ("handshake", "Time from a client's first SYN to the connection."),
            ("connection", "Time from the connection to its end."),
        )
    }
    return counters, histograms


def _server_port(row: pb.TcpMetrics | pb.TcpPeerMetrics) -> str:
    if row.remote_address == OTHER:
        return ""
    if isinstance(row, pb.TcpPeerMetrics):
        return str(row.port)
    return str(row.remote_port if row.role == pb.TCP_ROLE_CLIENT else row.local_port)


def _expose(
    counters: dict[str, CounterMetricFamily],
    histograms: dict[str, HistogramMetricFamily],
    labels: Sequence[str],
    series: _Series,
) -> None:
    totals = series.counters
    for name, values in (
        ("connections", {"": 0, **series.connections}),
        ("io_bytes", {"transmit": totals.bytes_sent, "receive": totals.bytes_received}),
        (
            "retransmits",
            {
                "fast": totals.retransmits_fast,
                "timeout": totals.retransmits_timeout,
                "tail_loss_probe": totals.retransmits_tail_probe,
                "handshake": totals.retransmits_handshake,
            },
        ),
        ("resets", {"transmit": totals.resets_sent, "receive": totals.resets_received}),
    ):
        for value, count in values.items():
            counters[name].add_metric((*labels, value), count)
    for name, histogram in (
        ("rtt", series.rtt),
        ("handshake", series.handshake),
        ("connection", series.duration),
    ):
        histograms[name].add_metric(labels, histogram.buckets, histogram.sum_us / 1e6)
