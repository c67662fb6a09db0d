"""What a follower of an agent hands to the store: batches, where they are from, and what was lost
on the way. Data alone: neither side knows the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from coral.client import Batch, Kind

AGENT_LOST: Final = "agent_lost"
"""The stage of events that an agent had numbered, and took with it when it died. Only the colony
can know of it, so the contract's `Loss.Stage` does not have it."""


class EndedError(Exception):
    """Whoever keeps deliveries has ended, and takes no more."""


class SequenceError(Exception):
    """A delivery does not follow on what is kept of its session: events would be counted twice, or
    never. Subscribe again after `expected_seq`."""

    def __init__(self, text: str, expected_seq: int) -> None:
        super().__init__(text)
        self.expected_seq = expected_seq


@dataclass(frozen=True, slots=True)
class Session:
    """One session of one agent. `attributes` are those of its pods, by OpenTelemetry's names."""

    agent_id: str
    collector_id: str
    kind: Kind
    service: str
    started_ns: int
    config: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What identifies it among the sessions of all agents."""
        return self.agent_id, self.collector_id


@dataclass(frozen=True, slots=True)
class Ended:
    """How a session ended. `reason` is a word of the client's `EndReason`, or `agent_lost`."""

    reason: str
    detail: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """The events `after_seq` + 1 to `last_seq` of a session, each in exactly one place:

        last_seq - after_seq = rows + the sum of lost

    `batch` has the rows, as columns where the kind has them; it is None where the delivery only
    says how the session stands. `lost` counts by stage since the delivery before. `lost_in_kernel`,
    by stage, and `produced` are those of the whole session so far, up to here.
    """

    session: Session
    batch: Batch | None
    after_seq: int
    last_seq: int
    produced: int
    time_ns: int  # the end of the interval it tells of, in Unix time; else when it came
    size_bytes: int
    lost: Mapping[str, int] = field(default_factory=dict)
    lost_in_kernel: Mapping[str, int] = field(default_factory=dict)
    ended: Ended | None = None

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.batch.count if self.batch else 0


@dataclass(frozen=True, slots=True)
class Standing:
    """What the store has of a session, as of its last transaction:

        last_seq = stored + the sum of lost

    and, once it has `ended`, `produced` = `last_seq`.
    """

    session: Session
    last_seq: int
    produced: int
    stored: int
    updated_ns: int
    lost: Mapping[str, int] = field(default_factory=dict)
    lost_in_kernel: Mapping[str, int] = field(default_factory=dict)
    ended: Ended | None = None


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """How an agent fares: its place, what it is, whether it is followed, or why not."""

    agent_id: str
    address: str
    seen_ns: int
    connected: bool
    version: str = ""
    kernel: str = ""
    detail: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two Unix times an agent could not be followed, and may have seen what nobody knows
    of. A gap that goes on comes again, with the same `from_ns` and a later `to_ns`."""

    agent_id: str
    from_ns: int
    to_ns: int
    why: str


@dataclass(frozen=True, slots=True)
class Away:
    """An address that is to be followed and is not, since when and why; `agent` is the id of the
    agent that answered there last, if one did since the colony began. `elsewhere` says that this
    agent is followed at another address, so that nothing of it is missing."""

    agent: str
    address: str
    since_ns: int
    why: str
    elsewhere: bool = False
