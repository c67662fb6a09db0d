"""One session's stream: batches are numbered, split to message size, kept for later subscribers and
offered to present ones.

A loop-free core; tests drive it step by step. The account, at every moment and for every
subscription that began after event number S:

    produced - S = delivered + filtered + queued + lost

`produced` counts the events numbered since the session began. Events lost in the kernel never had a
number: `lost_in_kernel` counts them on top.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Final

import numpy as np

from coral.agent.streams.frame import Frame, Header, Held, loss_messages
from coral.agent.streams.rows import row_bytes, row_sizes, take, with_used_strings
from coral.agent.streams.subscription import Subscription, Terms
from coral.collectors.contract import Batch, EventRows, Summaries, Unread
from coral.collectors.metering import Charge, uncharged
from coral.mesh.v1 import ebpf_pb2 as pb

# A message stays below 1 MiB; clients refuse more than 4 MiB by default.
MAX_ROWS: Final = 16_384
# Making a summary's message takes some 10 µs, on the event loop.
MAX_SUMMARIES: Final = 512
ROWS_BYTES: Final = (1 << 20) - (32 << 10)
# Frames whose encodings are kept beside their rows: readers that keep up share them.
_ENCODED_FRAMES: Final = 32
# A collector of single events keeps its names from batch to batch; above this number it is worth
# looking which of them a batch uses.
_MANY_STRINGS: Final = 256


class Channel:
    """One session's stream. Keeps the last `replay_bytes` for later subscribers. CHARGE is called
    with the CPU time that offering them batches takes, in nanoseconds."""

    def __init__(
        self,
        header: Header,
        replay_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        charge: Charge = uncharged,
    ) -> None:
        self.header = header
        self.clock = clock
        self._charge = charge
        self.replay_bytes = replay_bytes
        self.produced = 0
        self.lost_in_kernel: Counter[int] = Counter()  # by stage
        self.unread: Mapping[str, Unread] = {}
        self.ended = False
        self.subscriptions: set[Subscription] = set()
        self.subscribers_lost: Counter[int] = Counter()  # by stage, over all there ever were
        self.kept: deque[Frame] = deque()
        self.kept_from = 0  # how many frames were kept before, and are no more
        self.kept_bytes = 0
        self.held = Held()
        self.evicted_losses: Counter[int] = Counter()  # in the kernel, told by evicted frames

    @property
    def buffered_bytes(self) -> int:
        """Memory held for subscribers: the replay, and what they hold that is not in it."""
        return self.held.size_bytes

    def publish(self, batch: Batch) -> None:
        """Numbers a batch and offers it to every subscriber. Never blocks. Rows that are more than
        a message should hold become several frames. Raises RuntimeError after the end."""
        self.lost_in_kernel.update(batch.losses)
        for what, more in batch.unread.items():
            self.unread = {**self.unread, what: self.unread.get(what, Unread(0, 0)) + more}
        self.attributes = batch.attributes
        losses = {stage: count for stage, count in batch.losses.items() if count}
        for rows in _messages_of(batch.rows):
            if not (len(rows) or losses):
                continue
            last_seq = self.produced + len(rows)
            self._send(
                Frame(
                    self.header,
                    self.produced + 1,
                    last_seq,
                    batch.interval_start_ns,
                    batch.interval_end_ns,
                    rows if len(rows) else None,
                    losses,
                    dict(self.lost_in_kernel),
                    unread=self.unread,
                    attributes=self.attributes,
                )
            )
            losses = {}

    def end(self, reason: pb.SessionEnd.Reason, detail: str, at_ns: int) -> None:
        """Sends the end as the last frame. The stream can still be subscribed to."""
        end = pb.SessionEnd(
            reason=reason,
            detail=detail,
            produced=self.produced,
            lost_in_kernel=loss_messages(self.lost_in_kernel),
        )
        self._send(self.control(self.produced + 1, self.produced, at_ns, end=end))
        self.ended = True

    def control(
        self, first_seq: int, last_seq: int, at_ns: int, *, end: pb.SessionEnd | None = None
    ) -> Frame:
        """A frame without rows, as of now."""
        lost = dict(self.lost_in_kernel)
        return Frame(
            self.header,
            first_seq,
            last_seq,
            at_ns,
            at_ns,
            lost_in_kernel=lost,
            unread=self.unread,
            end=end,
        )

    def _send(self, frame: Frame) -> None:
        if self.ended:
            raise RuntimeError("the session has ended")
        self.produced = frame.last_seq
        self.kept.append(frame)
        self.kept_bytes += frame.kept_bytes
        frame.hold(self.held)
        began_ns = time.thread_time_ns()
        while self.kept_bytes > self.replay_bytes and len(self.kept) > 1:
            self._evict()
        if len(self.kept) > _ENCODED_FRAMES:
            self.kept[-1 - _ENCODED_FRAMES].stop_sharing()
        now = self.clock()
        self._with_each(lambda subscription: subscription.offer(frame, now))
        self._charge(time.thread_time_ns() - began_ns)

    def _with_each(self, work: Callable[[Subscription], None]) -> None:
        """Does WORK with every subscription. One that it fails for is ended and told; the others
        go on."""
        for subscription in tuple(self.subscriptions):
            try:
                work(subscription)
            except Exception as error:  # noqa: BLE001  its reader is told
                subscription.fail(f"the agent could not serve this stream: {error!r}")

    def _evict(self) -> None:
        self._with_each(lambda subscription: subscription.evict(self.kept_from, self.kept[0]))
        oldest = self.kept.popleft()
        self.kept_from += 1
        self.kept_bytes -= oldest.kept_bytes
        oldest.release()
        self.evicted_losses.update(oldest.losses)

    def subscribe(self, terms: Terms | None = None) -> Subscription:
        """A new reader, during the session or after its end. It starts after the event that it
        has, with what is still kept; the rest is its first loss. Raises ValueError for a number
        that was not given out yet."""
        terms = terms or Terms()
        if terms.after_seq > self.produced:
            raise ValueError(f"{terms.after_seq} is beyond {self.produced}, the last event so far")
        subscription = Subscription(self, terms)
        self.subscriptions.add(subscription)
        return subscription


def shorten_queues(channels: Collection[Channel], wanted_bytes: int) -> None:
    """Halves queues of the subscribers of CHANNELS, the longest at the time first, until
    WANTED_BYTES are free or none is left. What is dropped is a loss in the subscriber's queue."""

    def buffered_bytes() -> int:
        return sum(channel.buffered_bytes for channel in channels)

    most_bytes = buffered_bytes() - wanted_bytes
    subscriptions = (each for channel in channels for each in channel.subscriptions)
    longest = [(-each.queued_bytes, at, each) for at, each in enumerate(subscriptions)]
    heapify(longest)
    while longest and buffered_bytes() > most_bytes:
        _, at, subscription = heappop(longest)
        if subscription.shorten():
            heappush(longest, (-subscription.queued_bytes, at, subscription))


def _messages_of(rows: EventRows | Summaries) -> Iterator[EventRows | Summaries]:
    """ROWS in parts that fit a message each; at least one part, which may be empty."""
    if isinstance(rows, EventRows):
        if len(rows.strings) > _MANY_STRINGS:
            rows = with_used_strings(rows)
        most = min(MAX_ROWS, ROWS_BYTES // row_bytes(rows))
        for start in range(0, len(rows) or 1, most):
            yield replace(rows, records=rows.records[start : start + most])
        return
    ends = np.cumsum(row_sizes(rows))
    if len(rows) <= MAX_SUMMARIES and (not len(ends) or ends[-1] <= ROWS_BYTES):
        yield rows
        return
    start = sent_bytes = 0
    while start < len(rows):
        fitting = int(np.searchsorted(ends, sent_bytes + ROWS_BYTES, side="right"))
        stop = min(max(fitting, start + 1), start + MAX_SUMMARIES, len(rows))
        yield take(rows, np.arange(start, stop))
        start, sent_bytes = stop, int(ends[stop - 1])
