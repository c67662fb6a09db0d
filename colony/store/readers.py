"""Reading in threads, each on one snapshot, until a deadline. The writer never waits for them,
except to open the database again: then they are interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, Generic, TypeVar

import duckdb
import structlog

from coral.colony.store.catalog import Segment
from coral.colony.store.database import Database
from coral.colony.store.errors import StoreUnavailableError
from coral.colony.store.figures import Figures
from coral.colony.store.rows import Rows
from coral.colony.store.sources import Sources

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

T = TypeVar("T")
Work = Callable[[duckdb.DuckDBPyConnection, Sources], T]

_AGAIN_S: Final = 0.05


class Readers:
    """At most MOST at a time; the others wait, which counts towards their deadlines."""

    def __init__(
        self, directory: Path, database: Database, rows: Rows, figures: Figures, most: int
    ) -> None:
        self._directory = directory
        self._database = database
        self._rows = rows
        self._figures = figures
        self._places = asyncio.Semaphore(most)
        self._threads = ThreadPoolExecutor(most, "coral-read")

    async def run(self, work: Work[T], deadline_s: float) -> T:
        """What WORK returns; see `Store.snapshot`."""
        reading = _Reading(work, self._directory, self._database, self._rows)
        async with asyncio.timeout(deadline_s):
            await self._places.acquire()
            future = asyncio.get_running_loop().run_in_executor(self._threads, reading.run)
            self._figures.readers += 1
            future.add_done_callback(lambda it: self._ended(it, reading.missing))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                # The thread must not go on unseen. An interrupt between two statements is lost.
                while not future.done():
                    reading.interrupt()
                    await asyncio.wait([future], timeout=_AGAIN_S)
                raise

    def close(self) -> None:
        """Takes no more; the database interrupts those at work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, future: asyncio.Future[T], missing: Sequence[Segment]) -> None:
        self._figures.readers -= 1
        for it in missing:
            if it.path not in self._figures.missing:
                self._figures.missing.add(it.path)
                log.error(
                    "a segment is gone, or is not what was written", file=it.path, rows=it.rows
                )
        self._places.release()
        if not future.cancelled():
            future.exception()  # told to the caller, if there still is one


class _Reading(Generic[T]):
    def __init__(self, work: Work[T], directory: Path, database: Database, rows: Rows) -> None:
        self._work = work
        self._directory = directory
        self._database = database
        self._rows = rows
        self.missing: Sequence[Segment] = ()
        self._cursor: duckdb.DuckDBPyConnection | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """From another thread."""
        self._interrupted = True
        if cursor := self._cursor:
            with suppress(duckdb.Error):
                cursor.interrupt()

    def run(self) -> T:
        with self._database.cursor() as cursor:
            self._cursor = cursor
            try:
                if self._interrupted:
                    raise StoreUnavailableError("interrupted")
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                sources = Sources.of(cursor, self._directory, self._rows)
                try:
                    return self._work(cursor, sources)
                finally:
                    self.missing = sources.missing
            except duckdb.InterruptException:
                raise StoreUnavailableError("the database is being opened again") from None
            finally:
                self._cursor = None
                with suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
