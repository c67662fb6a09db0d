"""What collectors have in common whose programs follow processes (targets.bpf.h), keep an account
(account.bpf.h), and send records through a buffer (records.bpf.h).

A subclass says which options and hooks it has, makes its object, and turns what the kernel counted
into rows. Everything else of the contract is here.
"""
# ruff: noqa: D102  contract.py says what each method is for

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from coral.bpf import Features, RecordReader, Rung, climb
from coral.bpf.buffers.account import Counts
from coral.bpf.buffers.records import Records, drain_whole
from coral.bpf.closing import close_all
from coral.bpf.rung import HOOKS
from coral.collectors.clock import CLOCK
from coral.collectors.contract import (
    Batch,
    Collector,
    Coverage,
    EventRows,
    ServiceProcesses,
    Summaries,
    Support,
    Unread,
    Watched,
)
from coral.collectors.hubs import Plan, Slot
from coral.collectors.losses import by_stage
from coral.collectors.options import (
    Option,
    OptionError,
    boolean,
    choice,
    describe,
    duration,
    integer,
    option,
    parse_options,
    size,
    value_text,
)
from coral.collectors.target_options import TargetOptions
from coral.collectors.targets import Targets, refused_options
from coral.mesh.v1 import ebpf_pb2 as pb

# How often a session of single events says what it has lost, if there are none.
_EVENTS_INTERVAL_S: Final = 1.0
# The shortest time between two reads of the losses while events come.
_LOOK_EVERY_NS: Final = 100_000_000


@dataclass(frozen=True)
class KernelOptions(TargetOptions):
    """The options that all of these collectors have; a collector's own options extend this."""

    # Options that select single events: those with mode=events only.
    selecting: ClassVar[Sequence[str]] = ()

    interval: float = option(duration(0.1, 60), "1s", "how often to send summaries")
    mode: str = option(
        choice("summaries", "events"),
        "summaries",
        "`summaries`: figures for each interval; `events`: every single event",
    )
    ring: int = option(
        size(64 << 10, 256 << 20), "4MiB", "the size of the ring buffer for single events"
    )

    @property
    def single_events(self) -> bool:
        """Whether the session sends single events, not summaries."""
        return self.mode == "events"

    def check(self, service: ServiceProcesses | None) -> None:
        """Raises `OptionError`, too, for a selection of single events without single events."""
        super().check(service)
        for name in self.selecting:
            value = getattr(self, name)
            if value != getattr(type(self), name) and not self.single_events:
                raise OptionError(name, value_text(value), "it with mode=events only")


def top_option(which: str, rest: str = "", all_rows: str = "all rows") -> Any:  # noqa: ANN401
    """The option `top`: WHICH rows come first, whose the REST is, and what 0 stands for."""
    return option(
        integer(0, 10240),
        "0",
        f"how many rows to send for each interval: {which}, then the row `other`{rest}, which adds "
        f"up the rest; 0: {all_rows}",
    )


def min_duration_option(events: str) -> Any:  # noqa: ANN401
    """The option `min_duration` of single EVENTS."""
    return option(
        duration(0, 3600),
        "0s",
        f"with mode=events: send only {events} that took at least this long",
    )


def errors_only_option(errors: str) -> Any:  # noqa: ANN401
    """The option `errors_only`: send ERRORS."""
    return option(boolean(), "false", f"with mode=events: send only {errors}")


OptionsT = TypeVar("OptionsT", bound=KernelOptions)


class KernelCollector(Collector, Generic[OptionsT]):
    """A collector of processes. Subclasses set `kind` and the variables below."""

    options_type: ClassVar[type[KernelOptions]]
    # The kinds of hooks that the programs are written for, best first.
    hooks: ClassVar[Sequence[str]] = HOOKS
    # Programs on the same hook, of which one that runs is sufficient.
    twins: ClassVar[Sequence[str]] = ()
    # Whether the programs keep a state for each thread (thread.bpf.h).
    thread_state: ClassVar[bool] = False
    # Whether every session is sent records, and not only one of single events.
    always_has_records: ClassVar[bool] = False

    def __init__(
        self, options: OptionsT, service: ServiceProcesses | None, features: Features
    ) -> None:
        self._options = options
        self._targets = Targets(options, service)
        self._rung = self.climb(features)
        for name, instead in self.refused_options(features, self._rung).items():
            if (value := getattr(options, name)) != getattr(type(options), name):
                raise OptionError(name, str(value).lower(), instead)
        self._slot = Slot(self._plan(features))
        self._records: RecordReader | None = None
        self._counted: Counter[int] = Counter()  # losses by stage, as the programs count them
        self._lost: Counter[int] = Counter()  # and with those that user space knows of
        self._drained_at_ns = self._looked_at_ns = 0
        self._was_filling = False

    @abstractmethod
    def _plan(self, features: Features) -> Plan:
        """The hub of this kind, by `self._rung`."""

    @property
    def _own_maps(self) -> Mapping[str, int]:
        """The maps that the session has of its own, with their sizes, beside those of its targets
        and its records."""
        return {}

    @abstractmethod
    def _open_maps(self) -> None:
        """Finds the maps, sets the session's options, and opens the buffer of records by
        `_open_records`: after the maps are made, before the programs work for the session."""

    def _read_rows(self) -> EventRows | Summaries:
        """All rows since the last drain."""
        return self._read_summaries()

    @abstractmethod
    def _read_summaries(self) -> Summaries:
        """The summaries of the interval that ends now."""

    def _on_followed(self) -> None:
        """Called by `open` once the programs work for the session, before it has targets."""

    def _on_filled(self) -> None:
        """Called by `open` once the programs know the session's targets."""

    def _events_in(self, rows: Summaries) -> int:
        """How many events the programs counted for ROWS, more or less: their share of the programs'
        run time is by these."""
        return len(rows)

    def _uncounted(self) -> int:
        """How many events the subclass itself could not count so far, for want of room in a map."""
        return 0

    def _read_unread(self) -> Mapping[str, Unread]:
        """What the programs came upon since this was last called and cannot read."""
        return {}

    @classmethod
    def climb(cls, features: Features) -> Rung:
        """The rung of the ladder that this kind uses here."""
        return climb(features, cls.hooks, thread_state=cls.thread_state)

    @classmethod
    def refused_options(cls, features: Features, rung: Rung) -> Mapping[str, str]:
        """Options that are unsupported on this machine, each with the value to use instead and the
        reason."""
        refused = refused_options(features)
        if not rung.buffer.taken:
            refused["mode"] = f"`summaries`: there is no buffer for events ({rung.buffer.why_not})"
        return refused

    @classmethod
    def options(cls) -> Sequence[Option]:
        return describe(cls.options_type)

    @classmethod
    def check(cls, config: Mapping[str, str], service: ServiceProcesses | None) -> None:
        options: Any = parse_options(cls.options_type, config, anywhere=True)
        options.check(service)

    @classmethod
    def support(cls, features: Features) -> Support:
        if features.obstacle:
            return Support(False, reason=features.obstacle)
        rung = cls.climb(features)
        return Support.by(rung, cls.refused_options(features, rung))

    @classmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> Self:
        options: Any = parse_options(cls.options_type, config)
        return cls(options, service, features)

    @property
    def label(self) -> str:
        return self._targets.label

    @property
    def watched(self) -> Watched:
        return self._targets.watched

    @property
    def notes(self) -> Sequence[str]:
        return self._targets.notes

    @property
    def attributes(self) -> Mapping[str, str]:
        return self._targets.attributes

    def spare(self, tgids: AbstractSet[int]) -> None:
        self._targets.spared = frozenset(tgids)

    @property
    def target(self) -> tuple[str, ...]:
        return self._targets.key

    @property
    def coverage(self) -> Coverage:
        options = self._options
        if options.single_events:
            return Coverage.NONE
        everything = options.follow_children and not options.from_exec
        return Coverage.WHOLE if everything else Coverage.PART

    @property
    def bpf_object(self) -> Slot:
        return self._slot

    @property
    def interval_s(self) -> float:
        return _EVENTS_INTERVAL_S if self._options.single_events else self._options.interval

    @property
    def records(self) -> RecordReader | None:
        return self._records

    @property
    def drains_on_loop(self) -> bool:
        return self._options.single_events

    def exit_fds(self) -> Sequence[int]:
        return self._targets.exit_fds

    def _open_records(self, order_by: Mapping[str, str | None]) -> None:
        """Opens the session's buffer, whose records are of the structs that ORDER_BY names; see
        `Slot.reader`."""
        self._records = self._slot.reader(order_by, self._options.ring)

    def _drain_records(self) -> Records:
        """The records of the buffer: a part that does not hold the event loop for long, or all."""
        if self._records is None:
            raise RuntimeError("not open")
        return self._records.drain() if self.drains_on_loop else drain_whole(self._records)

    def open(self) -> None:
        self._slot.load()
        self._slot.install()
        self._account = self._slot.account(self.twins)
        self._open_maps()
        self._targets.follow(self._slot, detailed=self._options.single_events)
        self._on_followed()
        self._targets.fill()
        self._on_filled()
        self._drained_at_ns = self._looked_at_ns = time.monotonic_ns()

    @property
    def _sizes(self) -> dict[str, int]:
        """The sizes of all maps that the session has of its own, in entries or bytes."""
        has_records = self.always_has_records or self._options.single_events
        records = self._rung.record_map if has_records else None
        return {
            **self._targets.maps,
            **self._own_maps,
            **({records: self._options.ring} if records else {}),
        }

    def drain(self) -> Batch:
        before_ns, self._drained_at_ns = self._drained_at_ns, time.monotonic_ns()
        began_at_ns, ended_at_ns = CLOCK.unix_ns_of(before_ns, self._drained_at_ns)
        self._targets.note_common()
        counts = None
        if self._should_look_closely():
            # Before the rows: what is refused in between counts as lost in the next interval.
            counts = self._account.read()
        rows = self._read_rows()
        if isinstance(rows, Summaries):
            events = self._events_in(rows)
        else:
            events = counts.produced if counts else 0
        self._slot.tidy()
        losses: Mapping[int, int] = {}
        unread: Mapping[str, Unread] = {}
        if counts:
            unread = self._read_unread()
            # After the rows: a perf buffer says what it refused in records between them.
            losses = self._losses(counts)
            elapsed_ns = self._drained_at_ns - self._looked_at_ns
            self._looked_at_ns = self._drained_at_ns
            self._slot.note_work(events, elapsed_ns / 1e9)
        return Batch(
            rows, began_at_ns, ended_at_ns, losses, self._in_detail, unread, self._targets.common
        )

    def _should_look_closely(self) -> bool:
        """Whether this drain also reads what the kernel lost. Reading it takes a third of a small
        drain, so drains in quick succession skip it, unless the buffer is so full now, or was
        before the last drain, that it may have refused something since; the last one never
        does."""
        was_filling, records = self._was_filling, self._records
        self._was_filling = records is not None and records.filling
        return (
            not self._options.single_events
            or was_filling
            or self._was_filling
            or self._drained_at_ns >= self._looked_at_ns + _LOOK_EVERY_NS
            or not self._slot.attached
        )

    @property
    def _in_detail(self) -> bool:
        """`Batch.in_detail`."""
        return False

    def _losses(self, counts: Counts) -> dict[int, int]:
        """What was lost since this was last called, by stage; COUNTS is the account since then."""
        counted = self._counted
        counted.update(by_stage(counts.lost))
        totals = counted.copy()
        # Programs count what the buffer refuses, except for perf buffers before Linux 5.1: there
        # the kernel alone knows.
        buffer = int(pb.Loss.STAGE_KERNEL_BUFFER)
        totals[buffer] = max(totals[buffer], self._records.lost if self._records else 0)
        totals[int(pb.Loss.STAGE_MAP_FULL)] += self._uncounted() + self._targets.unfollowed
        before, self._lost = self._lost, totals
        return dict(totals - before)

    def close(self) -> None:
        records, self._records = self._records, None
        close_all([*([records.close] if records else []), self._targets.close, self._slot.close])


class EventCollector(KernelCollector[OptionsT]):
    """A collector whose sessions send summaries or, with mode=events, every single event."""

    @abstractmethod
    def _read_events(self) -> EventRows:
        """All single events since the last drain."""

    def _read_rows(self) -> EventRows | Summaries:
        return self._read_events() if self._options.single_events else super()._read_rows()
