"""What a follower needs of whatever keeps its deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing


class Sink(Protocol):
    """Keeps deliveries; the store is one."""

    def put(self, delivery: Delivery) -> object:
        """Queues DELIVERY, which goes on where the session's delivery before it ended. Raises
        `SequenceError` where it does not."""

    async def room(self) -> None:
        """Returns when there is room for more. Followers wait for it before they read on."""

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What is durable of a session; None for one that it has nothing of."""

    def standings(self) -> Sequence[Standing]:
        """The same of every session."""

    def agent_seen(self, agent: AgentSeen) -> None:
        """Notes how an agent fares."""

    def gap(self, gap: Gap) -> None:
        """Notes that an agent could not be followed for a while."""
