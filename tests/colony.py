"""What tests of the colony share: a store in memory that checks every delivery, and a fleet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeVar

from coral.client import AgentClient
from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing
from coral.colony.follow.discovery.listed import Listed
from coral.colony.follow.fleet import Fleet
from coral.colony.follow.follower import ONCE
from coral.colony.follow.status import Connect
from coral.colony.follow.wanted import Wanted
from tests.support import PATIENCE

T = TypeVar("T")
Key = tuple[str, str]

CONNECT: Final[Connect] = partial(AgentClient, timeout_s=10 * PATIENCE, retry=ONCE)


class Shelf:
    """Keeps deliveries in memory, and holds each one to its promise. It outlives fleets, as a
    store's file outlives colonies."""

    def __init__(self) -> None:
        self.kept: dict[Key, list[Delivery]] = {}
        self.gaps: list[Gap] = []
        self.seen: dict[str, AgentSeen] = {}
        self.open = asyncio.Event()
        self.open.set()
        self._standings: dict[Key, Standing] = {}

    def put(self, delivery: Delivery) -> None:
        key, before = delivery.session.key, self._standings.get(delivery.session.key)
        assert delivery.after_seq == (before.last_seq if before else 0), delivery
        lost, in_order = sum(delivery.lost.values()), delivery.last_seq - delivery.after_seq
        assert in_order == delivery.rows + lost, delivery
        assert delivery.produced >= delivery.last_seq
        if delivery.ended:
            assert delivery.produced == delivery.last_seq
        self.kept.setdefault(key, []).append(delivery)
        stored, all_lost = (before.stored, before.lost) if before else (0, {})
        self._standings[key] = Standing(
            session=delivery.session,
            last_seq=delivery.last_seq,
            produced=delivery.produced,
            stored=stored + delivery.rows,
            updated_ns=delivery.time_ns,
            lost=dict(Counter(all_lost) + Counter(delivery.lost)),
            lost_in_kernel=delivery.lost_in_kernel,
            ended=delivery.ended,
        )

    async def room(self) -> None:
        await self.open.wait()

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        return self._standings.get((agent_id, collector_id))

    def standings(self) -> Sequence[Standing]:
        return tuple(self._standings.values())

    def agent_seen(self, agent: AgentSeen) -> None:
        self.seen[agent.agent_id] = agent

    def gap(self, gap: Gap) -> None:
        assert gap.from_ns <= gap.to_ns
        self.gaps.append(gap)

    def of(self, collector_id: str) -> Standing | None:
        """What there is of the session, of whatever agent."""
        found = (it for it in self.standings() if it.session.collector_id == collector_id)
        return next(found, None)


async def until(condition: Callable[[], T], timeout_s: float = 30.0) -> T:
    """What CONDITION returns once it is true; TimeoutError where it never is."""
    async with asyncio.timeout(timeout_s * PATIENCE):
        while not (value := condition()):  # noqa: ASYNC110  nothing says when
            await asyncio.sleep(0.01)
    return value


@asynccontextmanager
async def following(
    shelf: Shelf,
    *addresses: str,
    wanted: Sequence[Wanted] = (),
    connect: Connect = CONNECT,
) -> AsyncIterator[Fleet]:
    """A fleet of the agents at ADDRESSES, each of which is followed or was tried."""
    fleet = Fleet(shelf, [Listed(addresses)], connect, wanted=wanted)
    async with fleet.following():
        await until(lambda: fleet.is_settled)
        yield fleet


def ended(standing: Standing | None) -> bool:
    """Whether the session's end is known."""
    return standing is not None and standing.ended is not None
