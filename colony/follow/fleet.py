"""All agents: those that discovery finds are followed, each by a task of its own; and what callers
ask of all of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import structlog

from coral.client import AgentClient, AgentError
from coral.colony import clock
from coral.colony.delivery import Away, Gap
from coral.colony.follow.agents import Agents, given_up
from coral.colony.follow.counts import Counts
from coral.colony.follow.discovery.source import Source
from coral.colony.follow.follower import Follower
from coral.colony.follow.gate import Gate
from coral.colony.follow.kept import Kept, Renewal
from coral.colony.follow.sink import Sink
from coral.colony.follow.status import Connect, Shared, State, Status
from coral.colony.follow.visit import TRANSIENT
from coral.colony.follow.wanted import Wanted
from coral.wire.leases import MAX_LEASE_S

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_LOOK_EVERY_S: Final = 10.0
_RENEW_EVERY_S: Final = 1.0
_SOURCE_AGAIN_S: Final = 30.0
SILENT: Final = "the agent has not answered for too long"


@dataclass(frozen=True, slots=True)
class Asked:
    """What one agent did. `error` is empty where it did what it was asked."""

    agent_id: str
    collector_id: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()


class Fleet:
    """The agents that SOURCES find. WANTED are the collectors that are to be at work on each one;
    at most CONNECTING agents are connected to at a time; an agent that has not answered for
    LOST_AFTER_S is given up: ALONE says that nobody else hands deliveries to the sink, so that
    agents which were followed in an earlier life count, too."""

    def __init__(
        self,
        sink: Sink,
        sources: Sequence[Source],
        connect: Connect,
        *,
        wanted: Sequence[Wanted] = (),
        connecting: int = 50,
        lost_after_s: float = 3600.0,
        alone: bool = True,
    ) -> None:
        self.counts = Counts()
        self.gate = Gate(connecting)
        self.agents = Agents(sink)
        self.kept = Kept()
        self._shared = Shared(sink, self.agents, self.gate, connect, wanted, self.counts)
        self._sources = sources
        self._lost_after_ns = int(lost_after_s * 1e9)
        self._alone = alone
        self._found: dict[Source, frozenset[str]] = {}
        self._followers: dict[str, tuple[Follower, asyncio.Task[None]]] = {}
        self._group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follows for the duration of the block; what has been read then has been put."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            tasks = [
                *(group.create_task(self._discover(source)) for source in self._sources),
                group.create_task(self._give_up_the_silent()),
                group.create_task(self._renew_kept()),
            ]
            try:
                yield
            finally:
                self._group = None
                for task in (*tasks, *(task for _, task in self._followers.values())):
                    task.cancel()
                self._followers.clear()

    @property
    def statuses(self) -> Sequence[Status]:
        """How each address stands, in order."""
        return [self._followers[address][0].status for address in sorted(self._followers)]

    @property
    def is_settled(self) -> bool:
        """Whether every source has said which agents there are, and each one has been tried."""
        return len(self._found) == len(self._sources) and not any(
            status.state is State.CONNECTING for status in self.statuses
        )

    def missing(self) -> Mapping[str, Mapping[str, str]]:
        """By agent id: the wanted collectors that are not at work, and why."""
        return {
            follower.status.agent_id: missing
            for follower, _ in self._followers.values()
            if follower.client and (missing := follower.upkeep.missing)
        }

    def away(self) -> Sequence[Away]:
        """The addresses that do not answer, or may not be followed."""
        there = {
            follower.status.agent_id for follower, _ in self._followers.values() if follower.client
        }
        return [
            Away(it.agent_id, it.address, it.since_ns, it.why, it.agent_id in there)
            for it in self.statuses
            if it.state in (State.AWAY, State.REFUSED)
        ]

    async def collect(
        self,
        kind: int | str,
        *,
        config: Mapping[str, str] | None = None,
        service: str = "",
        duration_s: float | None = None,
        agents: Collection[str] = (),
    ) -> Sequence[Asked]:
        """Starts a collector on each of AGENTS, by default on all: of those that are not followed
        now the answer says why. It is followed as all others, and ends after DURATION_S, by default
        with the lease that the agent gives it. A longer one than agents' leases is renewed by this
        fleet, and by no other: when the fleet or the agent ends, so does the collector."""
        lease_s = None if duration_s is None else min(duration_s, MAX_LEASE_S)

        async def start(agent_id: str, client: AgentClient) -> Asked:
            started = await client.start(
                kind, service_name=service, config=config, duration_s=lease_s
            )
            if started.supported and duration_s is not None:
                self.kept.started(agent_id, started.collector_id, duration_s, time.monotonic())
            error = "" if started.supported else started.error
            return Asked(agent_id, started.collector_id, error, started.notes)

        asked = await self._ask(agents, start)
        away = () if agents else (it for it in self.away() if not it.elsewhere)
        return [*asked, *(Asked(it.agent or it.address, error=it.why) for it in away)]

    async def stop(self, agent_id: str, collector_id: str) -> Asked:
        """Ends a collector. One whose agent cannot be reached is not renewed any more."""
        was_kept = self.kept.forget(agent_id, collector_id)

        async def stop(agent_id: str, client: AgentClient) -> Asked:
            await client.stop(collector_id)
            return Asked(agent_id, collector_id)

        (asked,) = await self._ask([agent_id], stop)
        # A renewal may have been under way.
        self.kept.forget(agent_id, collector_id)
        if asked.error and was_kept:
            more = f"; it is not renewed any more, and ends within {MAX_LEASE_S:.0f} s"
            return replace(asked, error=asked.error + more)
        return asked

    async def _renew_kept(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            await self.renew(time.monotonic())

    async def renew(self, now_s: float) -> None:
        """Renews the leases of what was asked for that are due."""
        there = self._clients()

        async def one(renewal: Renewal) -> None:
            client = there.get(renewal.agent_id)
            if client is None:
                self.kept.failed(renewal, now_s)
                return
            try:
                async with self.gate.passing(failed=False):
                    await client.renew(renewal.collector_id, renewal.lease_s)
            except TRANSIENT:
                self.kept.failed(renewal, now_s)
            except AgentError as error:
                if self.kept.forget(renewal.agent_id, renewal.collector_id):
                    log.warning(
                        "what was asked for has ended early", agent=renewal.agent_id,
                        collector=renewal.collector_id, reason=str(error),
                    )  # fmt: skip
            else:
                self.kept.renewed(renewal, now_s)

        await asyncio.gather(*map(one, self.kept.due(now_s)))

    def _clients(self) -> Mapping[str, AgentClient]:
        """Of the agents that are followed now, by id."""
        return {
            follower.status.agent_id: follower.client
            for follower, _ in self._followers.values()
            if follower.client
        }

    async def _ask(
        self,
        agents: Collection[str],
        ask: Callable[[str, AgentClient], Awaitable[Asked]],
    ) -> Sequence[Asked]:
        there = self._clients()

        async def one(agent_id: str) -> Asked:
            client = there.get(agent_id)
            if client is None:
                return Asked(agent_id, error=self._why_not(agent_id))
            try:
                async with self.gate.passing(failed=False):
                    return await ask(agent_id, client)
            except AgentError as error:
                return Asked(agent_id, error=str(error))

        return await asyncio.gather(*map(one, agents or sorted(there)))

    def _why_not(self, agent_id: str) -> str:
        for status in self.statuses:
            if status.agent_id == agent_id:
                return f"the agent at {status.address} is {status.state.value}: {status.why}"
        return f"agent {agent_id!r} is not known"

    async def _discover(self, source: Source) -> None:
        def found(addresses: frozenset[str]) -> None:
            self._found[source] = addresses
            self._adjust()

        while True:
            try:
                await source.follow(found)
            except Exception:  # what is found elsewhere goes on
                log.exception("a source of agents failed, and is asked again")
            await asyncio.sleep(_SOURCE_AGAIN_S)

    def _adjust(self) -> None:
        """One follower for each address that any source has found."""
        wanted = frozenset[str]().union(*self._found.values())
        for address in self._followers.keys() - wanted:
            _, task = self._followers.pop(address)
            task.cancel()
            log.info("agent is followed no longer", address=address)
        for address in sorted(wanted - self._followers.keys()):
            if self._group:
                follower = Follower(address, self._shared)
                task = self._group.create_task(follower.run())
                self._followers[address] = follower, task

    async def _give_up_the_silent(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.give_up(clock.now_ns())

    def give_up(self, now_ns: int) -> None:
        """Ends the sessions of agents that have not answered for too long. Should one come back
        with its sessions, they go on."""
        for agent in self.agents.silent(now_ns - self._lost_after_ns):
            if not (self._alone or agent.address):
                continue  # somebody else follows it
            self._shared.lose(given_up(agent, frozenset(), SILENT, now_ns))
            self._shared.sink.gap(Gap(agent.agent_id, agent.heard_ns, now_ns, SILENT))
