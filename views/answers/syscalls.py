"""System calls, those that took most time first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coral.views.answers.contract import (
    BAD,
    AnswerView,
    Shown,
    change,
    count_text,
    leading,
    text_of,
    time_cell,
    verdict_cell,
)
from coral.views.sheet import Column, Sheet
from coral.views.text import bar, format_ns, format_rate, format_share

_PARTS: Final = ("syscall",)
_SUBJECT: Final = Column("SYSCALL", right=False, fits=True, room=15)
_BAR_WIDTH: Final = 16


def sheets(shown: Shown) -> Iterator[Sheet]:
    """One table."""
    yield _compared(shown) if shown.compared else _table(shown)


def _table(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    sheet = Sheet(
        (
            *lead.columns,
            Column("CALLS"),
            Column("CALLS/S", spare=4),
            Column("ERRORS"),
            Column("P50", spare=3),
            Column("P95", spare=6),
            Column("P99", spare=1),
            Column("MAX", spare=5),
            Column("TIME"),
            Column("", right=False, spare=7, drawn=True),
        )
    )
    all_ns = sum(row["total_ns"] for row in shown.rows) or 1
    for row in shown.rows:
        share = row["total_ns"] / all_ns
        sheet.add(
            *lead.cells(row, text_of(row.get("syscall"))),
            count_text(row["calls"]),
            format_rate(row["calls"], shown.seconds) if shown.seconds else "",
            (count_text(row["errors"]), "" if row["errors"] else "dim"),
            time_cell(row["p50_ns"]),
            time_cell(row["p95_ns"]),
            time_cell(row["p99_ns"]),
            time_cell(row["max_ns"]),
            format_share(share),
            (bar(share, _BAR_WIDTH), "cyan"),
        )
    return sheet


def _compared(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    sheet = Sheet(
        (
            *lead.columns,
            Column("NOW", right=False),
            Column("CALLS", spare=1),
            Column("ERRORS", spare=2),
            Column("P50", spare=3),
            Column("P99"),
        )
    )
    for row in shown.rows:
        sheet.add(
            *lead.cells(row, text_of(row.get("syscall"))),
            verdict_cell(row),
            change(row, "calls", count_text),
            (change(row, "errors", count_text), BAD if row["verdict"] == "failing" else ""),
            change(row, "p50_ns", format_ns),
            change(row, "p99_ns", format_ns),
        )
    return sheet


VIEW: Final = AnswerView(sheets, "no system calls")
