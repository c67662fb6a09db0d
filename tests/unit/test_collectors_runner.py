"""When a collector is opened, drained and closed: the async shell, around a collector that looks at
no kernel."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coral.bpf import Features, LoadError
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
        self._programs = SimpleNamespace(name="steps", detach=lambda: self.done.append("detach"))

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
