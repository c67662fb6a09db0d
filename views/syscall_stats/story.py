"""A tap of `syscall_stats` in a table: system calls, those that took most time first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from rich.console import RenderableType
from rich.text import Text

from coral.client import Batch
from coral.views import pods
from coral.views.intervals import Intervals
from coral.views.sheet import Column, Content, Sheet
from coral.views.syscall_stats.calls import QUANTILES, call_lines, records
from coral.views.syscall_stats.totals import SyscallRow, SyscallTotals, sum_of
from coral.views.text import bar, fitting, format_ns, format_rate, format_share, times

_BAR_WIDTH: Final = 20
_NOTHING: Final = "no system calls"
_NO_LATENCY: Final = "-"

_COLUMNS: Final = (
    Column("SYSCALL", right=False, fits=True, room=15, comfort=20, least=20),
    Column("CALLS", least=10),
    Column("CALLS/S", spare=4, least=9),
    Column("ERRORS", least=8),
    Column("WHY", right=False, fits=True, room=11, comfort=20, spare=2, optional=True, least=20),
    Column("P50", spare=3, least=7),
    Column("P95", spare=6, least=7),
    Column("P99", spare=1, least=7),
    Column("MAX", spare=5, least=7),
    Column("TIME", least=5),
    Column("", right=False, spare=7, drawn=True),
)


class SyscallStory:
    """The last interval, and the whole session."""

    def __init__(self) -> None:
        self.intervals = Intervals()
        self._latest = SyscallTotals()
        self._totals = SyscallTotals()

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single calls."""
        if self.intervals.add(batch.message):
            self._latest = SyscallTotals()
        self._latest.add(batch)
        self._totals.add(batch)

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """The last interval, for a terminal."""
        return _sheet(self._latest, self.intervals.rate_s, most_lines).table(width)

    def interval_lines(self) -> Iterator[str]:
        """The last interval, for a pipe."""
        yield from _sheet(self._latest, self.intervals.rate_s).lines()

    def end_table(self, width: int) -> RenderableType:
        """The whole session, for a terminal."""
        sheet = _sheet(self._totals, self.intervals.total_rate_s)
        return sheet.table(width) if sheet.rows else Text(_NOTHING, "dim")

    def end_lines(self) -> Iterator[str]:
        """The whole session, for a pipe."""
        sheet = _sheet(self._totals, self.intervals.total_rate_s)
        yield from sheet.lines() if sheet.rows else (_NOTHING,)

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterator[str]:
        """A line for each single call."""
        yield from call_lines(batch, width)

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Each row as plain data."""
        yield from records(batch)


def _sheet(totals: SyscallTotals, seconds: float, most_rows: int | None = None) -> Sheet:
    """TOTALS, gathered in so many SECONDS; 0 where that is too short for rates."""
    of_pods = totals.has_pods
    sheet = Sheet((pods.COLUMN, *_COLUMNS) if of_pods else _COLUMNS)
    shown, rest = totals.choose(most_rows)
    all_ns = totals.total_ns or 1
    for call, row in shown:
        cells = _cells(call.name, row, seconds, row.total_ns / all_ns)
        sheet.add(*([call.pod] if of_pods else []), *cells)
    if rest:
        one = sum_of(row for _, row in rest)
        cells = _cells(f"and {len(rest)} more", one, seconds, one.total_ns / all_ns)
        sheet.add(*([""] if of_pods else []), *cells)
    return sheet


def _cells(
    name: str, row: SyscallRow, seconds: float, share: float
) -> Iterator[Content | tuple[Content, str]]:
    yield name
    yield f"{row.calls:,}"
    yield format_rate(row.calls, seconds) if seconds else ""
    style = "red" if row.failures else "" if row.errors else "dim"
    yield f"{row.errors:,}", style
    yield _why(row), style
    returned = row.latency.max_ns  # 0 for a call that never returns, such as exit
    for quantile in QUANTILES.values():
        yield format_ns(row.latency.quantile_ns(quantile)) if returned else _NO_LATENCY
    yield format_ns(row.latency.max_ns) if returned else _NO_LATENCY
    yield format_share(share)
    yield bar(share, _BAR_WIDTH), "cyan"


def _why(row: SyscallRow) -> Content:
    """The errors by cause, the most frequent first, with how many where there are several. A cause
    that does not fit is left out, and never a part of a number."""
    causes = row.causes.most_common()
    if len(causes) <= 1:
        return "".join(cause for cause, _ in causes)
    return fitting([f"{cause} {times(count)}" for cause, count in causes])
