"""What a follower needs of whatever keeps its deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from coral.colony.delivery import Delivery, Standing


class Sink(Protocol):
    """Keeps deliveries; the store is one."""

    def put(self, delivery: Delivery) -> None:
        """Queues DELIVERY, which goes on where the session's delivery before it ended."""

    async def room(self) -> None:
        """Returns when there is room for more. Followers wait for it before they read on."""

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What is durable of a session; None for one that it has nothing of."""

    def standings(self) -> Sequence[Standing]:
        """The same of every session."""

    def gap(self, agent_id: str, from_ns: int, to_ns: int, why: str) -> None:
        """Between the two Unix times the agent could not be followed, and it may have seen what
        nobody knows of."""
