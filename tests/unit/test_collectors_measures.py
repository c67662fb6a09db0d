"""Prometheus' metrics are sums over rows, for each type of row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.collectors.contract import Batch, Measures, Summaries, Unread
from coral.collectors.http_latency.measures import HttpMeasures
from coral.collectors.syscall_stats import errno_class
from coral.collectors.syscall_stats.counters import LATENCY_SLOTS
from coral.collectors.syscall_stats.measures import SyscallMeasures
from coral.collectors.tcp_metrics.connections import BOUNDS_US
from coral.collectors.tcp_metrics.measures import TcpMeasures
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.series import le
from tests.summaries import Make, connections, peers, requests, syscalls

tops = st.integers(0, 6)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, 12)
few = settings(max_examples=25)


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def exposed(measures: Measures) -> Samples:
    """What a scrape gives, without what is zero."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in measures.collect()
        for sample in family.samples
        if sample.value
    }


class Sums:
    """The same figures, added up row by row."""

    def __init__(self) -> None:
        self.samples: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()

    def add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        self.samples[name, frozenset(labels.items())] += value  # type: ignore[assignment]

    def slot(
        self, name: str, count: int, up_to_s: float, bounds_s: Sequence[float], labels: Any
    ) -> None:
        """COUNT values of at most UP_TO_S."""
        self.add(f"{name}_count", count, labels)
        for bound in (*bounds_s, float("inf")):
            le = "+Inf" if bound == float("inf") else repr(float(bound))
            if up_to_s <= bound:
                self.add(f"{name}_bucket", count, {**labels, "le": le})


def assert_same(measures: Measures, sums: Sums) -> None:
    assert exposed(measures) == pytest.approx({k: v for k, v in sums.samples.items() if v})


@few
@given(seed=seeds, count=counts, top=tops)
def test_metrics_of_system_calls_are_sums_over_rows(seed: int, count: int, top: int) -> None:
    measures, sums = SyscallMeasures(100), Sums()
    name = "coral_syscall_duration_seconds"
    bounds_s = [2**exponent / 1e9 for exponent in range(8, 35, 2)]
    for each in (seed, seed + 1):
        summaries = syscalls(each, count, top)
        measures.observe("shop", Batch(summaries, 0, 1))
        for row in summaries.as_messages():
            assert isinstance(row, pb.SyscallStats)
            labels = {"service": "shop", "syscall": row.syscall_name}
            sums.add("coral_syscall_calls_total", row.call_count, labels)
            for of, failed in row.errors_by_class.items():
                sums.add("coral_syscall_errors_total", failed, {**labels, "class": of})
            for slot, calls in enumerate(row.latency_ns.counts):
                upper_s = 2 ** (row.latency_ns.first_exponent + slot + 1) / 1e9
                last = slot == row.latency_ns.slots - 1
                sums.slot(name, calls, float("inf") if last else upper_s, bounds_s, labels)
            sums.add(f"{name}_sum", row.total_duration_ns / 1e9, labels)
    assert_same(measures, sums)


PREFIX = "system_network_tcp_"
BUCKETS_S = [us / 1e6 for us in BOUNDS_US if us >= 500]
DURATIONS_S = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600]
ERRORS = {"ECONNREFUSED": "refused", "ETIMEDOUT": "timed_out"}


class Row:
    """A row of either type, added up under the labels of its series."""

    def __init__(self, sums: Sums, row: Any, *, by_peer: bool, labelled: bool) -> None:
        self.sums, self.row = sums, row
        self.listens = row.role == pb.TCP_ROLE_LISTENER
        client = row.role == pb.TCP_ROLE_CLIENT
        self.role = "client" if client else "server" if row.role else "other"
        self.labels = {"service": "shop", "role": self.role}
        if labelled:
            self.labels |= {"network_peer_address": "", "server_port": ""}
        if by_peer and not self.listens:
            single = isinstance(row, pb.TcpMetrics)
            port = (row.remote_port if client else row.local_port) if single else row.port
            self.labels["network_peer_address"] = row.remote_address
            self.labels["server_port"] = "" if row.remote_address == "other" else str(port)

    def add_up(self) -> None:
        delta = self.row.delta
        self.add("resets", delta.resets_sent, direction="transmit")
        self.add("resets", delta.resets_received, direction="receive")
        if self.listens:
            self.add("retransmits", delta.syn_ack_retransmits, type="handshake")
            self.add("listen_drops", delta.listen_drops)
            return
        self.add("io_bytes", delta.bytes_sent, direction="transmit")
        self.add("io_bytes", delta.bytes_received, direction="receive")
        self.add("retransmits", delta.retransmits_fast, type="fast")
        self.add("retransmits", delta.retransmits_timeout, type="timeout")
        self.add("retransmits", delta.retransmits_tail_probe, type="tail_loss_probe")
        if self.role != "server":
            self.add("retransmits", delta.retransmits_handshake, type="handshake")
        self.histogram("rtt", self.row.rtt_us_delta)
        if isinstance(self.row, pb.TcpPeerMetrics):
            self.add_peer(self.row)
        else:
            self.add_connection(self.row)

    def add_peer(self, row: pb.TcpPeerMetrics) -> None:
        self.histogram("handshake", row.connect_us_delta)
        self.add("connections", row.connections_established, error_type="")
        for error, failed in row.failures.items():
            self.add("connections", failed, error_type=ERRORS.get(error, "_OTHER"))

    def add_connection(self, row: pb.TcpMetrics) -> None:
        self.add("connections", row.established, error_type="")
        if row.established and row.connect_ns:
            self.observe("handshake", row.connect_ns, BUCKETS_S)
        if row.end == pb.TCP_END_OPEN or row.preexisting:
            return
        if row.was_established:
            self.observe("connection", row.duration_ns - row.connect_ns, DURATIONS_S)
        else:
            self.add("connections", 1, error_type=ERRORS.get(row.error, "_OTHER"))

    def add(self, name: str, value: float, **label: str) -> None:
        self.sums.add(f"{PREFIX}{name}_total", value, {**self.labels, **label})

    def observe(self, name: str, value_ns: int, bounds_s: Sequence[float]) -> None:
        of = f"{PREFIX}{name}_duration_seconds"
        self.sums.slot(of, 1, value_ns / 1e9, bounds_s, self.labels)
        self.sums.add(f"{of}_sum", value_ns / 1e9, self.labels)

    def histogram(self, name: str, buckets: pb.BucketHistogram) -> None:
        of = f"{PREFIX}{name}_duration_seconds"
        bounds = [*buckets.bounds, float("inf")]
        for slot, count in enumerate(buckets.counts):
            self.sums.slot(of, count, bounds[slot] / 1e6, BUCKETS_S, self.labels)
        self.sums.add(f"{of}_sum", buckets.sum / 1e6, self.labels)


@pytest.mark.parametrize("make", [connections, peers])
@few
@given(seed=seeds, count=counts, top=tops, by_peer=st.booleans())
def test_metrics_of_connections_are_sums_over_rows(
    make: Make, seed: int, count: int, top: int, *, by_peer: bool
) -> None:
    measures, sums = TcpMeasures(1000), Sums()
    batches = [make(each, count, top) for each in (seed, seed + 1)]
    rows: list[Any] = [row for batch in batches for row in batch.as_messages()]
    labelled = by_peer and any(row.role != pb.TCP_ROLE_LISTENER for row in rows)
    for batch in batches:
        measures.observe("shop", Batch(batch, 0, 1, in_detail=by_peer))
    for row in rows:
        Row(sums, row, by_peer=by_peer, labelled=labelled).add_up()
    assert_same(measures, sums)


def http_labels(row: pb.HttpLatencyHistogram) -> dict[str, str]:
    """The attributes of OpenTelemetry's conventions for a row, in Prometheus' form."""
    error = str(row.status) if row.status >= 500 else row.labels.get("outcome", "")
    return {
        "service": "shop",
        "http_request_method": row.labels.get("method", ""),
        "http_response_status_code": row.labels.get("status", ""),
        "http_route": row.route,
        "error_type": "" if error == "unknown" else error,
        "url_scheme": row.labels.get("scheme", ""),
        "network_protocol_version": row.labels.get("version", ""),
    }


@few
@given(seed=seeds, count=counts, top=tops)
def test_metrics_of_requests_are_sums_over_rows(seed: int, count: int, top: int) -> None:
    measures, sums = HttpMeasures(1000), Sums()
    for each in (seed, seed + 1):
        summaries = requests(each, count, top)
        measures.observe("shop", Batch(summaries, 0, 1))
        rows: Any = summaries.as_messages()
        for row in rows:
            labels, name = http_labels(row), f"http_{row.labels['role']}"
            bounds_s = [bound_ms / 1e3 for bound_ms in row.buckets]
            for slot, times in enumerate(row.counts):
                upper_s = [*bounds_s, float("inf")][slot]
                sums.slot(f"{name}_request_duration_seconds", times, upper_s, bounds_s, labels)
            sums.add(f"{name}_request_duration_seconds_sum", row.sum / 1e3, labels)
            for side in ("request", "response"):
                of = f"{name}_{side}_body_size_bytes"
                sums.add(f"{of}_sum", getattr(row, f"{side}_body_bytes"), labels)
                sums.add(f"{of}_count", row.count, labels)
    assert_same(measures, sums)


def test_requests_beyond_the_limit_are_other_of_their_role() -> None:
    measures, summaries = HttpMeasures(4), requests(1, 40, 0)
    measures.observe("shop", Batch(summaries, 0, 1))
    rows: Any = summaries.as_messages()
    for role in ("client", "server"):
        counted = [
            (dict(labels)["service"], value)
            for (name, labels), value in exposed(measures).items()
            if name == f"http_{role}_request_duration_seconds_count"
        ]
        assert "other" in dict(counted)
        made = sum(row.count for row in rows if row.labels["role"] == role)
        assert sum(value for _, value in counted) == made
    assert len({labels for name, labels in exposed(measures) if name.endswith("s_sum")}) <= 4


def test_what_cannot_be_read_is_counted_by_service_and_reason() -> None:
    measures, nothing = HttpMeasures(1), requests(1, 0, 0)
    for service, unread in (
        ("shop", {"tls": Unread(2, 100), "unseen": Unread(1, 7)}),
        ("shop", {"tls": Unread(1, 50)}),
        ("bank", {"http2": Unread(1, 0)}),  # beyond the limit
    ):
        measures.observe(service, Batch(nothing, 0, 1, unread=unread))
    assert {
        (name, *sorted(dict(labels).values())): n for (name, labels), n in exposed(measures).items()
    } == {
        ("coral_http_unread_total", "shop", "tls"): 3,
        ("coral_http_unread_bytes_total", "shop", "tls"): 150,
        ("coral_http_unread_total", "shop", "unseen"): 1,
        ("coral_http_unread_bytes_total", "shop", "unseen"): 7,
        ("coral_http_unread_total", "http2", "other"): 1,
    }


def test_series_beyond_the_limit_are_other() -> None:
    measures = SyscallMeasures(2)
    summaries = syscalls(1, 12, 0)
    measures.observe("shop", Batch(summaries, 0, 1))
    calls = {
        dict(labels)["syscall"]: value
        for (name, labels), value in exposed(measures).items()
        if name == "coral_syscall_calls_total"
    }
    first, second = dict.fromkeys(row.syscall_name for row in _syscall_rows(summaries)[:2])
    assert set(calls) == {first, second, "other"}
    assert sum(calls.values()) == sum(row.call_count for row in _syscall_rows(summaries))


def test_peers_leave_half_of_the_series_to_services() -> None:
    measures = TcpMeasures(4)
    measures.observe("shop", Batch(connections(1, 12, 0), 0, 1, in_detail=True))
    addresses = {
        dict(labels).get("network_peer_address")
        for name, labels in exposed(measures)
        if name == f"{PREFIX}io_bytes_total"
    }
    assert "other" in addresses
    assert (
        len({labels for name, labels in exposed(measures) if "rtt" in name and "sum" in name}) <= 5
    )


def _syscall_rows(summaries: Summaries) -> list[pb.SyscallStats]:
    return [row for row in summaries.as_messages() if isinstance(row, pb.SyscallStats)]


def test_each_latency_is_in_the_bucket_whose_bound_it_is_below() -> None:
    """Exact, by hand: slot s of the kernel counts calls of less than 2**(7 + s) ns, and at least
    half of that, but for the first and the last."""
    latency = np.zeros((1, LATENCY_SLOTS), np.uint64)
    # 128..255 ns, 256..511 ns, 512..1023 ns, 1024..2047 ns, and 137 s or more.
    for slot, count in ((1, 1), (2, 10), (3, 100), (4, 1000), (LATENCY_SLOTS - 1, 10_000)):
        latency[0, slot] = count
    columns: dict[str, Any] = {
        "syscall": np.array([1], np.uint32),
        "latency_ns": latency,
        "total_duration_ns": np.array([123], np.uint64),
        "errors_by_class": np.zeros((1, len(errno_class.NAMES)), np.uint64),
    }
    rows = Summaries(pb.SyscallStatsColumns, columns, ("", "read"), lambda *_: (), 1)
    measures = SyscallMeasures(10)
    measures.observe("shop", Batch(rows, 0, 1))
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in exposed(measures).items()
        if name == "coral_syscall_duration_seconds_bucket"
    }
    assert {bound: buckets[bound] for bound in list(buckets)[:3]} == {
        "2.56e-07": 1,  # 256 ns: those of less
        "1.024e-06": 111,  # 1024 ns
        "4.096e-06": 1111,
    }
    assert buckets["17.179869184"] == 1111
    assert buckets["+Inf"] == 11_111
    assert list(buckets) == [le(2**exponent / 1e9) for exponent in range(8, 35, 2)] + ["+Inf"]
