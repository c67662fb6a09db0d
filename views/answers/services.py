"""Every service in a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coral.views.answers.contract import (
    BAD,
    WARNING,
    AnswerView,
    Row,
    Shown,
    change,
    count_text,
    place_cells,
    places,
    time_cell,
    verdict_cell,
)
from coral.views.sheet import Column, Sheet
from coral.views.text import format_ns, format_rate, format_share

_NS_PER_S: Final = 1e9
_WITHOUT: Final = "(no service)"


def sheets(shown: Shown) -> Iterator[Sheet]:
    """One table."""
    yield _compared(shown) if shown.compared else _table(shown)


def _table(shown: Shown) -> Sheet:
    columns, names = places(shown, ("service",))
    service = _service_columns(shown)
    sheet = Sheet(
        (
            *service,
            *columns,
            Column("AGENTS", spare=6),
            Column("REQ/S"),
            Column("ERRORS", spare=1),
            Column("P99", spare=2),
            Column("CPUS", spare=4),
            Column("CALLS/S", spare=7),
            Column("OPENED", spare=8),
            Column("FAILED", spare=5),
            Column("RESENT", spare=3),
        )
    )
    for row in shown.rows:
        requests = row["requests"] + row["requests_made"]
        sheet.add(
            *([(row["service"] or _WITHOUT, "" if row["service"] else "dim")] if service else []),
            *place_cells(row, names),
            count_text(row["agents"]),
            _rate(requests, shown),
            _errors(row, requests),
            time_cell(row["p99_ns"]),
            _cpus(row, shown),
            _rate(row["calls"], shown),
            count_text(row["opened"]) if row["opened"] else "",
            (count_text(row["failed"]), BAD) if row["failed"] else "",
            _resent(row),
        )
    return sheet


def _compared(shown: Shown) -> Sheet:
    columns, names = places(shown, ("service",))
    service = _service_columns(shown)
    sheet = Sheet(
        (
            *service,
            *columns,
            Column("NOW", right=False),
            Column("REQUESTS", spare=2),
            Column("ERRORS", spare=1),
            Column("P99"),
        )
    )
    for row in shown.rows:
        sheet.add(
            *([row["service"] or _WITHOUT] if service else []),
            *place_cells(row, names),
            verdict_cell(row),
            change(row, "requests", count_text),
            change(row, "errors", count_text),
            change(row, "p99_ns", format_ns),
        )
    return sheet


def _service_columns(shown: Shown) -> list[Column]:
    if "service" not in shown.by:
        return []
    return [Column("SERVICE", right=False, fits=True, room=16, comfort=24)]


def _rate(count: int, shown: Shown) -> str:
    return format_rate(count, shown.seconds) if count and shown.seconds else ""


def _errors(row: Row, requests: int) -> tuple[str, str]:
    if not row["errors"]:
        return ("0" if requests else "", "dim")
    return f"{row['errors']:,} ({format_share(row['errors'] / max(requests, 1))})", BAD


def _cpus(row: Row, shown: Shown) -> str:
    if not (row["cpu_ns"] and shown.seconds):
        return ""
    return f"{row['cpu_ns'] / _NS_PER_S / shown.seconds:.2f}"


def _resent(row: Row) -> tuple[str, str]:
    if not row["segments_sent"]:
        return "", ""
    share = row["retransmits"] / row["segments_sent"]
    return format_share(share), WARNING if row["retransmits"] else "dim"


VIEW: Final = AnswerView(sheets, "no service was seen")
