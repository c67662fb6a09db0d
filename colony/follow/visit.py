"""The sessions of an agent while one connection to it stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import structlog

from coral.client import (
    AgentClient,
    AgentError,
    CollectorInfo,
    ContractError,
    DeadlineExceededError,
    NotFoundError,
    OutOfRangeError,
    Retry,
    StreamLostError,
    UnavailableError,
)
from coral.client.backoff import Backoff
from coral.colony import clock
from coral.colony.delivery import Gap, SequenceError
from coral.colony.follow.agents import RESTARTED, Agent, given_up
from coral.colony.follow.book import Book
from coral.colony.follow.claims import checked_id
from coral.colony.follow.status import Shared, Status

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

TRANSIENT: Final = (UnavailableError, DeadlineExceededError)

_NOT_THERE: Final = (StreamLostError, NotFoundError, OutOfRangeError)
_RETRY: Final = Retry(patience_s=float("inf"), first_delay_s=0.5, max_delay_s=30.0)
_LAST_WORDS_S: Final = 5.0
_MOST_SESSIONS: Final = 256
"""Of one agent; many times what its limits allow by default."""
_MOST_TOLD: Final = 10


class Visit:
    """Reads each session of AGENT by a task of GROUP; STATUS says how many there are."""

    def __init__(
        self,
        shared: Shared,
        client: AgentClient,
        agent: Agent,
        status: Status,
        group: asyncio.TaskGroup,
    ) -> None:
        self._shared = shared
        self._client = client
        self._agent = agent
        self._status = status
        self._group = group
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._over = asyncio.Event()
        self._told: set[str] = set()

    async def begin(self, infos: Sequence[CollectorInfo]) -> None:
        """Follows all sessions that the agent reports, and gives up those that it has lost. Returns
        when each subscription stands, or was refused."""
        opened = [event for info in infos if (event := self.follow(info))]
        now_ns, agent = clock.now_ns(), self._agent
        reported = frozenset(info.collector_id for info in infos)
        if lost := given_up(agent, reported, RESTARTED, now_ns):
            self._shared.lose(lost)
            self._shared.sink.gap(Gap(agent.agent_id, agent.heard_ns, now_ns, RESTARTED))
        agent.heard_ns = now_ns
        for event in opened:
            await event.wait()

    def follow(self, info: CollectorInfo) -> asyncio.Event | None:
        """Reads the session; the event says that its subscription stands. None for one that is
        read already, of which everything is known, or for which there is no room."""
        if info.collector_id in self._reading:
            return None
        if len(self._reading) >= _MOST_SESSIONS:
            self._tell_once("it has more sessions than the colony follows of one agent")
            return None
        try:
            checked_id(info.collector_id, "a session's id")
        except ContractError as error:
            self._tell_once(str(error))
            return None
        book = self._agent.books.open(info)
        if book is None:
            return None
        opened = asyncio.Event()
        self._reading[info.collector_id] = self._group.create_task(self._read(book, opened))
        self._status.sessions = len(self._reading)
        return opened

    def _tell_once(self, why: str) -> None:
        """An agent decides how many sessions it reports, and how often."""
        if why not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(why)
            log.warning("a session is not followed", agent=self._agent.agent_id, reason=why)

    async def end(self) -> None:
        """The connection is over. Sessions that the agent has ended in order still have their last
        batches to be read, for a few seconds."""
        self._over.set()
        if self._reading:
            await asyncio.wait(self._reading.values(), timeout=_LAST_WORDS_S)

    async def _read(self, book: Book, opened: asyncio.Event) -> None:
        """Reads a session until it or the connection ends."""
        backoff, collector_id = Backoff(_RETRY), book.session.collector_id
        try:
            while not book.ended:
                try:
                    await self._subscribe(book, opened)
                except SequenceError as error:
                    log.error(
                        "a session is read again from where the sink has it", reason=str(error),
                        agent=self._agent.agent_id, collector=collector_id,
                    )  # fmt: skip
                    book.last_seq, book.ended = error.expected_seq, None
                except _NOT_THERE as error:
                    self._shared.lose([book.close_as_lost(str(error), clock.now_ns())])
                except AgentError as error:
                    opened.set()
                    if not isinstance(error, TRANSIENT):
                        log.warning(
                            "a stream failed, and is asked for again", collector=collector_id,
                            agent=self._agent.agent_id, reason=str(error),
                        )  # fmt: skip
                    if await self._is_over_within(backoff.delay_s(time.monotonic()) or 0.0):
                        return
                    await self._shared.sink.room()
            self._agent.books.close(book)
        finally:
            opened.set()
            self._reading.pop(collector_id, None)
            self._status.sessions = len(self._reading)

    async def _subscribe(self, book: Book, opened: asyncio.Event) -> None:
        async with self._client.subscribe(
            book.session.collector_id, after_seq=book.begin_stream(), columns=True
        ) as stream:
            opened.set()
            received_bytes = 0
            async for batch in stream:
                self._agent.heard_ns = now_ns = clock.now_ns()
                size_bytes = stream.received_bytes - received_bytes
                received_bytes = stream.received_bytes
                # Nothing may come between these two: the book says what the sink has.
                if delivery := book.take(batch, stream.account, size_bytes, now_ns):
                    self._shared.put(delivery)
                    await self._shared.sink.room()

    async def _is_over_within(self, wait_s: float) -> bool:
        """Waits for the end of the visit, at most that long; whether it came."""
        try:
            async with asyncio.timeout(wait_s):
                await self._over.wait()
        except TimeoutError:
            return False
        return True
