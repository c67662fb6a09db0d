"""The ways in which a tap is shown: on a terminal, in a pipe, to a program."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coral.cli.common import echo_data
from coral.client import Batch, SessionEnd, Started
from coral.mesh.v1 import ebpf_pb2 as pb

_LEASE_BAR_WIDTH: Final = 30
_LINES_AROUND_TABLE: Final = 6
_REFRESH_PER_S: Final = 4


class Story(Protocol):
    """What a tap of one kind of collector tells, however it is shown."""

    @property
    def seconds(self) -> float:
        """How long it has gathered."""

    def add(self, batch: Batch) -> None:
        """Takes in a batch that has rows."""

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """The last interval, for a terminal."""

    def interval_lines(self) -> Iterable[str]:
        """The last interval, for a pipe: columns that stand, no colour."""

    def end_table(self, width: int) -> RenderableType:
        """All of it, for a terminal."""

    def end_lines(self) -> Iterable[str]:
        """All of it, for a pipe."""

    def event_lines(self, batch: Batch) -> Iterable[str]:
        """A line for each single event; colours in it are for a terminal alone."""

    def records(self, batch: Batch) -> Iterable[dict[str, Any]]:
        """Each row as plain data."""


class Tapped:
    """What is known of the tap so far."""

    def __init__(self, target: str, started: Started, story: Story) -> None:
        self.target = target
        self.story = story
        self.collector_id = started.collector_id
        self.started_at = time.time()
        self.expires_at = started.expires_at.ToNanoseconds() / 1e9
        self.lost: Counter[str] = Counter()
        self.end: SessionEnd | None = None
        self.interrupted = 0  # the signal

    def add(self, batch: Batch) -> None:
        """Takes a batch in."""
        self.lost.update(batch.lost)
        if batch.count:
            self.story.add(batch)
        self.end = batch.end

    @property
    def end_text(self) -> str:
        """How it ended, for people."""
        if not self.end:
            return "the agent went away"
        reason = pb.SessionEnd.Reason.Name(self.end.reason).removeprefix("REASON_")
        text = reason.lower().replace("_", " ")
        return f"{text}: {self.end.detail}" if self.end.detail else text


class View(Protocol):
    """One way to show a tap."""

    def update(self, batch: Batch) -> None:
        """A batch has come, and is not taken in yet."""

    def show(self) -> None:
        """Nothing more comes for now: what has been taken in is whole."""

    def finish(self) -> None:
        """Shows the end and the totals."""


def view_of(output: str, tapped: Tapped, config: Mapping[str, str]) -> View:
    """The way that OUTPUT, the collector's CONFIG and standard output ask for."""
    if output != "table":
        return _DataView(tapped, output)
    if config.get("mode") == "events":
        return _EventView(tapped)
    return _LiveView(tapped) if sys.stdout.isatty() else _PlainView(tapped)


class _DataView:
    """One object a row, for programs."""

    def __init__(self, tapped: Tapped, output: str) -> None:
        self._tapped = tapped
        self._output = output

    def update(self, batch: Batch) -> None:
        for record in self._tapped.story.records(batch):
            echo_data(record, self._output)
        for stage, count in batch.lost.items():
            echo_data({"lost": count, "stage": stage}, self._output)

    def show(self) -> None:
        """Every row is shown as it comes."""

    def finish(self) -> None:
        end = self._tapped.end
        reason = pb.SessionEnd.Reason.Name(end.reason).removeprefix("REASON_") if end else "UNKNOWN"
        echo_data({"end": reason.lower(), "detail": end.detail if end else ""}, self._output)


class _PlainView:
    """Rows of fixed width as they come, for a pipe."""

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
        click.echo(f"\ntotals of {tapped.story.seconds:.1f}s, {tapped.end_text}")
        for line in tapped.story.end_lines():
            click.echo(line)
        for stage, count in tapped.lost.items():
            click.echo(f"lost {count} ({stage})")


class _EventView(_PlainView):
    """A line for each single event."""

    def update(self, batch: Batch) -> None:
        if lines := list(self._tapped.story.event_lines(batch)):
            click.echo("\n".join(lines))


class _LiveView:
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
        """What is drawn is what has been taken in."""

    def show(self) -> None:
        self._live.refresh()

    def finish(self) -> None:
        self._live.stop()
        tapped = self._tapped
        self._console.print(
            Text.assemble(("totals", "bold"), f" of {tapped.story.seconds:.1f}s, {tapped.end_text}")
        )
        self._console.print(tapped.story.end_table(self._console.width))
        self._console.print(self._losses())

    def _render(self) -> RenderableType:
        lines = max(self._console.height - _LINES_AROUND_TABLE, 1)
        table = self._tapped.story.interval_table(self._console.width, lines)
        return Group(self._lease(), Text(), table, self._losses())

    def _lease(self) -> RenderableType:
        tapped = self._tapped
        lease_s = tapped.expires_at - tapped.started_at
        left_s = max(tapped.expires_at - time.time(), 0)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(tapped.target, "bold"),
            ProgressBar(lease_s, lease_s - left_s, width=_LEASE_BAR_WIDTH),
            Text(f"{left_s:.0f}s left, Ctrl-C stops", "dim"),
        )
        return line

    def _losses(self) -> Text:
        lost = ", ".join(f"{count} {stage}" for stage, count in self._tapped.lost.items())
        return Text(f"lost: {lost}", "red") if lost else Text()
