"""Jobs of requests: a deadline gives the slot back, and threads that are late are counted."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from coral.agent import main
from coral.agent.config import Config, Continuous
from coral.agent.errors import LimitError
from coral.agent.jobs import Jobs
from coral.collectors.runner import in_thread
from tests.scripted import until


async def test_a_job_returns_what_it_makes_and_raises_what_it_raises() -> None:
    jobs = Jobs()
    assert await jobs.run(lambda: 7, "job") == 7
    with pytest.raises(ZeroDivisionError):
        await jobs.run(lambda: 1 // 0, "job")
    assert jobs.late == 0


async def test_a_late_job_is_refused_and_counted_until_it_ends() -> None:
    jobs, may_end = Jobs(deadline_s=0.02), threading.Event()
    with pytest.raises(LimitError, match=r"stats: this took longer than 0.02 s"):
        await jobs.run(may_end.wait, "stats")
    assert jobs.late == 1
    may_end.set()
    await until(lambda: jobs.late == 0)
    assert await jobs.run(lambda: 7, "stats") == 7


async def test_jobs_that_never_end_do_not_become_more_than_the_limit() -> None:
    jobs, may_end = Jobs(deadline_s=0.01, most_late=2), threading.Event()
    before = set(threading.enumerate())
    for _ in range(5):
        with pytest.raises(LimitError):
            await jobs.run(may_end.wait, "stats")
    assert len(set(threading.enumerate()) - before) == jobs.late == 2
    with pytest.raises(LimitError, match="2 earlier requests still wait"):
        await jobs.run(lambda: 7, "stats")
    may_end.set()
    await until(lambda: jobs.late == 0)


async def test_a_job_is_refused_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It might block, so it does not run in the loop."""

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ran: list[int] = []
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(LimitError, match=r"stats: the agent could not start a thread \(can't"):
        await Jobs().run(lambda: ran.append(1), "stats")
    assert not ran


async def test_a_cancelled_caller_keeps_its_place_until_the_job_ends() -> None:
    jobs, may_end, ended = Jobs(), threading.Event(), []
    task = asyncio.create_task(jobs.run(lambda: ended.append(may_end.wait()), "job"))
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    may_end.set()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert ended == [True]
    assert jobs.late == 0


async def test_slow_requests_leave_the_threads_that_drain_sessions_alone() -> None:
    jobs, may_end = Jobs(), threading.Event()
    slow = [asyncio.create_task(jobs.run(may_end.wait, "job")) for _ in range(50)]
    try:
        async with asyncio.timeout(10):
            assert await in_thread(lambda: 7) == 7
        assert not any(task.done() for task in slow)
    finally:
        may_end.set()
        await asyncio.gather(*slow)


def test_every_session_has_a_thread_of_its_own() -> None:
    rules = tuple(Continuous(kind="syscall_stats") for _ in range(10))
    assert main._threads(Config(continuous=rules)) == 3 + 10 + 4
