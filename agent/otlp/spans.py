"""Requests whose trace is known, as spans. Synchronous: the rows are picked on the event loop, by
array; the spans are made in a thread.
"""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp

from coral.agent.otlp.resource import Resource, number, text
from coral.collectors.contract import Batch, EventRows
from coral.collectors.http_latency.summaries import method_text, outcome_text
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.resources import of_resource
from coral.wire.series import Service

_SPAN_ID_BYTES: Final = 8
_CLIENT_ERRORS: Final = 400
_SERVER_ERRORS: Final = 500


@dataclass(frozen=True, slots=True)
class Traced:
    """Rows of requests of one service, struct HttpRequest of shape (n,), and their strings."""

    service: str
    records: NDArray[Any]
    strings: Sequence[str]


def traced(service: str, batch: Batch) -> Iterator[Traced]:
    """The requests of a batch that belong to a trace and are over; those of each container by
    themselves, where the session watches pods."""
    rows = batch.rows
    if not isinstance(rows, EventRows) or rows.message is not pb.HttpRequest or not len(rows):
        return
    over = rows.records["outcome"] != pb.HTTP_OUTCOME_IN_PROGRESS
    records = rows.records[np.flatnonzero((rows.records["trace_id"] != 0) & over)]
    if not rows.resources and len(records):
        yield Traced(service, records, rows.strings)
        return
    for at in np.unique(records["resource"]).tolist() if len(records) else ():
        own = rows.resources[at - 1].attributes if at else {}
        told = of_resource(batch.attributes, own)
        of_pod = Service(told.get("service.name", service), {}, told)
        yield Traced(of_pod, records[records["resource"] == at], rows.strings)


class Queue:
    """Requests that wait to be exported: at most MOST, the oldest give way. Loop-free."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Traced] = deque()
        self.count = 0

    def add(self, requests: Traced) -> int:
        """Lets REQUESTS wait; returns how many gave way."""
        dropped = 0
        self._waiting.append(requests)
        self.count += len(requests.records)
        while self.count > self._most:
            oldest = self._waiting.popleft()
            kept = oldest.records[self.count - self._most :]
            dropped += len(oldest.records) - len(kept)
            self.count -= len(oldest.records) - len(kept)
            if len(kept):
                self._waiting.appendleft(Traced(oldest.service, kept, oldest.strings))
        return dropped

    def take(self, most: int) -> list[Traced]:
        """The oldest, at most MOST of them."""
        taken: list[Traced] = []
        while self._waiting and most:
            first = self._waiting.popleft()
            if len(first.records) > most:
                rest = Traced(first.service, first.records[most:], first.strings)
                self._waiting.appendleft(rest)
                first = Traced(first.service, first.records[:most], first.strings)
            taken.append(first)
            most -= len(first.records)
            self.count -= len(first.records)
        return taken


def request_of(requests: Iterable[Traced], resource: Resource) -> ExportTraceServiceRequest:
    """REQUESTS as spans, with ids of their own: children of the span that the caller named."""
    made = ExportTraceServiceRequest()
    for each in requests:
        of_service = made.resource_spans.add(resource=resource.of(each.service))
        spans = of_service.scope_spans.add(scope=resource.scope).spans
        names = each.records.dtype.names or ()
        ids = os.urandom(_SPAN_ID_BYTES * len(each.records))
        for at, values in enumerate(each.records.tolist()):
            span_id = ids[_SPAN_ID_BYTES * at : _SPAN_ID_BYTES * (at + 1)]
            spans.append(_span(dict(zip(names, values, strict=True)), each.strings, span_id))
    return made


def _span(row: dict[str, Any], strings: Sequence[str], span_id: bytes) -> otlp.Span:
    serves = row["role"] == pb.HTTP_ROLE_SERVER
    method, route = method_text(row["method"]), strings[row["route"]]
    start_ns = int(row["time_ns"])
    span = otlp.Span(
        trace_id=bytes.fromhex(strings[row["trace_id"]]),
        span_id=span_id,
        parent_span_id=bytes.fromhex(strings[row["parent_span_id"]]),
        name=f"{method} {route}" if serves and route else method,
        kind=otlp.Span.SPAN_KIND_SERVER if serves else otlp.Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=start_ns,
        end_time_unix_nano=start_ns + row["duration_ns"],
        attributes=_attributes(row, strings, method, route if serves else ""),
    )
    status = row["status"]
    if not status or status >= (_SERVER_ERRORS if serves else _CLIENT_ERRORS):
        span.status.code = otlp.Status.STATUS_CODE_ERROR
    if row["first_byte_ns"]:
        event = span.events.add(name="response.first_byte")
        event.time_unix_nano = start_ns + row["first_byte_ns"]
    return span


def _attributes(
    row: dict[str, Any], strings: Sequence[str], method: str, route: str
) -> list[KeyValue]:
    """Those of OpenTelemetry's conventions for HTTP spans."""
    serves, status = row["role"] == pb.HTTP_ROLE_SERVER, row["status"]
    peer = _address(row["remote_high"], row["remote_low"])
    here = _address(row["local_high"], row["local_low"])
    host, _, _ = strings[row["host"]].rpartition(":") if row["host"] else ("", "", "")
    host = host or strings[row["host"]]
    server_port = row["local_port"] if serves else row["remote_port"]
    found = [
        text("http.request.method", method),
        text("url.scheme", "https" if row["tls"] else "http"),
        text("url.path", strings[row["path"]]),
        text("network.protocol.version", f"1.{row['version']}"),
        text("network.peer.address", peer),
        number("network.peer.port", row["remote_port"]),
        text("server.address", host or (here if serves else peer)),
        number("server.port", server_port),
        number("process.pid", row["pid"]),
    ]
    if route:
        found.append(text("http.route", route))
    if row["query"]:
        found.append(text("url.query", strings[row["query"]]))
    if status:
        found.append(number("http.response.status_code", status))
    if not status:
        found.append(text("error.type", outcome_text(row["outcome"])))
    elif status >= (_SERVER_ERRORS if serves else _CLIENT_ERRORS):
        found.append(text("error.type", str(status)))
    return found


def _address(high: int, low: int) -> str:
    address = ipaddress.IPv6Address(high << 64 | low)
    return str(address.ipv4_mapped or address)
