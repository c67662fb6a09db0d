"""The ways in which a tap is shown: on a terminal, in a pipe, to a program."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final, Protocol

import click
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from coral.cli.common import echo_data
from coral.client import Account, Batch, EndReason, SessionEnd, Started
from coral.views.contract import Story
from coral.views.pods import attributed, lines_width, with_pods
from coral.views.text import shorten
from coral.wire.text import safe

_BAR_WIDTH: Final = 30
_SHORTEST_BAR: Final = 10  # less room than this has no bar
_SHORTEST_TARGET: Final = 12
_GAP: Final = "  "
_LINES_AROUND_TABLE: Final = 6
_REFRESH_PER_S: Final = 4
# The name of the reason says it all, or the command prints more of it on standard error.
_SAID_ELSEWHERE: Final = (EndReason.AGENT_SHUTDOWN, EndReason.PREEMPTED)


class Tapped:
    """The state of one tap."""

    def __init__(self, target: str, started: Started, story: Story) -> None:
        self.target = safe(target)
        self.story = story
        self.collector_id = started.collector_id
        self.started_at = time.time()
        self.expires_at = (started.expires_at_ns or 0) / 1e9
        self.lost: Counter[str] = Counter()
        self.unread: Mapping[str, tuple[int, int]] = {}  # so far
        self.end: SessionEnd | None = None
        self.interrupted = 0  # the signal

    def begin(self, at_ns: int) -> None:
        """Notes when the collector began to watch, by its agent's clock."""
        self.story.intervals.begin(at_ns)

    def add(self, batch: Batch) -> None:
        """Takes a batch in. One without rows says how far the collector has come, too."""
        self.story.intervals.reach(batch.message.interval_end_ns)
        self.unread = batch.unread
        if batch.count or batch.unread:
            self.story.add(batch)
        self.end = batch.end

    def count_lost(self, account: Account) -> None:
        """Notes what was lost so far: a sum over batches is off once the connection is renewed."""
        self.lost = Counter(account.lost) + Counter(account.lost_in_kernel)

    @property
    def end_text(self) -> str:
        """How it ended, for people."""
        if not self.end:
            return (
                f"incomplete: the connection to the agent was lost after {self._reached_clock}; "
                "what came then is not known"
            )
        text = self.end.reason.name.lower().replace("_", " ")
        if not self.end.detail or self.end.reason in _SAID_ELSEWHERE:
            return text
        return f"{text}: {safe(self.end.detail)}"

    @property
    def _reached_clock(self) -> str:
        """The time of day up to which batches have come."""
        return time.strftime("%H:%M:%S", time.localtime(self.story.intervals.reached_ns / 1e9))

    @property
    def totals_text(self) -> str:
        """The heading of the totals."""
        return f"totals of {self.story.intervals.seconds:.1f}s, {self.end_text}"


class Screen(Protocol):
    """One way to show a tap."""

    def update(self, batch: Batch) -> None:
        """A batch has come, and is not taken in yet."""

    def show(self) -> None:
        """Nothing more comes for now: every interval that has been taken in is complete."""

    def finish(self) -> None:
        """Shows the end and the totals."""

    def discard(self) -> None:
        """Ends without showing anything more."""


def screen_of(output: str, tapped: Tapped, config: Mapping[str, str]) -> Screen:
    """The way that OUTPUT, the collector's CONFIG and standard output ask for."""
    if output != "table":
        return _DataScreen(tapped, output)
    if config.get("mode") == "events":
        return _EventScreen(tapped)
    return _LiveScreen(tapped) if sys.stdout.isatty() else _PlainScreen(tapped)


class _DataScreen:
    """One object a row, for programs."""

    def __init__(self, tapped: Tapped, output: str) -> None:
        self._tapped = tapped
        self._output = output

    def update(self, batch: Batch) -> None:
        for record in attributed(batch, self._tapped.story.records(batch)):
            echo_data(record, self._output)
        for stage, count in batch.lost.items():
            echo_data({"lost": count, "stage": stage}, self._output)

    def show(self) -> None:
        """Every row is shown as it comes."""

    def finish(self) -> None:
        for what, (count, size) in self._tapped.unread.items():
            echo_data({"unread": what, "count": count, "bytes": size}, self._output)
        end = self._tapped.end
        reason = end.reason.name if end else "UNKNOWN"
        detail = end.detail if end else self._tapped.end_text
        echo_data({"end": reason.lower(), "detail": detail}, self._output)

    def discard(self) -> None:
        """Nothing is held back."""


class _PlainScreen:
    """A table for each interval, for a pipe."""

    def __init__(self, tapped: Tapped) -> None:
        self._tapped = tapped
        self._coming_ns = 0  # the end of the interval that has not been shown yet

    def update(self, batch: Batch) -> None:
        if not batch.count:
            return
        if batch.message.interval_end_ns != self._coming_ns:
            self.show()
        self._coming_ns = batch.message.interval_end_ns

    def show(self) -> None:
        if not self._coming_ns:
            return
        clock = time.strftime("%H:%M:%S", time.localtime(self._coming_ns / 1e9))
        self._coming_ns = 0
        click.echo(f"\n{clock}  {self._tapped.target}")
        for line in self._tapped.story.interval_lines():
            click.echo(line)

    def finish(self) -> None:
        self.show()
        tapped = self._tapped
        click.echo(f"\n{tapped.totals_text}")
        for line in tapped.story.end_lines():
            click.echo(line)
        for stage, count in tapped.lost.items():
            click.echo(f"lost {count:,} ({stage})")

    def discard(self) -> None:
        """Nothing has to be undone."""


class _EventScreen(_PlainScreen):
    """A line for each single event."""

    def __init__(self, tapped: Tapped) -> None:
        super().__init__(tapped)
        self._console = Console()

    def update(self, batch: Batch) -> None:
        width = self._console.width if self._console.is_terminal else None
        lines = self._tapped.story.event_lines(batch, lines_width(batch, width))
        if shown := list(with_pods(batch, lines)):
            click.echo("\n".join(shown))

    def finish(self) -> None:
        if self._console.is_terminal:
            click.echo()
            show_end(self._console, self._tapped)
        else:
            super().finish()


class _LiveScreen:
    """A table that is drawn anew with every interval, for a terminal."""

    def __init__(self, tapped: Tapped) -> None:
        self._tapped = tapped
        self._console = Console()
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESH_PER_S,
            transient=True,
        )
        self._live.start()

    def update(self, batch: Batch) -> None:
        """What is drawn comes from the story, which has not taken this batch in yet."""

    def show(self) -> None:
        self._live.refresh()

    def finish(self) -> None:
        self._live.stop()
        show_end(self._console, self._tapped)

    def discard(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        width = self._console.width
        lines = max(self._console.height - _LINES_AROUND_TABLE, 1)
        table = self._tapped.story.interval_table(width, lines)
        return Group(self._lease(width), Text(), table, _losses(self._tapped))

    def _lease(self, width: int) -> Text:
        """Whom this watches, and how much of its time is left; where there is no room, without the
        bar."""
        tapped = self._tapped
        lease_s = max(tapped.expires_at - tapped.started_at, 1e-3)
        left_s = max(tapped.expires_at - time.time(), 0)
        end = f"{left_s:.0f}s left, Ctrl-C stops"
        room = width - len(end) - len(_GAP)
        target = shorten(tapped.target, max(room, _SHORTEST_TARGET))
        bar_width = min(room - cell_len(target) - len(_GAP), _BAR_WIDTH)
        line = Text(target, "bold", no_wrap=True)
        if bar_width >= _SHORTEST_BAR:
            done = round(bar_width * min(max(1 - left_s / lease_s, 0), 1))
            line.append(_GAP).append("━" * done, "cyan").append("━" * (bar_width - done), "dim")
        return line.append(_GAP).append(end, "not bold dim")


def show_end(console: Console, tapped: Tapped) -> None:
    """The totals, on a terminal."""
    heading = Text(tapped.totals_text)
    heading.stylize("bold", 0, len("totals"))
    console.print(heading)
    console.print(tapped.story.end_table(console.width))
    if tapped.lost:
        console.print(_losses(tapped))


def _losses(tapped: Tapped) -> Text:
    lost = ", ".join(f"{count:,} {stage}" for stage, count in tapped.lost.items())
    return Text(f"lost: {lost}", "red") if lost else Text()
