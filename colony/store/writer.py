"""The thread that writes: it takes what waits, calls the core once a second, lets another thread
seal, and tries again whatever failed. The loop only ever puts."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import duckdb
import pyarrow as pa
import structlog

from coral.colony.store.catalog import Segment
from coral.colony.store.core import Core
from coral.colony.store.database import is_damaged, is_full
from coral.colony.store.errors import StoreEndedError, StoreError
from coral.colony.store.figures import Figures, State
from coral.colony.store.making import Waiting
from coral.colony.store.settings import Tier, tier_of

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

OnRollup = Callable[[Mapping[str, pa.Table]], None]

_RETIRE_EVERY_S: Final = 5.0
_FORGET_EVERY_S: Final = 3600.0
_PASSES: Final = (duckdb.Error, OSError, pa.ArrowException, StoreError)
"""What may pass: it is tried again."""


class Writer:
    """PUBLISHED is called, in the writing thread, after each transaction, and when it ends;
    ON_ROLLUP with the rows of minutes that a transaction made durable."""

    def __init__(
        self,
        core: Core,
        figures: Figures,
        published: Callable[[], None],
        on_rollup: OnRollup | None = None,
    ) -> None:
        self.durable = 0
        """How many of the things put, from the first on, are durable."""
        self.failure: BaseException | None = None
        """Why the thread ended, where it was not asked to."""
        self._core = core
        self._settings = core.settings
        self._figures = figures
        self._published = published
        self._on_rollup = on_rollup
        self._queue: deque[tuple[Waiting, int]] = deque()
        self._put = 0
        self._turn = threading.Condition()
        self._urgent = False
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="coral-store", daemon=True)
        self._sealer = ThreadPoolExecutor(1, "coral-seal")
        self._sealing: Future[Segment] | None = None
        self._troubles: dict[str, tuple[State, str]] = {}
        self._taken_bytes = 0  # of what the core has, and may not be durable yet
        self._rebuilt = False
        self._retry_s = 0.0
        self._commit_at = self._seal_at = self._seal_begun_at = self._retire_at = 0.0
        self._forget_at = time.monotonic() + _FORGET_EVERY_S

    def start(self) -> None:
        """The core has been opened."""
        self._thread.start()

    def put(self, item: Waiting, size_bytes: int) -> int:
        """Queues ITEM, and returns its number. Any one thread."""
        with self._turn:
            self._queue.append((item, size_bytes))
            self._put += 1
            self._figures.queue_items += 1
            self._figures.queue_bytes += size_bytes
            if self._figures.queue_bytes >= self._settings.commit_bytes:
                self._turn.notify()
            return self._put

    def hurry(self) -> None:
        """What was put is to be stored at once."""
        with self._turn:
            self._urgent = True
            self._turn.notify()

    def stop(self, within_s: float) -> bool:
        """Stores what waits, and ends the thread. False where that did not succeed in WITHIN_S:
        what waits is in nobody's books as stored. Blocks."""
        with self._turn:
            self._stop_at = time.monotonic() + within_s
            self._turn.notify()
        self._thread.join()
        return not self.failure and self.durable == self._put

    def _run(self) -> None:
        try:
            while not self._is_over():
                self._wait()
                self._step()
        except BaseException as failure:
            self.failure = failure
            log.exception("the store ends")
        finally:
            self._end()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        done = not self._queue and not self._core.has_pending
        return done or time.monotonic() >= self._stop_at

    def _wait(self) -> None:
        with self._turn:
            now = time.monotonic()
            self._turn.wait_for(self._is_due, max(0.0, self._commit_at - now))
            self._urgent = False

    def _is_due(self) -> bool:
        if self._retry_s:
            return self._stop_at is not None and time.monotonic() >= self._stop_at
        return (
            self._urgent
            or self._stop_at is not None
            or self._figures.queue_bytes >= self._settings.commit_bytes
            or (self._sealing is not None and self._sealing.done())
        )

    def _step(self) -> None:
        went_well = self._try("open", self._ready) and self._try("commit", self._commit)
        if went_well:
            self._seal()
            now = time.monotonic()
            if now >= self._retire_at:
                self._retire_at = now + _RETIRE_EVERY_S
                self._try("retire", self._retire)
            if now >= self._forget_at:
                self._forget_at = now + _FORGET_EVERY_S
                self._try("retire", self._forget)
        self._retry_s = 0.0 if went_well else self._next_retry_s()
        self._commit_at = time.monotonic() + (self._retry_s or self._settings.commit_s)
        self._observe()

    def _next_retry_s(self) -> float:
        return min(max(self._settings.retry_s, 2 * self._retry_s), self._settings.most_retry_s)

    def _ready(self) -> None:
        core = self._core
        if damage := core.database.damage:
            raise StoreEndedError(f"the hot file is damaged: {damage}")
        if not core.database.is_in_place:
            raise StoreEndedError(f"{core.database.path} was removed or replaced")
        if core.must_recover:
            self._figures.reopened += 1
            core.recover()
            self._publish()
        if not self._rebuilt:
            core.rebuild()
            self._rebuilt = True

    def _commit(self) -> None:
        core = self._core
        if core.has_pending:
            self._store(())
        with self._turn:
            taken, self._queue = self._queue, deque()
        if taken or core.is_behind:
            self._taken_bytes = sum(size for _, size in taken)
            self._store(_let_go(taken))

    def _store(self, items: Iterable[Waiting]) -> None:
        begin = time.perf_counter()
        commit = self._core.commit(items)
        self._figures.commits.add(time.perf_counter() - begin)
        for table, rows in commit.tables.items():
            self._figures.rows[table] += rows.num_rows
        self._publish()
        minutes = {it: rows for it, rows in commit.tables.items() if tier_of(it) is Tier.MINUTE}
        if self._on_rollup and minutes:
            self._on_rollup(minutes)

    def _publish(self) -> None:
        """What the core knows to be durable."""
        durable = self._core.durable_items
        if durable > self.durable:
            with self._turn:
                self._figures.queue_items -= durable - self.durable
                self._figures.queue_bytes -= self._taken_bytes
            self._taken_bytes = 0
            self.durable = durable
        self._figures.committed_ns = self._core.committed_ns
        self._published()

    def _seal(self) -> None:
        if self._sealing and self._sealing.done():
            future, self._sealing = self._sealing, None
            begun_at = self._seal_begun_at

            def register() -> None:
                self._core.register(future.result())
                self._figures.seals.add(time.monotonic() - begun_at)

            if not self._try("seal", register):
                self._seal_at = time.monotonic() + self._settings.most_retry_s
        now = time.monotonic()
        if self._sealing or now < self._seal_at or self._stop_at is not None:
            return
        if due := self._core.next_seal(self._settings.clock_ns()):
            self._seal_begun_at = now
            self._sealing = self._sealer.submit(due.run)
            self._sealing.add_done_callback(self._sealed)

    def _sealed(self, _future: Future[Segment]) -> None:
        with self._turn:
            self._turn.notify()

    def _retire(self) -> None:
        gone = self._core.retire(self._settings.clock_ns())
        self._figures.retired += len(gone)

    def _forget(self) -> None:
        self._core.forget(self._settings.clock_ns())

    def _try(self, what: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except StoreEndedError:
            raise
        except _PASSES as error:
            if is_damaged(error):
                self._core.database.condemn(error)
            self._figures.failures[what] += 1
            state = State.DISK_FULL if is_full(error) else State.FAILING
            if self._troubles.get(what, (None,))[0] is not state:
                log.warning("the store cannot go on for now", what=what, error=str(error))
            self._troubles[what] = state, f"{what}: {error}"
            return False
        if self._troubles.pop(what, None):
            log.info("the store goes on", what=what)
        return True

    def _observe(self) -> None:
        """Brings the figures up to date."""
        figures, catalog = self._figures, self._core.catalog
        states = list(self._troubles.values())
        figures.state, figures.detail = states[0] if states else (State.STORING, "")
        database = self._core.database
        figures.hot_bytes = database.size_bytes + database.spilled_bytes
        figures.hot_rows = sum(it.rows for it in catalog.generations)
        figures.segments = catalog.count_by_tier()
        figures.segment_bytes = catalog.bytes_by_tier()

    def _end(self) -> None:
        try:
            self._core.close()
        except StoreError as error:
            log.warning("the database was not closed", error=str(error))
        self._sealer.shutdown(wait=True)
        self._figures.state = State.CLOSED
        self._published()


def _let_go(queue: deque[tuple[Waiting, int]]) -> Iterator[Waiting]:
    """What is in QUEUE. Each thing leaves it, so that batches need not be in memory while what was
    made of them is written."""
    while queue:
        yield queue.popleft()[0]
