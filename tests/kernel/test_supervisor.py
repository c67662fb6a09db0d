"""The supervisor as a library, without gRPC: sessions on the real kernel, in this process."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from coral.agent.config import ByteCount, Config, Limits
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.hubs import Slot
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import STOPPED
from tests.support import PATIENCE, Puppet, Vitals, held_by, totals

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor() as supervisor:
        yield supervisor


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


def request(puppet: Puppet, duration_s: float | None = None, **config: str) -> StartRequest:
    return StartRequest(
        "syscall_stats", config={"pid": str(puppet.pid), **config}, duration_s=duration_s
    )


def collector_of(session: Session) -> SyscallStatsCollector:
    collector = session.collector
    assert isinstance(collector, SyscallStatsCollector)
    return collector


async def all_rows(session: Session) -> list[pb.SyscallStats]:
    """All rows that a subscriber gets until the session ends."""
    return [
        row
        async for frame in session.subscribe()
        for row in pb.EbpfEventBatch.FromString(frame.wire()).syscall_stats
    ]


@pytest.mark.long
@pytest.mark.soak
async def test_200_sessions_leave_no_task_and_no_session(
    supervisor: Supervisor, puppet: Puppet
) -> None:
    async def one_after_another(times: int) -> None:
        for _ in range(times):
            session = await supervisor.start(request(puppet))
            await supervisor.stop(session.id)

    async def at_once(times: int) -> None:
        await asyncio.gather(one_after_another(times // 2), one_after_another(times // 2))

    await at_once(20)
    tasks, warm = len(asyncio.all_tasks()), Vitals.of(os.getpid())
    await at_once(200)
    assert len(asyncio.all_tasks()) == tasks
    async with asyncio.timeout(5):
        while not Vitals.of(os.getpid()).at_most(warm):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert supervisor.sessions == {}
    assert not supervisor._tasks
    assert not any(held_by(os.getpid()).values())


async def test_what_a_drain_has_read_is_told_though_the_session_is_stopped_meanwhile(
    supervisor: Supervisor, puppet: Puppet
) -> None:
    for _ in range(5):
        session = await supervisor.start(request(puppet))
        slot = collector_of(session).bpf_object

        def interval(slot: Slot = slot) -> int:
            mine = slot.object.map("syscall_sessions").read_one(slot.number)
            return int(mine["interval"])  # type: ignore[index]

        before = interval()
        puppet.getppid(1000)
        while interval() == before:  # noqa: ASYNC110  a drain counts it up, and then reads
            await asyncio.sleep(0)
        await supervisor.stop(session.id)
        assert totals(await all_rows(session))["getppid"] == 1000


@pytest.mark.long
@pytest.mark.soak
async def test_real_sessions_that_are_stopped_around_their_expiry_tell_every_call(
    supervisor: Supervisor, puppet: Puppet
) -> None:
    """60 of them, one after the other, each stopped within 5 ms of its expiry."""
    reasons: Counter[int] = Counter()
    loop = asyncio.get_running_loop()
    for number in range(60):
        session = await supervisor.start(request(puppet, 0.1, interval="10s"))
        puppet.getppid(1000)
        offset_s = (number % 11 - 5) / 1000
        loop.call_later(session.expires_at - time.time() + offset_s, session.end_for, STOPPED)
        assert totals(await all_rows(session))["getppid"] == 1000
        assert session.end
        reasons[session.end.reason] += 1
    assert sum(reasons.values()) == 60
    assert set(reasons) == {pb.SessionEnd.REASON_EXPIRED, pb.SessionEnd.REASON_STOPPED}


async def test_maps_that_wait_for_a_session_make_room_before_a_session_has_to(
    puppet: Puppet,
) -> None:
    limits = Limits(memory=ByteCount(8 << 20))
    async with Supervisor(Config(limits=limits)) as supervisor:
        session = await supervisor.start(request(puppet, mode="events", ring="4MiB"))
        if not collector_of(session).bpf_object.prepares_next:
            pytest.skip("programs serve few sessions here: no maps are made before their session")
        alone = session.map_memory_bytes
        puppet.getppid(1)
        async with asyncio.timeout(10 * PATIENCE):
            while session.map_memory_bytes < alone + (4 << 20):  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert 4 << 20 < supervisor.memory_bytes() < limits.memory
        assert not session.decided_end


async def test_leaving_the_supervisor_ends_every_session(puppet: Puppet) -> None:
    async with Supervisor() as supervisor:
        sessions = [await supervisor.start(request(puppet)) for _ in range(3)]
    for session in sessions:
        assert session.end
        assert session.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN
    assert not any(held_by(os.getpid()).values())


async def test_a_caller_that_goes_away_while_it_starts_leaves_no_session(
    supervisor: Supervisor, puppet: Puppet
) -> None:
    await supervisor.features()
    for delay_ms in range(0, 40, 2):
        starting = asyncio.create_task(supervisor.start(request(puppet)))
        await asyncio.sleep(delay_ms / 1000)
        if starting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await supervisor.stop(starting.result().id)
        assert supervisor.sessions == {}
        assert not any(held_by(os.getpid()).values())
