"""How sessions and the supervisor end: once, whole, and whatever happens at the same time."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from structlog.testing import capture_logs

from coral.agent.config import ByteCount, Continuous, Limits
from coral.agent.errors import NotFoundError, UnavailableError
from coral.agent.sessions import enforcement
from coral.agent.sessions.background import Backoff, keep_going
from coral.agent.sessions.session import EXPIRED, End, Session
from coral.bpf import BpfError
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import STOPPED, Desk, Scripted, calls, frames, until

LEASE_S = 0.05
CALLS = 1000


async def test_sessions_that_are_stopped_around_their_expiry_tell_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """500 of them, in rounds of 50, each stopped within 5 ms of its expiry."""
    monkeypatch.setattr(Scripted, "interval_s", 1.0)
    chance, loop = random.Random(10), asyncio.get_running_loop()
    desk = Desk(Limits(concurrent_collectors=50, cpu_percent=1000))
    reasons: Counter[int] = Counter()

    async def one() -> None:
        session = await desk.start(LEASE_S, last=calls(CALLS))
        left_s = session.expires_at - time.time()
        loop.call_later(left_s + chance.uniform(-0.005, 0.005), session.end_for, STOPPED)
        await session.ended.wait()
        batches = frames(session)
        assert sum(batch.count for batch in batches) == CALLS
        assert batches[-1].end.produced == CALLS
        reasons[batches[-1].end.reason] += 1

    async with desk.supervisor:
        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(50)))
    assert sum(reasons.values()) == 500
    assert set(reasons) == {pb.SessionEnd.REASON_EXPIRED, pb.SessionEnd.REASON_STOPPED}


async def test_the_first_reason_to_end_is_the_one_that_is_told(desk: Desk) -> None:
    session = await desk.start(last=calls(7))
    session.end_for(STOPPED)
    await desk.supervisor.shutdown()
    assert session.end == STOPPED
    assert frames(session)[-1].end.reason == pb.SessionEnd.REASON_STOPPED
    assert session.channel.produced == 7


async def test_a_failure_of_the_last_drain_is_told_though_the_session_was_stopped(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await desk.start()
    (collector,) = desk.made

    def detach() -> None:
        monkeypatch.setattr(collector, "drain", fail)

    def fail() -> None:
        raise BpfError("reading the map", 12)

    monkeypatch.setattr(collector.bpf_object, "detach", detach)
    await session.stop(STOPPED)
    assert session.end
    assert session.end.reason == pb.SessionEnd.REASON_FAILED
    assert "reading the map" in session.end.detail


async def test_a_lease_that_was_renewed_does_not_end_at_its_old_deadline(desk: Desk) -> None:
    loop, old_lease_is_over = asyncio.get_running_loop(), asyncio.Event()
    session = await desk.start(0.5)
    # Set after the lease's own timer, and for later, so it is due after that.
    loop.call_later(0.5, old_lease_is_over.set)
    desk.supervisor.renew(session.id, 60)
    await old_lease_is_over.wait()
    assert session.decided_end is None
    desk.supervisor.renew(session.id, 0.01)
    async with asyncio.timeout(10):
        await session.ended.wait()
    assert session.end == EXPIRED


async def test_limits_are_enforced_while_a_preempted_session_cannot_detach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do others go for what that session still holds."""
    monkeypatch.setattr(enforcement, "_ENFORCE_EVERY_S", 0.001)
    desk = Desk(Limits(concurrent_collectors=3, memory=ByteCount(2_000_000)))
    async with desk.supervisor as supervisor, AsyncExitStack() as undo:
        sessions = [await desk.start(map_bytes=size) for size in (500_000, 900_000, 400_000)]
        small, stuck, other = sessions
        desk.made[1].may_detach.clear()
        undo.callback(desk.made[1].may_detach.set)
        desk.made[1].bpf_object.map_memory_bytes = 2_500_000
        await until(desk.made[1].detaching.is_set)
        sampled = len(small.costs._samples)
        await until(lambda: len(small.costs._samples) > sampled + 10)
        assert [session.decided_end is None for session in sessions] == [True, False, True]
        needs = stuck.needs
        assert needs
        assert needs.memory_bytes >= 2_500_000
        desk.made[0].bpf_object.map_memory_bytes = 9_000_000
        await until(small.ended.is_set)
        assert small.end
        assert small.end.reason == pb.SessionEnd.REASON_PREEMPTED
        assert stuck.needs == needs
        assert not stuck.ended.is_set()
        assert supervisor.at_work() == [stuck, other]
        desk.made[1].may_detach.set()
        await stuck.ended.wait()
        assert stuck.end
        assert stuck.end.reason == pb.SessionEnd.REASON_PREEMPTED
    assert other.end == End(pb.SessionEnd.REASON_AGENT_SHUTDOWN, "the agent is shutting down")


async def test_queues_that_are_not_read_give_way_before_a_session_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(enforcement, "_ENFORCE_EVERY_S", 0.001)
    desk = Desk(Limits(memory=ByteCount(2 << 20), replay_bytes=ByteCount(64 << 10)))
    async with desk.supervisor as supervisor:
        session = await desk.start()
        idle, prompt = session.subscribe(), session.subscribe()
        for _ in range(100):
            await desk.made[0].emit(calls(1_000))
            while prompt.take():
                pass
        await until(lambda: supervisor.memory_bytes() <= 2 << 20)
        lost = idle.account.lost[pb.Loss.STAGE_SUBSCRIBER_QUEUE]
        assert 50_000 < lost < 100_000
        assert idle.account.queued == 100_000 - lost
        assert prompt.account.lost == {}
        assert prompt.delivered == 100_000
        assert supervisor.at_work() == [session]


async def test_what_a_continuous_collector_waits_for_has_no_control_characters() -> None:
    desk = Desk(None, Continuous(kind="syscall_stats", service="shop"))
    desk.script = {"refusal": NotFoundError("the nearest names are \x1b[2Jshop\nready")}
    async with desk.supervisor:
        (standing,) = desk.supervisor.continuous
        await until(lambda: standing.failures)
        assert str(standing) == "syscall_stats shop: the nearest names are ?[2Jshop?ready"


def detached(desk: Desk) -> bool:
    return all(collector.detaching.is_set() for collector in desk.made)


async def run_supervisor(desk: Desk, inside: asyncio.Event) -> None:
    async with desk.supervisor:
        await until(desk.supervisor.at_work)  # of the configuration
        for _ in range(3):
            await desk.start(last=calls(CALLS))
        inside.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
async def test_a_supervisor_that_is_cancelled_leaves_no_task(steps: int) -> None:
    """In its block, and once more after STEPS steps of the event loop, while it ends."""
    before = asyncio.all_tasks()
    desk, inside = Desk(None, Continuous(kind="syscall_stats")), asyncio.Event()
    desk.script = {"last": calls(CALLS)}
    task = asyncio.create_task(run_supervisor(desk, inside))
    await inside.wait()
    assert len(desk.supervisor.at_work()) == 4
    sessions: list[Session] = desk.supervisor.at_work()
    for collector in desk.made:
        collector.may_detach.clear()
    task.cancel()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    for collector in desk.made:
        collector.may_detach.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert detached(desk)
    assert asyncio.all_tasks() == before
    for session in sessions:
        assert session.end
        assert session.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN
        assert session.channel.produced == CALLS


async def test_a_supervisor_that_is_cancelled_at_once_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    for steps in range(4):
        desk = Desk(None, Continuous(kind="syscall_stats"))
        task = asyncio.create_task(run_supervisor(desk, asyncio.Event()))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before


async def test_an_exception_in_the_block_ends_every_session_and_goes_on() -> None:
    desk, sessions = Desk(), list[Session]()

    async def fails() -> None:
        async with desk.supervisor:
            sessions.append(await desk.start(last=calls(CALLS)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert [session.channel.produced for session in sessions] == [CALLS]


async def test_nothing_starts_between_admission_and_launch_during_a_shutdown() -> None:
    desk = Desk()
    async with desk.supervisor:
        desk.preparing.clear()
        starts = [asyncio.create_task(desk.start()) for _ in range(3)]
        await asyncio.sleep(0)
    desk.preparing.set()
    for start in starts:
        with pytest.raises(UnavailableError):
            await start
    assert not desk.supervisor.sessions
    assert not desk.supervisor._tasks


async def test_whatever_a_continuous_collector_raises_the_others_go_on() -> None:
    desk = Desk(None, Continuous(kind="syscall_stats", config={"cgroup": "a\0b"}))
    desk.script = {"refusal": ValueError("embedded null byte")}
    with capture_logs() as logged:
        async with desk.supervisor:
            await until(lambda: any(line["event"] == "unexpected failure" for line in logged))
            (standing,) = desk.supervisor.continuous
            assert standing.failures == 1
            assert standing.waits.reason == "failed"
            assert "embedded null byte" in standing.waits.text
            session = await desk.start(last=calls(CALLS))
            # The rule is tried again, after a second at first.
            await until(lambda: len(desk.supervisor.at_work()) == 2)
            await until(lambda: not standing.waits.reason)
            await desk.supervisor.stop(session.id)
            assert session.channel.produced == CALLS


async def test_background_work_begins_again_after_an_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    attempts = iter([ValueError(), OSError(5, "x"), KeyError("y"), None])

    async def work() -> None:
        if error := next(attempts):
            raise error

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with capture_logs() as logged:
        await keep_going("limits", work)
    assert [line["task"] for line in logged] == ["limits"] * 3
    assert [round(pause_s / mean) for pause_s, mean in zip(pauses, (1, 2, 4), strict=True)] == [
        1
    ] * 3


async def test_background_work_can_be_cancelled() -> None:
    task = asyncio.create_task(keep_going("limits", asyncio.Event().wait))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(("lasted_s", "expected_s"), [(61, 1), (59, 60)])
def test_pauses_grow_to_a_minute_and_are_short_again_after_steady_work(
    lasted_s: float, expected_s: float
) -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    backoff = Backoff(clock)
    means = [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    for mean in means:
        backoff.begin()
        assert 0.75 * mean <= backoff.pause_s() <= 1.25 * mean
    backoff.begin()
    now_s += lasted_s
    assert 0.75 * expected_s <= backoff.pause_s() <= 1.25 * expected_s
