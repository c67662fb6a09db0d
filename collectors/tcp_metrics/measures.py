"""The Prometheus metrics of connections, by service and role.

Names are those of OpenTelemetry's proposal for `system.network.tcp.*` (semantic-conventions, issue
3682), in Prometheus form. Labels have addresses only in sessions that ask for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from coral.collectors.columns import group, sum_by_group
from coral.collectors.contract import Batch, EventRows, Measures
from coral.collectors.tcp_metrics.connections import BOUNDS_US, NAMES
from coral.collectors.tcp_metrics.names import OTHER
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.series import SeriesTable, le

Columns = Mapping[str, NDArray[Any]]

_PREFIX: Final = "system_network_tcp_"
_LABELS: Final = ("service", "role")
# For servers, the port is the one that they listen on.
_PEER_LABELS: Final = ("network_peer_address", "server_port")
# For round trips and handshakes.
_BUCKETS_US: Final = (
    500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
)  # fmt: skip
_DURATIONS_US: Final = tuple(
    seconds * 1_000_000 for seconds in (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600)
)
_ROLES: Final[Mapping[int, str]] = {
    pb.TCP_ROLE_CLIENT: "client",
    pb.TCP_ROLE_SERVER: "server",
    pb.TCP_ROLE_LISTENER: "server",
}
# Why an attempt to connect failed: error.type of the proposal.
_ERROR_TYPES: Final = {
    "ECONNREFUSED": "refused",
    "ECONNRESET": "reset",
    "ETIMEDOUT": "timed_out",
    "EHOSTUNREACH": "host_unreachable",
    "ENETUNREACH": "net_unreachable",
}
_ERROR_OTHER: Final = "_OTHER"
_ATTEMPT_TYPES: Final = ("", *_ERROR_TYPES.values(), _ERROR_OTHER)  # "" is success
_NO_PEER: Final = 0xFFFFFFFF  # in place of the index of an address


# A series is one array of counters, which these slices of it name. A histogram has a count for each
# bucket, the last without an upper bound, and then the sum of its values in nanoseconds.
_COUNTERS: Final = slice(0, len(NAMES))
_ATTEMPTS: Final = slice(_COUNTERS.stop, _COUNTERS.stop + len(_ATTEMPT_TYPES))
_RTT: Final = slice(_ATTEMPTS.stop, _ATTEMPTS.stop + len(_BUCKETS_US) + 2)
_HANDSHAKE: Final = slice(_RTT.stop, _RTT.stop + len(_BUCKETS_US) + 2)
_DURATION: Final = slice(_HANDSHAKE.stop, _HANDSHAKE.stop + len(_DURATIONS_US) + 2)
_WIDTH: Final = _DURATION.stop
# The bucket for each slot that the kernel counts in: its bounds are finer, and have all of ours.
_BUCKET_OF_SLOT: Final = np.searchsorted(_BUCKETS_US, (*BOUNDS_US, np.inf))
_RESETS: Final = [NAMES.index("resets_sent"), NAMES.index("resets_received")]
_HANDSHAKE_RETRANSMITS: Final = NAMES.index("retransmits_handshake")
_SYN_ACK_RETRANSMITS: Final = NAMES.index("syn_ack_retransmits")
_LISTEN_DROPS: Final = NAMES.index("listen_drops")


class _Key(NamedTuple):
    service: str
    role: str
    address: str = ""
    port: str = ""


class TcpMeasures(Measures):
    """Connections, bytes, retransmits, resets and times by service and role, and by peer for
    sessions that ask for it."""

    def __init__(self, max_series: int) -> None:
        self._max_series = max_series
        self._series = SeriesTable(max_series, _Key(OTHER, OTHER))

    def observe(self, service: str, batch: Batch) -> None:
        rows = batch.rows
        if isinstance(rows, EventRows):
            return  # no figures
        columns = rows.columns
        peers = rows.message is pb.TcpPeerMetricsColumns
        role = columns["role"]
        by_peer = (role != pb.TCP_ROLE_LISTENER) & batch.in_detail
        address = np.where(by_peer, columns["remote_address"], _NO_PEER)
        port = np.where(by_peer, columns["port"] if peers else _server_port(columns), 0)
        first, of_row = group(_packed(address, port, role))
        added = _counted(columns, of_row, role[first])
        if peers:
            _add_peers(added, columns, of_row, rows.strings)
        else:
            _add_connections(added, columns, of_row, rows.strings)
        listens = role[first] == pb.TCP_ROLE_LISTENER
        added[listens] = _of_listeners(added[listens])
        for row, more in zip(first.tolist(), added, strict=True):
            key = _Key(service, _ROLES.get(int(role[row]), OTHER))
            if address[row] != _NO_PEER:
                key = self._of_peer(key, rows.strings[address[row]], str(port[row]))
            self._series.add(key, more)

    def _of_peer(self, key: _Key, address: str, port: str) -> _Key:
        peer = key._replace(address=address, port="" if address == OTHER else port)
        # Anyone can be a peer, so peers leave room for services.
        room = self._series.has_room(peer, self._max_series // 2)
        return peer if room else key._replace(address=OTHER)

    def collect(self) -> Iterable[Metric]:
        return _exposed(self._series.copy())


def _exposed(series_by_key: Mapping[_Key, NDArray[np.uint64]]) -> Iterator[Metric]:
    peers = any(key.address for key in series_by_key)
    labels = (*_LABELS, *_PEER_LABELS) if peers else _LABELS
    families = _families(labels)
    for key, series in series_by_key.items():
        _expose(*families, key[: len(labels)], series)
    yield from (*families[0].values(), *families[1].values())


def _families(
    labels: Sequence[str],
) -> tuple[dict[str, CounterMetricFamily], dict[str, HistogramMetricFamily]]:
    counters = {
        name: CounterMetricFamily(_PREFIX + name, text, labels=(*labels, *of))
        for name, text, *of in (
            ("connections", "Attempts to connect that ended, by what failed.", "error_type"),
            ("io_bytes", "Payload, each byte once.", "direction"),
            ("retransmits", "Segments sent again, by what made the kernel do it.", "type"),
            ("resets", "Resets sent and received.", "direction"),
            ("listen_drops", "Attempts to connect that a listener dropped: its backlog is full."),
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


def _server_port(columns: Columns) -> NDArray[Any]:
    """The port at the server's end of each connection, of shape (n,)."""
    client = columns["role"] == pb.TCP_ROLE_CLIENT
    return np.where(client, columns["remote_port"], columns["local_port"])


def _packed(address: NDArray[Any], port: NDArray[Any], role: NDArray[Any]) -> NDArray[np.uint64]:
    """One number for each row, which is the same for rows of one series."""
    packed = address.astype(np.uint64)
    for values, bits in ((port, 16), (role, 8)):
        packed = (packed << np.uint64(bits)) | values.astype(np.uint64)
    return packed


def _counted(columns: Columns, of_row: NDArray[np.intp], roles: NDArray[Any]) -> NDArray[np.uint64]:
    """The counters and round trips of rows of either type, added up by group: of shape (groups,
    _WIDTH). OF_ROW is the group of each row, ROLES the role of each group."""
    added = np.zeros((len(roles), _WIDTH), np.uint64)
    added[:, _COUNTERS] = sum_by_group(columns["delta"], of_row, len(roles))
    # Listeners count what is sent again for their connections.
    added[roles == pb.TCP_ROLE_SERVER, _HANDSHAKE_RETRANSMITS] = 0
    added[roles != pb.TCP_ROLE_LISTENER, _LISTEN_DROPS] = 0
    _add_histograms(added[:, _RTT], columns, "rtt_us_delta", of_row)
    return added


def _add_connections(
    added: NDArray[np.uint64], columns: Columns, of_row: NDArray[np.intp], strings: Sequence[str]
) -> None:
    """Adds what only rows of TcpMetricsColumns have to ADDED, of shape (groups, _WIDTH)."""
    established, connect_ns = columns["established"], columns["connect_ns"]
    np.add.at(added[:, _ATTEMPTS.start], of_row, established)
    shook = (established > 0) & (connect_ns > 0)
    _observe(added[:, _HANDSHAKE], of_row[shook], connect_ns[shook], _BUCKETS_US)
    ended = (columns["end"] != pb.TCP_END_OPEN) & (columns["preexisting"] == 0)
    lasted = ended & (columns["was_established"] > 0)
    lasted_ns = np.maximum(columns["duration_ns"], connect_ns) - connect_ns
    _observe(added[:, _DURATION], of_row[lasted], lasted_ns[lasted], _DURATIONS_US)
    failed = ended & ~lasted
    failures = _attempt_columns(columns["error"][failed], strings)
    np.add.at(added, (of_row[failed], failures), 1)


def _add_peers(
    added: NDArray[np.uint64], columns: Columns, of_row: NDArray[np.intp], strings: Sequence[str]
) -> None:
    """Adds what only rows of TcpPeerMetricsColumns have to ADDED, of shape (groups, _WIDTH)."""
    _add_histograms(added[:, _HANDSHAKE], columns, "connect_us_delta", of_row)
    np.add.at(added[:, _ATTEMPTS.start], of_row, columns["connections_established"])
    at = _attempt_columns(columns["failure_names"], strings)
    for column, failures in zip(at.tolist(), columns["failures"].T, strict=True):
        np.add.at(added[:, column], of_row, failures)


def _of_listeners(added: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What listeners, of shape (groups, _WIDTH), add to the series of servers: SYN-ACKs that were
    sent again for all clients, also for those that never came, resets, and attempts dropped."""
    kept = np.zeros_like(added)
    kept[:, _HANDSHAKE_RETRANSMITS] = added[:, _SYN_ACK_RETRANSMITS]
    kept[:, _RESETS] = added[:, _RESETS]
    kept[:, _LISTEN_DROPS] = added[:, _LISTEN_DROPS]
    return kept


def _add_histograms(
    histogram: NDArray[np.uint64], columns: Columns, name: str, of_row: NDArray[np.intp]
) -> None:
    """Adds the columns NAME and NAME_sum, histograms by BOUNDS_US, to HISTOGRAM, of shape (groups,
    buckets + 1)."""
    slots = sum_by_group(columns[name], of_row, len(histogram))
    for bucket, counts in zip(_BUCKET_OF_SLOT.tolist(), slots.T, strict=False):
        histogram[:, bucket] += counts
    sums_us = sum_by_group(columns[f"{name}_sum"], of_row, len(histogram))
    histogram[:, -1] += sums_us * np.uint64(1000)


def _observe(
    histogram: NDArray[np.uint64],
    of_value: NDArray[np.intp],
    values_ns: NDArray[Any],
    bounds_us: Sequence[float],
) -> None:
    """Adds VALUES_NS, whose groups are OF_VALUE, to HISTOGRAM, of shape (groups, buckets + 1)."""
    buckets = np.searchsorted(np.array(bounds_us) * 1000, values_ns)
    np.add.at(histogram, (of_value, buckets), 1)
    np.add.at(histogram[:, -1], of_value, values_ns)


def _attempt_columns(errors: NDArray[Any], strings: Sequence[str]) -> NDArray[np.intp]:
    """The column of a series that counts attempts that failed with each of ERRORS, which are
    indices into STRINGS."""
    column_of = [_ATTEMPT_TYPES.index(_ERROR_TYPES.get(name, _ERROR_OTHER)) for name in strings]
    columns: NDArray[np.intp] = np.array(column_of, np.intp)[errors] + _ATTEMPTS.start
    return columns


def _buckets(histogram: NDArray[np.uint64], bounds_us: Sequence[float]) -> list[tuple[str, float]]:
    """In Prometheus' form: cumulative, by upper bounds in seconds."""
    ends = [le(bound / 1e6) for bound in (*bounds_us, float("inf"))]
    return list(zip(ends, histogram[:-1].cumsum().astype(float).tolist(), strict=True))


def _expose(
    counters: Mapping[str, CounterMetricFamily],
    histograms: Mapping[str, HistogramMetricFamily],
    labels: Sequence[str],
    series: NDArray[np.uint64],
) -> None:
    totals = dict(zip(NAMES, series[_COUNTERS].tolist(), strict=True))
    attempts = dict(zip(_ATTEMPT_TYPES, series[_ATTEMPTS].tolist(), strict=True))
    for name, values in (
        ("connections", {key: count for key, count in attempts.items() if count or not key}),
        ("io_bytes", {"transmit": totals["bytes_sent"], "receive": totals["bytes_received"]}),
        (
            "retransmits",
            {
                "fast": totals["retransmits_fast"],
                "timeout": totals["retransmits_timeout"],
                "tail_loss_probe": totals["retransmits_tail_probe"],
                "handshake": totals["retransmits_handshake"],
            },
        ),
        ("resets", {"transmit": totals["resets_sent"], "receive": totals["resets_received"]}),
    ):
        for value, count in values.items():
            counters[name].add_metric((*labels, value), count)
    if labels[_LABELS.index("role")] == _ROLES[pb.TCP_ROLE_LISTENER]:
        counters["listen_drops"].add_metric(labels, totals["listen_drops"])
    for name, where, bounds_us in (
        ("rtt", _RTT, _BUCKETS_US),
        ("handshake", _HANDSHAKE, _BUCKETS_US),
        ("connection", _DURATION, _DURATIONS_US),
    ):
        histogram = series[where]
        buckets = _buckets(histogram, bounds_us)
        histograms[name].add_metric(labels, buckets, float(histogram[-1]) / 1e9)
