"""From batches to subscribers: numbered once, encoded once, queued for each, accounted for each.

A loop-free core. `Channel` is one session's stream, `Subscription` one reader's end of it; tests
drive both step by step. The async part only waits (`Subscription.__anext__`).

The account, at every moment and for every subscription:

    produced = delivered + queued + lost

where `produced` counts the events numbered since the session began, the ones replayed included.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from google.protobuf.message import Message

from collectors.base import Batch
from proto.coral.mesh.v1 import ebpf_pb2 as pb


def _fields_by_row_type(message: type[Message], least_number: int) -> dict[str, str]:
    return {
        field.message_type.full_name: field.name
        for field in message.DESCRIPTOR.fields
        if field.message_type and field.number >= least_number
    }


# Where rows of each message type go. A new collector's message is found here by itself.
_BATCH_FIELDS: Final = _fields_by_row_type(pb.EbpfEventBatch, 100)
_EVENT_FIELDS: Final = _fields_by_row_type(pb.EbpfEvent, 10)


@dataclass(frozen=True, slots=True)
class Header:
    """What every message of one session says of it."""

    collector_id: str
    kind: pb.EbpfCollectorKind
    agent_id: str
    service_name: str


@dataclass(frozen=True)
class Frame:
    """One message of a stream: `count` events from `first_seq` on, or only losses, or the end.

    `wire` is made once, and shared by every subscriber that it goes to.
    """

    header: Header
    first_seq: int
    batch: Batch
    end: pb.SessionEnd | None = None

    @property
    def count(self) -> int:
        """Events in it."""
        return len(self.batch.rows)

    @cached_property
    def wire(self) -> bytes:
        """The frame as an encoded EbpfEventBatch."""
        message = pb.EbpfEventBatch(
            collector_id=self.header.collector_id,
            kind=self.header.kind,
            agent_id=self.header.agent_id,
            service_name=self.header.service_name,
            first_seq=self.first_seq,
            count=self.count,
            interval_start_ns=self.batch.interval_start_ns,
            interval_end_ns=self.batch.interval_end_ns,
            losses=self._losses(),
            end=self.end,
        )
        if self.batch.rows:
            name = _BATCH_FIELDS[self.batch.rows[0].DESCRIPTOR.full_name]
            getattr(message, name).extend(self.batch.rows)
        return message.SerializeToString()

    def events(self) -> Iterator[bytes]:
        """The frame as encoded EbpfEvents, one for each event; losses and the end stand alone."""
        losses = self._losses()
        if losses:
            yield self._event(losses=losses).SerializeToString()
        for index, row in enumerate(self.batch.rows):
            event = self._event(seq=self.first_seq + index)
            payload = getattr(event, _EVENT_FIELDS[row.DESCRIPTOR.full_name])
            payload.CopyFrom(row)
            yield event.SerializeToString()
        if self.end:
            yield self._event(end=self.end).SerializeToString()

    def _event(
        self,
        seq: int = 0,
        losses: list[pb.Loss] | None = None,
        end: pb.SessionEnd | None = None,
    ) -> pb.EbpfEvent:
        event = pb.EbpfEvent(
            collector_id=self.header.collector_id,
            agent_id=self.header.agent_id,
            service_name=self.header.service_name,
            seq=seq,
            losses=losses,
            end=end,
        )
        event.timestamp.FromNanoseconds(self.batch.interval_end_ns)
        return event

    def _losses(self) -> list[pb.Loss]:
        return [
            pb.Loss(stage=stage, count=count)  # type: ignore[arg-type]
            for stage, count in self.batch.losses.items()
        ]


@dataclass(frozen=True, slots=True)
class Account:
    """Where the events of a session are, as one subscriber sees it."""

    produced: int
    delivered: int
    queued: int
    queued_bytes: int
    lost: Mapping[int, int]  # by pb.Loss.Stage


class Channel:
    """One session's stream. Keeps the last `replay_bytes` for those who come later."""

    def __init__(self, header: Header, replay_bytes: int, queue_bytes: int) -> None:
        self.header = header
        self.produced = 0
        self.ended = False
        self.subscriptions: set[Subscription] = set()
        self.subscribers_lost: Counter[int] = Counter()  # by stage, over all there ever were
        self._queue_bytes = queue_bytes
        self._replay_bytes = replay_bytes
        self._replay: deque[Frame] = deque()
        self._replayed_bytes = 0

    def publish(self, batch: Batch) -> None:
        """Numbers a batch and puts it into every subscriber's queue. Never blocks."""
        if not batch:
            return
        frame = Frame(self.header, self.produced + 1, batch)
        self.produced += frame.count
        self._send(frame)

    def end(self, reason: pb.SessionEnd.Reason, detail: str, at_ns: int) -> None:
        """Sends the end as the last frame; afterwards nothing can be published."""
        end = pb.SessionEnd(reason=reason, detail=detail, produced=self.produced)
        self._send(Frame(self.header, self.produced + 1, Batch((), at_ns, at_ns), end))
        self.ended = True

    def _send(self, frame: Frame) -> None:
        if self.ended:
            raise RuntimeError("the session has ended")
        self._replay.append(frame)
        self._replayed_bytes += len(frame.wire)
        while self._replayed_bytes > self._replay_bytes and len(self._replay) > 1:
            self._replayed_bytes -= len(self._replay.popleft().wire)
        for subscription in self.subscriptions:
            subscription.offer(frame)

    def subscribe(self, peer: str = "") -> Subscription:
        """A new reader. It starts with what is still kept; what is not is its first loss."""
        subscription = Subscription(self, peer, self._queue_bytes)
        kept_from = self._replay[0].first_seq if self._replay else self.produced + 1
        if kept_from > 1:
            subscription.lose(pb.Loss.STAGE_REPLAY_EVICTED, kept_from - 1)
        for frame in self._replay:
            subscription.offer(frame)
        self.subscriptions.add(subscription)
        return subscription


@dataclass(eq=False)
class Subscription:
    """One reader's end: a queue bounded in bytes that drops its oldest events when it is full.

    Iterate over it to get frames; the iteration ends after the frame that carries the end. Close
    it when you stop before that.
    """

    channel: Channel
    peer: str
    queue_bytes: int
    delivered: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    _untold: Counter[int] = field(default_factory=Counter)
    _queue: deque[Frame] = field(default_factory=deque)
    _queued: int = 0
    _queued_bytes: int = 0
    _waiter: asyncio.Future[None] | None = None

    def offer(self, frame: Frame) -> None:
        """Queues a frame. Where there is no room, the oldest events go, and are counted; what is
        not an event (losses told, the end) is never dropped."""
        self._queue.append(frame)
        self._queued += frame.count
        self._queued_bytes += len(frame.wire)
        while self._queued_bytes > self.queue_bytes and len(self._queue) > 1:
            oldest = self._queue.popleft()
            self._remove(oldest)
            self._untold.update(oldest.batch.losses)
            if oldest.count:
                self.lose(pb.Loss.STAGE_SUBSCRIBER_QUEUE, oldest.count)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def lose(self, stage: pb.Loss.Stage, count: int) -> None:
        """Counts events that this reader will not get; it is told before the next frame."""
        self.lost[stage] += count
        self.channel.subscribers_lost[stage] += count
        self._untold[stage] += count

    def _remove(self, frame: Frame) -> None:
        self._queued -= frame.count
        self._queued_bytes -= len(frame.wire)

    def take(self) -> Frame | None:
        """The next frame, or None where there is none yet. Raises EOFError after the end."""
        if self._untold:
            losses = dict(self._untold)
            self._untold.clear()
            first_seq = self._queue[0].first_seq if self._queue else self.channel.produced + 1
            at_ns = self._queue[0].batch.interval_start_ns if self._queue else 0
            return Frame(self.channel.header, first_seq, Batch((), at_ns, at_ns, losses))
        if self._queue:
            frame = self._queue.popleft()
            self._remove(frame)
            self.delivered += frame.count
            return frame
        if self.channel.ended:
            raise EOFError
        return None

    @property
    def account(self) -> Account:
        """Where the session's events are, for this reader."""
        return Account(
            self.channel.produced,
            self.delivered,
            self._queued,
            self._queued_bytes,
            dict(self.lost),
        )

    def close(self) -> None:
        """Leaves the session and frees the queue. Safe to call twice."""
        self.channel.subscriptions.discard(self)
        self._queue.clear()
        self._queued = self._queued_bytes = 0

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
