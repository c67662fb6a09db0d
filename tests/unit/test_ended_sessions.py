"""What is kept of ended sessions, for how long, and what gives way to what."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest

from coral.agent.config import ByteCount, Config, Duration, Limits
from coral.agent.errors import (
    LimitError,
    NotFoundError,
    OutOfRangeError,
)
from coral.agent.sessions.ended import SESSION_BYTES, EndedSessions
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.streams import Terms
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import STATS, STOPPED, Desk, Scripted, calls, frames, until


async def test_who_comes_after_the_end_gets_what_is_kept_and_then_the_end(desk: Desk) -> None:
    session = await desk.start(last=calls(4, lost=2))
    await desk.made[0].emit(calls(10, lost=1))
    await desk.made[0].emit(calls(20))
    await desk.supervisor.stop(session.id)
    with pytest.raises(NotFoundError, match="has ended: STOPPED"):
        desk.supervisor.find(session.id)
    kept = desk.supervisor.readable(session.id)
    whole, resumed = frames(kept), frames(kept, 15)
    assert [(b.first_seq, b.count) for b in whole] == [(1, 10), (11, 20), (31, 4), (35, 0)]
    assert [(b.first_seq, b.count) for b in resumed] == [(16, 15), (31, 4), (35, 0)]
    for batches in (whole, resumed):
        end = batches[-1].end
        assert (end.reason, end.produced) == (pb.SessionEnd.REASON_STOPPED, 34)
        assert [(loss.stage, loss.count) for loss in end.lost_in_kernel] == [
            (pb.Loss.STAGE_KERNEL_BUFFER, 3)
        ]
    assert [batch.count for batch in frames(kept, 34)] == [0]
    with pytest.raises(OutOfRangeError, match="after_seq: 35 is beyond 34"):
        kept.subscribe(Terms(after_seq=35))


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ended_session(rows: int = 0, replay_bytes: int = 4 << 20) -> Session:
    """A session that worked, has ROWS to be read, and ended."""
    config = Config(limits=Limits(replay_bytes=ByteCount(replay_bytes)))
    session = Session(Scripted(), StartRequest("syscall_stats", continuous=True), config)
    session.attached()
    if rows:
        session.channel.publish(calls(rows))
    session.end_for(STOPPED)
    session.finish()
    return session


def test_an_ended_session_is_kept_for_its_time_and_how_it_ended_for_longer() -> None:
    clock, gone = Clock(), list[Session]()
    ended = EndedSessions(Limits(ended_sessions=Duration(60)), gone.append, clock)
    early, late = ended_session(), ended_session()
    ended.add(early)
    clock.now_s += 30
    ended.add(late)
    clock.now_s += 29.999
    assert ended.readable() == [early, late]
    clock.now_s += 0.001
    assert ended.find(early.id) is None
    assert ended.find(late.id) is late
    assert ended.readable() == [late]
    assert gone == [early]
    assert ended.end_of(early.id) == STOPPED
    clock.now_s += 30
    ended.tick()
    assert gone == [early, late]
    assert ended.memory_bytes == 0


def test_ended_sessions_keep_so_many_bytes_and_the_oldest_go_first() -> None:
    sessions = [ended_session(1000) for _ in range(5)]
    each = SESSION_BYTES + sessions[0].channel.kept_bytes
    assert each > 40_000
    limits = Limits(ended_bytes=ByteCount(3 * each))
    ended = EndedSessions(limits, list[Session]().append, Clock())
    for session in sessions:
        ended.add(session)
    assert ended.readable() == sessions[2:]
    ended.make_room(each * 3 // 2)
    assert ended.readable() == sessions[4:]
    too_large = ended_session(200_000, 1 << 30)
    ended.add(too_large)
    assert ended.readable() == []
    assert ended.end_of(too_large.id) == STOPPED


def test_one_that_is_read_is_closed_to_others_and_stays_until_it_is_read() -> None:
    gone: list[Session] = []
    ended = EndedSessions(Limits(), gone.append, Clock())
    session = ended_session(1000)
    ended.add(session)
    reading = session.subscribe()
    before = ended.memory_bytes
    ended.make_room(1)
    assert ended.find(session.id) is None
    assert list(ended.in_memory()) == [session]
    assert ended.memory_bytes == before
    ended.tick()
    assert gone == []
    reading.close()
    ended.tick()
    assert gone == [session]
    assert ended.memory_bytes == 0


async def test_ended_sessions_give_way_before_any_that_works() -> None:
    limits = Limits(memory=ByteCount(1 << 20), ended_bytes=ByteCount(1 << 20))
    desk = Desk(limits)
    async with desk.supervisor:
        ended = []
        for _ in range(3):
            session = await desk.start(last=calls(3000))
            await desk.supervisor.stop(session.id)
            ended.append(session)
        assert desk.supervisor.ended.readable() == ended
        each = ended[0].channel.buffered_bytes + SESSION_BYTES
        room = limits.memory - desk.supervisor.memory_bytes()
        working = await desk.start(map_bytes=room + each + 1)
        assert desk.supervisor.ended.readable() == ended[2:]
        assert desk.supervisor.memory_bytes() <= limits.memory
        with pytest.raises(LimitError, match=r"limits\.memory is 1048576 bytes; this syscall_"):
            await desk.start(map_bytes=1 << 20)
        assert desk.supervisor.ended.readable() == []
        assert desk.supervisor.at_work() == [working]


async def test_losses_are_counted_once_however_long_a_session_is_read() -> None:
    limits = Limits(replay_bytes=ByteCount(10_000), ended_sessions=Duration(1e-9))
    desk = Desk(limits)
    stage = pb.Loss.STAGE_REPLAY_EVICTED
    async with desk.supervisor:
        session = await desk.start()
        for _ in range(10):
            await desk.made[0].emit(calls(100, lost=1))
        subscription = session.subscribe()
        lost = subscription.account.lost[stage]
        assert 0 < lost < 1000
        losses = desk.supervisor.totals.losses
        assert losses() == {(STATS, stage): lost, (STATS, pb.Loss.STAGE_KERNEL_BUFFER): 10}
        await desk.supervisor.stop(session.id)
        with pytest.raises(NotFoundError):
            desk.supervisor.readable(session.id)
        late = session.subscribe()
        assert losses()[STATS, stage] == 2 * lost
        for reader in (subscription, late):
            reader.close()
        desk.supervisor.ended.tick()
        assert not list(desk.supervisor.ended.in_memory())
        assert losses() == {(STATS, stage): 2 * lost, (STATS, pb.Loss.STAGE_KERNEL_BUFFER): 10}


def test_an_ended_session_takes_no_more_memory_than_it_is_counted_for() -> None:
    ended_session()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [ended_session() for _ in range(100)]
        gc.collect()
        used = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()
    assert SESSION_BYTES / 4 < used < SESSION_BYTES


async def test_an_ended_session_lets_go_of_its_collector(desk: Desk) -> None:
    session = await desk.start()
    collector = weakref.ref(desk.made.pop())
    await desk.supervisor.stop(session.id)
    await until(lambda: not desk.supervisor._tasks)

    def is_gone() -> bool:  # a thread may have it for a moment after its last job
        gc.collect()
        return collector() is None

    await until(is_gone)
    assert frames(desk.supervisor.readable(session.id))
