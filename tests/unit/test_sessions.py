"""Sessions: slots, leases and ends, without a kernel."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coral.agent.access.access import Access
from coral.agent.config import Config, Continuous, Limits
from coral.agent.errors import (
    FailedPreconditionError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    UnavailableError,
)
from coral.agent.serving.prometheus import Registry
from coral.agent.sessions.admission import Admission
from coral.agent.sessions.budget import Room
from coral.agent.sessions.session import EXPIRED, StartRequest
from coral.bpf import BpfError
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import STOPPED, Change, Desk, calls, frames, until

# Slots


async def test_a_slot_is_taken_from_the_first_step_of_a_start(desk: Desk) -> None:
    desk.preparing.clear()
    starts = [asyncio.create_task(desk.start()) for _ in range(5)]
    await asyncio.sleep(0)
    refused = [start for start in starts if start.done()]
    assert len(refused) == 2
    for start in refused:
        with pytest.raises(LimitError, match="concurrent_collectors is 3, and 3 are at work"):
            start.result()
    desk.preparing.set()
    for start in starts:
        if start not in refused:
            await start
    assert len(desk.supervisor.at_work()) == 3


@pytest.mark.parametrize(
    "script",
    [
        {"refusal": InvalidRequestError("config: no")},
        {"failure": BpfError("attaching", 22)},
        {"failure": ValueError("nobody expected this")},
        {"map_bytes": 1 << 40},
    ],
    ids=["refused", "not attached", "unexpected", "too large"],
)
async def test_a_start_that_fails_gives_its_slot_back_and_is_not_watched_nor_kept(
    script: dict[str, Any], desk: Desk
) -> None:
    watch = desk.supervisor.watch()
    for _ in range(5):
        with pytest.raises((InvalidRequestError, BpfError, LimitError)):
            await desk.start(**script)
    assert desk.changes(watch) == [(Change.WHAT_SYNCED, "")]
    assert not desk.supervisor.sessions
    assert not desk.supervisor.ended.readable()
    for _ in range(3):
        await desk.start()


async def test_a_start_whose_caller_goes_away_gives_its_slot_back(desk: Desk) -> None:
    desk.preparing.clear()
    for _ in range(3):
        start = asyncio.create_task(desk.start())
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    desk.preparing.set()
    for _ in range(3):
        await desk.start()


# Ends


async def test_a_session_that_is_stopped_before_its_first_step_ends(desk: Desk) -> None:
    start = asyncio.create_task(desk.start())
    for _ in range(10):  # by single steps, so that its task has taken none
        if desk.supervisor.sessions:
            break
        await asyncio.sleep(0)
    (session,) = desk.supervisor.sessions.values()
    assert not session.started_at
    metrics = {family.name: family.samples for family in Registry(desk.supervisor).collect()}
    assert sum(it.value for it in metrics["coral_agent_sessions_starting"]) == 1
    async with asyncio.timeout(10):
        await session.stop(STOPPED)
    with pytest.raises(NotFoundError, match="ended before it was attached: STOPPED"):
        await start
    assert not desk.supervisor.sessions


async def test_a_start_during_the_shutdown_is_unavailable() -> None:
    desk = Desk()
    async with asyncio.timeout(5), desk.supervisor:
        desk.preparing.clear()
        start = asyncio.create_task(desk.start())
        await asyncio.sleep(0)
        await desk.supervisor.shutdown()
        desk.preparing.set()
        for attempt in (start, desk.start()):
            with pytest.raises(UnavailableError, match="the agent is shutting down"):
                await attempt
        with pytest.raises(UnavailableError):
            desk.supervisor.watch()


async def test_a_renewal_while_a_session_expires_is_not_found_and_says_why(desk: Desk) -> None:
    session = await desk.start(duration_s=0.01)
    (collector,) = desk.made
    collector.may_detach.clear()
    await until(collector.detaching.is_set)
    assert session.end is None
    with pytest.raises(NotFoundError, match=f"{session.id} has ended: EXPIRED"):
        desk.supervisor.renew(session.id, 10)
    collector.may_detach.set()
    await session.ended.wait()
    assert session.end == EXPIRED
    with pytest.raises(NotFoundError, match=f"{session.id} has ended: EXPIRED"):
        desk.supervisor.renew(session.id, 10)


async def test_a_renewal_while_a_session_is_stopped_is_not_found_and_says_why(desk: Desk) -> None:
    session = await desk.start()
    (collector,) = desk.made
    collector.may_detach.clear()
    stopping = asyncio.create_task(desk.supervisor.stop(session.id))
    await until(collector.detaching.is_set)
    with pytest.raises(NotFoundError, match=f"{session.id} has ended: STOPPED"):
        desk.supervisor.renew(session.id, 10)
    again = asyncio.create_task(desk.supervisor.stop(session.id))
    collector.may_detach.set()
    await asyncio.gather(stopping, again)
    assert session.end == STOPPED


async def test_a_continuous_session_has_no_lease_to_renew() -> None:
    desk = Desk(None, Continuous(kind="syscall_stats"))
    async with desk.supervisor:
        await until(desk.supervisor.at_work)
        (session,) = desk.supervisor.at_work()
        with pytest.raises(FailedPreconditionError, match="is continuous"):
            desk.supervisor.renew(session.id, 10)


@pytest.mark.parametrize("duration_s", [0, -1, float("nan"), float("inf"), -float("inf"), 1e300])
async def test_a_duration_that_is_none_is_refused(duration_s: float, desk: Desk) -> None:
    with pytest.raises(InvalidRequestError, match="duration: "):
        await desk.start(duration_s=duration_s)
    assert not desk.made


async def test_the_shortest_lease_starts_and_expires(desk: Desk) -> None:
    session = await desk.start(duration_s=1e-9, last=calls(3))
    async with asyncio.timeout(10):
        await session.ended.wait()
    assert session.end == EXPIRED
    assert [batch.count for batch in frames(session)] == [3, 0]


def test_admission_of_two_supervisors_is_apart() -> None:
    request = StartRequest("syscall_stats")
    config = Config(limits=Limits(concurrent_collectors=1))
    one, other = (Admission(config, Access(config)) for _ in range(2))
    with one.slot(request), other.slot(request), pytest.raises(LimitError), one.slot(request):
        raise AssertionError("there is one slot")


async def test_a_stop_while_an_expired_session_detaches_loses_no_last_interval(desk: Desk) -> None:
    session = await desk.start(duration_s=0.05, last=calls(100, lost=7))
    (collector,) = desk.made
    collector.may_detach.clear()
    await until(collector.detaching.is_set)
    stopping = asyncio.create_task(session.stop(STOPPED))
    (task,) = desk.supervisor._tasks
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()  # as the end of the event loop does
    collector.may_detach.set()
    await stopping
    assert session.end == EXPIRED
    assert session.channel.produced == 100
    assert session.channel.lost_in_kernel == {pb.Loss.STAGE_KERNEL_BUFFER: 7}


# Preemption


async def test_a_preempted_continuous_collector_comes_back_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[bool] = []

    def take(*arguments: Any) -> bool:
        answers.append(room_take(*arguments))
        return answers[-1]

    room_take = Room.take
    monkeypatch.setattr(Room, "take", take)
    desk = Desk(Limits(cpu_percent=50, continuous_cpu_percent=50), Continuous(kind="syscall_stats"))
    async with desk.supervisor:
        await until(desk.supervisor.at_work)
        (continuous,) = desk.supervisor.at_work()
        expensive = await desk.start()
        # Without the continuous one, the other is within the limit.
        expensive.costs.charge_reading(3_500_000_000)
        continuous.costs.charge_reading(1_700_000_000)
        await continuous.ended.wait()
        assert continuous.end
        assert continuous.end.reason == pb.SessionEnd.REASON_PREEMPTED
        assert "limits.cpu_percent is 50 of one CPU; collectors used 5" in str(continuous.end)
        await until(lambda: len(answers) > 1)
        assert answers == [False] * len(answers)
        assert desk.supervisor.at_work() == [expensive]
        await expensive.stop(STOPPED)
        await until(desk.supervisor.at_work)
        (again,) = desk.supervisor.at_work()
        assert again.continuous
        assert answers.pop()
        assert not any(answers)
