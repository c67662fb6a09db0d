"""The agent's answers as plain data: names in place of enumerations, units in the names of fields.

`message` is the contract's own message, for JSON and for fields that are newer than this file. All
times are Unix times in nanoseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, Final, Self, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from coral.client.errors import ContractError
from coral.client.pods import PodSource
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name, kind_of

_STAGE_PREFIX: Final = "STAGE_"

Data = TypeVar("Data")


class Kind(int):
    """A kind of collector: the contract's number, printed as its name, such as `syscall_stats`."""

    @classmethod
    def of(cls, kind: int | str) -> Self:
        """From a name or a number. Raises ValueError for a name that the contract does not have."""
        if not isinstance(kind, str):
            return cls(kind)
        try:
            return cls(kind_of(kind))
        except ValueError:
            known = ", ".join(kind_name(n) for n in pb.EbpfCollectorKind.values() if n)
            raise ValueError(
                f"kind: {kind!r} is not known; kinds of the contract: {known}; `capabilities()` "
                "lists what this agent has"
            ) from None

    @property
    def name(self) -> str:
        """`syscall_stats` and its like; the number, where the contract has no such kind."""
        return kind_name(int(self))

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Kind({self.name!r})"


class EndReason(IntEnum):
    """Why a session ended; the numbers are those of SessionEnd.Reason in the contract."""

    UNSPECIFIED = pb.SessionEnd.REASON_UNSPECIFIED
    EXPIRED = pb.SessionEnd.REASON_EXPIRED
    STOPPED = pb.SessionEnd.REASON_STOPPED
    FAILED = pb.SessionEnd.REASON_FAILED
    PREEMPTED = pb.SessionEnd.REASON_PREEMPTED
    AGENT_SHUTDOWN = pb.SessionEnd.REASON_AGENT_SHUTDOWN
    TARGET_EXITED = pb.SessionEnd.REASON_TARGET_EXITED

    @classmethod
    def _missing_(cls, _value: object) -> EndReason:
        return cls.UNSPECIFIED  # of an agent that is newer than this client

    def __str__(self) -> str:
        return self.name.lower()


def by_stage(losses: Iterable[pb.Loss]) -> Mapping[str, int]:
    """Losses by stage: `subscriber_queue`, `kernel_buffer` and so on."""
    names = pb.Loss.Stage.DESCRIPTOR.values_by_number
    counted: Counter[str] = Counter()
    for loss in losses:
        known = names.get(loss.stage)
        name = known.name.removeprefix(_STAGE_PREFIX).lower() if known else str(int(loss.stage))
        counted[name] += loss.count
    return counted


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """How a session ended: `detail` names the error or the limit, `produced` is the number of
    events in the whole session, `lost_in_kernel` those lost before they had a number, by stage."""

    reason: EndReason
    detail: str
    produced: int
    lost_in_kernel: Mapping[str, int]

    @classmethod
    def of(cls, message: pb.SessionEnd) -> Self:
        """From the contract's message."""
        return cls(
            EndReason(message.reason),
            message.detail,
            message.produced,
            by_stage(message.lost_in_kernel),
        )


@dataclass(frozen=True, slots=True)
class Started:
    """The answer to a start. Where this machine cannot run the collector, `supported` is False
    and `error` says why. `notes` are what one may not expect of a collector that has started, in
    sentences: such as that no process matches its target yet."""

    collector_id: str
    supported: bool
    error: str
    notes: tuple[str, ...]
    expires_at_ns: int | None
    message: pb.StartEbpfCollectorResponse = field(repr=False, compare=False)

    @classmethod
    def of(cls, message: pb.StartEbpfCollectorResponse) -> Self:
        """From the contract's message."""
        return cls(
            message.collector_id,
            message.supported,
            message.error,
            tuple(message.notes),
            unix_ns(message, "expires_at"),
            message,
        )

    @property
    def expires_at(self) -> Timestamp:
        """The deadline as a protobuf Timestamp; see `expires_at_ns`."""
        return self.message.expires_at


@dataclass(frozen=True, slots=True)
class SubscriberInfo:
    """One subscriber of a collector, as the agent sees it. `lag` counts events that are numbered
    and not delivered yet; `losses` splits `lost` by stage."""

    peer: str
    queued_events: int
    queued_bytes: int
    delivered: int
    lost: int
    filtered: int
    lag: int
    losses: Mapping[str, int]

    @classmethod
    def of(cls, message: pb.SubscriberInfo) -> Self:
        """From the contract's message."""
        return _alike(cls, message, losses=by_stage(message.losses))


@dataclass(frozen=True, slots=True)
class CollectorInfo:
    """A collector at work, or one that has ended.

    `produced` counts the events numbered so far, `lost` those lost in the kernel by stage.
    `expires_at_ns` is None for a continuous collector, `end` and `ended_at_ns` for one at work.
    """

    collector_id: str
    kind: Kind
    service_name: str
    started_at_ns: int | None
    expires_at_ns: int | None
    config: Mapping[str, str]
    produced: int
    subscribers: tuple[SubscriberInfo, ...]
    map_memory_bytes: int
    continuous: bool
    end: SessionEnd | None
    ended_at_ns: int | None
    lost: Mapping[str, int]
    message: pb.CollectorInfo = field(repr=False, compare=False)

    @classmethod
    def of(cls, message: pb.CollectorInfo) -> Self:
        """From the contract's message."""
        return _alike(
            cls,
            message,
            kind=Kind(message.kind),
            started_at_ns=unix_ns(message, "started_at"),
            expires_at_ns=unix_ns(message, "expires_at"),
            config=dict(message.config),
            subscribers=tuple(map(SubscriberInfo.of, message.subscribers)),
            end=SessionEnd.of(message.end) if message.HasField("end") else None,
            ended_at_ns=unix_ns(message, "ended_at"),
            lost=by_stage(message.lost),
            message=message,
        )

    @property
    def started_at(self) -> Timestamp:
        """The start as a protobuf Timestamp; see `started_at_ns`."""
        return self.message.started_at

    @property
    def expires_at(self) -> Timestamp:
        """The deadline as a protobuf Timestamp; see `expires_at_ns`."""
        return self.message.expires_at


@dataclass(frozen=True, slots=True)
class Collectors:
    """The collectors of one agent; iterate over it."""

    collectors: tuple[CollectorInfo, ...]
    message: pb.ListCollectorsResponse = field(repr=False, compare=False)

    @classmethod
    def of(cls, message: pb.ListCollectorsResponse) -> Self:
        """From the contract's message."""
        return cls(tuple(map(CollectorInfo.of, message.collectors)), message)

    def __iter__(self) -> Iterator[CollectorInfo]:
        return iter(self.collectors)

    def __len__(self) -> int:
        return len(self.collectors)


@dataclass(frozen=True, slots=True)
class KernelFeature:
    """One thing that was tried on the agent's kernel. `reason` says why it is not available, and
    what would help."""

    name: str
    available: bool
    reason: str

    @classmethod
    def of(cls, message: pb.KernelFeature) -> Self:
        """From the contract's message."""
        return _alike(cls, message)


@dataclass(frozen=True, slots=True)
class CollectorStep:
    """One thing that kernels do in different ways: the way `taken`, empty where there is none, and
    the better ones that were `refused`, best first."""

    what: str
    taken: str
    refused: tuple[KernelFeature, ...]

    @classmethod
    def of(cls, message: pb.CollectorStep) -> Self:
        """From the contract's message."""
        return _alike(cls, message, refused=tuple(map(KernelFeature.of, message.refused)))


@dataclass(frozen=True, slots=True)
class CollectorOption:
    """An option of a collector. `refused` says what to give instead, where this machine cannot do
    all that the option accepts."""

    name: str
    accepts: str
    default_value: str
    description: str
    refused: str

    @classmethod
    def of(cls, message: pb.CollectorOption) -> Self:
        """From the contract's message."""
        return _alike(cls, message)


@dataclass(frozen=True, slots=True)
class CollectorCapability:
    """What the agent can do with one kind of collector. `hook` is the way in that would be taken,
    `reason` why there is none, or no better one."""

    kind: Kind
    supported: bool
    hook: str
    reason: str
    options: tuple[CollectorOption, ...]
    steps: tuple[CollectorStep, ...]

    @classmethod
    def of(cls, message: pb.CollectorCapability) -> Self:
        """From the contract's message."""
        return _alike(
            cls,
            message,
            kind=Kind(message.kind),
            options=tuple(map(CollectorOption.of, message.options)),
            steps=tuple(map(CollectorStep.of, message.steps)),
        )


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an agent can do on its machine. `unsupported_reason` says why eBPF cannot be used there
    at all; it is empty where it can. `warnings` are of its configuration."""

    agent_id: str
    agent_version: str
    supported: bool
    unsupported_reason: str
    kernel_version: str
    libbpf_version: str
    btf_available: bool
    cap_bpf: bool
    available_collectors: tuple[Kind, ...]
    features: tuple[KernelFeature, ...]
    collectors: tuple[CollectorCapability, ...]
    pod_sources: tuple[PodSource, ...]
    warnings: tuple[str, ...]
    message: pb.EbpfCapabilities = field(repr=False, compare=False)

    @classmethod
    def of(cls, message: pb.EbpfCapabilities) -> Self:
        """From the contract's message."""
        return _alike(
            cls,
            message,
            available_collectors=tuple(map(Kind, message.available_collectors)),
            features=tuple(map(KernelFeature.of, message.features)),
            collectors=tuple(map(CollectorCapability.of, message.collectors)),
            pod_sources=tuple(map(PodSource.of, message.pod_sources)),
            warnings=tuple(message.warnings),
            message=message,
        )


def _alike(data: type[Data], message: Message, /, **converted: object) -> Data:
    """A dataclass from a message's fields of the same names; those CONVERTED differ."""
    names: list[str] = [it.name for it in fields(data)]  # type: ignore[arg-type]
    values: dict[str, Any] = {n: getattr(message, n) for n in names if n not in converted}
    return data(**values, **converted)


def unix_ns(message: Message, name: str) -> int | None:
    """The Timestamp NAME of a message in Unix time; None where it has none. Raises `ContractError`
    for one that is not between the years 1 and 9999."""
    timestamp: Timestamp = getattr(message, name)
    try:
        return timestamp.ToNanoseconds() if message.HasField(name) else None
    except ValueError as error:
        raise ContractError(f"{name}: {error}") from error
