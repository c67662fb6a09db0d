"""Following one address: connect, find out whose it is, read every session there, keep what is
wanted at work; and all of it again when the connection breaks."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, suppress
from typing import Final

import grpc
import structlog

from coral.client import (
    AgentClient,
    AgentError,
    CollectorInfo,
    ContractError,
    DeadlineExceededError,
    Retry,
    UnavailableError,
    Watch,
    What,
)
from coral.client.backoff import Backoff
from coral.colony.delivery import AgentSeen, EndedError
from coral.colony.follow.agents import Agent, FollowedTwiceError
from coral.colony.follow.claims import checked_id, short
from coral.colony.follow.status import Shared, State, Status
from coral.colony.follow.visit import TRANSIENT, Visit
from coral.colony.follow.wanted import Renew, Start, Upkeep

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

ONCE: Final = Retry(patience_s=0)
"""For clients of agents: the follower itself connects again, through its gate."""

_RETRY: Final = Retry(patience_s=float("inf"), first_delay_s=0.2, max_delay_s=10.0)
_REFUSED_S: Final = 60.0
"""After an agent refused the colony, which an operator has to mend, rather than did not answer."""
_LOOK_S: Final = 60.0
_MOST_PRESENT: Final = 10_000
"""Collectors at work on an agent; many times what its limits allow."""


class Follower:
    """Follows the agent at ADDRESS until it is cancelled. `client` is there while the agent is
    followed."""

    def __init__(self, address: str, shared: Shared) -> None:
        self.status = Status(address)
        self.client: AgentClient | None = None
        self.upkeep = Upkeep(shared.wanted)
        self._shared = shared
        self._changed = asyncio.Event()  # something may be due earlier than it was
        self._backoff = Backoff(_RETRY)
        self._failed = False

    async def run(self) -> None:
        """Follows until it is cancelled."""
        task = asyncio.current_task()
        while True:
            pause_s = await self._follow_once()
            # A TaskGroup that ends for an error forgets a cancellation that comes meanwhile.
            if task and task.cancelling():
                raise asyncio.CancelledError
            self._failed = True
            self._shared.counts.failures += 1
            await asyncio.sleep(pause_s)

    async def _follow_once(self) -> float:
        """Follows for as long as the connection stands; after how many seconds to try again."""
        try:
            await self._follow()
        except FollowedTwiceError as error:
            return self._is_refused(str(error))
        except AgentError as error:
            return self._fails(error)
        except ExceptionGroup as group:
            failed, others = group.split(AgentError)
            if failed and not others:
                return self._fails(_first(failed))
            if group.subgroup(EndedError):
                raise
            return self._breaks(others)
        except EndedError:
            raise
        except Exception as error:  # noqa: BLE001  an agent may send anything
            return self._breaks(error)
        return 0.0

    def _breaks(self, error: BaseException | None) -> float:
        """What nobody thought of: it costs this agent, and no other."""
        log.error("following an agent failed", address=self.status.address, exc_info=error)
        return self._is_refused(f"the colony failed at it: {type(error).__name__}; see its log")

    def _fails(self, error: AgentError) -> float:
        cause = error.__cause__ if isinstance(error.__cause__, AgentError) else error
        if not isinstance(error, TRANSIENT):
            return self._is_refused(str(cause))
        self._is(State.AWAY, cause.reason if isinstance(cause, UnavailableError) else str(cause))
        return self._backoff.delay_s(time.monotonic()) or 0.0

    def _is_refused(self, why: str) -> float:
        self._is(State.REFUSED, why)
        return _REFUSED_S * (1 + random.random()) / 2  # noqa: S311  a jitter

    def _is(self, state: State, why: str = "") -> None:
        status = self.status
        status.why = why
        if state is status.state:
            return
        status.state, status.since_ns = state, time.time_ns()
        tell = log.info if state is State.FOLLOWED else log.warning
        more = {"reason": why} if why else {}
        if status.agent_id:
            more["agent"] = status.agent_id
        tell(f"agent is {state.value}", address=status.address, **more)

    async def _follow(self) -> None:
        """Raises `AgentError`, alone or in groups, and `FollowedTwiceError`."""
        shared, address = self._shared, self.status.address
        async with AsyncExitStack() as stack, AsyncExitStack() as entering:
            await entering.enter_async_context(shared.gate.passing(failed=self._failed))
            client = await stack.enter_async_context(shared.connect(address))
            told, listed = await asyncio.gather(
                client.capabilities(), client.collectors(include_ended=True)
            )
            self.status.agent_id = checked_id(told.agent_id, "its id")
            agent = stack.enter_context(shared.agents.followed(told.agent_id, address))
            agent.version, agent.kernel = short(told.agent_version), short(told.kernel_version)
            watch = await stack.enter_async_context(client.watch())
            present = await _present(watch, client.timeout_s)
            self.upkeep.begin(present, time.monotonic())
            stack.callback(self._leaves)
            async with asyncio.TaskGroup() as group:
                visit = Visit(shared, client, agent, self.status, group)
                await visit.begin([*present, *listed])
                await entering.aclose()
                self._stands(client)
                stack.callback(self._tell_seen, agent, connected=False)
                self._tell_seen(agent, connected=True)
                group.create_task(self._keep_up(client))
                try:
                    async for change in watch:
                        if change.collector:
                            self._take(change.what, change.collector)
                            visit.follow(change.collector)
                except AgentError:
                    await visit.end()
                    raise

    def _stands(self, client: AgentClient) -> None:
        self.client = client
        self._failed = False
        self._shared.counts.connections += 1
        self._backoff.stands()
        self._backoff.delivers()
        self._is(State.FOLLOWED)

    def _tell_seen(self, agent: Agent, *, connected: bool) -> None:
        address = self.status.address
        self._shared.sink.agent_seen(
            AgentSeen(
                agent.agent_id, address, agent.heard_ns, connected, agent.version, agent.kernel
            )
        )

    def _leaves(self) -> None:
        self.client = None

    def _take(self, what: What, info: CollectorInfo) -> None:
        if what is What.ENDED:
            self.upkeep.disappears(info.collector_id, _how_it_ended(info), time.monotonic())
        else:
            self.upkeep.appears(info, time.monotonic())
        self._changed.set()

    async def _keep_up(self, client: AgentClient) -> None:
        """Starts what is wanted and not there, and renews leases."""
        while True:
            self._changed.clear()
            for action in self.upkeep.due(time.monotonic()):
                await self._do(client, action)
            wait_s = min(self.upkeep.next_s() - time.monotonic(), _LOOK_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(wait_s, 0)):
                    await self._changed.wait()

    async def _do(self, client: AgentClient, action: Start | Renew) -> None:
        wanted = action.wanted
        try:
            if isinstance(action, Renew):
                await client.renew(action.collector_id, wanted.lease_s)
                self.upkeep.done(action, action.collector_id, time.monotonic())
                return
            started = await client.start(
                wanted.kind, service_name=wanted.service, config=wanted.config,
                duration_s=wanted.lease_s,
            )  # fmt: skip
        except AgentError as error:
            why, is_refusal = str(error), not isinstance(error, TRANSIENT)
        else:
            if started.supported:
                self._shared.counts.started[wanted.kind.name] += 1
                self.upkeep.done(action, started.collector_id, time.monotonic())
                return
            why, is_refusal = started.error, True
        if is_refusal:
            self._tell_refused(action, why)
        self.upkeep.refused(action, why, time.monotonic())

    def _tell_refused(self, action: Start | Renew, why: str) -> None:
        """Logs each reason once."""
        self._shared.counts.refused[action.wanted.kind.name] += 1
        if self.upkeep.missing.get(str(action.wanted)) != why:
            log.warning(
                "an agent refuses what is wanted of it", agent=self.status.agent_id,
                collector=str(action.wanted), reason=why,
            )  # fmt: skip


async def _present(watch: Watch, timeout_s: float) -> list[CollectorInfo]:
    """The collectors at work when the watch began. Raises `DeadlineExceededError` for an agent that
    has not told them all after TIMEOUT_S, because others wait for its place in the gate."""
    found: list[CollectorInfo] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for change in watch:
                if change.what is What.SYNCED:
                    break
                if change.collector:
                    found.append(change.collector)
                if len(found) > _MOST_PRESENT:
                    raise ContractError(f"more than {_MOST_PRESENT:,} collectors at work")
    except TimeoutError as error:
        raise DeadlineExceededError(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the agent did not tell its collectors within {timeout_s:g} s",
        ) from error
    return found


def _how_it_ended(info: CollectorInfo) -> str:
    if not info.end:
        return "it ended"
    return f"it ended: {info.end.reason}" + (f": {info.end.detail}" if info.end.detail else "")


def _first(group: BaseExceptionGroup[AgentError]) -> AgentError:
    """What went wrong first: when a connection breaks, all its calls fail."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
