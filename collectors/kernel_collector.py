"""What collectors have in common whose programs follow processes (targets.bpf.h), keep an account
(account.bpf.h), and send records through a buffer (records.bpf.h).

A subclass says which options and hooks it has, makes its object, and turns what the kernel counted
into rows. Everything else of the contract is here.
"""
# ruff: noqa: D102  contract.py says what each method is for

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from numpy.typing import NDArray

from coral.bpf import BpfObject, Features, RecordReader, Rung, climb
from coral.bpf.buffers.maps import sum_over_cpus
from coral.bpf.rung import HOOKS
from coral.collectors.contract import (
    Batch,
    Collector,
    Coverage,
    EventRows,
    ServiceProcesses,
    Summaries,
    Support,
    Watched,
)
from coral.collectors.options import (
    Option,
    OptionError,
    choice,
    describe,
    duration,
    option,
    parse_options,
    size,
)
from coral.collectors.targets import TargetOptions, Targets, refused_options
from coral.mesh.v1 import ebpf_pb2 as pb

# Single events: the longest that one waits before it is sent, and the share of the buffer that may
# fill up before a program asks for a drain. An event should reach its subscriber within 20 ms; a
# drain that finds anything costs from half a millisecond to one, up to the write to a subscriber.
_EVENTS_INTERVAL_S: Final = 0.018
_WAKEUP_SHARE: Final = 4


@dataclass(frozen=True)
class KernelOptions(TargetOptions):
    """The options that all of these collectors have; a collector's own options extend this."""

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


OptionsT = TypeVar("OptionsT", bound=KernelOptions)


class KernelCollector(Collector, Generic[OptionsT]):
    """A collector of processes. Subclasses set `kind` and the variables below."""

    options_type: ClassVar[type[KernelOptions]]
    # The kinds of hooks that the programs are written for, best first.
    hooks: ClassVar[Sequence[str]] = HOOKS
    # Whether the programs keep a state for each thread (thread.bpf.h).
    thread_state: ClassVar[bool] = False

    def __init__(
        self, options: OptionsT, service: ServiceProcesses | None, features: Features
    ) -> None:
        self._options = options
        self._targets = Targets(options, service)
        self._rung = self.climb(features)
        for name, instead in self.refused_options(features, self._rung).items():
            if (value := getattr(options, name)) != getattr(type(options), name):
                raise OptionError(name, str(value).lower(), instead)
        self._object = self._make_object(features)
        self._records: RecordReader | None = None
        self._lost: Mapping[int, int] = {}
        self._drained_at_ns = 0

    @abstractmethod
    def _make_object(self, features: Features) -> BpfObject:
        """The object, by `self._rung`; `self._object_options` are among its options."""

    @abstractmethod
    def _open_maps(self) -> None:
        """Finds the maps, and the buffer of records by `_open_records`: after the object is loaded,
        before it is attached."""

    @abstractmethod
    def _read_events(self) -> EventRows:
        """All single events since the last drain."""

    @abstractmethod
    def _read_summaries(self) -> Summaries:
        """The summaries of the interval that ends now."""

    def _on_attached(self) -> None:
        """Called by `open` once the programs are attached and know their targets."""

    def _uncounted(self) -> int:
        """How many events the subclass itself could not count so far, for want of room in a map."""
        return 0

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
    def bpf_object(self) -> BpfObject:
        return self._object

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

    @property
    def _object_options(self) -> Mapping[str, object]:
        """The read-only globals of targets.bpf.h and records.bpf.h. With `from_exec`, a process
        counts once it has exec'd; programs that count the exec itself turn `active_at_exec` off."""
        return {
            **self._targets.object_options,
            "active_at_exec": True,
            "ring_wakeup_bytes": self._wakeup_bytes,
        }

    @property
    def _wakeup_bytes(self) -> int:
        return self._options.ring // _WAKEUP_SHARE

    def _open_records(self, record: str, order_by: str) -> None:
        """Opens the buffer, which holds `struct RECORD`; see `Rung.reader`."""
        self._records = self._rung.reader(
            self._object,
            record,
            buffer_bytes=self._options.ring,
            wakeup_bytes=self._wakeup_bytes,
            order_by=order_by,
        )

    def _drain_records(self) -> NDArray[Any]:
        """Empties the buffer: its records, of shape (n,)."""
        if self._records is None:
            raise RuntimeError("not open")
        return self._records.drain()

    def open(self) -> None:
        self._object.load()
        self._account = self._object.map("account")
        self._open_maps()
        self._targets.prepare(self._object)
        self._object.attach()
        self._targets.fill(self._object)
        self._on_attached()
        self._drained_at_ns = time.time_ns()

    def drain(self) -> Batch:
        began_at_ns, self._drained_at_ns = self._drained_at_ns, time.time_ns()
        # Before the rows: what is refused in between counts as lost in the next interval.
        losses = self._losses()
        rows: EventRows | Summaries
        rows = self._read_events() if self._options.single_events else self._read_summaries()
        return Batch(rows, began_at_ns, self._drained_at_ns, losses, self._in_detail)

    @property
    def _in_detail(self) -> bool:
        """`Batch.in_detail`."""
        return False

    def _losses(self) -> dict[int, int]:
        """What was lost since this was last called, by stage."""
        _, account = self._account.read()
        full = int(sum_over_cpus(account, "map_full")[0]) + self._uncounted()
        lost = int(sum_over_cpus(account, "lost")[0])
        totals = {
            # Programs count what the buffer refuses, except for perf buffers before Linux 5.1:
            # there the kernel alone knows.
            int(pb.Loss.STAGE_KERNEL_BUFFER): max(lost, self._records.lost if self._records else 0),
            int(pb.Loss.STAGE_MAP_FULL): full + self._targets.unfollowed(self._object),
        }
        before, self._lost = self._lost, totals
        added = {stage: total - before.get(stage, 0) for stage, total in totals.items()}
        return {stage: count for stage, count in added.items() if count > 0}

    def close(self) -> None:
        self._records = None
        self._targets.close()
        self._object.close()


def unix_offset_ns() -> int:
    """What makes Unix time of the programs' times, in nanoseconds. The two clocks drift apart by
    parts in a million, so callers ask again for each batch, or keep one offset for each thing."""
    return time.time_ns() - time.monotonic_ns()
