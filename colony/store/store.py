"""The store as the rest of the colony sees it: on the loop, and never in its way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import duckdb
import pyarrow as pa

from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing
from coral.colony.store.core import Core
from coral.colony.store.errors import StoreEndedError
from coral.colony.store.figures import Figures
from coral.colony.store.lock import DirectoryLock
from coral.colony.store.making import Waiting
from coral.colony.store.readers import Readers, Work
from coral.colony.store.rows import Rows
from coral.colony.store.settings import Settings
from coral.colony.store.sources import Sources
from coral.colony.store.writer import OnRollup, Writer

T = TypeVar("T")

_CLOSING_S: Final = 10.0
_ITEM_BYTES: Final = 500  # of what has no size of its own
_LEAST_ROW_BYTES: Final = 64
"""Columns of zeros are not sent, and take as much as others in a transaction."""
_LOOK_AGAIN_S: Final = 1.0
_WEIGHT: Final = 0.01  # of one more size in the average


class Store:
    """Everything of one colony, in DIRECTORY, which no other process may use. All methods belong to
    the loop that `start` ran on; none of them waits for a disk.

    What `put` takes is durable after the next transaction, within about a second: `standing` says
    up to where. What a crash takes was never in a standing.

    ON_ROLLUP is called, in a thread, with the rows of minutes that a transaction made durable; it
    must not raise.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        rows: Rows,
        on_rollup: OnRollup | None = None,
    ) -> None:
        self.directory = directory
        self.figures = Figures()
        self._settings = settings
        self._core = Core(directory, settings, rows)
        self._on_rollup = on_rollup
        self._changed = asyncio.Event()
        self._last = 0
        self._mean_bytes = float(_ITEM_BYTES)
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def start(self) -> None:
        """Opens or makes the directory. Raises `StoreError`, `StoreInUseError`, OSError."""
        await asyncio.to_thread(self._open)
        loop = asyncio.get_running_loop()

        def published() -> None:
            with suppress(RuntimeError):  # nobody waits in a loop that is closed
                loop.call_soon_threadsafe(self._wake)

        self._writer = Writer(
            self._core,
            self.figures,
            published,
            self._on_rollup,
        )
        self._readers = Readers(
            self.directory,
            self._core.database,
            self._core.rows,
            self.figures,
            self._settings.readers,
        )
        if aside := self._core.database.moved_aside:
            self.figures.moved_aside = str(aside)
        self._writer.start()

    async def run(self) -> None:
        """Returns never. Raises `StoreEndedError` once nothing can be stored any more."""
        await self._until(lambda: False)

    async def close(self) -> bool:
        """Stores what waits and ends. False where that was not possible within 10 s, as on a full
        disk; agents keep it for a while, and are asked again after what is stored."""
        self._readers.close()
        all_stored = await asyncio.to_thread(self._writer.stop, _CLOSING_S)
        self._lock.release()
        return all_stored

    # What comes.

    def put(self, delivery: Delivery) -> bool:
        """Queues DELIVERY. False where the store has it already, so that nothing is stored twice.
        Raises `SequenceError` where it does not follow on `expected_seq`, ValueError where its
        figures do not add up, `StoreEndedError`."""
        if not self._core.book.admit(delivery):
            self.figures.repeated += 1
            return False
        size_bytes = max(delivery.size_bytes, delivery.rows * _LEAST_ROW_BYTES)
        self._queue(delivery, size_bytes + _ITEM_BYTES)
        return True

    def agent_seen(self, agent: AgentSeen) -> None:
        """Notes how an agent fares, for the table `agents`."""
        self._queue(agent, _ITEM_BYTES)

    def gap(self, gap: Gap) -> None:
        """Notes that an agent could not be reached, for the table `gaps`."""
        self._queue(gap, _ITEM_BYTES)

    async def room(self) -> None:
        """Returns once less than `queue_bytes` wait. Followers call it before they read on. Raises
        `StoreEndedError`."""
        while self._waiting or self._is_full:
            self._raise_if_ended()
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                # One that was let in may have nothing to put, and then nobody lets others in.
                await asyncio.wait([waiting], timeout=_LOOK_AGAIN_S)
            finally:
                if not waiting.done():
                    self._waiting.remove(waiting)
            if waiting.done() or not self._is_full:
                return

    async def stored(self) -> None:
        """Returns once everything put so far is durable; hurries. Raises
        `StoreEndedError`."""
        last = self._last
        self._writer.hurry()
        await self._until(lambda: self._writer.durable >= last)

    # What is there.

    def expected_seq(self, agent_id: str, collector_id: str) -> int:
        """The last event of a session that was put: where to go on in a running colony."""
        return self._core.book.expected_seq((agent_id, collector_id))

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What is durable of a session; None for one that the store does not know, or that ended
        longer ago than `known_ended_s`."""
        return self._core.book.standing((agent_id, collector_id))

    def standings(self) -> Sequence[Standing]:
        """Those of all such sessions."""
        return self._core.book.standings()

    async def snapshot(self, work: Work[T], *, deadline_s: float) -> T:
        """What WORK returns. It runs in a thread, on a cursor of its own, in one transaction that
        sees everything as of one commit, and must not write. After DEADLINE_S, or where the caller
        is cancelled, its statements are interrupted. Raises TimeoutError,
        `StoreUnavailableError`, and what WORK raises."""
        return await self._readers.run(work, deadline_s)

    async def read(
        self,
        build: Callable[[Sources], str],
        parameters: Sequence[object] = (),
        *,
        deadline_s: float,
    ) -> pa.Table:
        """The rows of the query that BUILD makes; see `snapshot`."""

        def work(cursor: duckdb.DuckDBPyConnection, sources: Sources) -> pa.Table:
            return cursor.sql(build(sources), params=list(parameters) or None).to_arrow_table()

        return await self.snapshot(work, deadline_s=deadline_s)

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = DirectoryLock(self.directory)
        try:
            self._core.open()
        except BaseException:
            self._lock.release()
            raise

    def _queue(self, item: Waiting, size_bytes: int) -> None:
        self._raise_if_ended()
        self._mean_bytes += (size_bytes - self._mean_bytes) * _WEIGHT
        self._last = self._writer.put(item, size_bytes)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._raise_if_ended()
            await self._changed.wait()

    def _raise_if_ended(self) -> None:
        if self._writer.failure:
            raise StoreEndedError(f"the store has ended: {self._writer.failure}")

    def _wake(self) -> None:
        """Lets everybody look again who waits for something to be stored; and of those who wait to
        put something, as many as there is room for, as deliveries are on average."""
        self._changed.set()
        self._changed = asyncio.Event()
        room_bytes = self._settings.queue_bytes - self.figures.queue_bytes
        for _ in range(min(len(self._waiting), int(room_bytes / self._mean_bytes))):
            self._waiting.popleft().set_result(None)

    @property
    def _is_full(self) -> bool:
        return self.figures.queue_bytes >= self._settings.queue_bytes
