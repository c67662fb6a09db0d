"""Watches: complete, in order, and bounded for each watcher."""

from __future__ import annotations

import asyncio
import time

import pytest

from coral.agent.access.target import NOBODYS
from coral.agent.errors import (
    LimitError,
)
from coral.agent.sessions.changes import MAX_WAITING_BYTES, Changes
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import Change, Desk, calls


async def test_a_watch_begins_with_what_works_and_goes_on_in_order(desk: Desk) -> None:
    first = await desk.start()
    watch = desk.supervisor.watch()
    second = await desk.start()
    await desk.made[0].emit(calls(7, lost=5))
    await desk.supervisor.stop(first.id)
    late = desk.supervisor.watch()
    third = await desk.start(exits=True)
    await third.ended.wait()
    assert desk.changes(watch) == [
        (Change.WHAT_PRESENT, first.id),
        (Change.WHAT_SYNCED, ""),
        (Change.WHAT_STARTED, second.id),
        (Change.WHAT_ENDED, first.id),
        (Change.WHAT_STARTED, third.id),
        (Change.WHAT_ENDED, third.id),
    ]
    assert desk.changes(late) == [
        (Change.WHAT_PRESENT, second.id),
        (Change.WHAT_SYNCED, ""),
        (Change.WHAT_STARTED, third.id),
        (Change.WHAT_ENDED, third.id),
    ]


async def test_the_end_in_a_watch_has_the_final_account(desk: Desk) -> None:
    watch = desk.supervisor.watch()
    began = time.time()
    session = await desk.start(last=calls(2, lost=1))
    await desk.made[0].emit(calls(7, lost=5))
    await desk.supervisor.stop(session.id)
    _synced, started, ended = (watch.take() for _ in range(3))
    assert started
    assert ended
    lost = [pb.Loss(stage=pb.Loss.STAGE_KERNEL_BUFFER, count=6)]
    assert not started.collector.HasField("end")
    assert (started.collector.produced, started.collector.map_memory_bytes) == (0, 1000)
    info = ended.collector
    assert (info.produced, info.map_memory_bytes, list(info.lost)) == (9, 0, lost)
    assert info.end == pb.SessionEnd(
        reason=pb.SessionEnd.REASON_STOPPED, produced=9, lost_in_kernel=lost
    )
    assert began <= info.ended_at.ToNanoseconds() / 1e9 <= time.time()


def info(number: int = 0) -> pb.CollectorInfo:
    return pb.CollectorInfo(collector_id=str(number), service_name="x" * 1000)


def test_a_watcher_that_does_not_read_is_ended_and_told_to_watch_again() -> None:
    each = pb.CollectorChange(what=Change.WHAT_STARTED, collector=info()).ByteSize()
    fitting = MAX_WAITING_BYTES // each
    changes = Changes()
    stalled, reading = changes.watch((info(n), NOBODYS) for n in range(10)), changes.watch(())
    read = 0
    for _ in range(fitting):
        changes.publish(Change.WHAT_STARTED, info())
        while reading.take():
            read += 1
    assert read == 1 + fitting
    for _ in range(12):  # the ten that were there, the mark, and one whose place is free now
        assert stalled.take()
    changes.publish(Change.WHAT_STARTED, info())
    assert stalled.take()
    for _ in range(2):
        changes.publish(Change.WHAT_STARTED, info())
    with pytest.raises(LimitError, match=f"more than {MAX_WAITING_BYTES} bytes.*: watch again"):
        stalled.take()
    assert not stalled._waiting
    assert reading.take()


async def test_a_shutdown_ends_watches_after_what_they_have_not_read(desk: Desk) -> None:
    session = await desk.start()
    watch = desk.supervisor.watch()
    waiting = asyncio.create_task(anext(desk.supervisor.watch()))
    await desk.supervisor.shutdown()
    assert (await waiting).collector.collector_id == session.id
    changes = [change async for change in watch]
    assert [change.what for change in changes] == [
        Change.WHAT_PRESENT,
        Change.WHAT_SYNCED,
        Change.WHAT_ENDED,
    ]
    assert changes[-1].collector.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN


async def test_a_watch_that_is_cancelled_leaves_nothing() -> None:
    changes = Changes()
    watches = [changes.watch(()) for _ in range(100)]
    for watch in watches:
        assert watch.take()
    readers = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    changes.publish(Change.WHAT_STARTED, info(1))
    assert {change.collector.collector_id for change in await asyncio.gather(*readers)} == {"1"}
    for watch in watches:
        watch.close()
        watch.close()
    assert not changes.watches
