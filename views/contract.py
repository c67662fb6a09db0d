"""What a kind of collector looks like to a person: everything that `coral tap`, `coral doctor` and
a colony have to know about one kind.

To add a kind, write a folder here with a `View` named `VIEW`, and add the folder's name to
`registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from rich.console import RenderableType

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.intervals import Intervals
from coral.wire.kinds import kind_name


class Story(Protocol):
    """Takes in the batches of one session, and shows the last interval and the whole.

    A width of None stands for a pipe: lines are as long as they are, without colour.
    """

    @property
    def intervals(self) -> Intervals:
        """How long the session has watched; whoever reads the stream notes its begin and its
        progress there."""

    def add(self, batch: Batch) -> None:
        """Takes in a batch that has rows, or that says what the collector could not read."""

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """The last interval, for a terminal, in about MOST_LINES."""

    def interval_lines(self) -> Iterable[str]:
        """The last interval, for a pipe."""

    def end_table(self, width: int) -> RenderableType:
        """The whole session, for a terminal."""

    def end_lines(self) -> Iterable[str]:
        """The whole session, for a pipe."""

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterable[str]:
        """A line for each single event, with escape sequences for colours."""

    def records(self, batch: Batch) -> Iterable[dict[str, Any]]:
        """Each row as plain data, for JSON."""


@dataclass(frozen=True)
class Flag:
    """An option of `coral tap`.

    With `key`, it sets that option of the collector: a switch to `value`, else to the value that
    the user gives, which `metavar` names. Without `key` it is a switch that only the story sees.
    """

    name: str  # "--include"
    help: str
    key: str = ""
    value: str = ""
    metavar: str = ""
    short: str = ""  # "-i"

    @property
    def is_switch(self) -> bool:
        """Whether it has no value of its own."""
        return not self.metavar


# What most kinds have. A flag of several kinds is the same object in each.
EVENTS: Final = Flag(
    "--events", "Show every single event on a line of its own.", key="mode", value="events"
)
INTERVAL: Final = Flag(
    "--interval",
    "How often to show figures.  [default: 1s; of profiles 5s]",
    key="interval",
    metavar="DURATION",
    short="-i",
)


@dataclass(frozen=True)
class Provocation:
    """A known workload, and how to recognise it: `coral doctor` starts a collector on a process
    that runs `code`, Python, and counts what the batches report.

    `count` is the number of `things` in a batch, and `times` the number expected in all, in every
    mode, or the least number if that is not `exact`; `config` goes to the collector together with
    the process and the mode.
    """

    things: str
    times: int
    code: str
    count: Callable[[Batch], int]
    config: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True)
class Session:
    """What a file says of its session beside its story: what was watched, how it ended, in words,
    and how many rows this client has missed, by stage."""

    target: str
    end: str
    lost: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FileFormat:
    """A file that the story of a whole session can be written to, with `-o NAME.SUFFIX`."""

    suffix: str  # ".svg"
    about: str
    content: Callable[[Story, Session], bytes]


@dataclass(frozen=True)
class View:
    """One kind of collector, for people.

    `story` makes a story from the names of the given flags that have no `key`. `cheaper` says how
    to watch less, to a user whose tap used more than the agent allows. `columns`: its story reads
    summaries as columns. `files` are those that a session can be written to.
    """

    kind: pb.EbpfCollectorKind
    about: str
    story: Callable[[AbstractSet[str]], Story]
    flags: tuple[Flag, ...]
    cheaper: str
    provocation: Provocation | None = None
    columns: bool = False
    files: tuple[FileFormat, ...] = ()

    @property
    def name(self) -> str:
        """`syscall_stats` and its like."""
        return kind_name(self.kind)

    @property
    def flag(self) -> str:
        """`--syscall-stats` and its like: the option of `coral tap` that asks for this kind."""
        return "--" + self.name.replace("_", "-")
