"""The Prometheus metrics of requests, with the names and attributes of OpenTelemetry's semantic
conventions for HTTP, in Prometheus' form.

Sizes of bodies are sums and counts, not histograms: summaries have no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, SummaryMetricFamily

from coral.collectors.contract import Batch, EventRows, Measures, Unread
from coral.collectors.http_latency.summaries import (
    BUCKETS,
    OTHER,
    method_text,
    outcome_text,
    role_text,
)
from coral.collectors.http_latency.unread import WHAT
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.http import BOUNDS_NS
from coral.wire.series import SeriesTable, le

_UNREAD_LABELS: Final = ("service", "reason")
_LABELS: Final = (
    "service", "http_request_method", "http_response_status_code", "http_route", "error_type",
    "url_scheme", "network_protocol_version",
)  # fmt: skip
_ROLES: Final = ("server", "client")
_SERVER_FAILED: Final = 500  # the first status of its class

# A series is one array of counters: by bucket, then these.
_SUM_NS, _REQUEST_BYTES, _RESPONSE_BYTES = range(BUCKETS, BUCKETS + 3)
_WIDTH: Final = BUCKETS + 3
_ENDS: Final = tuple(le(bound / 1e9) for bound in (*BOUNDS_NS, float("inf")))


class _Key(NamedTuple):
    role: str
    service: str
    method: str = ""
    status: str = ""
    route: str = ""
    error: str = ""
    scheme: str = ""
    version: str = ""


class HttpMeasures(Measures):
    """Times and sizes of requests by service, method, route and status, for as long as the agent
    lives."""

    def __init__(self, max_series: int) -> None:
        # The rest of each role goes to a series of its own.
        self._most = max(0, max_series - len(_ROLES))
        self._series = SeriesTable(max_series, _Key("", OTHER))
        self._unread = SeriesTable(max_series, OTHER)  # by service, of few reasons each

    def observe(self, service: str, batch: Batch) -> None:
        rows = batch.rows
        if isinstance(rows, EventRows):
            return  # filtered events do not measure the whole
        if batch.unread:
            nothing = Unread(0, 0)
            unread = [batch.unread.get(what, nothing) for what in WHAT]
            figures = np.array([(it.count, it.bytes) for it in unread], np.uint64)
            self._unread.add(service, figures.reshape(-1))
        columns = rows.columns
        added = np.zeros((len(rows), _WIDTH), np.uint64)
        added[:, :BUCKETS] = columns["counts"]
        added[:, _SUM_NS] = columns["sum_ns"]
        added[:, _REQUEST_BYTES] = columns["request_body_bytes"]
        added[:, _RESPONSE_BYTES] = columns["response_body_bytes"]
        for key, figures in zip(_keys(service, columns, rows.strings), added, strict=True):
            room = self._series.has_room(key, self._most)
            self._series.add(key if room else _Key(key.role, OTHER), figures)

    def collect(self) -> Iterable[Metric]:
        return chain(_families(self._series.copy()), _unread_families(self._unread.copy()))


def _keys(
    service: str, columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
) -> Iterator[_Key]:
    """The series of each row."""
    # Rows without a response are of one outcome.
    outcomes = columns["outcomes"].argmax(axis=1)
    names = ("role", "method", "status", "route", "tls", "version")
    values = (*(columns[name].tolist() for name in names), outcomes.tolist())
    for role, method, status, route, tls, version, outcome in zip(*values, strict=True):
        if not method:  # requests of several methods and so on
            yield _Key(role_text(role), service, route=strings[route])
            continue
        yield _Key(
            role_text(role),
            service,
            method_text(method),
            str(status or ""),
            strings[route],
            _error_type(status, outcome),
            "https" if tls else "http",
            f"1.{version}",
        )


def _error_type(status: int, outcome: int) -> str:
    if status >= _SERVER_FAILED:
        return str(status)
    if status or outcome == pb.HTTP_OUTCOME_UNKNOWN:
        return ""
    return outcome_text(outcome)


def _families(series: Mapping[_Key, NDArray[np.uint64]]) -> Iterator[Metric]:
    for role in _ROLES:
        seconds = HistogramMetricFamily(
            f"http_{role}_request_duration_seconds",
            "Time from the first byte of a request to the last byte of its response.",
            labels=_LABELS,
        )
        asked, answered = (
            SummaryMetricFamily(
                f"http_{role}_{side}_body_size_bytes",
                f"Payload of the body of a {side}, without the framing of chunks.",
                labels=_LABELS,
            )
            for side in ("request", "response")
        )
        for key, figures in series.items():
            if key.role != role:
                continue
            labels, counts = key[1:], figures[:BUCKETS].cumsum()
            buckets = list(zip(_ENDS, counts.astype(float).tolist(), strict=True))
            seconds.add_metric(labels, buckets, float(figures[_SUM_NS]) / 1e9)
            count = int(counts[-1])
            asked.add_metric(labels, count, int(figures[_REQUEST_BYTES]))
            answered.add_metric(labels, count, int(figures[_RESPONSE_BYTES]))
        yield from (seconds, asked, answered)


def _unread_families(series: Mapping[str, NDArray[np.uint64]]) -> Iterator[Metric]:
    count = CounterMetricFamily(
        "coral_http_unread",
        "Connections of which something could not be read, by what that is; for `unseen`, reads "
        "and writes.",
        labels=_UNREAD_LABELS,
    )
    size = CounterMetricFamily(
        "coral_http_unread_bytes",
        "Bytes that could not be read; those of a connection are added when it ends.",
        labels=_UNREAD_LABELS,
    )
    for service, figures in series.items():
        for what, (number, length) in zip(WHAT, figures.reshape(-1, 2).tolist(), strict=True):
            if number or length:
                count.add_metric((service, what), number)
                size.add_metric((service, what), length)
    yield from (count, size)
