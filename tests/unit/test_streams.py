"""The core of the streams: numbering, the account, the bound, the replay, the end."""

from __future__ import annotations

import asyncio
import gc
import time
import timeit
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from coral.agent.streams import (
    EVERYTHING,
    MAX_ROWS,
    MAX_SUMMARIES,
    Channel,
    Filter,
    Frame,
    Header,
    Subscription,
    SubscriptionEndedError,
    Terms,
    shorten_queues,
)
from coral.agent.streams.passed import Passed, Queued
from coral.agent.streams.rows import take
from coral.agent.streams.subscription import ENTRY_BYTES
from coral.client import Batch as Received
from coral.collectors.contract import Batch, EventRows, Summaries, Unread
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from coral.wire.encoding import NotFixedError, fields
from coral.wire.rows import row_layout

HEADER = Header("session", pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, "agent", "shop")
CALLS = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls")
CALL = CALLS.dtype
DROP_OLDEST = pb.EbpfEventStreamRequest.OVERFLOW_DROP_OLDEST
DROP_NEWEST = pb.EbpfEventStreamRequest.OVERFLOW_DROP_NEWEST
END = pb.EbpfEventStreamRequest.OVERFLOW_END
LOST = pb.Loss.STAGE_SUBSCRIBER_QUEUE
EVICTED = pb.Loss.STAGE_REPLAY_EVICTED


def messages(
    columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
) -> Sequence[pb.SyscallStats]:
    return [
        pb.SyscallStats(syscall_name=strings[at], call_count=count)
        for at, count in zip(columns["syscall"], columns["call_count"], strict=True)
    ]


def summaries(calls_: Sequence[int], names: Sequence[str] = ("read",)) -> Summaries:
    count = len(calls_)
    columns = {"syscall": np.arange(count) % len(names), "call_count": np.array(calls_, np.uint64)}
    return Summaries(pb.SyscallStatsColumns, columns, names, messages, count)


def batch(count: int, **losses: int) -> Batch:
    stages = {pb.Loss.Stage.Value(f"STAGE_{name}"): n for name, n in losses.items()}
    return Batch(summaries(range(1, count + 1)), 1_000, 2_000, stages)


def wide_batch(count: int) -> Batch:
    """Summaries with as many columns as any kind has."""
    layout = columns_layout(pb.TcpMetricsColumns.DESCRIPTOR).columns
    columns = {name: np.zeros(count, column.dtype) for name, column in layout.items()}
    return Batch(Summaries(pb.TcpMetricsColumns, columns, ("",), messages, count), 1_000, 2_000)


def told_losses(frames: Sequence[Frame]) -> Counter[int]:
    told: Counter[int] = Counter()
    for frame in frames:
        told.update(frame.losses)
    return told


def channel(replay_bytes: int = 1 << 20) -> Channel:
    return Channel(HEADER, replay_bytes, lambda: clock[0])


clock = [0.0]


def calls(count: int, first: int = 0) -> Batch:
    """A batch of single events: pids 1, 2, 3, 1, ..., every fourth an error, i µs long."""
    records = np.zeros(count, CALL)
    number = np.arange(first, first + count)
    records["ended_ns"] = number
    records["pid"] = number % 3 + 1
    records["tid"] = number
    records["duration_ns"] = number * 1_000
    records["return_value"] = np.where(number % 4, 0, -2)
    records["syscall"] = number % 2
    records["comm"] = 2
    return Batch(EventRows(pb.SyscallCall, records, ("read", "write", "shop"), 5), 1_000, 2_000)


def size_of(made: Batch) -> int:
    return Frame(HEADER, 1, len(made.rows), 1_000, 2_000, made.rows).size_bytes


def kept_size_of(made: Batch) -> int:
    """What a frame of a batch takes of a replay."""
    return Frame(HEADER, 1, len(made.rows), 1_000, 2_000, made.rows).kept_bytes


def events_of(wire: bytes) -> NDArray[Any]:
    """The rows of single events in an encoded batch."""
    return Received.parse(wire).events


def take_all(subscription: Subscription) -> list[Frame]:
    frames = []
    try:
        while frame := subscription.take():
            frames.append(frame)
    except EOFError:
        pass
    return frames


def parsed(frame: Frame) -> pb.EbpfEventBatch:
    return pb.EbpfEventBatch.FromString(frame.wire())


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
    assert a.wire() is b.wire()


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
    assert evicted.count == frames[0].last_seq == 50 - len(frames[1:])
    assert [f.first_seq for f in frames[1:]] == list(range(evicted.count + 1, 51))


def test_a_full_queue_drops_its_oldest_and_says_how_many() -> None:
    stream = channel()
    slow, fast = stream.subscribe(Terms(queue_bytes=300)), stream.subscribe()
    got = []
    for _ in range(20):
        stream.publish(batch(2))
        got += take_all(fast)
    assert sum(frame.count for frame in got) == 40
    frames = [parsed(frame) for frame in take_all(slow)]
    assert [(x.stage, x.count) for x in frames[0].losses] == [(LOST, frames[0].last_seq)]
    assert frames[1].first_seq == frames[0].last_seq + 1
    assert frames[-1].first_seq == 39


def test_what_the_kernel_lost_is_told_even_when_its_batch_is_dropped() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(queue_bytes=300))
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


def test_rows_of_single_events_are_the_same_by_array_and_by_protobuf() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(1_000))
    (frame,) = take_all(reader)
    by_array = events_of(frame.wire())
    by_protobuf = pb.EbpfEventBatch.FromString(frame.wire())
    assert frame.count == by_protobuf.count == len(by_protobuf.syscall_calls) == 1_000
    assert by_protobuf.sample_every == 5
    assert list(by_protobuf.strings) == ["read", "write", "shop"]
    for name in CALL.names or ():
        assert by_array[name].tolist() == [getattr(row, name) for row in by_protobuf.syscall_calls]


def test_rows_that_another_library_wrote_are_not_taken_for_fixed_ones() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(10))
    (frame,) = take_all(reader)
    rewritten = pb.EbpfEventBatch.FromString(frame.wire()).SerializeToString()  # omits zeros
    assert rewritten != frame.wire()
    with pytest.raises(NotFixedError):
        CALLS.view(rewritten, rewritten.index(CALLS.head[:-1]))


def test_a_large_batch_becomes_messages_of_less_than_a_mebibyte() -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20))
    stream.publish(calls(3 * MAX_ROWS + 1))
    frames = take_all(reader)
    assert [frame.count for frame in frames] == [MAX_ROWS] * 3 + [1]
    assert max(len(frame.wire()) for frame in frames) < 1 << 20
    numbers = np.concatenate([events_of(frame.wire())["ended_ns"] for frame in frames])
    assert (numbers == np.arange(3 * MAX_ROWS + 1)).all()


def test_a_large_batch_of_summaries_becomes_messages_of_less_than_a_mebibyte() -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20))
    stream.publish(batch(2 * MAX_SUMMARIES + 1, MAP_FULL=3))
    frames = take_all(reader)
    assert [frame.count for frame in frames] == [MAX_SUMMARIES] * 2 + [1]
    assert max(len(frame.wire()) for frame in frames) < 1 << 20
    counts = [row.call_count for frame in frames for row in parsed(frame).syscall_stats]
    assert counts == list(range(1, 2 * MAX_SUMMARIES + 2))
    assert sum(loss.count for frame in frames for loss in parsed(frame).losses) == 3


def test_wider_rows_are_fewer_in_a_message() -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20))
    dtype = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "tcp_state_changes").dtype
    rows = EventRows(pb.TcpStateChange, np.zeros(MAX_ROWS, dtype), ("",))
    stream.publish(Batch(rows, 1_000, 2_000))
    frames = take_all(reader)
    assert sum(frame.count for frame in frames) == MAX_ROWS
    assert max(len(frame.wire()) for frame in frames) < 1 << 20


def test_single_events_can_be_sent_one_a_message() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(3))
    (frame,) = take_all(reader)
    events = [pb.EbpfEvent.FromString(event) for event in frame.events()]
    assert [event.seq for event in events] == [1, 2, 3]
    assert [event.syscall_call.tid for event in events] == [0, 1, 2]
    assert events[1].strings[events[1].syscall_call.syscall] == "write"


FILTERS: dict[str, tuple[Filter, Callable[[int], bool]]] = {
    "pids": (Filter(pids=frozenset({1})), lambda n: n % 3 == 0),
    "tids": (Filter(tids=frozenset({4, 5})), lambda n: n in (4, 5)),
    "syscalls": (Filter(syscalls=frozenset({"write"})), lambda n: n % 2 == 1),
    "comms": (Filter(comms=frozenset({"shop"})), lambda n: n >= 0),
    "no such comm": (Filter(comms=frozenset({"other"})), lambda n: n < 0),
    "errors": (Filter(errors_only=True), lambda n: n % 4 == 0),
    "duration": (Filter(min_duration_ns=30_000), lambda n: n >= 30),
    "all of it": (
        Filter(pids=frozenset({1, 2}), errors_only=True, min_duration_ns=9_000),
        lambda n: n % 3 < 2 and n % 4 == 0 and n >= 9,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_takes_what_it_says_and_the_rest_is_accounted(name: str) -> None:
    wanted, expected = FILTERS[name]
    stream = channel()
    reader, all_of_it = stream.subscribe(Terms(wanted=wanted)), stream.subscribe()
    stream.publish(calls(50))
    numbers = [n for n in range(50) if expected(n)]
    frames = take_all(reader)
    got = [n for f in frames for n in events_of(f.wire())["ended_ns"].tolist()]
    assert got == numbers
    assert reader.account.delivered == len(numbers)
    assert reader.account.filtered == 50 - len(numbers)
    assert [(f.first_seq, f.last_seq) for f in frames] == ([(1, 50)] if numbers else [])
    seqs = [pb.EbpfEvent.FromString(e).seq for f in frames for e in f.events()]
    assert seqs == [n + 1 for n in numbers]
    assert take_all(all_of_it)[0].count == 50


def test_subscribers_with_the_same_filter_share_one_encoding() -> None:
    stream = channel()
    terms = Terms(wanted=Filter(pids=frozenset({2})))
    first, second = stream.subscribe(terms), stream.subscribe(replace(terms, peer="another"))
    stream.publish(calls(30))
    (a,), (b,) = take_all(first), take_all(second)
    assert a.wire() is b.wire()


def test_summaries_are_filtered_too() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(wanted=Filter(syscalls=frozenset({"write"}))))
    stream.publish(Batch(summaries([1, 2, 3], ("read", "write", "open")), 0, 0))
    (frame,) = take_all(reader)
    assert [row.syscall_name for row in parsed(frame).syscall_stats] == ["write"]
    assert (frame.first_seq, frame.last_seq, reader.account.filtered) == (1, 3, 2)


def test_a_reader_resumes_after_the_last_event_it_has_even_inside_a_batch() -> None:
    stream = channel()
    for first in (0, 10, 20):
        stream.publish(calls(10, first))
    for after_seq in (0, 5, 10, 19, 30):
        reader = stream.subscribe(Terms(after_seq=after_seq))
        frames = take_all(reader)
        got = [n for f in frames for n in events_of(f.wire())["ended_ns"].tolist()]
        assert got == list(range(after_seq, 30))
        assert reader.account.produced == reader.account.delivered == 30 - after_seq
    with pytest.raises(ValueError, match="31 is beyond 30"):
        stream.subscribe(Terms(after_seq=31))


def test_dropping_the_newest_keeps_what_is_queued_and_tells_the_gap_where_it_is() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(overflow=DROP_NEWEST, queue_bytes=1_500))
    for first in range(0, 100, 10):
        stream.publish(calls(10, first))
    kept = reader.take()
    assert kept
    assert (kept.first_seq, kept.last_seq) == (1, 10)
    stream.publish(calls(10, 100))
    told = take_all(reader)
    assert told_losses(told).total() == 110 - reader.account.delivered
    rows = [f for f in told if f.count]
    assert rows[0].first_seq == 11
    assert rows[-1].last_seq == 110
    assert [(f.first_seq, f.last_seq) for f in told if f.losses] == [
        (rows[-2].last_seq + 1, rows[-1].first_seq - 1)
    ]


def test_a_reader_that_wants_it_is_ended_when_its_queue_is_full() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(overflow=END, queue_bytes=1_000))
    for first in range(0, 100, 10):
        stream.publish(calls(10, first))
    with pytest.raises(SubscriptionEndedError, match="the queue of 1000 bytes was full"):
        reader.take()
    assert reader.account.lost == {LOST: 100}
    assert reader.account.queued_bytes == 0


def test_a_rate_is_kept_and_what_is_over_it_is_a_loss() -> None:
    stream = channel()
    clock[0] = 0.0
    reader = stream.subscribe(Terms(rate_bytes_s=2_000))
    size = size_of(calls(10))
    for _ in range(20):
        stream.publish(calls(10))
    within = -(-2_000 // size)  # the last one on credit
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 200 - 10 * within}
    clock[0] = 1.0
    for _ in range(20):
        stream.publish(calls(10))
    within += -(-(2 * 2_000 - within * size) // size)
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 400 - 10 * within}
    told = [f for f in take_all(reader) if f.losses]
    assert sum(sum(f.losses.values()) for f in told) == 400 - 10 * within


def test_a_reader_that_was_idle_may_have_a_seconds_worth_at_once_and_no_more() -> None:
    stream = channel()
    clock[0] = 0.0
    reader = stream.subscribe(Terms(rate_bytes_s=2_000))
    size = size_of(calls(10))
    stream.publish(calls(10))
    clock[0] = 100.0
    for _ in range(100):
        stream.publish(calls(10))
    at_once = -(-2_000 // size)
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 1_000 - 10 * at_once}


def test_a_frame_larger_than_a_seconds_rate_is_sent_on_credit() -> None:
    stream = channel(64 << 20)
    clock[0] = 0.0
    reader = stream.subscribe(Terms(rate_bytes_s=10_000, queue_bytes=64 << 20))
    size = size_of(calls(1_000))
    for second in range(60):
        clock[0] = float(second)
        stream.publish(calls(1_000))
    sent = reader.account.queued // 1_000
    assert sent == pytest.approx(60 * 10_000 / size, abs=1.1)
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 60_000 - 1_000 * sent}


def test_names_of_any_length_in_a_filter_cost_their_own_reader_alone() -> None:
    stream = channel()
    reader, other = (
        stream.subscribe(Terms(wanted=Filter(comms=frozenset(names))))
        for names in (["x" * 2_000_000, *map(str, range(1_000))], ["shop"])
    )
    stream.publish(calls(50))
    assert reader.account.filtered == 50
    assert other.account.queued == 50


def test_a_stalled_reader_is_told_why_and_holds_nothing() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(10))
    reader.fail("it did not read")
    assert reader.account.queued == reader.account.queued_bytes == 0
    assert reader.account.lost == {LOST: 10}
    with pytest.raises(SubscriptionEndedError, match="it did not read"):
        reader.take()


TERMS = st.builds(
    Terms,
    overflow=st.sampled_from([DROP_OLDEST, DROP_NEWEST, END]),
    queue_bytes=st.integers(200, 5_000),
    rate_bytes_s=st.sampled_from([0.0, 0.0, 3_000.0]),
    wanted=st.sampled_from([EVERYTHING, *(wanted for wanted, _ in FILTERS.values())]),
)
READERS = st.integers(0, 3)


class Reader:
    """A chain of subscriptions, each resuming where the last one was left, and all that the reader
    knows from the bytes it was sent."""

    def __init__(self, stream: Channel, terms: Terms) -> None:
        self.stream = stream
        self.start = self.last = terms.after_seq
        self.seqs: list[int] = []  # of the rows it got
        self.before = Counter[int]()  # lost by earlier subscriptions, by stage
        self.filtered_before = 0
        self.account = pb.StreamAccount()
        self.told: Counter[int] = Counter()  # sum of what messages say was lost since the last one
        self.lost_in_kernel: Counter[int] = Counter()
        self.end: pb.SessionEnd | None = None
        self.failed = False
        self.subscription = stream.subscribe(terms)

    def resume(self) -> None:
        """Loses its connection, and subscribes again with what it has."""
        self.subscription.close()
        self.before.update(counted(self.account.lost))
        self.filtered_before += self.account.filtered
        self.account = pb.StreamAccount()
        self.failed = False
        if not self.last:  # then it begins anew, and is told again what was lost before
            self.told.clear()
            self.lost_in_kernel.clear()
        terms = replace(self.subscription.terms, after_seq=self.last)
        self.subscription = self.stream.subscribe(terms)

    def take(self) -> bool:
        """One message; whether there was one. Checks the account that it makes."""
        try:
            frame = self.subscription.take(clock[0])
        except EOFError:
            assert self.end is not None
            return False
        except SubscriptionEndedError:
            self.failed = True
            return False
        if frame is None:
            return False
        batch = pb.EbpfEventBatch.FromString(self.subscription.message(frame))
        assert batch.first_seq == self.last + 1 or self.subscription.terms.wanted
        assert batch.first_seq > self.last
        assert batch.last_seq >= batch.first_seq - 1
        self.last = batch.last_seq
        self.seqs += (
            range(batch.first_seq, batch.last_seq + 1) if frame.seqs is None and frame.count else ()
        )
        self.seqs += frame.seqs.tolist() if frame.seqs is not None else ()
        assert len(batch.syscall_calls) + len(batch.syscall_stats) == batch.count == frame.count
        self.account = batch.account
        self.told.update(counted(batch.losses))
        lost_in_kernel = counted(batch.lost_in_kernel)
        assert lost_in_kernel >= self.lost_in_kernel
        self.lost_in_kernel = lost_in_kernel
        assert batch.produced == batch.last_seq
        if batch.HasField("end"):
            self.end = batch.end
        self.check()
        return True

    @property
    def lost(self) -> Counter[int]:
        """What it knows of as lost to it."""
        return self.before + counted(self.account.lost)

    def check(self) -> None:
        """Every number up to the last is in one place."""
        filtered = self.filtered_before + self.account.filtered
        assert self.last - self.start == len(self.seqs) + filtered + self.lost.total()


def counted(losses: Iterable[pb.Loss]) -> Counter[int]:
    return Counter({loss.stage: loss.count for loss in losses})


class AnyInterleaving(RuleBasedStateMachine):
    """Produce, subscribe, read, stall, drop, resume, overflow, end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Reader] = []
        self.published = 0
        self.largest = 0
        self.lost = 0  # in the kernel
        clock[0] = 0.0

    @initialize(replay_bytes=st.integers(200, 12_000))
    def begin(self, replay_bytes: int) -> None:
        self.stream = channel(replay_bytes)

    def publish(self, made: Batch) -> None:
        if not self.stream.ended:
            self.largest = max(self.largest, size_of(made) + 80)  # what was lost
            self.stream.publish(made)
            self.published += len(made.rows)
            self.lost += sum(made.losses.values())

    @rule(count=st.integers(1, 6))
    def publish_summaries(self, count: int) -> None:
        self.publish(batch(count))

    @rule(count=st.integers(1, 40), lost=st.integers(0, 3))
    def publish_events(self, count: int, lost: int) -> None:
        losses: dict[int, int] = {pb.Loss.STAGE_KERNEL_BUFFER: lost} if lost else {}
        self.publish(replace(calls(count, self.published), losses=losses))

    @rule(count=st.integers(1, 9))
    def lose_in_the_kernel(self, count: int) -> None:
        self.publish(Batch(summaries([]), 0, 0, {pb.Loss.STAGE_KERNEL_BUFFER: count}))

    @rule(terms=TERMS, after=st.integers(0, 400))
    def subscribe(self, terms: Terms, after: int) -> None:
        if len(self.readers) < 4:
            after_seq = min(after, self.stream.produced)
            self.readers.append(Reader(self.stream, replace(terms, after_seq=after_seq)))

    @rule(index=READERS)
    def take(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.take()

    @rule(index=READERS)
    def resume(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.resume()

    @rule(index=READERS)
    def leave(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.subscription.close()
        del self.readers[index : index + 1]

    @rule(index=READERS)
    def stall(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.subscription.fail("stalled")

    @rule(wanted_bytes=st.integers(1, 20_000))
    def run_out_of_memory(self, wanted_bytes: int) -> None:
        before = self.stream.buffered_bytes
        shorten_queues([self.stream], wanted_bytes)
        freed_bytes = before - self.stream.buffered_bytes
        assert freed_bytes >= wanted_bytes or all(
            len(reader._held.entries) + len(reader._live.entries) < 2
            for reader in self.stream.subscriptions
        )

    @rule(seconds=st.floats(0.001, 1))
    def wait(self, seconds: float) -> None:
        clock[0] += seconds

    @rule()
    def end(self) -> None:
        if not self.stream.ended:
            self.stream.end(pb.SessionEnd.REASON_EXPIRED, "", 0)

    @invariant()
    def every_account_is_even(self) -> None:
        for reader in self.readers:
            account = reader.subscription.account
            assert account.produced == (
                account.delivered + account.filtered + account.queued + sum(account.lost.values())
            )
            most_bytes = max(reader.subscription.terms.queue_bytes, self.largest)
            end_bytes = 200 if self.stream.ended else 0  # it is queued whatever there is before it
            assert account.queued_bytes <= most_bytes + end_bytes

    @invariant()
    def what_is_held_is_counted_once(self) -> None:
        if hasattr(self, "stream"):
            readers = self.stream.subscriptions
            frames: dict[int, Queued] = {id(frame): frame for frame in self.stream.kept}
            frames |= {id(r._taken): r._taken for r in readers if r._taken}
            entries = [e for r in readers for q in (r._held, r._live) for e in q.entries]
            frames |= {id(frame): frame for _, frame in entries}
            passed = [frame for frame in frames.values() if isinstance(frame, Passed)]
            frames |= {id(each.source): each.source for each in passed}
            held_bytes = sum(frame.memory_bytes for frame in frames.values())
            assert self.stream.buffered_bytes == held_bytes + len(entries) * ENTRY_BYTES

    def teardown(self) -> None:
        """Each reader that reads on accounts for every event, and for what the kernel lost."""
        if not hasattr(self, "stream"):
            return
        for reader in self.readers:
            for _ in range(2):
                while reader.take():
                    pass
                clock[0] += 2.0  # then it is time to say where the stream stands
            reader.take()
            if reader.failed:
                continue
            assert reader.last == self.stream.produced == self.published
            assert reader.lost_in_kernel.total() == self.lost
            assert len(set(reader.seqs)) == len(reader.seqs)
            assert reader.subscription.account.queued == 0
            assert reader.told.total() <= reader.lost.total() + self.lost  # none is told twice
            if self.stream.ended:
                assert reader.end is not None
                assert reader.end.produced == self.published
                assert counted(reader.end.lost_in_kernel).total() == self.lost


AnyInterleaving.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnyInterleaving = AnyInterleaving.TestCase


def test_summaries_are_sent_as_columns_to_those_who_want_them() -> None:
    stream = channel()
    rows, columns = stream.subscribe(), stream.subscribe(Terms(columns=True))
    stream.publish(Batch(summaries([5, 6, 7], ("read", "write")), 0, 0))
    as_rows = pb.EbpfEventBatch.FromString(rows.message(take_all(rows)[0]))
    as_columns = pb.EbpfEventBatch.FromString(columns.message(take_all(columns)[0]))
    assert [(row.syscall_name, row.call_count) for row in as_rows.syscall_stats] == [
        ("read", 5),
        ("write", 6),
        ("read", 7),
    ]
    assert not as_rows.HasField("syscall_stats_columns")
    assert not as_columns.syscall_stats
    assert as_columns.count == as_rows.count == 3
    assert list(as_columns.strings) == ["read", "write"]
    assert list(as_columns.syscall_stats_columns.syscall) == [0, 1, 0]
    assert list(as_columns.syscall_stats_columns.call_count) == [5, 6, 7]


def test_columns_come_back_as_arrays_of_the_same_values() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(columns=True))
    stream.publish(Batch(summaries([5, 0, 1 << 60]), 0, 0))
    wire = reader.message(take_all(reader)[0])
    number = pb.EbpfEventBatch.SYSCALL_STATS_COLUMNS_FIELD_NUMBER
    (body,) = (bytes(body) for found, _, body in fields(wire) if found == number)
    columns = columns_layout(pb.SyscallStatsColumns.DESCRIPTOR).decode(body, 3)
    assert columns["call_count"].tolist() == [5, 0, 1 << 60]
    assert columns["pid"].tolist() == [0, 0, 0]  # not sent
    assert columns["latency_ns"].shape == (3, 0)
    with pytest.raises(NotFixedError, match="column call_count has 3 values for 4 rows"):
        columns_layout(pb.SyscallStatsColumns.DESCRIPTOR).decode(body, 4)


def test_a_filter_leaves_the_strings_that_are_used() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(columns=True, wanted=Filter(syscalls=frozenset({"open"}))))
    stream.publish(Batch(summaries([1, 2, 3], ("read", "write", "open")), 0, 0))
    batch_ = pb.EbpfEventBatch.FromString(reader.message(take_all(reader)[0]))
    assert list(batch_.strings) == ["open"]
    assert list(batch_.syscall_stats_columns.call_count) == [3]
    assert batch_.account.filtered == 2


@pytest.mark.parametrize("columns", [False, True])
def test_messages_are_split_by_bytes_however_long_the_strings_are(columns: bool) -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20, columns=columns))
    names = [f"{number:04}" + "x" * 6_000 for number in range(MAX_SUMMARIES)]
    stream.publish(Batch(summaries(range(MAX_SUMMARIES), names), 0, 0))
    wires, counts = [], 0
    for frame in take_all(reader):
        wires.append(reader.message(frame))
        counts += frame.count
    assert counts == MAX_SUMMARIES
    assert len(wires) == 4
    assert max(map(len, wires)) < 1 << 20


def test_a_stream_without_events_says_once_a_second_where_it_stands() -> None:
    clock[0] = 100.0
    stream = channel()
    reader = stream.subscribe(Terms(wanted=Filter(pids=frozenset({99}))))
    stream.publish(replace(calls(30), losses={pb.Loss.STAGE_KERNEL_BUFFER: 4}))
    assert reader.take(100.0) is not None  # the kernel's losses
    stream.publish(calls(30))
    assert reader.take(100.9) is None
    frame = reader.take(101.0)
    assert frame is not None
    batch_ = pb.EbpfEventBatch.FromString(reader.message(frame))
    assert (batch_.first_seq, batch_.last_seq, batch_.count, batch_.produced) == (31, 60, 0, 60)
    assert batch_.account == pb.StreamAccount(filtered=60)
    assert counted(batch_.lost_in_kernel) == {pb.Loss.STAGE_KERNEL_BUFFER: 4}
    assert not batch_.losses
    assert reader.take(101.9) is None
    assert reader.take(102.0) is not None


def test_a_position_of_a_stream_of_single_events_has_no_event() -> None:
    clock[0] = 100.0
    stream = channel()
    reader = stream.subscribe(Terms(wanted=Filter(pids=frozenset({99}))))
    stream.publish(calls(30))
    frame = reader.take(101.0)
    assert frame is not None
    (event,) = (pb.EbpfEvent.FromString(event) for event in reader.events(frame))
    assert event.WhichOneof("payload") is None
    assert (event.seq, event.produced, event.account.filtered) == (0, 30, 30)


def test_a_single_event_has_its_own_strings_and_its_sample() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(2))
    (frame,) = take_all(reader)
    _, event = (pb.EbpfEvent.FromString(event) for event in reader.events(frame))
    call = event.syscall_call
    assert list(event.strings) == ["write", "shop"]
    assert (event.strings[call.syscall], event.strings[call.comm]) == ("write", "shop")
    assert event.sample_every == 5


def test_a_stream_that_has_ended_can_still_be_read() -> None:
    stream = channel()
    stream.publish(calls(10))
    stream.publish(batch(0, KERNEL_BUFFER=3))
    stream.end(pb.SessionEnd.REASON_STOPPED, "", 0)
    for after_seq in (0, 4, 10):
        reader = stream.subscribe(Terms(after_seq=after_seq))
        frames = take_all(reader)
        assert sum(frame.count for frame in frames) == 10 - after_seq
        end = frames[-1].end
        assert end is not None
        assert (end.produced, counted(end.lost_in_kernel).total()) == (10, 3)
        assert counted(parsed(frames[-1]).lost_in_kernel).total() == 3


def test_what_is_kept_is_read_whole_however_small_the_queue_is() -> None:
    stream = channel(replay_bytes=1 << 20)
    for first in range(0, 1_000, 10):
        stream.publish(calls(10, first))
    reader = stream.subscribe(Terms(queue_bytes=200))
    assert reader.account.queued == 1_000
    assert reader.account.queued_bytes == 0
    got = [n for f in take_all(reader) for n in events_of(f.wire())["ended_ns"].tolist()]
    assert got == list(range(1_000))
    assert reader.account.lost == {}


def test_what_is_pushed_out_before_it_is_read_moves_into_the_queue() -> None:
    stream = channel(3 * kept_size_of(calls(10)))
    for first in (0, 10, 20):
        stream.publish(calls(10, first))
    reader = stream.subscribe()
    for first in range(30, 200, 10):
        stream.publish(calls(10, first))
    got = [n for f in take_all(reader) for n in events_of(f.wire())["ended_ns"].tolist()]
    assert got == list(range(200))


def test_losses_that_evicted_frames_told_are_told_to_who_comes_later() -> None:
    stream = channel(replay_bytes=200)
    stream.publish(batch(1, MAP_FULL=7))
    for _ in range(20):
        stream.publish(batch(1))
    (first, *_) = take_all(stream.subscribe())
    assert first.losses == {EVICTED: 20, pb.Loss.STAGE_MAP_FULL: 7}
    assert first.lost_in_kernel == {pb.Loss.STAGE_MAP_FULL: 7}
    resumed = take_all(stream.subscribe(Terms(after_seq=5)))
    assert resumed[0].losses == {EVICTED: 15}
    assert resumed[0].lost_in_kernel == {pb.Loss.STAGE_MAP_FULL: 7}


def test_encodings_are_kept_for_recent_frames_alone() -> None:
    stream = channel()
    reader = stream.subscribe()
    for _ in range(100):
        stream.publish(batch(5))
        for frame in take_all(reader):
            reader.message(frame)
    rows_bytes = sum(frame.kept_bytes for frame in stream.kept)
    encoded = [frame for frame in stream.kept if frame.memory_bytes > frame.kept_bytes]
    assert len(stream.kept) == 100
    assert len(encoded) == 32
    assert stream.buffered_bytes == rows_bytes + sum(len(frame.wire()) for frame in encoded)


def test_late_readers_leave_nothing_behind_whatever_they_filter() -> None:
    stream = channel(1 << 20)
    for first in range(0, 20_000, 200):
        stream.publish(calls(200, first))
        stream.publish(Batch(summaries(range(5), ("read", "write")), 1_000, 2_000))
    held = stream.buffered_bytes
    for number in range(1, 30):
        for columns in (False, True):
            wanted = Filter(min_duration_ns=number, syscalls=frozenset({"read"}))
            reader = stream.subscribe(Terms(wanted=wanted, columns=columns))
            for frame in take_all(reader):
                reader.message(frame)
            reader.close()
    assert len(stream.kept) > 80
    assert all(frame.memory_bytes == frame.kept_bytes for frame in stream.kept)
    assert stream.buffered_bytes == held


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many more bytes are held than at the start of the block."""
    np.unique(np.arange(2))  # it imports a module at its first call
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [calls, batch, wide_batch])
def test_small_frames_are_counted_with_their_objects(make: Callable[[int], Batch]) -> None:
    with traced() as held:
        stream = channel(1 << 20)
        readers = [stream.subscribe(Terms(queue_bytes=128 << 10)) for _ in range(4)]
        for _ in range(2_000):
            stream.publish(make(1))
        assert stream.kept_bytes <= 1 << 20
        gc.collect()
        assert 0.85 * stream.buffered_bytes < held() < 1.05 * stream.buffered_bytes
        for reader in readers:
            reader.close()
        gc.collect()
        assert held() < 1.05 * stream.buffered_bytes < 1.2 * (1 << 20)


@pytest.mark.timed
def test_what_is_buffered_is_known_without_a_look_at_each_frame() -> None:
    stream = channel(64 << 20)
    for _ in range(10_000):
        stream.publish(calls(1))
    assert len(stream.kept) == 10_000
    took_s = timeit.repeat(lambda: stream.buffered_bytes, number=1, repeat=10)
    assert min(took_s) < 0.001


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("summaries_", [False, True], ids=["events", "summaries"])
def test_64_filters_one_after_another_leave_nothing(summaries_: bool, columns: bool) -> None:
    stream = channel(4 << 20)
    for number in range(8):
        stream.publish(batch(500) if summaries_ else calls(5_000, number * 5_000))
    assert stream.kept_bytes > 40 << 10
    with traced() as held:
        for number in range(64):
            read_all(stream, Terms(wanted=Filter(min_duration_ns=number), columns=columns))
        assert held() < 64 << 10


def two_of_three(number: int) -> Filter:
    """A filter of its own for each NUMBER, which two of three calls pass."""
    return Filter(pids=frozenset({1, 2, 100 + number}))


def test_what_64_filters_hold_at_once_is_counted_and_freed() -> None:
    stream = channel(1 << 20)
    for first in range(0, 40_000, 5_000):
        stream.publish(calls(5_000, first))
    before = stream.buffered_bytes
    readers = [stream.subscribe(Terms(wanted=two_of_three(n))) for n in range(64)]
    with traced() as held:
        for first in range(40_000, 60_000, 5_000):  # to the queues
            stream.publish(calls(5_000, first))
        # Of each of the eight frames, the rows that pass as bits, and the frame itself once.
        waiting = stream.buffered_bytes - before
        assert 0 < waiting < 64 * 8 * (5_000 // 8 + 1_000) + 8 * size_of(calls(5_000))
        assert waiting == pytest.approx(held(), rel=0.05)
        for reader in readers:
            told, sending = reader.take(), reader.take()
            assert told
            assert told.losses
            assert sending
            assert sending.count in (3_333, 3_334)
        del told, sending
        sending_bytes = stream.buffered_bytes - before
        assert sending_bytes > 64 * 3_333 * CALL.itemsize
        assert sending_bytes == pytest.approx(held(), rel=0.05)
        for reader in readers:
            take_all(reader)
            reader.close()
        del readers, reader
        assert held() < stream.buffered_bytes + (128 << 10) < 2 << 20


def test_120_filters_that_nobody_reads_hold_bits_of_what_all_share() -> None:
    stream = channel(1 << 20)
    readers = [stream.subscribe(Terms(wanted=two_of_three(n))) for n in range(120)]
    with traced() as held:
        most_bytes = 0
        for first in range(0, 1_000_000, 10_000):
            stream.publish(calls(10_000, first))
            most_bytes = max(most_bytes, held())
        assert most_bytes < 48 << 20
        assert held() == pytest.approx(stream.buffered_bytes, rel=0.1)
    for reader in readers:
        account = reader.account
        assert account.lost[LOST] > 0
        assert account.queued_bytes == pytest.approx(8 << 20, rel=0.1)
        assert account.queued + account.filtered + account.lost[LOST] == 1_000_000


def test_rows_that_pass_are_encoded_when_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    begin = Frame.__post_init__

    def count(frame: Frame) -> None:
        made.append(frame.count)
        begin(frame)

    monkeypatch.setattr(Frame, "__post_init__", count)
    stream = channel()
    readers = [stream.subscribe(Terms(wanted=two_of_three(number))) for number in range(64)]
    for number in range(3):
        stream.publish(calls(3_000, number * 3_000))
    assert made == [3_000] * 3
    for taken, reader in enumerate(readers, 1):
        frame = reader.take()
        assert frame
        assert frame.count == 2_000
        assert made == [3_000] * 3 + [2_000] * taken


def test_a_few_rows_do_not_keep_a_frame_in_memory() -> None:
    stream = channel(1)
    with traced() as held:
        reader = stream.subscribe(Terms(wanted=Filter(tids=frozenset(range(0, 160_000, 1_000)))))
        for first in range(0, 160_000, 16_000):
            stream.publish(calls(16_000, first))
        assert reader.account.queued == 160
        one = size_of(calls(16_000))
        assert held() < one + (64 << 10)
    frames = take_all(reader)
    assert [frame.count for frame in frames] == [16] * 10


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@given(
    counts=st.lists(st.integers(1, 200), max_size=6),
    wanted=st.sampled_from([wanted for wanted, _ in FILTERS.values()]),
    replay_bytes=st.sampled_from([1, 5_000, 1 << 20]),
)
def test_rows_are_the_same_whenever_their_frame_is_made(
    columns: bool, counts: Sequence[int], wanted: Filter, replay_bytes: int
) -> None:
    stream = channel(replay_bytes)
    late, prompt = (stream.subscribe(Terms(wanted=wanted, columns=columns)) for _ in range(2))
    at_once, expected = [], []
    for number, count in enumerate(counts):
        numbers = range(number, number + count)
        for made in (
            calls(count, number),
            Batch(summaries(numbers, ("read", "open")), 1_000, 2_000),
        ):
            stream.publish(made)
            at_once += [frame.wire(columns=columns) for frame in take_all(prompt)]
            mask = wanted.mask(made.rows)
            if not mask.any():
                continue
            rows = made.rows if mask.all() else take(made.rows, mask)
            last_seq = stream.produced
            first_seq = last_seq - count + 1
            eager = Frame(HEADER, first_seq, last_seq, 1_000, 2_000, rows)
            expected.append(eager.wire(columns=columns))
    assert at_once == expected
    assert [frame.wire(columns=columns) for frame in take_all(late)] == expected


def test_who_is_furthest_behind_gives_way_first() -> None:
    stream = channel(1)
    far, strict, near = (
        stream.subscribe(Terms(overflow=overflow)) for overflow in (DROP_NEWEST, END, DROP_OLDEST)
    )
    for first in range(0, 64_000, 1_000):
        stream.publish(calls(1_000, first))
        if first < 60_000:
            near.take()
    assert near.account.queued == 4_000
    held = stream.buffered_bytes
    shorten_queues([stream], held // 4)
    assert held // 2 - size_of(calls(1_000)) < stream.buffered_bytes <= held - held // 4
    assert near.account.lost == {}
    assert far.account.lost == {LOST: 32_000}
    with pytest.raises(SubscriptionEndedError, match="the agent had no memory left"):
        strict.take()
    told, *rows = take_all(far)
    assert told.losses == {LOST: 32_000}
    assert [frame.first_seq for frame in rows] == list(range(32_001, 64_001, 1_000))
    shorten_queues([stream], 1 << 30)
    assert near.account.queued == 1_000


def test_filtering_is_charged_to_the_subscribers() -> None:
    charged: list[int] = []
    stream = Channel(HEADER, 1 << 20, charge=charged.append)
    stream.publish(calls(5_000))
    readers = [stream.subscribe(Terms(wanted=two_of_three(number))) for number in range(64)]
    began_ns = time.thread_time_ns()
    stream.publish(calls(5_000))
    took_ns = time.thread_time_ns() - began_ns
    unread, filtered = charged
    assert 10 * unread < filtered < took_ns
    assert filtered > took_ns // 2
    assert len(readers) == len(stream.subscriptions)


@given(
    values=st.lists(st.integers(0, (1 << 32) - 1), max_size=30),
    pids=st.frozensets(st.integers(0, (1 << 32) - 1), min_size=1),
)
def test_processes_are_found_among_any_others(values: list[int], pids: frozenset[int]) -> None:
    values += sorted(pids)[::2]
    columns = {"pid": np.array(values, np.uint32)}
    rows = Summaries(pb.SyscallStatsColumns, columns, ("",), messages, len(values))
    assert Filter(pids=pids).mask(rows).tolist() == [value in pids for value in values]


def read_all(stream: Channel, terms: Terms) -> None:
    """A reader that comes, reads everything, and goes."""
    reader = stream.subscribe(terms)
    for frame in take_all(reader):
        reader.message(frame)
    reader.close()


def test_messages_of_single_events_count_by_their_bytes_towards_the_rate() -> None:
    stream = channel(64 << 20)
    clock[0] = 0.0
    terms = Terms(rate_bytes_s=100_000, queue_bytes=64 << 20, single_events=True)
    reader = stream.subscribe(terms)
    sent = 0
    for tick in range(600):
        clock[0] = tick / 10
        stream.publish(calls(200, tick * 200))
        for frame in take_all(reader):
            sent += sum(map(len, reader.events(frame)))
    # A second's worth is saved up, and the last frame is on credit.
    assert sent == pytest.approx(61 * 100_000, rel=0.02)
    assert reader.account.lost[pb.Loss.STAGE_RATE_LIMIT] == 120_000 - reader.delivered > 0
    # A row comes to more than in a batch.
    assert sent / reader.delivered > 1.5 * CALL.itemsize
    clock[0] += 1
    for number in range(30):  # for a reader that is slow
        stream.publish(calls(200, 120_000 + number))
    waiting = [event for frame in take_all(reader) for event in frame.events()]
    assert sum(map(len, waiting)) == pytest.approx(100_000, rel=0.2)


def test_single_events_that_pass_a_filter_have_their_own_strings() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(wanted=Filter(syscalls=frozenset({"write"}))))
    stream.publish(calls(4))
    batch_ = parsed(take_all(reader)[0])
    assert list(batch_.strings) == ["write", "shop"]
    assert [batch_.strings[row.syscall] for row in batch_.syscall_calls] == ["write", "write"]
    assert [batch_.strings[row.comm] for row in batch_.syscall_calls] == ["shop", "shop"]


COLUMNS: dict[str, tuple[Filter, type[Message], dict[str, list[int]], list[bool]]] = {
    "a call's errors": (
        Filter(errors_only=True),
        pb.SyscallStatsColumns,
        {"error_count": [1, 0]},
        [True, False],
    ),
    "a call's longest": (
        Filter(min_duration_ns=5),
        pb.SyscallStatsColumns,
        {"max_duration_ns": [5, 4], "total_duration_ns": [5, 9]},
        [True, False],
    ),
    "a caller": (
        Filter(comms=frozenset({"shop"})),
        pb.SyscallStatsColumns,
        {"comm": [1, 2]},
        [True, False],
    ),
    "a connection's owner": (
        Filter(pids=frozenset({7}), comms=frozenset({"shop"})),
        pb.TcpMetricsColumns,
        {"pid": [7, 8], "comm": [1, 1]},
        [True, False],
    ),
    "a connection's error": (
        Filter(errors_only=True),
        pb.TcpMetricsColumns,
        {"error": [1, 0]},
        [True, False],
    ),
    "a connection's age": (
        Filter(min_duration_ns=5),
        pb.TcpMetricsColumns,
        {"duration_ns": [5, 0]},
        [True, False],
    ),
    "a peer's failures": (
        Filter(errors_only=True),
        pb.TcpPeerMetricsColumns,
        {"connections_failed": [2, 0]},
        [True, False],
    ),
    "what peers do not have": (
        Filter(pids=frozenset({7}), comms=frozenset({"shop"}), syscalls=frozenset({"read"})),
        pb.TcpPeerMetricsColumns,
        {"port": [80, 81]},
        [True, True],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_filter_takes_the_summaries_that_fit(name: str) -> None:
    wanted, message, values, expected = COLUMNS[name]
    columns = {column: np.array(numbers) for column, numbers in values.items()}
    rows = Summaries(message, columns, ("", "shop", "shelf"), messages, 2)
    assert wanted.mask(rows).tolist() == expected


def test_a_reader_that_fails_at_an_eviction_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = channel(2 * kept_size_of(calls(10)))
    broken, other = stream.subscribe(), stream.subscribe()
    for _ in range(2):  # they are kept from before the readers below
        stream.publish(calls(10))
    late_broken, late = stream.subscribe(), stream.subscribe()

    def fail(_index: int, _frame: Frame) -> None:
        raise ValueError("a defect")

    for reader in (broken, late_broken):
        monkeypatch.setattr(reader, "evict", fail)
    for _ in range(3):
        stream.publish(calls(10))
    for reader in (broken, late_broken):
        with pytest.raises(SubscriptionEndedError, match="could not serve this stream: ValueError"):
            reader.take()
    for reader in (other, late):
        assert sum(frame.count for frame in take_all(reader)) == 50
    assert stream.produced == 50


def test_losses_in_the_kernel_are_told_though_their_frames_are_dropped_one_after_another() -> None:
    stream = channel(1)
    reader = stream.subscribe(Terms(queue_bytes=2 * size_of(calls(10))))
    for number in range(1, 9):
        stream.publish(replace(calls(10), losses={pb.Loss.STAGE_KERNEL_BUFFER: number}))
    frames = take_all(reader)
    assert told_losses(frames)[pb.Loss.STAGE_KERNEL_BUFFER] == sum(range(1, 9))
    assert told_losses(frames)[LOST] == 80 - sum(frame.count for frame in frames) > 0


def test_a_pause_earns_no_more_than_a_seconds_rate() -> None:
    stream = channel()
    clock[0] = 0.0
    size = size_of(calls(10))
    reader = stream.subscribe(Terms(rate_bytes_s=3.5 * size, queue_bytes=64 << 20))
    stream.publish(calls(10))
    clock[0] = 3600.0
    for _ in range(20):
        stream.publish(calls(10))
    assert reader.account.queued == 10 + 40
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 160}


def test_each_message_says_what_could_not_be_read_so_far() -> None:
    stream = channel()
    early = stream.subscribe()
    stream.publish(replace(calls(1), unread={"tls": Unread(1, 100)}))
    stream.publish(replace(batch(0), unread={"tls": Unread(2, 50), "http2": Unread(1, 0)}))
    stream.publish(batch(1))
    stream.end(pb.SessionEnd.REASON_STOPPED, "", 3_000)
    told = [Received.parse(early.message(frame)).unread for frame in take_all(early)]
    everything = {"tls": (3, 150), "http2": (1, 0)}
    # A message without rows or losses waits for what follows.
    assert told == [{"tls": (1, 100)}, everything, everything]
    late = stream.subscribe(Terms(after_seq=1))
    frames = take_all(late)
    assert [Received.parse(late.message(frame)).unread for frame in frames] == [everything] * 2
    (end,) = (pb.EbpfEvent.FromString(wire) for wire in frames[-1].events())
    assert {it.what: (it.count, it.bytes) for it in end.unread} == everything
