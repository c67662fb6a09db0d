"""The async shell around a collector: opens it, drains it in time, closes it.

It decides when to drain. What a drain does, the collector alone knows.
"""

from __future__ import annotations

import asyncio
import errno
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Self, TypeVar

from coral.bpf import LoadError, RecordReader
from coral.bpf.buffers.records import MOST_BYTES
from coral.bpf.libbpf import release_memory
from coral.collectors.contract import Batch, Collector, Emit
from coral.collectors.metering import measured
from coral.collectors.pacing import EventPace

# In its first interval a collector is drained after pauses that double between these, until it has
# rows, so that users see within a blink that it works; from then on at its interval.
_FIRST_DRAIN_S: Final = 0.01
_FIRST_DRAINS_MOST_S: Final = 0.25

T = TypeVar("T")


class Stop:
    """A request to end a run. It can be made at any time, and again without effect."""

    def __init__(self) -> None:
        self.requested = False
        self.woken = asyncio.Event()  # the run has something to look at

    def request(self) -> None:
        """The run ends at its next step, in order."""
        self.requested = True
        self.woken.set()


async def run(
    collector: Collector, emit: Emit, attached: Callable[[], None], stop: Stop | None = None
) -> None:
    """Opens COLLECTOR, calls ATTACHED, then drains it and emits at every interval, until STOP is
    requested or all processes that it watches have ended. Either way it then detaches the
    collector, drains it once more, and closes it. Raises `BpfError` where it cannot be opened or
    drained. A cancellation ends it in the same way and loses nothing either."""
    stop = stop or Stop()
    opened = False
    try:
        if stop.requested:
            return
        await in_thread(lambda: _open(collector))
        opened = True
        if stop.requested:
            return
        attached()
        await in_thread(release_memory)
        with _Watch(collector, stop) as watch:
            if collector.records and collector.drains_on_loop:
                await _drain_events(collector, collector.records, watch, emit)
            else:
                await _drain_summaries(collector, watch, emit)
    finally:
        await completed(asyncio.ensure_future(_wind_up(collector, emit, opened=opened)))


async def _wind_up(collector: Collector, emit: Emit, *, opened: bool) -> None:
    try:
        if opened:
            try:
                await in_thread(collector.bpf_object.detach)
            finally:  # what it had counted until then is not lost with a failure to detach
                await _drain_rest(collector, emit)
    finally:
        await in_thread(collector.close)


def _open(collector: Collector) -> None:
    try:
        collector.open()
    except OSError as error:  # a descriptor, a file of /proc
        what = f"opening {error.filename or 'a descriptor'}"
        raise LoadError(what, error.errno or errno.EIO) from error
    except KeyError as error:
        raise LoadError(
            f"{collector.bpf_object.name} has no {error}: it is of another version of this "
            "agent, or damaged"
        ) from error


async def _drain(collector: Collector, emit: Emit) -> Batch:
    """Drains and emits a batch. A cancellation is deferred until it is emitted: its rows are in no
    map any more, and would be lost without a number."""
    drained: list[Batch] = []
    try:
        if collector.drains_on_loop:
            drained.append(collector.drain())
        else:
            await in_thread(lambda: drained.append(collector.drain()))
    finally:
        for batch in drained:
            emit(batch)
    return drained[0]


async def _drain_rest(collector: Collector, emit: Emit) -> None:
    """Drains everything that there is, in as many parts as it takes."""
    await _drain(collector, emit)
    records = collector.records if collector.drains_on_loop else None
    for _ in range(records.capacity_bytes // MOST_BYTES if records else 0):
        if not records or not records.pending_bytes:
            break
        await asyncio.sleep(0)
        await _drain(collector, emit)


async def _drain_events(
    collector: Collector, records: RecordReader, watch: _Watch, emit: Emit
) -> None:
    pace = EventPace(time.monotonic(), collector.interval_s, polls=not records.wakes_at_rest)
    while not watch.over:
        now = time.monotonic()  # the loop's own clock may stand still for a millisecond
        pending = records.pending_bytes > 0
        if pace.should_drain(now, pending=pending, filling=records.filling):
            batch = await _drain(collector, emit)
            more = records.pending_bytes >= MOST_BYTES
            pace.drained(now, time.monotonic(), len(batch.rows), more=more)
            await asyncio.sleep(0)  # others come in between, however much there is to drain
        elif not pace.rests(now) or records.rest():
            await watch.wait(pace.due(now) - now)


async def _drain_summaries(collector: Collector, watch: _Watch, emit: Emit) -> None:
    loop, interval_s = asyncio.get_running_loop(), collector.interval_s
    started = tick = loop.time()
    seen, pause_s = False, _FIRST_DRAIN_S
    while not watch.over:
        if seen:
            if tick <= loop.time():  # a wake-up does not put off the tick
                tick = max(tick + interval_s, loop.time())
        else:
            tick = min(loop.time() + pause_s, started + interval_s)
            pause_s = min(2 * pause_s, _FIRST_DRAINS_MOST_S)
            seen = tick == started + interval_s
        while loop.time() < tick and not watch.over and not watch.filling:
            await watch.wait(tick - loop.time())
        if watch.over:
            continue
        if await _drain(collector, emit) and not seen:
            seen, tick = True, loop.time()


class _Watch:
    """Waits for the next time to drain: a tick, a program's wake-up, or the end of the run."""

    def __init__(self, collector: Collector, stop: Stop) -> None:
        self._stop = stop
        self._exited = False
        self._woken = stop.woken
        self._running = set(collector.exit_fds())
        self._records = collector.records
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        for fd in self._running:
            self._loop.add_reader(fd, self._on_exit, fd)
        if self._records:
            wakeup = self._records.wakeup
            self._loop.add_reader(wakeup.fileno(), self._on_wakeup, wakeup)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._running:
            self._loop.remove_reader(fd)
        if self._records:
            self._loop.remove_reader(self._records.wakeup.fileno())

    @property
    def over(self) -> bool:
        """Whether the run has to end: it was requested, or all targets have ended."""
        return self._exited or self._stop.requested

    @property
    def filling(self) -> bool:
        """Whether a buffer of records should not wait for the interval's end."""
        return self._records is not None and self._records.filling

    def _on_exit(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._running.discard(fd)
        self._exited = not self._running
        if self._exited:
            self._woken.set()

    def _on_wakeup(self, wakeup: select.epoll) -> None:
        wakeup.poll(0)
        self._woken.set()

    async def wait(self, seconds: float) -> None:
        """Waits for SECONDS, or a wake-up."""
        timer = self._loop.call_later(seconds, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
        self._woken.clear()


async def in_thread(function: Callable[[], T]) -> T:
    """Runs FUNCTION in a thread. A caller that is cancelled meanwhile still waits for its end, so
    that everything it makes has an owner; then the cancellation goes on."""
    loop, taken = asyncio.get_running_loop(), threading.Lock()
    done: Future[T] = Future()
    function = measured(function)

    def job() -> None:
        if taken.acquire(blocking=False):
            try:
                done.set_result(function())
            except BaseException as error:  # noqa: BLE001  raised below, by result()
                done.set_exception(error)

    try:
        loop.run_in_executor(None, job)
    except RuntimeError:
        # No thread can be started, yet the job stays queued: run it here, and only once.
        job()
    return await completed(asyncio.wrap_future(done))


async def completed(future: asyncio.Future[T]) -> T:
    """What FUTURE, which nobody else cancels, returns or raises. A caller that is cancelled
    meanwhile still waits for its end; then the cancellation goes on, before what FUTURE raised."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        future.exception()
        raise cancelled
    return future.result()
