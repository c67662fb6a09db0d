"""When a collector is opened, drained and closed: the async shell, around a collector that looks at
no kernel."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coral.bpf import Features, LoadError, RecordReader
from coral.bpf.buffers.records import MOST_BYTES, Records
from coral.collectors.contract import (
    Batch,
    Collector,
    EventRows,
    Measures,
    ServiceProcesses,
    Support,
)
from coral.collectors.options import Option
from coral.collectors.runner import Stop, in_thread, run
from coral.mesh.v1 import ebpf_pb2 as pb

ROWS = EventRows(pb.SyscallCall, np.zeros(1, [("pid", "<u4")]), ())


class Steps(Collector):
    """Notes what is done with it; each drain gives one row, once it may."""

    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS

    def __init__(self, fds: Sequence[int] = (), error: Exception | None = None) -> None:
        self.done: list[str] = []
        self.error = error
        self.may_drain, self.drains = threading.Event(), threading.Event()
        self.may_drain.set()
        self._fds = fds
        self._programs = SimpleNamespace(name="steps", detach=lambda: None)

    @classmethod
    def options(cls) -> Sequence[Option]:
        return ()

    @classmethod
    def support(cls, features: Features) -> Support:
        return Support(not features.obstacle)

    @classmethod
    def measures(cls, max_series: int) -> Measures:
        raise NotImplementedError

    @classmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> Steps:
        raise NotImplementedError

    @property
    def label(self) -> str:
        return "steps"

    @property
    def bpf_object(self) -> Any:
        return self._programs

    @property
    def interval_s(self) -> float:
        return 0.02

    def open(self) -> None:
        self.done.append("open")
        if self.error:
            raise self.error

    def drain(self) -> Batch:
        self.drains.set()
        self.may_drain.wait()
        self.done.append("drain")
        return Batch(ROWS, 1, 2)

    def close(self) -> None:
        self.done.append("close")

    def exit_fds(self) -> Sequence[int]:
        return self._fds


async def test_it_is_drained_until_cancelled_then_once_more_and_closed() -> None:
    steps, batches = Steps(), list[Batch]()
    attached, three = asyncio.Event(), asyncio.Event()

    def emit(batch: Batch) -> None:
        batches.append(batch)
        if len(batches) == 3:
            three.set()

    task = asyncio.create_task(run(steps, emit, attached.set))
    await attached.wait()
    await three.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.done[0] == "open"
    assert steps.done[-2:] == ["drain", "close"]
    # Every batch that was drained was emitted.
    assert steps.done.count("drain") == len(batches) >= 4


@pytest.mark.timed
async def test_without_rows_it_is_drained_seldom_in_its_first_interval() -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    stop, drained_at_s = Stop(), list[float]()

    class Empty(Steps):
        @property
        def interval_s(self) -> float:
            return 1.0

        def drain(self) -> Batch:
            drained_at_s.append(time.monotonic() - began_s)
            if drained_at_s[-1] >= 1.0:
                loop.call_soon_threadsafe(over.set)
            return Batch(replace(ROWS, records=ROWS.records[:0]), 1, 2)

    began_s = time.monotonic()
    task = asyncio.create_task(run(Empty(), lambda _: None, lambda: None, stop))
    async with asyncio.timeout(10):
        await over.wait()
    stop.request()
    await task
    # After 10, 20, 40, 80, 160, 250 and 250 ms, at the end of the interval, and of the run.
    assert 4 < len(drained_at_s) <= 9
    assert drained_at_s[0] < 0.25


async def test_a_cancellation_in_a_drain_loses_no_batch() -> None:
    steps, batches = Steps(), list[Batch]()
    steps.may_drain.clear()
    task = asyncio.create_task(run(steps, batches.append, lambda: None))
    await asyncio.to_thread(steps.drains.wait)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    steps.may_drain.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.done == ["open", "drain", "drain", "close"]
    assert len(batches) == 2


async def test_it_ends_when_all_that_it_watches_have_ended() -> None:
    first, second = [
        await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE) for _ in range(2)
    ]
    steps = Steps([os.pidfd_open(process.pid) for process in (first, second)])
    batches = asyncio.Queue[Batch]()
    task = asyncio.create_task(run(steps, batches.put_nowait, lambda: None))
    try:
        await first.communicate(b"")  # the end of its input
        for _ in range(batches.qsize() + 2):
            await batches.get()
        assert not task.done()  # one of them still runs
    finally:
        await second.communicate(b"")
    await task
    assert steps.done[-2:] == ["drain", "close"]
    for fd in steps.exit_fds():
        os.close(fd)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(24, "Too many open files", "/proc/1/comm"), "opening /proc/1/comm"),
        (KeyError("stats"), "has no 'stats': it is of another version of this agent, or damaged"),
    ],
)
async def test_what_cannot_be_opened_is_closed(error: Exception, message: str) -> None:
    steps, attached = Steps(error=error), list[bool]()
    with pytest.raises(LoadError, match=message):
        await run(steps, lambda _: None, lambda: attached.append(True))
    assert steps.done == ["open", "close"]
    assert not attached


async def test_a_job_is_waited_for_before_a_cancellation_goes_on() -> None:
    may_end, began, ended = threading.Event(), threading.Event(), list[bool]()

    def job() -> None:
        began.set()
        may_end.wait()
        ended.append(True)

    task = asyncio.create_task(in_thread(job))
    await asyncio.to_thread(began.wait)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


class Buffer:
    """A buffer of records whose programs the test is."""

    capacity_bytes = 64 << 20
    filling, wakes_at_rest, lost, memory_bytes = False, True, 0, 0

    def __init__(self) -> None:
        self.pending_bytes, self.resting = 0, asyncio.Event()
        self._event = os.eventfd(0)
        self.wakeup = select.epoll()
        self.wakeup.register(self._event, select.EPOLLIN | select.EPOLLET)

    def write(self, size: int) -> None:
        self.pending_bytes += size
        os.eventfd_write(self._event, 1)

    def rest(self) -> bool:
        self.resting.set()
        return not self.pending_bytes

    def drain(self, most_bytes: int = MOST_BYTES) -> Records:
        taken = min(most_bytes, self.pending_bytes)
        self.pending_bytes -= taken
        return {"call": np.zeros(taken >> 10)}

    def close(self) -> None:
        self.wakeup.close()
        os.close(self._event)


class Events(Steps):
    """Drains a buffer, on the event loop."""

    interval_s = 60.0
    drains_on_loop = True

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer()

    @property
    def records(self) -> RecordReader:
        return self.buffer

    def drain(self) -> Batch:
        self.done.append("drain")
        count = len(self.buffer.drain()["call"])
        return Batch(replace(ROWS, records=np.zeros(count, [("pid", "<u4")])), 1, 2)


async def test_a_full_buffer_is_drained_in_parts_and_others_get_their_turn() -> None:
    events, turns, between, stop = Events(), 0, list[int](), Stop()

    def emit(batch: Batch) -> None:
        if len(batch.rows):
            between.append(turns)
        if not events.buffer.pending_bytes:
            stop.request()

    events.buffer.write(10 * MOST_BYTES)
    task = asyncio.create_task(run(events, emit, lambda: None, stop))
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    await task
    assert len(between) == 10
    assert all(later > earlier for earlier, later in pairwise(between))
    events.buffer.close()


async def test_events_are_drained_when_they_come_and_not_before() -> None:
    events, batches, stop = Events(), asyncio.Queue[Batch](), Stop()
    task = asyncio.create_task(run(events, batches.put_nowait, lambda: None, stop))
    for size in (1, 3, 2):
        await events.buffer.resting.wait()
        events.buffer.resting.clear()
        assert batches.empty()
        events.buffer.write(size << 10)
        async with asyncio.timeout(10):
            assert len((await batches.get()).rows) == size
    stop.request()
    await task
    assert events.done == ["open", *["drain"] * 4, "close"]
    events.buffer.close()


async def test_all_that_is_left_is_drained_at_the_end() -> None:
    events, counts, stop = Events(), list[int](), Stop()

    def attached() -> None:
        events.buffer.write(5 * MOST_BYTES + 1024)
        stop.request()

    await run(events, lambda batch: counts.append(len(batch.rows)), attached, stop)
    assert counts == [1024] * 5 + [1]
    events.buffer.close()
