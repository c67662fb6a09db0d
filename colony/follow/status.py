"""How an address stands, and what its follower shares with all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import structlog

from coral.client import AgentClient
from coral.colony.delivery import AGENT_LOST, Delivery
from coral.colony.follow.agents import Agents
from coral.colony.follow.claims import OTHER
from coral.colony.follow.counts import Counts
from coral.colony.follow.gate import Gate
from coral.colony.follow.sink import Sink
from coral.colony.follow.wanted import Wanted

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

Connect = Callable[[str], AgentClient]


class State(Enum):
    """How an address stands."""

    CONNECTING = "connecting"
    FOLLOWED = "followed"
    AWAY = "away"
    """It does not answer."""
    REFUSED = "refused"
    """It answers, and may not be followed; `why` says why."""


@dataclass(slots=True)
class Status:
    """How an address stands, since when in Unix time, and why not better. `agent_id` is that of the
    agent that answered there last."""

    address: str
    state: State = State.CONNECTING
    since_ns: int = field(default_factory=time.time_ns)
    why: str = ""
    agent_id: str = ""
    sessions: int = 0


@dataclass(frozen=True, slots=True)
class Shared:
    """What all followers share."""

    sink: Sink
    agents: Agents
    gate: Gate
    connect: Connect
    wanted: Sequence[Wanted]
    counts: Counts

    def put(self, delivery: Delivery) -> None:
        """Hands DELIVERY on, and counts it."""
        counts, kind = self.counts, delivery.session.kind.name
        if not kind.isidentifier():  # a number, of which there can be any
            kind = OTHER
        counts.deliveries[kind] += 1
        counts.rows[kind] += delivery.rows
        counts.bytes[kind] += delivery.size_bytes
        for stage, count in delivery.lost.items():
            counts.lost[kind, stage] += count
        self.sink.put(delivery)

    def lose(self, deliveries: Iterable[Delivery]) -> None:
        """The same for those that end sessions which their agent has lost; they are logged."""
        for delivery in deliveries:
            self.counts.sessions_lost += 1
            self.put(delivery)
            log.warning(
                "an agent has lost a session", agent=delivery.session.agent_id,
                collector=delivery.session.collector_id, kind=delivery.session.kind.name,
                last_seq=delivery.last_seq, lost=delivery.lost.get(AGENT_LOST, 0),
                reason=delivery.ended.detail if delivery.ended else "",
            )  # fmt: skip
