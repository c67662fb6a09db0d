"""Batches of HTTP requests that no kernel gave: rows of figures, single requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.http import BOUNDS_NS
from coral.wire.rows import row_layout

CLIENT: Final = pb.HTTP_ROLE_CLIENT
SERVER: Final = pb.HTTP_ROLE_SERVER
GET: Final = pb.HTTP_METHOD_GET
POST: Final = pb.HTTP_METHOD_POST
START_NS: Final = 1_700_000_000 * 10**9
_BOUNDS_MS: Final = np.array(BOUNDS_NS) / 1e6
_ROWS: Final = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "http_requests").dtype
_TEXTS: Final = ("comm", "path", "route")


def row(
    route: str,
    times_ms: Sequence[float],
    *,
    status: int = 200,
    role: int = SERVER,
    method: int = GET,
    first_share: float = 0.5,
    outcome: str = "",
    **fields: Any,
) -> pb.HttpLatencyHistogram:
    """A row of requests that took TIMES_MS, and FIRST_SHARE of that to the first byte."""
    total = np.array(times_ms)
    first = total * first_share if status else total[:0]
    return pb.HttpLatencyHistogram(
        buckets=_BOUNDS_MS.tolist(), unit="ms", count=len(total), role=role, method=method,  # type: ignore[arg-type]
        route=route, status=status, version=1, outcomes={outcome: len(total)} if outcome else {},
        errors=len(total) if status >= 500 or (not status and outcome != "unknown") else 0,
        **_figures("", total), **_figures("first_byte_", first), **fields,
    )  # fmt: skip


def _figures(prefix: str, times_ms: Any) -> dict[str, Any]:
    slots = np.searchsorted(_BOUNDS_MS, times_ms)
    figures = {"sum": times_ms.sum()}
    if len(times_ms):
        figures |= {"min": times_ms.min(), "max": times_ms.max()}
    counts = {"counts": np.bincount(slots, minlength=len(_BOUNDS_MS) + 1).tolist()}
    return {f"{prefix}{name}": value for name, value in (figures | counts).items()}


def figures(start_s: float, end_s: float, *rows: pb.HttpLatencyHistogram) -> Batch:
    message = _message(start_s, end_s, len(rows))
    message.http_latency.extend(rows)
    return Batch(message, np.empty(0, _ROWS))


def requests(start_s: float, end_s: float, *events: Mapping[str, Any]) -> Batch:
    """Single requests; what they do not say is that of a `GET /` that a server answered at once."""
    message = _message(start_s, end_s, len(events))
    strings = [""]
    rows = np.zeros(len(events), _ROWS)
    for at, event in enumerate(events):
        whole: dict[str, Any] = {
            "time_ns": START_NS, "role": SERVER, "method": GET, "status": 200, "version": 1,
            "outcome": pb.HTTP_OUTCOME_COMPLETE, "comm": "shop", "path": "/", "pid": 77,
            "local_low": 0xFFFF_7F00_0001, "remote_low": 0xFFFF_7F00_0001, "remote_port": 40_000,
        } | dict(event)  # fmt: skip
        whole.setdefault("route", whole["path"])
        for name, value in whole.items():
            if name in _TEXTS and value not in strings:
                strings.append(value)
            rows[name][at] = strings.index(value) if name in _TEXTS else value
    message.strings.extend(strings)
    return Batch(message, rows)


def unread(at_s: float, **what: tuple[int, int]) -> Batch:
    """A batch without rows that says what could not be read so far: how many, and their bytes."""
    message = _message(at_s, at_s, 0)
    for name, (count, size) in what.items():
        message.unread.add(what=name, count=count, bytes=size)
    return Batch(message, np.empty(0, _ROWS))


def _message(start_s: float, end_s: float, count: int) -> pb.EbpfEventBatch:
    return pb.EbpfEventBatch(
        kind=pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY,
        service_name="shop",
        first_seq=1,
        count=count,
        interval_start_ns=START_NS + int(start_s * 1e9),
        interval_end_ns=START_NS + int(end_s * 1e9),
    )
