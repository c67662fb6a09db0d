"""The core of the streams: numbering, the account, the bound, the replay, the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coral.agent.streams.channel import (
    MAX_ROWS,
    MAX_SUMMARIES,
    Channel,
    Subscription,
    SubscriptionEndedError,
    Terms,
)
from coral.agent.streams.filter import EVERYTHING, Filter
from coral.agent.streams.frame import Frame, Header
from coral.client import Batch as Received
from coral.collectors.contract import Batch, EventRows
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.rows import NotFixedError, row_layout

HEADER = Header("session", pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, "agent", "shop")
CALL = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls").dtype
DROP_OLDEST = pb.EbpfEventStreamRequest.OVERFLOW_DROP_OLDEST
DROP_NEWEST = pb.EbpfEventStreamRequest.OVERFLOW_DROP_NEWEST
END = pb.EbpfEventStreamRequest.OVERFLOW_END
LOST = pb.Loss.STAGE_SUBSCRIBER_QUEUE
EVICTED = pb.Loss.STAGE_REPLAY_EVICTED


def batch(count: int, **losses: int) -> Batch:
    rows = [pb.SyscallStats(syscall_name="read", call_count=n + 1) for n in range(count)]
    stages = {pb.Loss.Stage.Value(f"STAGE_{name}"): n for name, n in losses.items()}
    return Batch(rows, 1_000, 2_000, stages)


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
    stream = channel()
    slow, fast = stream.subscribe(Terms(queue_bytes=300)), stream.subscribe()
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
    by_array = Received.parse(frame.wire)
    by_protobuf = pb.EbpfEventBatch.FromString(frame.wire)
    assert by_array.count == by_protobuf.count == len(by_protobuf.syscall_calls) == 1_000
    assert by_protobuf.sample_every == 5
    assert list(by_protobuf.strings) == ["read", "write", "shop"]
    for name in CALL.names or ():
        assert by_array.events[name].tolist() == [
            getattr(row, name) for row in by_protobuf.syscall_calls
        ]
    assert by_array.strings[by_array.events["syscall"][:2]].tolist() == ["read", "write"]


def test_rows_that_another_library_wrote_are_read_too() -> None:
    stream = channel()
    reader = stream.subscribe()
    stream.publish(calls(10))
    (frame,) = take_all(reader)
    rewritten = pb.EbpfEventBatch.FromString(frame.wire).SerializeToString()  # omits zeros
    assert rewritten != frame.wire
    with pytest.raises(NotFixedError):
        row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls").view(rewritten)
    assert Received.parse(rewritten).events.tolist() == Received.parse(frame.wire).events.tolist()


def test_a_large_batch_becomes_messages_of_less_than_a_mebibyte() -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20))
    stream.publish(calls(3 * MAX_ROWS + 1))
    frames = take_all(reader)
    assert [frame.count for frame in frames] == [MAX_ROWS] * 3 + [1]
    assert max(len(frame.wire) for frame in frames) < 1 << 20
    numbers = np.concatenate([Received.parse(frame.wire).events["ended_ns"] for frame in frames])
    assert (numbers == np.arange(3 * MAX_ROWS + 1)).all()


def test_a_large_batch_of_summaries_becomes_messages_of_less_than_a_mebibyte() -> None:
    stream = channel(64 << 20)
    reader = stream.subscribe(Terms(queue_bytes=64 << 20))
    stream.publish(batch(2 * MAX_SUMMARIES + 1, MAP_FULL=3))
    frames = take_all(reader)
    assert [frame.count for frame in frames] == [MAX_SUMMARIES] * 2 + [1]
    assert max(len(frame.wire) for frame in frames) < 1 << 20
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
    assert max(len(frame.wire) for frame in frames) < 1 << 20


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
    got = [n for f in frames for n in Received.parse(f.wire).events["ended_ns"].tolist()]
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
    assert a.wire is b.wire


def test_summaries_are_filtered_too() -> None:
    stream = channel()
    reader = stream.subscribe(Terms(wanted=Filter(syscalls=frozenset({"write"}))))
    rows = [pb.SyscallStats(syscall_name=name) for name in ("read", "write", "open")]
    stream.publish(Batch(rows, 0, 0))
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
        got = [n for f in frames for n in Received.parse(f.wire).events["ended_ns"].tolist()]
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
    losses = [(f.first_seq, dict(f.batch.losses)) for f in told if f.batch.losses]
    lost = sum(count for _, counts in losses for count in counts.values())
    assert lost == 110 - reader.account.delivered
    rows = [f for f in told if f.count]
    assert rows[0].first_seq == 11
    assert rows[-1].last_seq == 110
    assert losses[0][0] == rows[-1].first_seq


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
    size = len(Frame.of(HEADER, 1, calls(10)).wire)
    for _ in range(20):
        stream.publish(calls(10))
    within = 2_000 // size
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 200 - 10 * within}
    clock[0] = 1.0
    for _ in range(20):
        stream.publish(calls(10))
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 400 - 20 * within}
    told = [f for f in take_all(reader) if f.batch.losses]
    assert sum(sum(f.batch.losses.values()) for f in told) == 400 - 20 * within


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
    """A subscription, and what its reader has heard."""

    def __init__(self, stream: Channel, terms: Terms) -> None:
        self.subscription = stream.subscribe(terms)
        self.last = terms.after_seq
        self.rows = 0
        self.told: Counter[int] = Counter()
        self.failed = False

    def take(self) -> bool:
        """One frame; whether there was one. Checks that it is in order."""
        try:
            frame = self.subscription.take()
        except EOFError:
            return False
        except SubscriptionEndedError:
            self.failed = True
            return False
        if frame is None:
            return False
        assert frame.first_seq > self.last
        assert frame.last_seq >= frame.first_seq - 1
        self.rows += frame.count
        self.told.update(frame.batch.losses)
        if frame.covered:
            self.last = frame.last_seq
        return True


class AnyInterleaving(RuleBasedStateMachine):
    """Produce, subscribe, read, stall, drop, resume, overflow, end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Reader] = []
        self.published = 0
        self.largest = 0
        clock[0] = 0.0

    @initialize(replay_bytes=st.integers(200, 8_000))
    def begin(self, replay_bytes: int) -> None:
        self.stream = channel(replay_bytes)

    def publish(self, made: Batch) -> None:
        if not self.stream.ended:
            self.largest = max(self.largest, len(Frame.of(HEADER, 1, made).wire) + 20)
            self.stream.publish(made)
            self.published += len(made.rows)

    @rule(count=st.integers(1, 6))
    def publish_summaries(self, count: int) -> None:
        self.publish(batch(count))

    @rule(count=st.integers(1, 40), lost=st.integers(0, 3))
    def publish_events(self, count: int, lost: int) -> None:
        losses: dict[int, int] = {pb.Loss.STAGE_KERNEL_BUFFER: lost} if lost else {}
        self.publish(replace(calls(count, self.published), losses=losses))

    @rule(count=st.integers(1, 9))
    def lose_in_the_kernel(self, count: int) -> None:
        self.publish(Batch((), 0, 0, {pb.Loss.STAGE_KERNEL_BUFFER: count}))

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
            reader.subscription.close()
            terms = replace(reader.subscription.terms, after_seq=reader.last)
            self.readers[index] = Reader(self.stream, terms)

    @rule(index=READERS)
    def leave(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.subscription.close()
        del self.readers[index : index + 1]

    @rule(index=READERS)
    def stall(self, index: int) -> None:
        for reader in self.readers[index : index + 1]:
            reader.subscription.fail("stalled")

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
            assert account.delivered == reader.rows
            assert account.produced == (
                account.delivered + account.filtered + account.queued + sum(account.lost.values())
            )
            assert account.queued_bytes <= max(reader.subscription.terms.queue_bytes, self.largest)

    def teardown(self) -> None:
        """Each reader that reads on hears of every event: as a row, or as a loss."""
        for reader in self.readers:
            while reader.take():
                pass
            told = Counter(reader.told)
            del told[pb.Loss.STAGE_KERNEL_BUFFER]
            account = reader.subscription.account
            if not reader.failed:
                assert told == account.lost
                assert account.produced == reader.rows + account.filtered + told.total()


AnyInterleaving.TestCase.settings = settings(max_examples=150, deadline=None)
TestAnyInterleaving = AnyInterleaving.TestCase


# A row of each summary, one that fits and one that does not, by what is asked.
SUMMARIES: dict[str, tuple[Filter, Message, Message]] = {
    "a call's errors": (
        Filter(errors_only=True),
        pb.SyscallStats(error_count=1),
        pb.SyscallStats(call_count=1),
    ),
    "a call's longest": (
        Filter(min_duration_ns=5),
        pb.SyscallStats(max_duration_ns=5),
        pb.SyscallStats(max_duration_ns=4, total_duration_ns=9),
    ),
    "a caller": (
        Filter(comms=frozenset({"shop"})),
        pb.SyscallStats(labels={"comm": "shop"}),
        pb.SyscallStats(labels={"comm": "shelf"}),
    ),
    "a connection's owner": (
        Filter(pids=frozenset({7}), comms=frozenset({"shop"})),
        pb.TcpMetrics(pid=7, comm="shop"),
        pb.TcpMetrics(pid=8, comm="shop"),
    ),
    "a connection's error": (
        Filter(errors_only=True),
        pb.TcpMetrics(error="ETIMEDOUT"),
        pb.TcpMetrics(),
    ),
    "a connection's age": (
        Filter(min_duration_ns=5),
        pb.TcpMetrics(duration_ns=5),
        pb.TcpMetrics(),
    ),
    "a peer's failures": (
        Filter(errors_only=True),
        pb.TcpPeerMetrics(connections_failed=2),
        pb.TcpPeerMetrics(connections_open=2),
    ),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_filter_takes_the_summaries_that_fit(name: str) -> None:
    wanted, fits, does_not = SUMMARIES[name]
    assert wanted.takes(fits)
    assert not wanted.takes(does_not)


def test_a_filter_does_not_ask_a_summary_for_what_it_does_not_have() -> None:
    wanted = Filter(pids=frozenset({7}), comms=frozenset({"shop"}), syscalls=frozenset({"read"}))
    assert wanted.takes(pb.TcpPeerMetrics())
