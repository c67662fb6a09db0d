"""From batches to subscribers: numbered once, encoded once, queued for each, accounted for each.

A loop-free core. `Channel` is one session's stream, `Subscription` one reader's end of it; tests
drive both step by step. The async part only waits (`Subscription.__anext__`).

The account, at every moment and for every subscription that began after event number S:

    produced - S = delivered + filtered + queued + lost

`produced` counts the events numbered since the session began. Losses in the kernel come on top:
such events never had a number.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import Message

from coral.agent.streams.filter import EVERYTHING, Filter
from coral.agent.streams.frame import Frame, Header, row_bytes
from coral.collectors.contract import Batch, EventRows
from coral.mesh.v1 import ebpf_pb2 as pb

Overflow = pb.EbpfEventStreamRequest.Overflow
# A message stays below 1 MiB; clients refuse more than 4 MiB by default.
MAX_ROWS: Final = 16_384
MAX_SUMMARIES: Final = 2_048  # of a few hundred bytes each
_ROWS_BYTES: Final = (1 << 20) - (32 << 10)

__all__ = ["Account", "Channel", "Frame", "Header", "Subscription", "SubscriptionEndedError"]


class SubscriptionEndedError(Exception):
    """The agent has ended this subscription, for a reason that its reader should know."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How one subscriber wants its stream; `rate_bytes_s` 0 is without limit."""

    after_seq: int = 0
    overflow: Overflow = pb.EbpfEventStreamRequest.OVERFLOW_DROP_OLDEST
    queue_bytes: int = 8 << 20
    rate_bytes_s: float = 0
    wanted: Filter = EVERYTHING
    interactive: bool = False
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Account:
    """Where the events of a session are, as one subscriber sees it."""

    produced: int  # since the subscription's first number
    delivered: int
    filtered: int
    queued: int
    queued_bytes: int
    lost: Mapping[int, int]  # by pb.Loss.Stage


class Channel:
    """One session's stream. Keeps the last `replay_bytes` for those who come later."""

    def __init__(
        self, header: Header, replay_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.header = header
        self.produced = 0
        self.ended = False
        self.subscriptions: set[Subscription] = set()
        self.subscribers_lost: Counter[int] = Counter()  # by stage, over all there ever were
        self._clock = clock
        self._replay_bytes = replay_bytes
        self._replay: deque[Frame] = deque()
        self._replayed_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        """What is kept for subscribers: the replay, and queued frames that it no longer has."""
        kept = {id(frame) for frame in self._replay}
        queued = {
            id(entry.frame): len(entry.frame.wire)
            for subscription in self.subscriptions
            for entry in subscription.entries
            if id(entry.frame) not in kept
        }
        return self._replayed_bytes + sum(queued.values())

    def publish(self, batch: Batch) -> None:
        """Numbers a batch and puts it into every subscriber's queue. Never blocks. A batch of
        more rows than a message should hold becomes several."""
        most = _most_rows(batch)
        while len(batch.rows) > most:
            self._publish(replace(batch, rows=_part(batch, slice(most)), losses={}))
            batch = replace(batch, rows=_part(batch, slice(most, None)))
        self._publish(batch)

    def _publish(self, batch: Batch) -> None:
        if batch:
            frame = Frame.of(self.header, self.produced + 1, batch)
            self.produced = frame.last_seq
            self._send(frame)

    def end(self, reason: pb.SessionEnd.Reason, detail: str, at_ns: int) -> None:
        """Sends the end as the last frame; afterwards nothing can be published."""
        end = pb.SessionEnd(reason=reason, detail=detail, produced=self.produced)
        self._send(Frame.of(self.header, self.produced + 1, Batch((), at_ns, at_ns), end=end))
        self.ended = True

    def _send(self, frame: Frame) -> None:
        if self.ended:
            raise RuntimeError("the session has ended")
        self._replay.append(frame)
        self._replayed_bytes += len(frame.wire)
        while self._replayed_bytes > self._replay_bytes and len(self._replay) > 1:
            self._replayed_bytes -= len(self._replay.popleft().wire)
        now = self._clock()
        for subscription in tuple(self.subscriptions):
            subscription.offer(frame, now)

    def subscribe(self, terms: Terms | None = None) -> Subscription:
        """A new reader. It starts after the event that it has, with what is still kept; what is
        not is its first loss. Raises ValueError for a number that was not given out yet."""
        terms = terms or Terms()
        if terms.after_seq > self.produced:
            raise ValueError(f"{terms.after_seq} is beyond {self.produced}, the last event so far")
        subscription = Subscription(self, terms)
        kept_from = self._replay[0].first_seq if self._replay else self.produced + 1
        if kept_from > terms.after_seq + 1:
            subscription.lose(pb.Loss.STAGE_REPLAY_EVICTED, kept_from - 1 - terms.after_seq)
        for frame in self._replay:
            subscription.replay(frame)
        self.subscriptions.add(subscription)
        return subscription


@dataclass(slots=True)
class _Entry:
    """A frame in a queue, and what was lost right before it."""

    frame: Frame
    lost_before: Counter[int]


def _most_rows(batch: Batch) -> int:
    if not isinstance(batch.rows, EventRows):
        return MAX_SUMMARIES
    return min(MAX_ROWS, _ROWS_BYTES // row_bytes(batch.rows))


def _part(batch: Batch, part: slice) -> Sequence[Message] | EventRows:
    rows = batch.rows
    if isinstance(rows, EventRows):
        return replace(rows, records=rows.records[part])
    return rows[part]


class Subscription:
    """One reader's end: a queue bounded in bytes, and what happens when it is full.

    Iterate over it to get frames; the iteration ends after the frame that carries the end. Close
    it when you stop before that. A frame of losses stands where the lost events would have stood.
    """

    def __init__(self, channel: Channel, terms: Terms) -> None:
        self.channel = channel
        self.terms = terms
        self.delivered = 0
        self.last_delivered_seq = terms.after_seq
        self.filtered = 0
        self.lost: Counter[int] = Counter()
        self.blocked_since: float | None = None  # since when a write has not come back
        self.entries: deque[_Entry] = deque()
        self._queued = 0
        self._queued_bytes = 0
        self._losing: Counter[int] = Counter()  # lost after the last entry of the queue
        self._allowance_bytes = terms.rate_bytes_s
        self._allowed_at: float | None = None
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    def replay(self, frame: Frame) -> None:
        """Queues a frame that was sent before the subscription, from the number it resumes at."""
        after_seq = self.terms.after_seq
        if frame.first_seq > after_seq:
            self._accept(frame.filtered(self.terms.wanted))
        elif frame.last_seq > after_seq:
            self._accept(frame.after(after_seq).filtered(self.terms.wanted))

    def offer(self, frame: Frame, now: float) -> None:
        """Queues a frame, or counts what it cannot: over the rate, or without room."""
        if self._failure:
            self.lose(pb.Loss.STAGE_SUBSCRIBER_QUEUE, frame.covered)
            return
        frame = frame.filtered(self.terms.wanted)
        if frame.count and not self._within_rate(len(frame.wire), now):
            self._drop(frame, pb.Loss.STAGE_RATE_LIMIT)
        elif self._has_room(frame):
            self._accept(frame)
        elif self.terms.overflow == pb.EbpfEventStreamRequest.OVERFLOW_DROP_NEWEST:
            self._drop(frame, pb.Loss.STAGE_SUBSCRIBER_QUEUE)
        elif self.terms.overflow == pb.EbpfEventStreamRequest.OVERFLOW_END:
            self._drop(frame, pb.Loss.STAGE_SUBSCRIBER_QUEUE)
            self.fail(
                f"the queue of {self.terms.queue_bytes} bytes was full: read faster, filter, or "
                f"choose another overflow policy; the last event delivered was number "
                f"{self.last_delivered_seq}"
            )
        else:
            self._accept(frame)
        self._wake()

    def _has_room(self, frame: Frame) -> bool:
        return (
            not frame.count
            or not self.entries
            or self._queued_bytes + len(frame.wire) <= self.terms.queue_bytes
        )

    def _within_rate(self, size: int, now: float) -> bool:
        rate = self.terms.rate_bytes_s
        if not rate:
            return True
        if self._allowed_at is not None:
            self._allowance_bytes += (now - self._allowed_at) * rate
        self._allowed_at = now
        self._allowance_bytes = min(self._allowance_bytes, rate)  # a second's worth, at most
        if size > self._allowance_bytes:
            return False
        self._allowance_bytes -= size
        return True

    def _accept(self, frame: Frame) -> None:
        self.filtered += frame.covered - frame.count
        if not (frame.count or frame.batch.losses or frame.end):
            return
        self.entries.append(_Entry(frame, self._losing))
        self._losing = Counter()
        self._queued += frame.count
        self._queued_bytes += len(frame.wire)
        while self._queued_bytes > self.terms.queue_bytes and len(self.entries) > 1:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self.entries.popleft()
        self._unqueue(oldest.frame)
        following = self.entries[0].lost_before
        following.update(oldest.lost_before)
        following.update(oldest.frame.batch.losses)
        if oldest.frame.count:
            following[pb.Loss.STAGE_SUBSCRIBER_QUEUE] += oldest.frame.count
            self._count_lost(pb.Loss.STAGE_SUBSCRIBER_QUEUE, oldest.frame.count)

    def _drop(self, frame: Frame, stage: pb.Loss.Stage) -> None:
        """Counts a frame's events as lost, and keeps the losses that it would have told."""
        self.filtered += frame.covered - frame.count
        self._losing.update(frame.batch.losses)
        self.lose(stage, frame.count)

    def lose(self, stage: pb.Loss.Stage, count: int) -> None:
        """Counts events that this reader will not get, where the queue ends now."""
        if count:
            self._losing[stage] += count
            self._count_lost(stage, count)

    def _count_lost(self, stage: pb.Loss.Stage, count: int) -> None:
        self.lost[stage] += count
        self.channel.subscribers_lost[stage] += count

    def _unqueue(self, frame: Frame) -> None:
        self._queued -= frame.count
        self._queued_bytes -= len(frame.wire)

    def fail(self, reason: str) -> None:
        """Ends the subscription: frees what it holds, and tells its reader why at its next read."""
        self._failure = reason
        for entry in self.entries:
            self.lose(pb.Loss.STAGE_SUBSCRIBER_QUEUE, entry.frame.count)
        self._forget_queue()
        self._wake()

    def _forget_queue(self) -> None:
        self.entries.clear()
        self._queued = self._queued_bytes = 0

    def take(self) -> Frame | None:
        """The next frame, or None where there is none yet. Raises EOFError after the end, and
        `SubscriptionEndedError` where the agent has ended the subscription."""
        if self._failure:
            raise SubscriptionEndedError(self._failure)
        if not self.entries:
            if self.channel.ended:
                raise EOFError
            return self._losses(self._take_losing(), self.channel.produced + 1)
        entry = self.entries[0]
        if entry.lost_before:
            lost, entry.lost_before = entry.lost_before, Counter()
            return self._losses(lost, entry.frame.first_seq)
        self.entries.popleft()
        self._unqueue(entry.frame)
        self.delivered += entry.frame.count
        self.last_delivered_seq = entry.frame.last_seq
        return entry.frame

    def _take_losing(self) -> Counter[int]:
        losing, self._losing = self._losing, Counter()
        return losing

    def _losses(self, counts: Counter[int], first_seq: int) -> Frame | None:
        if not counts:
            return None
        at_ns = time.time_ns()
        return Frame.of(self.channel.header, first_seq, Batch((), at_ns, at_ns, dict(counts)))

    @property
    def account(self) -> Account:
        """Where the session's events are, for this reader."""
        return Account(
            self.channel.produced - self.terms.after_seq,
            self.delivered,
            self.filtered,
            self._queued,
            self._queued_bytes,
            dict(self.lost),
        )

    def close(self) -> None:
        """Leaves the session and frees the queue. Safe to call twice."""
        self.channel.subscriptions.discard(self)
        self._forget_queue()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Frame:
        while True:
            try:
                frame = self.take()
            except EOFError:
                self.close()
                raise StopAsyncIteration from None
            if frame:
                return frame
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
