"""The contract of a collector: all that a new one has to know.

A collector is synchronous: `open`, then `drain` again and again, then `close`. `runner.run` is the
async shell around it. To add a kind, write a folder here with a `collector.py`, whose `COLLECTOR`
is a subclass of `Collector` (of `KernelCollector` if its programs follow processes, of
`EventCollector` if it has single events too), and add the folder's name to `registry.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from prometheus_client import Metric

from coral.bpf import Features, ProgramStats, RecordReader, Rung, Step
from coral.bpf.probing import capabilities
from coral.collectors.hierarchies import Kind
from coral.collectors.options import Option, UnknownOptionError
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout


@dataclass(frozen=True, slots=True)
class EventRows:
    """Individual events as one array.

    `records` is of shape (n,), with the fields of `message`, a type of fixed-width fields only;
    fields that are indices point into `strings`. Each record stands for `sample_every` events.
    Records of a session that watches pods have the field `resource`, which points into `resources`;
    others have none.
    """

    message: type[Message]
    records: NDArray[Any]
    strings: Sequence[str]
    sample_every: int = 1
    resources: Sequence[pb.Resource] = ()

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class Summaries:
    """The summaries of one interval as columns, which frames, filters and metrics work on.

    `message` is the type of their columns (`pb.SyscallStatsColumns`). `columns` has an array for
    each of its fields: (n,) with a value for each row, (n, width) for a matrix, (k,) for a field
    that is per batch. Columns of indices point into `strings`; `resource`, which only a session
    that watches pods has, points into `resources`. `messages` makes the row messages from columns
    and strings, for subscribers that want rows; the callers add what the resources say.
    """

    message: type[Message]
    columns: Mapping[str, NDArray[Any]]
    strings: Sequence[str]
    messages: Callable[[Mapping[str, NDArray[Any]], Sequence[str]], Sequence[Message]]
    count: int
    # For columns that are per batch and depend on its rows: given all columns after some rows were
    # taken, and whether the first was among these.
    shrink: Callable[[dict[str, NDArray[Any]], bool], Mapping[str, NDArray[Any]]] | None = None
    resources: Sequence[pb.Resource] = ()

    def __len__(self) -> int:
        return self.count

    def take(self, index: NDArray[Any]) -> Summaries:
        """The rows at INDEX, of shape (m,): row numbers in any order, or a mask."""
        layout = columns_layout(self.message.DESCRIPTOR).columns
        columns: Mapping[str, NDArray[Any]]
        columns = taken = {
            name: values if layout[name].per_batch else values[index]
            for name, values in self.columns.items()
        }
        if self.shrink:
            has_first = bool(index[:1].all() if index.dtype == bool else (index == 0).any())
            columns = self.shrink(taken, has_first)
        count = int(np.count_nonzero(index)) if index.dtype == bool else len(index)
        return replace(self, columns=columns, count=count)

    def as_messages(self) -> Sequence[Message]:
        """The rows as messages, with one Python object for each row, without their resources."""
        return self.messages(self.columns, self.strings)


@dataclass(frozen=True, slots=True)
class Unread:
    """How many things of one sort could not be read, and their bytes: see Unread in the
    contract."""

    count: int
    bytes: int

    def __add__(self, more: Unread) -> Unread:
        return Unread(self.count + more.count, self.bytes + more.bytes)


NO_ATTRIBUTES: Final[Mapping[str, str]] = {}
"""One for all, because an empty mapping takes as much memory as a small event."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a collector saw in one interval: rows of one message type, and what it lost.

    Times are Unix time in nanoseconds. `losses` are counts by `pb.Loss.Stage`. `in_detail` says
    that the request asked for metrics with more labels than by default. `unread` is what it came
    upon and cannot read, by what that is. `attributes` are those of `Collector.attributes` now.
    """

    rows: Summaries | EventRows
    interval_start_ns: int
    interval_end_ns: int
    losses: Mapping[int, int] = field(default_factory=dict)
    in_detail: bool = False
    unread: Mapping[str, Unread] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=lambda: NO_ATTRIBUTES)

    def __bool__(self) -> bool:
        return bool(len(self.rows) or self.losses or self.unread)


Emit = Callable[[Batch], None]


class Coverage(IntEnum):
    """How much of what a collector watches its batches tell, for metrics that should cover all."""

    NONE = 0  # single events
    PART = 1  # summaries of some of the events, or with less detail
    WHOLE = 2


class Measures(ABC):
    """The Prometheus metrics of one kind of collector: counters that outlive its sessions."""

    @abstractmethod
    def observe(self, service: str, batch: Batch) -> None:
        """Adds a batch of a session that watches SERVICE. Called on the event loop."""

    @abstractmethod
    def collect(self) -> Iterable[Metric]:
        """The metric families of this moment. Called on the event loop: it copies the figures. The
        families may be made while the result is iterated over, which is done in a thread."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a kind of collector can run here: by which hook, or why not.

    `steps` are the rungs of the ladder that it would use, each with the better ones that were
    refused. `refused_options` are the options that this machine does not support, with the reasons.
    """

    supported: bool
    hook: str = ""
    reason: str = ""
    steps: tuple[Step, ...] = ()
    refused_options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by(cls, rung: Rung, refused_options: Mapping[str, str]) -> Support:
        """What RUNG makes possible."""
        steps = tuple(rung)
        if rung.missing:
            reason = "; ".join(f"no {step.what} ({step.why_not})" for step in rung.missing)
            return cls(False, reason=reason, steps=steps, refused_options=refused_options)
        return cls(True, rung.hook.taken, rung.hook.why_not, steps, refused_options)


CgroupsChanged = Callable[[frozenset[Path], frozenset[Path]], None]
"""Takes the directories of cgroups that a target has gained, and those that it has lost."""


class LiveCgroups(Protocol):
    """The cgroups of a target to which others may come later, such as the pods of a selector. All
    are in the hierarchy `kind`; none is below another."""

    @property
    def kind(self) -> Kind:
        """The hierarchy that they are in."""

    @property
    def label(self) -> str:
        """A name for what it is."""

    @property
    def key(self) -> tuple[str, ...]:
        """The same for equal targets."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user may not expect of it, in sentences."""

    @property
    def now(self) -> frozenset[Path]:
        """The directories that there are now."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """What all of it has in common now, by OpenTelemetry's names. Does not block."""

    def is_pod(self, directory: Path) -> bool:
        """Whether a cgroup's DIRECTORY is that of a pod, and those directly below it are its
        containers'."""

    def attributes_of(self, group: int) -> Mapping[str, str]:
        """The attributes of the container whose cgroup makes a GROUP (`cgroups.Below`), also for
        some time after it has gone; empty for one that is not known. Does not block."""

    def follow(self, changed: CgroupsChanged) -> frozenset[Path]:
        """Returns the directories that there are, and calls CHANGED, from another thread, for what
        is gained and lost from then on. Blocks."""

    def close(self) -> None:
        """Ends that. Blocks while CHANGED is under way. Safe to call twice."""


@dataclass(frozen=True, slots=True)
class ServiceProcesses:
    """The processes of a service, which a collector watches where its options name no process, or
    where they name pods or containers: then it is all processes in CGROUPS, and no others.

    NAMESPACES are the Kubernetes namespaces that all of them belong to; empty where one may belong
    to none that is known.
    """

    name: str
    tgids: tuple[int, ...]
    cgroups: LiveCgroups | None = None
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Watched:
    """The processes that a collector is about to watch, as its request resolved: by their ids, by
    their command name, by the directory of their cgroup, by those of pods or containers, whose
    target is then PODS, or all of the machine."""

    tgids: tuple[int, ...] = ()
    comm: str = ""
    cgroup: Path | None = None
    pods: str = ""
    cgroups: frozenset[Path] = frozenset()
    host: bool = False
    follows_children: bool = False


class Programs(Protocol):
    """The programs and maps that work for one session, alone or for others too."""

    @property
    def name(self) -> str:
        """Their name, for messages."""

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for maps on the session's account."""

    def program_stats(self) -> Mapping[str, ProgramStats]:
        """The kernel's figures of each program; empty once closed."""

    @property
    def shares(self) -> Mapping[str, float]:
        """Which part of each program's run time the session causes, by name: for all sessions that
        use the program, these add up to 1."""

    @property
    def attached(self) -> bool:
        """Whether they work for the session."""

    def detach(self) -> None:
        """They stop working for the session; what they have counted stays readable."""


class Collector(ABC):
    """One collector. Make it once, open it once, close it once."""

    kind: ClassVar[pb.EbpfCollectorKind]
    # The values of options that a collector of the configuration file has by default, where these
    # differ from the others' defaults.
    continuous_defaults: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def options(cls) -> Sequence[Option]:
        """Its options, for help, checks and documentation."""

    @classmethod
    def check(cls, config: Mapping[str, str], service: ServiceProcesses | None) -> None:  # noqa: ARG003
        """Raises `OptionError` or `UnknownOptionError` for what no machine could ever accept; looks
        at nothing on this one. SERVICE may have no processes yet."""
        known = {option.name for option in cls.options()}
        for name in config:
            if name not in known:
                raise UnknownOptionError(name, known)

    @classmethod
    def needs(cls) -> Mapping[str, str]:
        """The Linux capabilities that it cannot work without, each with its purpose, in the words
        after "CAP_... (". A collector that needs more than all others do adds its own to these."""
        return capabilities.TRACING

    @classmethod
    def wants(cls) -> Mapping[str, str]:
        """The Linux capabilities that it can work without, and tells less then, each with its
        purpose."""
        return {}

    @classmethod
    @abstractmethod
    def support(cls, features: Features) -> Support:
        """What FEATURES allow. Callers have checked that the agent has what it `needs`."""

    @classmethod
    @abstractmethod
    def measures(cls, max_series: int) -> Measures:
        """A new, empty set of this kind's metrics, of at most MAX_SERIES label sets."""

    @classmethod
    @abstractmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> Collector:
        """A collector for CONFIG. Raises `OptionError`; touches nothing in the kernel."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What it watches: the service's name for a request that gave none."""

    @property
    def watched(self) -> Watched:
        """The processes that it is about to watch, for the agent's policy. Blocks."""
        return Watched()

    @property
    def notes(self) -> Sequence[str]:
        """What the user may not expect of it, in sentences: once it is open."""
        return ()

    @property
    def attributes(self) -> Mapping[str, str]:
        """What all that it watches has in common, by OpenTelemetry's names, such as
        `k8s.namespace.name`. It may change. Does not block."""
        return NO_ATTRIBUTES

    def spare(self, tgids: AbstractSet[int]) -> None:  # noqa: B027  not all watch processes
        """Leaves the processes TGIDS out, whatever the target. Call it before `open`."""

    @property
    def target(self) -> tuple[str, ...]:
        """What it watches: the same for collectors that count the same events."""
        return (self.label,)

    @property
    def coverage(self) -> Coverage:
        """How much of its target's events the Prometheus metrics can count from its batches."""
        return Coverage.WHOLE

    @property
    @abstractmethod
    def bpf_object(self) -> Programs:
        """Its programs, for the figures that the kernel keeps of them."""

    @property
    @abstractmethod
    def interval_s(self) -> float:
        """How often to drain it."""

    @abstractmethod
    def open(self) -> None:
        """Loads and attaches. Blocks. Raises `BpfError`."""

    @abstractmethod
    def drain(self) -> Batch:
        """Everything since the last drain. Blocks."""

    @abstractmethod
    def close(self) -> None:
        """Detaches and frees, whatever state it is in. Blocks. Safe to call twice."""

    def exit_fds(self) -> Sequence[int]:
        """Descriptors that become readable when a watched process ends; the session ends once all
        are readable. Empty for a session that should go on."""
        return ()

    @property
    def records(self) -> RecordReader | None:
        """The buffer that `drain` empties, if it does: a program can then ask for a drain before
        the interval is over."""
        return None

    @property
    def drains_on_loop(self) -> bool:
        """Whether `drain` only empties `records`, which is quick enough for the event loop."""
        return False
