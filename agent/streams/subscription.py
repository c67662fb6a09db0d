"""One reader's end of a stream: a cursor over what is kept, then a bounded queue; an exact account.

A loop-free core; only `__anext__` waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from coral.agent.rate import Bucket, both
from coral.agent.streams.filter import EVERYTHING, Filter
from coral.agent.streams.frame import Frame, Held, loss_messages
from coral.agent.streams.passed import Passed, Queued, filtered
from coral.mesh.v1 import ebpf_pb2 as pb

if TYPE_CHECKING:
    from coral.agent.streams.channel import Channel

Overflow = pb.EbpfEventStreamRequest.Overflow

# What a place in a queue takes, beside the frame; tests/unit/test_streams.py measures it.
ENTRY_BYTES: Final = 300
# How often a stream without events says where it stands.
POSITION_EVERY_S: Final = 1.0
# It says so at once when the filter has left out this share of the replay: a reader that resumes
# must not come too late for it.
_FILTERED_SHARE: Final = 4
# Kept frames that one `take` looks through for one that passes the filter: decoding none of them
# holds the loop for long.
_LOOKED_THROUGH: Final = 16


class SubscriptionEndedError(Exception):
    """The agent has ended this subscription; the message tells its reader why."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How one subscriber wants its stream; `rate_bytes_s` 0 is without limit."""

    after_seq: int = 0
    overflow: Overflow = pb.EbpfEventStreamRequest.OVERFLOW_DROP_OLDEST
    queue_bytes: int = 8 << 20
    rate_bytes_s: float = 0
    wanted: Filter = EVERYTHING
    columns: bool = False
    single_events: bool = False  # a message for each event, by `Subscription.events`
    interactive: bool = False
    peer: str = ""
    principal: str = ""  # the caller that reads, by its name
    masked: bool = False  # without the other ends of connections
    # What it takes from together with other streams of its caller.
    shared_rate: Bucket | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """Where the events of a session are, as one subscriber sees it."""

    produced: int  # since the subscription's first number
    delivered: int
    filtered: int
    queued: int  # those that are kept for it, and not looked at yet, included
    queued_bytes: int
    lost: Mapping[int, int]  # by pb.Loss.Stage


@dataclass(slots=True)
class _Gap:
    """Numbers that are not delivered, and why: together as many as there are between the frames
    around. `in_kernel` are losses that dropped frames would have told."""

    filtered: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    in_kernel: Counter[int] = field(default_factory=Counter)

    def add(self, more: _Gap) -> None:
        self.filtered += more.filtered
        self.lost.update(more.lost)
        self.in_kernel.update(more.in_kernel)

    @property
    def to_tell(self) -> bool:
        """Whether it has losses: what the filter left out needs no message of its own."""
        return bool(self.lost or self.in_kernel)


@dataclass(slots=True)
class _Queue:
    """Frames in order, each with the gap before it, and the gap after the last."""

    held: Held
    entries: deque[tuple[_Gap, Queued]] = field(default_factory=deque)
    tail: _Gap = field(default_factory=_Gap)
    rows: int = 0
    size_bytes: int = 0

    def push(self, frame: Queued) -> None:
        self.entries.append((self.tail, frame))
        self.tail = _Gap()
        self.rows += frame.count
        self.size_bytes += frame.size_bytes
        self.held.size_bytes += ENTRY_BYTES
        frame.hold(self.held)

    def pop(self) -> tuple[_Gap, Queued]:
        gap, frame = self.entries.popleft()
        self.rows -= frame.count
        self.size_bytes -= frame.size_bytes
        self.held.size_bytes -= ENTRY_BYTES
        frame.release()
        return gap, frame

    @property
    def first_gap(self) -> _Gap:
        return self.entries[0][0] if self.entries else self.tail

    def clear(self) -> None:
        self.held.size_bytes -= len(self.entries) * ENTRY_BYTES
        for _, frame in self.entries:
            frame.release()
        self.entries.clear()
        self.rows = self.size_bytes = 0


class Subscription:
    """One reader's end of a stream. What the session kept is read where it lies; what comes later
    goes through a queue bounded in bytes.

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
        self._told = _Gap()  # everything up to the last frame that was taken
        self._seq = terms.after_seq  # the last number that is accounted for in what was taken
        self._held = _Queue(channel.held)  # kept when this began, evicted before it was read
        self._next_kept = channel.kept_from  # the next frame to read of those kept
        self._kept_until = channel.kept_from + len(channel.kept)
        self._live = _Queue(channel.held)
        self._taken: Frame | None = None  # it is being sent
        self._estimate_bytes = 0  # what sending it was taken for
        self._took_end = False
        # A second's worth, at most, may come at once.
        rate_bytes_s = terms.rate_bytes_s
        own_rate = Bucket(rate_bytes_s, rate_bytes_s) if rate_bytes_s else None
        self._rate = both(own_rate, terms.shared_rate)
        self._told_at = channel.clock()
        self._filtered_bytes = 0  # since the last frame that was taken
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._begin()

    def _begin(self) -> None:
        """Skips what the reader has, and counts what is not kept any more."""
        after_seq, channel = self.terms.after_seq, self.channel
        kept_seq = channel.kept[0].first_seq if channel.kept else channel.produced + 1
        if kept_seq > after_seq + 1:
            self._lose(self._held.tail, pb.Loss.STAGE_REPLAY_EVICTED, kept_seq - 1 - after_seq)
        if not after_seq:
            self._held.tail.in_kernel.update(channel.evicted_losses)
            return
        for frame in channel.kept:
            if frame.last_seq > after_seq or frame.end:
                break
            self._next_kept += 1

    def offer(self, frame: Frame, now: float) -> None:
        """Queues a frame that was just published, or counts what it cannot queue: over the rate, or
        without room."""
        if frame.end:
            self._live.push(frame)
            self._wake()
            return
        passed = self._filter(frame, self._live.tail)
        if passed is None:
            return
        if self._failure:
            self._drop(self._live.tail, passed, pb.Loss.STAGE_SUBSCRIBER_QUEUE)
        elif self._rate and not self._rate.take(self._message_bytes(passed), now):
            self._drop(self._live.tail, passed, pb.Loss.STAGE_RATE_LIMIT)
        else:
            self._admit(self._live, passed)
        self._wake()

    def evict(self, index: int, frame: Frame) -> None:
        """Takes over a frame that the session keeps no longer, if it is still to be read. INDEX is
        its number among all frames ever kept."""
        if index != self._next_kept or index >= self._kept_until:
            return
        self._next_kept += 1
        passed = self._kept_frame(frame)
        if passed and not self._failure:
            self._admit(self._held, passed)
        elif passed:
            self._drop(self._held.tail, passed, pb.Loss.STAGE_SUBSCRIBER_QUEUE)

    def _kept_frame(self, frame: Frame) -> Queued | None:
        if frame.rows and frame.first_seq <= self.terms.after_seq:
            frame = frame.after(self.terms.after_seq)
        return self._filter(frame, self._held.tail)

    def _filter(self, frame: Frame, gap: _Gap) -> Queued | None:
        """The frame as this reader wants it; None where it has no rows for it, which goes into the
        GAP before what follows."""
        passed = filtered(frame.masked() if self.terms.masked else frame, self.terms.wanted)
        self.filtered += frame.covered - passed.count
        if passed.count:
            return passed
        gap.filtered += frame.covered
        gap.in_kernel.update(frame.losses)
        self._filtered_bytes += frame.size_bytes if frame.rows else 0
        if frame.losses or self._should_tell_filtered:
            self._wake()
        return None

    def _admit(self, queue: _Queue, frame: Queued) -> None:
        """Queues a frame, if there is room or the policy makes room."""
        terms = self.terms
        room = terms.queue_bytes - self.queued_bytes
        fits = not self._waiting or frame.size_bytes <= room
        if fits or terms.overflow == pb.EbpfEventStreamRequest.OVERFLOW_DROP_OLDEST:
            queue.push(frame)
            while not fits and self._waiting > 1 and self._is_over():
                self._drop_oldest(self._held if self._held.entries else self._live)
            return
        self._drop(queue.tail, frame, pb.Loss.STAGE_SUBSCRIBER_QUEUE)
        if terms.overflow == pb.EbpfEventStreamRequest.OVERFLOW_END:
            self.fail(
                f"the queue of {terms.queue_bytes} bytes was full: read faster, filter, or "
                f"choose another overflow policy; the last event delivered was number "
                f"{self.last_delivered_seq}"
            )

    @property
    def _waiting(self) -> int:
        return len(self._held.entries) + len(self._live.entries)

    def _is_over(self) -> bool:
        return self.queued_bytes > self.terms.queue_bytes

    def _drop_oldest(self, queue: _Queue) -> None:
        gap, frame = queue.pop()
        self._drop(gap, frame, pb.Loss.STAGE_SUBSCRIBER_QUEUE)
        gap.add(queue.first_gap)
        if queue.entries:
            queue.entries[0] = gap, queue.entries[0][1]
        else:
            queue.tail = gap

    def shorten(self) -> bool:
        """Drops the older half of the queue, for want of memory; whether there was anything to
        drop."""
        if self._waiting < 2:  # noqa: PLR2004  an end is the last, and stays
            return False
        if self.terms.overflow == pb.EbpfEventStreamRequest.OVERFLOW_END:
            self.fail(
                "the agent had no memory left for this stream's queue: read faster, filter, or "
                "choose another overflow policy; the last event delivered was number "
                f"{self.last_delivered_seq}"
            )
            return False
        for _ in range(self._waiting // 2):
            self._drop_oldest(self._held if self._held.entries else self._live)
        self._wake()
        return True

    @property
    def queued_bytes(self) -> int:
        """What waits in its queue, as `terms.queue_bytes` counts it."""
        return self._held.size_bytes + self._live.size_bytes

    def _drop(self, gap: _Gap, frame: Queued, stage: pb.Loss.Stage) -> None:
        """Counts a frame's events as lost, and keeps the losses that it would have told."""
        gap.filtered += frame.covered - frame.count
        gap.in_kernel.update(frame.losses)
        self._lose(gap, stage, frame.count)

    def _lose(self, gap: _Gap, stage: pb.Loss.Stage, count: int) -> None:
        if count:
            gap.lost[stage] += count
            self.lost[stage] += count
            self.channel.subscribers_lost[stage] += count

    def _message_bytes(self, frame: Queued) -> int:
        """What sending FRAME takes; where that is a message for each event, an estimate."""
        return frame.event_bytes * frame.count if self.terms.single_events else frame.size_bytes

    def fail(self, reason: str) -> None:
        """Ends the subscription: frees what it holds, and tells its reader why at its next read."""
        self._failure = reason
        self._next_kept, rest = self._kept_until, self._unread()
        self._lose(self._live.tail, pb.Loss.STAGE_SUBSCRIBER_QUEUE, rest)
        for queue in (self._held, self._live):
            for _, frame in queue.entries:
                self._lose(self._live.tail, pb.Loss.STAGE_SUBSCRIBER_QUEUE, frame.count)
            queue.clear()
        self._wake()

    def _unread(self) -> int:
        """How many events are kept for this reader that it has not come to."""
        channel = self.channel
        at, until = self._next_kept - channel.kept_from, self._kept_until - channel.kept_from
        if at >= until:
            return 0
        first_seq = max(channel.kept[at].first_seq, self.terms.after_seq + 1)
        return channel.kept[until - 1].last_seq - first_seq + 1

    def take(self, now: float | None = None) -> Frame | None:
        """The next frame, or None where there is none yet. Raises EOFError after the end, and
        `SubscriptionEndedError` where the agent has ended the subscription. NOW is the channel's
        clock; with it, a frame that says where the stream stands comes when one is due."""
        self._release_taken()
        if self._failure:
            raise SubscriptionEndedError(self._failure)
        if self._took_end:
            raise EOFError
        frame = self._take_queued(self._held) or self._take_kept() or self._take_live()
        if not frame and now is not None and now >= self.position_due:
            frame = self._position()
        if frame:
            self._took(frame, now)
        return frame

    def _take_queued(self, queue: _Queue) -> Frame | None:
        if not queue.entries:
            return None
        gap, frame = queue.entries[0]
        if gap.to_tell:
            queue.entries[0] = _Gap(), frame
            return self._tell(gap, frame.first_seq - 1, frame.lost_in_kernel_before)
        made = self._made(frame)  # before its rows are released
        queue.pop()
        self._told.add(gap)
        return made

    def _made(self, queued: Queued) -> Frame:
        """The frame to send."""
        self._estimate_bytes = self._message_bytes(queued)
        return queued.frame() if isinstance(queued, Passed) else queued

    def _take_kept(self) -> Frame | None:
        """The next frame that passes of those kept since before the subscription; after a number
        of frames that do not pass, where the stream stands."""
        channel, gap = self.channel, self._held.tail
        for _ in range(_LOOKED_THROUGH):
            if self._next_kept >= self._kept_until:
                return None
            frame = channel.kept[self._next_kept - channel.kept_from]
            if gap.to_tell:
                self._held.tail = _Gap()
                first_seq = max(frame.first_seq, self.terms.after_seq + 1)
                return self._tell(gap, first_seq - 1, frame.lost_in_kernel_before)
            self._next_kept += 1
            if passed := frame if frame.end else self._kept_frame(frame):
                self._told.add(gap)
                self._held.tail = _Gap()
                return self._made(passed)
        return self._position() if self._next_kept < self._kept_until else None

    def _take_live(self) -> Frame | None:
        if self._next_kept < self._kept_until:
            return None
        gap, self._held.tail = self._held.tail, _Gap()
        gap.add(self._live.first_gap)
        if self._live.entries:
            self._live.entries[0] = gap, self._live.entries[0][1]
            return self._take_queued(self._live)
        if gap.to_tell:
            self._live.tail = _Gap()
            return self._tell(gap, self.channel.produced, self.channel.lost_in_kernel)
        self._live.tail = gap
        return None

    def _tell(self, gap: _Gap, last_seq: int, lost_in_kernel: Mapping[int, int]) -> Frame:
        """A frame of the losses of GAP, which ends at LAST_SEQ."""
        self._told.add(gap)
        losses = gap.lost + gap.in_kernel
        self._estimate_bytes = 0
        frame = self.channel.control(self._seq + 1, last_seq, time.time_ns())
        return replace(frame, losses=losses, lost_in_kernel=dict(lost_in_kernel))

    @property
    def position_due(self) -> float:
        """When, by the channel's clock, this stream has to say where it stands."""
        return self._told_at if self._should_tell_filtered else self._told_at + POSITION_EVERY_S

    @property
    def _should_tell_filtered(self) -> bool:
        return self._filtered_bytes > self.channel.replay_bytes // _FILTERED_SHARE

    def _position(self) -> Frame:
        if self._next_kept < self._kept_until:  # still looking through what was kept
            gap, self._held.tail = self._held.tail, _Gap()
            at = self.channel.kept[self._next_kept - self.channel.kept_from]
            return self._tell(gap, max(at.first_seq - 1, self._seq), at.lost_in_kernel_before)
        gap, self._live.tail = self._live.tail, _Gap()
        return self._tell(gap, self.channel.produced, self.channel.lost_in_kernel)

    def _took(self, frame: Frame, now: float | None) -> None:
        self._taken = frame
        frame.hold(self.channel.held)
        self._told.filtered += frame.covered - frame.count if frame.count else 0
        self.delivered += frame.count
        self._seq = frame.last_seq
        self._took_end = bool(frame.end)
        self._filtered_bytes = 0
        if frame.count:
            self.last_delivered_seq = frame.last_seq
        if now is not None:
            self._told_at = now

    def message(self, frame: Frame) -> bytes:
        """An encoded EbpfEventBatch of the frame that was just taken. The bytes are shared with
        other readers, unless there is something to say of this stream alone."""
        wire = frame.wire(columns=self.terms.columns)
        account = self._stream_account()
        if not account.ByteSize():
            return wire
        # Fields come in any order, and the rows are to stay the first.
        return wire + pb.EbpfEventBatch(account=account).SerializeToString()

    def events(self, frame: Frame) -> Iterator[bytes]:
        """The frame that was just taken as encoded EbpfEvents, one for each event. Meanwhile its
        rows exist as messages too, which no limit counts: about 2 MB for a frame of the most rows,
        for each call that is at this point."""
        estimate_bytes = self._estimate_bytes  # it gives way to the figure
        for event in frame.events(self._stream_account()):
            if self._rate:
                self._rate.spend(len(event) - estimate_bytes, self.channel.clock())
                estimate_bytes = 0
            yield event

    def _stream_account(self) -> pb.StreamAccount:
        return pb.StreamAccount(filtered=self._told.filtered, lost=loss_messages(self._told.lost))

    @property
    def account(self) -> Account:
        """Where the session's events are, for this reader."""
        return Account(
            self.channel.produced - self.terms.after_seq,
            self.delivered,
            self.filtered,
            self._held.rows + self._unread() + self._live.rows,
            self.queued_bytes,
            dict(self.lost),
        )

    def close(self) -> None:
        """Leaves the session and frees the queue. Safe to call twice."""
        self.channel.subscriptions.discard(self)
        self._held.clear()
        self._live.clear()
        self._release_taken()

    def _release_taken(self) -> None:
        if self._taken:
            self._taken.release()
            self._taken = None

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Frame:
        loop = asyncio.get_running_loop()
        while True:
            now = self.channel.clock()
            try:
                frame = self.take(now)
            except EOFError:
                self.close()
                raise StopAsyncIteration from None
            if frame:
                return frame
            self._waiter = loop.create_future()
            timer = loop.call_later(max(self.position_due - now, 0.0), self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
