"""Requests by route, or by whatever was asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from coral.client import Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.answers.contract import (
    BAD,
    TIME,
    WARNING,
    AnswerView,
    Row,
    Shown,
    change,
    count_text,
    leading,
    time_cell,
    verdict_cell,
)
from coral.views.http_latency.words import request
from coral.views.pictures import filled, histogram_sheet, slot_edges, strip
from coral.views.sheet import Column, Content, Sheet, bytes_cell
from coral.views.text import fitting, format_ns, format_rate, format_share, times

_PARTS: Final = ("role", "method", "route")
_SUBJECT: Final = Column("REQUEST", right=False, fits=True, room=20, comfort=32)
_OTHER_METHOD: Final = "_OTHER"


def sheets(shown: Shown) -> Iterator[Sheet | str]:
    """Requests; of a single service whose rows are all there, a histogram for each side, too."""
    if shown.compared:
        yield _compared(shown)
        return
    if not shown.cut:
        yield _headline(shown)
    yield _table(shown)
    if not shown.cut and "service" not in shown.by:
        yield from _histograms(shown)


def _table(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    slots = filled(_buckets(row, shown) for row in shown.rows)
    sheet = Sheet(
        (
            *lead.columns,
            Column("REQUESTS", spare=8),
            Column("REQ/S", spare=1),
            Column("ERRORS"),
            Column("NOT 2xx", right=False, fits=True, room=9, comfort=18, spare=4, optional=True),
            Column("BODIES OUT", spare=9),
            Column("TTFB P50", spare=6),
            Column("TTFB P99", spare=7),
            Column("P50", spare=2),
            Column("P95", spare=5),
            Column("P99"),
            Column("MAX", spare=5),
            Column(_range(shown, slots), right=False, spare=3),
        )
    )
    for row in shown.rows:
        style = BAD if row["errors"] else ""
        sheet.add(
            *lead.cells(row, (_request(row), style)),
            count_text(row["count"]),
            format_rate(row["count"], shown.seconds) if shown.seconds else "",
            (_errors(row), style or "dim"),
            (fitting(_besides(row)), style or WARNING),
            bytes_cell(row["response_body_bytes"]),
            time_cell(row["first_byte_p50_ns"]),
            time_cell(row["first_byte_p99_ns"]),
            time_cell(row["p50_ns"]),
            time_cell(row["p95_ns"]),
            time_cell(row["p99_ns"]),
            time_cell(row["max_ns"]),
            (strip(_buckets(row, shown).counts, slots), "cyan"),
        )
    return sheet


def _compared(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    sheet = Sheet(
        (
            *lead.columns,
            Column("NOW", right=False),
            Column("REQUESTS", spare=2),
            Column("ERRORS", spare=1),
            Column("P50", spare=3),
            Column("P99"),
        )
    )
    for row in shown.rows:
        sheet.add(
            *lead.cells(row, (_request(row), "")),
            verdict_cell(row),
            change(row, "count", count_text),
            change(row, "errors", count_text),
            change(row, "p50_ns", format_ns),
            change(row, "p99_ns", format_ns),
        )
    return sheet


def _headline(shown: Shown) -> str:
    count, errors = (sum(row[name] for row in shown.rows) for name in ("count", "errors"))
    share = format_share(errors / count) if count else "0%"
    whole = shown.seconds and TIME not in shown.by
    rate = f", {format_rate(count, shown.seconds)}/s" if whole else ""
    return f"{count:,} requests{rate}, {errors:,} errors ({share})"


def _request(row: Row) -> Content:
    """`← GET /users/{id}`, of those parts that the answer has."""
    method = row.get("method") or ""
    name = "OTHER" if method == _OTHER_METHOD else method
    return request(
        _number(pb.HttpRole, "HTTP_ROLE_", row.get("role") or ""),
        _number(pb.HttpMethod, "HTTP_METHOD_", name),
        row.get("route") or "",
    )


def _number(enum: Any, prefix: str, word: str) -> int:  # noqa: ANN401  an enum's wrapper
    found = enum.DESCRIPTOR.values_by_name.get(f"{prefix}{word.upper()}")
    return found.number if found else 0


def _errors(row: Row) -> str:
    return count_text(row["errors"])


def _besides(row: Row) -> list[str]:
    """Requests that did not end with a status of 2xx or 3xx, the worst first."""
    named = (("5xx", "status_5xx"), ("no answer", "no_response"), ("4xx", "status_4xx"))
    return [f"{word} {times(row[name])}" for word, name in named if row[name]]


def _buckets(row: Row, shown: Shown) -> Buckets:
    bounds = tuple(shown.bounds.get("histogram", ()))
    counts = list(row["histogram"] or ())
    return Buckets(bounds, counts, row["sum_ns"], row["min_ns"], row["max_ns"])


def _range(shown: Shown, slots: range) -> str:
    """From which to which time the strips go."""
    bounds: Sequence[int] = shown.bounds.get("histogram", ())
    if not slots:
        return ""
    lower, _ = slot_edges(bounds, slots[0])
    last, upper = slot_edges(bounds, slots[-1])
    return f"{lower}-{upper}" if upper else f"{lower}-{last}+"


def _histograms(shown: Shown) -> Iterator[Sheet]:
    """All requests of each side."""
    if "role" not in shown.by:
        return
    for role, title in (("server", "SERVED IN"), ("client", "ANSWERED IN")):
        together = Buckets()
        for row in shown.rows:
            if row["role"] == role:
                together.add(_buckets(row, shown))
        if together.count:
            yield histogram_sheet(title, "REQUESTS", together)


VIEW: Final = AnswerView(sheets, "no HTTP requests")
