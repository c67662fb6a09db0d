"""The core of the streams: numbering, the account, the bound, the replay, the end."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.streams import Channel, Frame, Header, Subscription
from collectors.base import Batch
from proto.coral.mesh.v1 import ebpf_pb2 as pb

HEADER = Header("session", pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, "agent", "shop")
LOST = pb.Loss.STAGE_SUBSCRIBER_QUEUE
EVICTED = pb.Loss.STAGE_REPLAY_EVICTED


def batch(count: int, **losses: int) -> Batch:
    rows = [pb.SyscallStats(syscall_name="read", call_count=n + 1) for n in range(count)]
    stages = {pb.Loss.Stage.Value(f"STAGE_{name}"): n for name, n in losses.items()}
    return Batch(rows, 1_000, 2_000, stages)


def channel(replay_bytes: int = 1 << 20, queue_bytes: int = 1 << 20) -> Channel:
    return Channel(HEADER, replay_bytes, queue_bytes)


def take_all(subscription: Subscription) -> list[Frame]:
    frames = []
    try:
        while frame := subscription.take():
            frames.append(frame)
    except EOFError:
        pass
    return frames


def parsed(frame: Frame) -> pb.EbpfEventBatch:
    return pb.EbpfEventBatch.FromString(frame.wire)


def test_events_are_numbered_from_one_without_a_gap() -> None:
    stream = channel()
    reader = stream.subscribe()
    for count in (3, 1, 4):
        stream.publish(batch(count))
    batches = [parsed(frame) for frame in take_all(reader)]
    assert [(b.first_seq, b.count, len(b.syscall_stats)) for b in batches] == [
        (1, 3, 3),
        (4, 1, 1),
        (5, 4, 4),
    ]
    assert batches[0].collector_id == "session"
    assert batches[0].service_name == "shop"
    assert (batches[0].interval_start_ns, batches[0].interval_end_ns) == (1_000, 2_000)


def test_every_subscriber_is_sent_the_same_bytes() -> None:
    stream = channel()
    first, second = stream.subscribe(), stream.subscribe()
    stream.publish(batch(2))
    a, b = first.take(), second.take()
    assert a is not None
    assert b is not None
    assert a.wire is b.wire


def test_one_event_a_message_tells_the_same() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(batch(2, MAP_FULL=5))
    stream.end(pb.SessionEnd.REASON_EXPIRED, "", 3_000)
    events = [pb.EbpfEvent.FromString(e) for frame in take_all(reader) for e in frame.events()]
    assert [e.seq for e in events] == [0, 1, 2, 0]
    assert events[0].losses[0].count == 5
    assert [e.syscall_stats.call_count for e in events[1:3]] == [1, 2]
    assert events[1].timestamp.ToNanoseconds() == 2_000
    assert events[3].end.reason == pb.SessionEnd.REASON_EXPIRED


def test_who_comes_later_gets_what_is_kept_and_is_told_what_is_not() -> None:
    stream = channel(replay_bytes=200)
    for _ in range(50):
        stream.publish(batch(1))
    reader = stream.subscribe()
    frames = [parsed(frame) for frame in take_all(reader)]
    evicted = frames[0].losses[0]
    assert evicted.stage == EVICTED
    assert evicted.count == frames[0].first_seq - 1 == 50 - len(frames[1:])
    assert [f.first_seq for f in frames[1:]] == list(range(evicted.count + 1, 51))


def test_a_full_queue_drops_its_oldest_and_says_how_many() -> None:
    stream = channel(queue_bytes=300)
    slow, fast = stream.subscribe(), stream.subscribe()
    got = []
    for _ in range(20):
        stream.publish(batch(2))
        got += take_all(fast)
    assert sum(frame.count for frame in got) == 40
    frames = [parsed(frame) for frame in take_all(slow)]
    assert [(x.stage, x.count) for x in frames[0].losses] == [(LOST, frames[0].first_seq - 1)]
    assert frames[1].first_seq == frames[0].first_seq
    assert frames[-1].first_seq == 39


def test_what_the_kernel_lost_is_told_even_when_its_batch_is_dropped() -> None:
    stream = channel(queue_bytes=300)
    reader = stream.subscribe()
    stream.publish(batch(1, MAP_FULL=7))
    for _ in range(20):
        stream.publish(batch(2))
    losses = {x.stage: x.count for x in parsed(take_all(reader)[0]).losses}
    assert losses[pb.Loss.STAGE_MAP_FULL] == 7


def test_the_end_is_the_last_frame_and_has_the_count() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(batch(3))
    stream.end(pb.SessionEnd.REASON_FAILED, "the verifier said no", 9)
    frames = [parsed(frame) for frame in take_all(reader)]
    assert frames[-1].end == pb.SessionEnd(
        reason=pb.SessionEnd.REASON_FAILED, detail="the verifier said no", produced=3
    )
    with pytest.raises(EOFError):
        reader.take()
    with pytest.raises(RuntimeError, match="ended"):
        stream.publish(batch(1))


def test_an_empty_batch_is_nothing() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(batch(0))
    assert reader.take() is None


async def test_a_waiting_reader_is_woken_and_ends_with_the_end() -> None:
    stream = channel()
    reader = stream.subscribe()
    seen = []

    async def read() -> None:
        async for frame in reader:
            seen.append(frame.count)
            if len(seen) == 1:
                stream.end(pb.SessionEnd.REASON_STOPPED, "", 0)

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    stream.publish(batch(2))
    async with asyncio.timeout(5):
        await task
    assert seen == [2, 0]
    assert not stream.subscriptions


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 6)),
        st.tuples(st.just("subscribe"), st.just(0)),
        st.tuples(st.just("take"), st.integers(0, 4)),
        st.tuples(st.just("close"), st.integers(0, 4)),
    ),
    max_size=60,
)


@given(STEPS, st.integers(100, 2_000), st.integers(100, 2_000))
def test_produced_is_delivered_queued_and_lost_at_every_moment(
    steps: list[tuple[str, int]], replay_bytes: int, queue_bytes: int
) -> None:
    stream = channel(replay_bytes, queue_bytes)
    readers: list[Subscription] = []
    delivered: dict[int, list[int]] = {}
    largest = 0
    for step, number in steps:
        reader = readers[number % len(readers)] if readers else None
        if step == "publish":
            stream.publish(batch(number))
            largest = max(largest, 100 + 60 * number)
        elif step == "subscribe":
            readers.append(stream.subscribe())
            delivered[id(readers[-1])] = []
        elif reader and step == "take":
            if (frame := reader.take()) and frame.count:
                got = delivered[id(reader)]
                assert not got or frame.first_seq > got[-1]
                got += range(frame.first_seq, frame.first_seq + frame.count)
        elif reader and step == "close":
            reader.close()
            readers.remove(reader)
        for each in readers:
            account = each.account
            lost = sum(account.lost.values())
            assert account.produced == account.delivered + account.queued + lost
            assert account.delivered == len(delivered[id(each)])
            assert account.queued_bytes <= max(queue_bytes, largest)
