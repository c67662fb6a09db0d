"""A tap of `http_latency` in tables: requests by route, busiest first, with those that fail, and
the slowest single requests where they are known; at the end histograms too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from coral.client import Batch
from coral.views import pods
from coral.views.ending import end_lines, end_table
from coral.views.headline import flowing, in_line
from coral.views.http_latency.events import event_lines, records
from coral.views.http_latency.tally import Requests, Tally, sum_of
from coral.views.http_latency.words import (
    CLIENT,
    OTHER,
    SERVER,
    is_error,
    is_refusal,
    is_success,
    outcome_word,
    process,
    request,
    status_word,
    unread_text,
)
from coral.views.intervals import Intervals
from coral.views.picking import pick
from coral.views.pictures import QUANTILES, filled, histogram_sheet, slot_edges, strip
from coral.views.sheet import MOST_LINES, Column, Content, Sheet, bytes_cell
from coral.views.text import (
    clauses,
    fitting,
    format_amount,
    format_clock,
    format_ns,
    format_rate,
    format_share,
    shorten,
    times,
)

_MOST_SLOWEST: Final = 10
_NOTHING: Final = "no HTTP requests"
_SEEN: Final = (
    "HTTP/1 on TCP sockets of the watched processes would be seen, in the clear or through "
    "OpenSSL; other TLS, HTTP/2, unix sockets and io_uring are not"
)
_BAD: Final = "bold red"
_WARNING: Final = "yellow"
_ROLES: Final[Mapping[int, tuple[str, str]]] = {
    SERVER: ("served", "SERVED IN"),
    CLIENT: ("made", "ANSWERED IN"),
}

_COLUMNS: Final = (
    Column("REQUEST", right=False, fits=True, room=20, comfort=32),
    Column("REQUESTS", spare=13),
    Column("REQ/S"),
    Column("ERRORS"),
    Column("NOT 2xx", right=False, fits=True, room=9, comfort=20, spare=3, optional=True),
    Column("IN", spare=12),
    Column("OUT", spare=11),
    Column("TTFB P50", spare=4),
    Column("TTFB P95", spare=10),
    Column("TTFB P99", spare=6),
    Column("P50", spare=1),
    Column("P95", spare=7),
    Column("P99"),
    Column("MAX", spare=5),
)
_STRIP_SPARE: Final = 2
_SLOWEST: Final = (
    Column("SLOWEST", right=False, fits=True, room=20, comfort=32),
    Column("BEGAN", right=False, spare=4),
    Column("STATUS", right=False),
    Column("TTFB", spare=1),
    Column("TOTAL"),
    Column("ENDED", right=False, spare=2, optional=True),
    Column("PROCESS", right=False, fits=True, room=16, spare=3),
)


class HttpStory:
    """The last interval, and the whole session."""

    def __init__(self) -> None:
        self._tally = Tally()

    @property
    def intervals(self) -> Intervals:
        """How long the session has watched."""
        return self._tally.intervals

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single requests, and what could not be read."""
        self._tally.add(batch)

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """The last interval, for a terminal. Where requests pause, the last one that had any."""
        tally, quiet_s = self._tally, self.intervals.quiet_s
        if not tally.latest:
            text = f"{_NOTHING} in {quiet_s:.0f}s: {self._unread or _SEEN}"
            return Group(*(Text(line, "dim") for line in clauses(text, width)))
        heads = [flowing(parts, width) for parts in self._headlines()]
        if self.intervals.is_quiet(quiet_s):
            heads.insert(0, Text(f"no requests for {quiet_s:.0f}s; the last were", "dim"))
        if self._unread:
            heads.append(Text(shorten(self._unread, width), "dim"))
        most = most_lines - 1 - sum(1 + head.plain.count("\n") for head in heads)
        slowest = self._slowest_sheet(tally.slowest_latest, most // 2 - 2)
        below: list[RenderableType] = [Text(), slowest.table(width)] if slowest.rows else []
        if below:
            most -= len(slowest.rows) + 2
        rows = self._routes_sheet(tally.latest.values(), self.intervals.rate_s, most)
        return Group(*heads, rows.table(width), *below)

    def interval_lines(self) -> Iterator[str]:
        """The last interval, for a pipe."""
        for parts in self._headlines():
            yield in_line(parts)
        rows = self._tally.latest.values()
        yield from self._routes_sheet(rows, self.intervals.rate_s, MOST_LINES).lines()
        slowest = self._slowest_sheet(self._tally.slowest_latest, _MOST_SLOWEST)
        if slowest.rows:
            yield ""
            yield from slowest.lines()

    def end_table(self, width: int) -> RenderableType:
        """The whole session, for a terminal."""
        return end_table(self._totals(), self._end_sheets(), width)

    def end_lines(self) -> Iterator[str]:
        """The whole session, for a pipe."""
        yield from end_lines(self._totals(), self._end_sheets())

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterator[str]:
        """A line for each single request."""
        yield from event_lines(batch, width)

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Each row as plain data."""
        yield from records(batch)

    def _headlines(self) -> Iterator[list[tuple[str, str]]]:
        """The last interval in a line for each role, each part with its style. An interval that is
        too short for rates has amounts in their place."""
        rate_s = self.intervals.rate_s
        seconds, per_s = (rate_s, "/s") if rate_s else (1.0, "")
        for role, requests in _by_role(self._tally.latest.values()):
            count = format_rate(requests.count, rate_s) if rate_s else f"{requests.count:,}"
            word, _ = _ROLES[role]
            noun = f"requests{per_s}" if rate_s else _noun(requests)
            parts = [(f"{count} {noun} {word}", ""), _errors(requests)]
            parts += [
                (f"p{q * 100:g} {format_ns(requests.total.quantile(q))}", "") for q in QUANTILES
            ]
            for amount, way in _carried(role, requests):
                parts.append((f"{format_amount(amount / seconds)}B{per_s} {way}", ""))
            yield parts

    def _totals(self) -> Iterator[str]:
        """The whole session: a line for each role."""
        if not self._tally.all:
            yield f"{_NOTHING}: {self._unread or _SEEN}"
        for role, requests in _by_role(self._tally.all.values()):
            word, _ = _ROLES[role]
            errors, _ = _errors(requests)
            carried = ", ".join(
                f"{format_amount(amount)}B {way}" for amount, way in _carried(role, requests)
            )
            ends = [
                f"{count:,} {outcome_word(outcome)}"
                for outcome, count in requests.outcomes.most_common()
            ]
            more = "".join(f"; {end}" for end in ends)
            yield f"{requests.count:,} {_noun(requests)} {word}, {errors}{more}; {carried}"

        if self._tally.all and self._unread:
            yield self._unread

    @property
    def _unread(self) -> str:
        """What could not be read so far."""
        return unread_text(self._tally.unread)

    def _end_sheets(self) -> Iterator[Sheet]:
        tally = self._tally
        if not tally.all:
            return
        yield self._routes_sheet(tally.all.values(), self.intervals.total_rate_s, MOST_LINES)
        slowest = self._slowest_sheet(tally.slowest, _MOST_SLOWEST)
        if slowest.rows:
            yield slowest
        for role, requests in _by_role(tally.all.values()):
            _, title = _ROLES[role]
            yield histogram_sheet(title, "REQUESTS", requests.total)

    def _routes_sheet(self, rows: Iterable[Requests], seconds: float, most: int) -> Sheet:
        """ROWS, gathered in SECONDS; 0 where that is too short for rates."""
        shown, rest = _choose(list(rows), max(most, 1))
        named = [(row, request(row.role, row.method, row.route)) for row in shown]
        if rest:
            text = f"and {len(rest):,} more"
            named.append((sum_of(rest), lambda width: text[:width]))
        slots = filled(row.total for row, _ in named)
        picture = Column(_range(named, slots), right=False, spare=_STRIP_SPARE)
        of_pods = len({row.pod for row in shown + rest if row.pod}) > 1
        sheet = Sheet((*([pods.COLUMN] if of_pods else []), *_COLUMNS, picture))
        for row, content in named:
            cells = _cells(row, content, seconds, slots)
            sheet.add(*([row.pod] if of_pods else []), *cells)
        return sheet

    @staticmethod
    def _slowest_sheet(events: Sequence[Mapping[str, Any]], most: int) -> Sheet:
        sheet = Sheet(_SLOWEST)
        for event in events[: max(min(most, _MOST_SLOWEST), 0)]:
            status = event["status"]
            style = _style(status, event["outcome"])
            sheet.add(
                request(event["role"], event["method"], event["path"]),
                format_clock(event["time_ns"]),
                (status_word(status), style),
                format_ns(event["first_byte_ns"]) if status else "",
                format_ns(event["duration_ns"]),
                (outcome_word(event["outcome"]), style),
                process(event["comm"], event["pid"]),
            )
        return sheet


def _choose(rows: Sequence[Requests], most: int) -> tuple[list[Requests], list[Requests]]:
    """The rows to show, busiest first, and the rest, which needs one of the MOST lines. The agent's
    own sum of others is last."""

    def busy(row: Requests) -> tuple[bool, int, int]:
        return row.route == OTHER, -row.count, -row.total.sum

    def worst(row: Requests) -> tuple[int, int]:
        return -row.errors, -row.count

    lines = most if len(rows) <= most else most - 1
    return pick(rows, lines, busy, worst, lambda row: row.errors > 0 and row.route != OTHER)


def _cells(
    row: Requests, content: Content, seconds: float, slots: range
) -> Iterator[Content | tuple[Content, str]]:
    style = _BAD if row.errors else ""
    received, sent = (amount for amount, _ in _carried(row.role, row))
    yield content, style
    yield f"{row.count:,}"
    yield format_rate(row.count, seconds) if seconds else ""
    yield f"{row.errors:,}", style or "dim"
    yield fitting(_besides(row)), style or _WARNING
    yield bytes_cell(received)
    yield bytes_cell(sent)
    for buckets in (row.first_byte, row.total):
        for quantile in QUANTILES:
            yield format_ns(buckets.quantile(quantile)) if buckets.count else ""
    yield format_ns(row.total.most or 0)
    yield strip(row.total.counts, slots), "cyan"


def _besides(row: Requests) -> list[str]:
    """Statuses other than 2xx and outcomes other than complete, the worst first, with how many."""
    parts = [
        (_severity(status), -count, f"{status} {times(count)}")
        for status, count in row.statuses.items()
        if status and not is_success(status)
    ]
    parts += [
        (1, -count, f"{outcome_word(outcome)} {times(count)}")
        for outcome, count in row.outcomes.items()
    ]
    return [text for *_, text in sorted(parts)]


def _severity(status: int) -> int:
    return 0 if is_error(status) else 2 if is_refusal(status) else 3


def _style(status: int, outcome: int) -> str:
    return _BAD if is_error(status, outcome) else _WARNING if is_refusal(status) else ""


def _range(named: Sequence[tuple[Requests, Content]], slots: range) -> str:
    """From which to which time the strips go."""
    bounds = next((row.total.bounds for row, _ in named if row.total.bounds), ())
    if not slots:
        return ""
    lower, _ = slot_edges(bounds, slots[0])
    last, upper = slot_edges(bounds, slots[-1])
    return f"{lower}-{upper}" if upper else f"{lower}-{last}+"


def _by_role(rows: Iterable[Requests]) -> Iterator[tuple[int, Requests]]:
    """The sums of those served and of those made, where there are any."""
    rows = list(rows)
    for role in _ROLES:
        of_role = [row for row in rows if row.role == role]
        if of_role:
            yield role, sum_of(of_role)


def _carried(role: int, row: Requests) -> tuple[tuple[int, str], tuple[int, str]]:
    """Bytes of bodies that came in and that went out."""
    asked, answered = row.request_bytes, row.response_bytes
    if role == CLIENT:
        asked, answered = answered, asked
    return (asked, "in"), (answered, "out")


def _noun(requests: Requests) -> str:
    return "request" if requests.count == 1 else "requests"


def _errors(requests: Requests) -> tuple[str, str]:
    count = requests.errors
    if not count:
        return "0 errors", "dim"
    word = "ERROR" if count == 1 else "ERRORS"
    return f"{count:,} {word} ({format_share(count / requests.count)})", _BAD
