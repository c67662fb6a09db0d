"""The parts of the bus without a server: subjects, what messages say, and the two ends, with a
stream that is a list."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from coral.colony.bus import envelope, subjects
from coral.colony.bus.inbox import (
    EVICTED,
    OVERLAPPED,
    UNREADABLE,
    Inbox,
    Order,
    OutOfOrderError,
)
from coral.colony.bus.outbox import Message, Numbered, Outbox
from coral.colony.delivery import Delivery, SequenceError, Standing
from tests.bus import Scripted

FATES = st.sampled_from(["", "", "", "rate_limit", "subscriber_queue"])


@dataclass
class Stream:
    """JetStream, as far as the bus needs it: it refuses what does not follow on, and remembers
    the ids of the last few messages alone."""

    messages: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    window: int = 3
    first: int = 0  # those before are dropped

    def last(self, subject: str) -> tuple[envelope.Told | None, int]:
        for at in range(len(self.messages) - 1, self.first - 1, -1):
            if self.messages[at][0] == subject:
                return envelope.told_of(self.messages[at][1]), at + 1
        return None, 0

    def publish(self, message: Message, headers: dict[str, str]) -> int:
        """The message's number; 0 where it is refused."""
        for at in range(max(len(self.messages) - self.window, self.first), len(self.messages)):
            if self.messages[at][1][envelope.MESSAGE_ID] == headers[envelope.MESSAGE_ID]:
                return at + 1
        if int(headers[envelope.EXPECTED]) != self.last(message.subject)[1]:
            return 0
        self.messages.append((message.subject, headers, message.payload))
        return len(self.messages)

    def found(self) -> list[tuple[envelope.Told, int]]:
        ends = (self.last(name) for name in {it[0] for it in self.messages[self.first :]})
        return [(told, number) for told, number in ends if told]


def send(outbox: Outbox, stream: Stream, *, answered: bool = True) -> bool:
    """Sends one message; without an answer the publisher dies. Whether there was one."""
    message = outbox.next()
    while message:
        number = stream.publish(message, outbox.headers(message))
        if not answered:
            return True
        if number:
            outbox.stored(message, number)
            return True
        assert isinstance(message, Numbered)
        if not outbox.refused(message, *stream.last(message.subject)):
            return True
    return False


class Books:
    """A store of numbers alone."""

    def __init__(self) -> None:
        self.standings: dict[tuple[str, str], Standing] = {}
        self.rows: dict[tuple[str, str], list[int]] = {}

    def recall(self, agent_id: str, collector_id: str) -> Standing | None:
        return self.standings.get((agent_id, collector_id))

    def put(self, it: Delivery) -> None:
        before = self.standings.get(it.session.key)
        assert it.after_seq == (before.last_seq if before else 0)
        assert it.last_seq - it.after_seq == it.rows + sum(it.lost.values())
        numbers = it.batch.events["ended_ns"].tolist() if it.batch else []
        self.rows.setdefault(it.session.key, []).extend(numbers)
        self.standings[it.session.key] = Standing(
            it.session, it.last_seq, it.produced, (before.stored if before else 0) + it.rows, 0,
            Counter(before.lost if before else {}) + Counter(it.lost), it.lost_in_kernel, it.ended,
        )  # fmt: skip


def read(stream: Stream, books: Books, since: int = 0) -> Inbox:
    """A reader that begins with message SINCE, or the first that there is."""
    inbox = Inbox(books.recall)
    for _, headers, payload in stream.messages[max(since, stream.first) :]:
        told = envelope.told_of(headers)
        if told and (delivery := inbox.take(told, payload)):
            books.put(delivery)
    return inbox


def test_subjects_have_one_token_for_each_name_and_shares_are_disjoint() -> None:
    assert subjects.token("a.b *>~é\r\n") == "a%2Eb%20%2A%3E%7E%C3%A9%0D%0A"
    assert subjects.token("") == "%"
    name = subjects.of_session("coral", "node-1.x", "s")
    assert name == f"coral.batches.{subjects.bucket('node-1.x'):02}.node-1%2Ex.s"
    assert subjects.share("coral", 0, 1) == ["coral.>"]
    shares = [subjects.share("coral", at, 3) for at in range(3)]
    assert len({it for share in shares for it in share}) == subjects.BUCKETS
    with pytest.raises(ValueError, match="shard 3 of 3"):
        subjects.share("coral", 3, 3)


def test_a_message_says_what_the_delivery_says() -> None:
    one = Scripted.make("node é", "s", ["", "rate_limit", ""], batch=3)
    for delivery in one.deliveries(0):
        told = envelope.told(delivery, 10, {"rate_limit": 2})
        value = envelope.header(told)
        assert value.isascii()
        assert "\n" not in value
        again = envelope.told_of({envelope.DELIVERY: value})
        assert again == told
        payload = delivery.batch.wire if delivery.batch else b""
        there = again.delivery(again.of, payload)
        for name in ("session", "after_seq", "last_seq", "produced", "lost", "ended", "rows"):
            assert getattr(there, name) == getattr(delivery, name)
        if delivery.batch and there.batch:
            assert there.batch.wire == delivery.batch.wire
        assert again.standing.stored == 10 + delivery.rows
        assert again.standing.lost["rate_limit"] == 2 + delivery.lost.get("rate_limit", 0)
    assert envelope.message_id(envelope.told(delivery, 0, {})) == "node%20%C3%A9/s/3@1003"


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 2},
        {"lost": {"rate_limit": -1}, "rows": 2},
        {"after_seq": 1 << 63, "last_seq": (1 << 63) + 1},
        {"time_ns": 1 << 63},
        {"agent": ""},
        {"session": "a\x1bb"},
        {"kind": 1 << 70},
        {"produced": 1.5},
    ],
)
def test_what_others_publish_is_no_delivery_unless_it_adds_up(wrong: dict[str, object]) -> None:
    right = {"agent": "a", "session": "s", "kind": 1, "after_seq": 0, "last_seq": 1, "produced": 1,
             "time_ns": 1, "rows": 1}  # fmt: skip
    assert envelope.told_of({envelope.DELIVERY: json.dumps(right)})
    with pytest.raises(msgspec.MsgspecError):
        envelope.told_of({envelope.DELIVERY: json.dumps({**right, **wrong})})


def test_gaps_and_agents_that_no_store_can_hold_are_none() -> None:
    gap = {"agent_id": "a", "from_ns": 1, "to_ns": 1 << 63, "why": ""}
    seen = {"agent_id": "a\x00", "address": "", "seen_ns": 1, "connected": True}
    with pytest.raises(msgspec.MsgspecError):
        envelope.gap_of({envelope.GAP: json.dumps(gap)})
    with pytest.raises(msgspec.MsgspecError):
        envelope.seen_of({envelope.SEEN: json.dumps(seen)})


@given(
    fates=st.lists(FATES, min_size=1, max_size=60),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    answered=st.lists(st.booleans(), max_size=60),
    dropped=st.integers(0, 30),
    reads=st.lists(st.integers(0, 60), max_size=4),
)
def test_each_event_is_stored_once_or_lost_once(
    fates: Sequence[str], sizes: list[int], answered: list[bool], dropped: int, reads: list[int]
) -> None:
    """Publishers that die with a message on its way, whose successors cut batches elsewhere; a
    stream that drops its oldest; readers that die and begin too early."""
    stream, books, lives = Stream(), Books(), [*sizes]
    answers, one = iter(answered), Scripted.make("node", "s", fates)
    while True:
        one.script.batch = lives.pop() if lives else sizes[0]
        outbox = Outbox("coral", 1 << 20, stream.found())
        standing = outbox.standing("node", "s")
        if standing and standing.ended:
            break
        for delivery in one.deliveries(standing.last_seq if standing else 0):
            outbox.admit(delivery)
        died = False
        while not died and len(outbox):
            answer = next(answers, True)
            assert send(outbox, stream, answered=answer)
            died = not answer
    acknowledged = 0
    for count in sorted(reads):
        read(Stream(stream.messages[:count]), books, max(acknowledged - 2, 0))
        acknowledged = count
    stream.first = min(dropped, len(stream.messages) - 1)
    inbox = read(stream, books)
    standing = books.standings["node", "s"]
    assert standing.ended
    assert standing.last_seq == standing.produced == len(fates)
    evicted = standing.lost.get(EVICTED, 0)
    assert inbox.lost == ({EVICTED: evicted} if evicted else {})
    lost = Counter(standing.lost)
    del lost[EVICTED]
    assert lost == one.lost
    numbers = books.rows["node", "s"]
    assert len(numbers) == standing.stored == len(one.rows) - evicted
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= set(one.rows)


def test_a_delivery_that_does_not_follow_on_is_refused() -> None:
    deliveries = [*Scripted.make("node", "s", [""] * 9, batch=3).deliveries(0)]
    outbox = Outbox("coral", 1 << 20)
    assert outbox.admit(deliveries[0])
    assert not outbox.admit(deliveries[0])
    with pytest.raises(SequenceError) as refused:
        outbox.admit(deliveries[2])
    assert refused.value.expected_seq == 3
    assert not outbox.has_all_up_to(outbox.last_number)
    assert send(outbox, Stream())
    assert outbox.has_all_up_to(outbox.last_number)
    assert outbox.waiting_bytes == 0


def test_what_cannot_be_read_or_split_is_counted() -> None:
    deliveries = [*Scripted.make("node", "s", [""] * 9, batch=3).deliveries(0)]
    told = [envelope.told(it, it.after_seq, {}) for it in deliveries]
    books = Books()
    inbox = Inbox(books.recall)
    for delivery in (
        inbox.take(told[0], b"\xff"),
        inbox.take(replace_after(told[1], 1), deliveries[1].batch.wire),  # type: ignore[union-attr]
        inbox.take(told[2], deliveries[2].batch.wire),  # type: ignore[union-attr]
        inbox.take(told[3], b""),
    ):
        assert delivery
        books.put(delivery)
    assert inbox.take(told[1], b"") is None
    assert inbox.lost == {UNREADABLE: 3, OVERLAPPED: 3}
    assert books.rows["node", "s"] == [7, 8, 9]
    ended = inbox.ended()
    assert ended == {("node", "s")}
    inbox.forget(ended)
    assert inbox.ended() == frozenset()


def replace_after(told: envelope.Told, after_seq: int) -> envelope.Told:

    return replace(told, after_seq=after_seq, rows=told.last_seq - after_seq)


def test_messages_that_were_skipped_or_came_before_are_noticed() -> None:
    order = Order()
    assert [order.is_new(5, 1), order.is_new(9, 2), order.is_new(9, 3), order.is_new(5, 4)] == [
        True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(OutOfOrderError):
        order.is_new(10, 6)
