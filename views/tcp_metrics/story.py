"""A tap of `tcp_metrics` in tables: connections, busiest first, with those that fail; at the end
peers, failures by cause, and a histogram of the round trips."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from coral.client import Batch
from coral.views import pods
from coral.views.ending import end_lines, end_table
from coral.views.headline import flowing, in_line
from coral.views.intervals import Intervals
from coral.views.names import Names
from coral.views.pictures import histogram_sheet
from coral.views.sheet import MOST_LINES, Column, Content, Sheet, bytes_cell
from coral.views.tcp_metrics.events import event_line, records
from coral.views.tcp_metrics.flows import Flow, Health, choose, fold, fold_peers, is_bad, sum_of
from coral.views.tcp_metrics.peers import peer
from coral.views.tcp_metrics.tally import Tally, Trouble, event_rows
from coral.views.text import (
    format_age,
    format_amount,
    format_ns,
    format_rate,
    format_share,
    times,
)

_MOST_PEERS: Final = 20
_MOST_TROUBLES: Final = 15
_STYLES: Final = {Health.WELL: "", Health.LOSSY: "yellow", Health.BAD: "bold red"}
_US: Final = 1000

_CONNECTIONS: Final = (
    Column("PROCESS", right=False, fits=True, room=8, comfort=15),
    Column("PID", spare=9),
    Column("CONNECTION", right=False, fits=True, room=18, comfort=28),
    Column("STATE", right=False),
    Column("OUT/S", spare=1),
    Column("IN/S", spare=1),
    Column("OUT", spare=7),
    Column("IN", spare=7),
    Column("RTT", spare=3),
    Column("P50", spare=11),
    Column("P99", spare=8),
    Column("RESENT", spare=2),
    Column("RETRANS", spare=10, optional=True),
    Column("CWND", spare=12),
    Column("AGE", spare=6),
)
_PEERS: Final = (
    Column("PEER", right=False, fits=True, room=18, comfort=28),
    Column("OPEN"),
    Column("NEW/S", spare=2),
    Column("OUT/S", spare=1),
    Column("IN/S", spare=1),
    Column("P50", spare=6),
    Column("P99", spare=7),
    Column("RESENT", spare=3),
    Column("ENDED BADLY", right=False, fits=True, room=12, optional=True),
)
_PEER_TOTALS: Final = (
    Column("PEER", right=False, fits=True, room=18, comfort=28),
    Column("OPENED"),
    Column("OPEN", spare=9),
    Column("FAILED"),
    Column("OUT", spare=1),
    Column("IN", spare=1),
    Column("P50", spare=6),
    Column("P99", spare=7),
    Column("RESENT", spare=2),
    Column("RETRANS", spare=8, optional=True),
    Column("LISTENER", right=False, fits=True, room=20, optional=True),
)
_EVENT_TOTALS: Final = (
    Column("PEER", right=False, fits=True, room=18, comfort=28),
    Column("OPENED"),
    Column("CLOSED", spare=1),
    Column("FAILED"),
    Column("RESENT"),
    Column("RESETS"),
)
_TROUBLES: Final = (
    Column("ENDED BADLY", right=False),
    Column("TIMES"),
    Column("PROCESS", right=False, fits=True, room=8, spare=1, optional=True),
    Column("CONNECTION", right=False, fits=True, room=18, comfort=28),
    Column("WHY", right=False, fits=True, room=12, optional=True),
)


class TcpStory:
    """The last interval, and the whole session. With NAMES, an address is shown by name as soon as
    its name is known."""

    def __init__(self, names: Names | None = None) -> None:
        self._names = names
        self._tally = Tally()
        self._heard_s = time.monotonic()
        self._folded: tuple[bool, list[Flow]] | None = None

    @property
    def intervals(self) -> Intervals:
        """How long the session has watched."""
        return self._tally.intervals

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single events."""
        self._tally.add(batch)
        self._heard_s = time.monotonic()
        self._folded = None

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """The last interval, for a terminal: connections in which nothing moves stay in sight."""
        quiet_s = time.monotonic() - self._heard_s
        quiet = self._tally.intervals.is_quiet(quiet_s)
        if not self._folded or self._folded[0] != quiet:
            flows = [] if quiet else self._tally.latest
            idle = [] if self._tally.by_peer else self._tally.idle(everything=quiet)
            self._folded = quiet, self._fold([*flows, *idle])
        if quiet:
            head = Text(f"{self._open()}nothing moved for {quiet_s:.0f}s", "dim")
        else:
            head = flowing(self._headline(), width)
        most = most_lines - 3 - head.plain.count("\n")
        sheet = self._interval_sheet(self._folded[1], most)
        return Group(head, sheet.table(width)) if sheet.rows else head

    def interval_lines(self) -> Iterator[str]:
        """The last interval, for a pipe."""
        yield in_line(self._headline())
        yield from self._interval_sheet(self._fold(self._tally.latest), MOST_LINES).lines()

    def end_table(self, width: int) -> RenderableType:
        """The whole session, for a terminal."""
        return end_table(self._totals(), self._end_sheets(), width)

    def end_lines(self) -> Iterator[str]:
        """The whole session, for a pipe."""
        yield from end_lines(self._totals(), self._end_sheets())

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterator[str]:
        """A line for each single event."""
        if len(batch.events):
            yield from (event_line(event, self._names, width) for event in event_rows(batch))

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Each row as plain data."""
        yield from records(batch, self._names)

    def _fold(self, flows: Sequence[Flow]) -> list[Flow]:
        return fold_peers(flows) if self._tally.by_peer else fold(flows)

    def _open(self) -> str:
        return f"{self._tally.open_now:,} open, " if self._tally.knows_open else ""

    def _headline(self) -> Iterator[tuple[str, str]]:
        """The last interval in a line, each part with its style. An interval that is too short for
        rates has amounts in their place."""
        tally = self._tally
        latest = tally.interval
        rate_s = tally.intervals.rate_s
        seconds, per_s = (rate_s, "/s") if rate_s else (1.0, "")
        resets = sum(count for word, count in latest.ends.items() if word.endswith("RESET"))
        if tally.knows_open:
            yield f"{tally.open_now:,} open", ""
        yield f"{format_rate(latest.opened, rate_s) if rate_s else latest.opened} new{per_s}", ""
        yield f"{latest.failed:,} FAILED" if latest.failed else "0 failed", _bad(latest.failed)
        if resets:
            yield f"{resets:,} RESET", _bad(resets)
        if latest.dropped:
            yield f"{latest.dropped:,} DROPPED by a full backlog", _bad(latest.dropped)
        yield f"{format_amount(latest.bytes_out / seconds)}B{per_s} out", ""
        yield f"{format_amount(latest.bytes_in / seconds)}B{per_s} in", ""
        style = _STYLES[Health.LOSSY] if latest.retransmits else ""
        yield f"{format_share(latest.resent_share)} resent", style

    def _interval_sheet(self, flows: Sequence[Flow], most: int) -> Sheet:
        shown, rest = choose(flows, max(most, 1))
        by_peer, seconds = self._tally.by_peer, self._tally.intervals.rate_s
        pod = _PodCells([*shown, *rest])
        sheet = Sheet((*pod.columns, *(_PEERS if by_peer else _CONNECTIONS)))
        cells = self._peer_cells if by_peer else self._connection_cells
        called = _peer_alone if by_peer else peer
        for flow in shown:
            sheet.add(*pod.of(flow.pod), *cells(flow, called(flow, self._names), seconds))
        if rest:
            others = sum_of(rest)
            others.comm, others.pid, others.word, others.age_ns = "", 0, "", 0
            sheet.add(*pod.of(""), *cells(others, f"and {len(rest):,} more lines", seconds))
        return sheet

    def _connection_cells(
        self, flow: Flow, content: Content, seconds: float
    ) -> Iterator[Content | tuple[Content, str]]:
        style = _STYLES[flow.health]
        yield flow.comm
        yield str(flow.pid or "")
        yield content, style
        yield flow.word, style
        yield _bytes_rate(flow.bytes_out, seconds)
        yield _bytes_rate(flow.bytes_in, seconds)
        yield bytes_cell(flow.ever_out)
        yield bytes_cell(flow.ever_in)
        yield _us(flow.round_trip_us)
        yield _us(flow.rtt.quantile(0.5))
        yield _us(flow.rtt.quantile(0.99))
        yield _resent(flow)
        yield f"{flow.retransmits:,}" if flow.retransmits else ""
        yield f"{flow.window:,}" if flow.window else ""
        yield format_age(flow.age_ns) if flow.age_ns else ""

    def _peer_cells(
        self, flow: Flow, content: Content, seconds: float
    ) -> Iterator[Content | tuple[Content, str]]:
        yield content, _STYLES[flow.health]
        yield f"{flow.open:,}"
        yield format_rate(flow.opened, seconds) if seconds else ""
        yield _bytes_rate(flow.bytes_out, seconds)
        yield _bytes_rate(flow.bytes_in, seconds)
        yield _us(flow.rtt.quantile(0.5))
        yield _us(flow.rtt.quantile(0.99))
        yield _resent(flow)
        bad = ((word, count) for word, count in flow.ends.most_common() if is_bad(word))
        text = ", ".join(f"{word} {times(count)}" for word, count in bad)
        yield text, _STYLES[Health.BAD]

    def _totals(self) -> Iterator[str]:
        """The whole session in two lines: how much it carried, and how connections ended."""
        tally, everything = self._tally, self._tally.all
        if self._names:
            self._end_sheets()  # asks for the names
            self._names.settle()
        opened = f"{everything.opened:,} opened, {everything.failed:,} failed"
        share = format_share(everything.resent_share)
        if tally.single_events:
            yield f"{opened}; segments resent: {everything.retransmits:,}"
        else:
            yield (
                f"{self._open()}{opened}; {format_amount(everything.bytes_out)}B out, "
                f"{format_amount(everything.bytes_in)}B in; "
                f"{share} of {everything.segments:,} segments resent"
            )
        if everything.dropped:
            yield f"attempts to connect that a full backlog dropped: {everything.dropped:,}"
        if everything.ends:
            ends = sorted(everything.ends.items(), key=lambda item: (-item[1], item[0]))
            yield "ended: " + ", ".join(f"{count:,} {word}" for word, count in ends)

    def _end_sheets(self) -> list[Sheet]:
        sheets = [self._peer_totals(), self._trouble_sheet(), self._rtt_sheet()]
        return [sheet for sheet in sheets if sheet.rows]

    def _peer_totals(self) -> Sheet:
        events = self._tally.single_events
        shown, rest = choose(fold_peers(self._tally.peers()), _MOST_PEERS)
        pod = _PodCells([*shown, *rest])
        sheet = Sheet((*pod.columns, *(_EVENT_TOTALS if events else _PEER_TOTALS)))
        cells = self._event_total_cells if events else self._peer_total_cells
        for flow in shown:
            sheet.add(*pod.of(flow.pod), *cells(flow, _peer_alone(flow, self._names)))
        if rest:
            sheet.add(*pod.of(""), *cells(sum_of(rest), f"and {len(rest):,} more"))
        return sheet

    def _peer_total_cells(
        self, flow: Flow, content: Content
    ) -> Iterator[Content | tuple[Content, str]]:
        yield content, _STYLES[flow.health]
        yield f"{flow.opened:,}"
        yield f"{flow.open:,}"
        yield f"{flow.failed:,}", _bad(flow.failed)
        yield bytes_cell(flow.bytes_out)
        yield bytes_cell(flow.bytes_in)
        yield _us(flow.rtt.quantile(0.5))
        yield _us(flow.rtt.quantile(0.99))
        yield _resent(flow)
        yield f"{flow.retransmits:,}" if flow.retransmits else ""
        yield _listener(flow), _STYLES[flow.health]

    def _event_total_cells(
        self, flow: Flow, content: Content
    ) -> Iterator[Content | tuple[Content, str]]:
        yield content, _STYLES[flow.health]
        yield f"{flow.opened:,}"
        yield f"{flow.closed:,}"
        yield f"{flow.failed:,}", _bad(flow.failed)
        yield f"{flow.retransmits:,}", _STYLES[Health.LOSSY] if flow.retransmits else "dim"
        yield f"{flow.resets:,}", _bad(flow.resets)

    def _trouble_sheet(self) -> Sheet:
        troubles = self._tally.troubles.most_common()
        pod = _PodCells([trouble for trouble, _ in troubles])
        sheet = Sheet((*pod.columns, *_TROUBLES))
        for trouble, count in troubles[:_MOST_TROUBLES]:
            flow = Flow(trouble.role, trouble.address, trouble.port)
            style = _STYLES[Health.BAD]
            content = peer(flow, self._names)
            number, who = f"{count:,}", trouble.comm
            of_pod = pod.of(trouble.pod)
            sheet.add(*of_pod, (trouble.word, style), number, who, content, trouble.why)
        if rest := troubles[_MOST_TROUBLES:]:
            count = sum(count for _, count in rest)
            sheet.add(*pod.of(""), "", f"{count:,}", "", f"and {len(rest):,} more", "")
        return sheet

    def _rtt_sheet(self) -> Sheet:
        return histogram_sheet("ROUND TRIP", "ACKS", self._tally.all.rtt, _US)


class _PodCells:
    """The column of pods in a table of ROWS, if they are of more than one."""

    def __init__(self, rows: Sequence[Flow | Trouble]) -> None:
        self.columns = [pods.COLUMN] if len({row.pod for row in rows if row.pod}) > 1 else []

    def of(self, pod: str) -> list[str]:
        """The cell of a row, if there is that column."""
        return [pod] if self.columns else []


def _peer_alone(flow: Flow, names: Names | None) -> Content:
    """A peer without the number of its connections, which has columns of its own."""
    return peer(replace(flow, connections=1), names)


def _bytes_rate(amount: int, seconds: float) -> tuple[str, str]:
    return bytes_cell(amount / seconds) if seconds else ("", "")


def _us(us: float) -> str:
    return format_ns(us * _US) if us else ""


def _resent(flow: Flow) -> tuple[str, str]:
    if not flow.retransmits:
        return "0%", "dim"
    return format_share(flow.resent_share), _STYLES[Health.LOSSY]


def _listener(flow: Flow) -> Content:
    """The attempts that a listener dropped, and in how many intervals its backlog was full. The
    latter is left out where there is no room."""
    full = f"FULL {times(flow.full)}" if flow.full else ""
    if not flow.dropped:
        return full
    dropped = f"DROPPED {flow.dropped:,}"
    both = f"{dropped}, {full}" if full else dropped
    return lambda width: both if len(both) <= width else dropped


def _bad(count: int) -> str:
    return _STYLES[Health.BAD] if count else "dim"
