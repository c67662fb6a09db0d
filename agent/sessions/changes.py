"""Starts and ends of sessions, for callers that watch them: in order, and bounded for each watcher.
Loop-free, except for `Watch.__anext__`, which only waits.

A watch begins with every session at work, then a mark that these were all; then come the starts and
ends, each as it happens. A watch is complete or it fails: no change is left out silently.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from coral.agent.access.target import NOBODYS, Ownership
from coral.agent.errors import LimitError, UnavailableError
from coral.mesh.v1 import ebpf_pb2 as pb

# The most that may wait for one watcher, beside the collectors that it began with. limits.memory
# does not count it: all watchers share a message, and limits.streams bounds their number.
MAX_WAITING_BYTES: Final = 1 << 20


class Changes:
    """Sends every watcher each change; the message is made once."""

    def __init__(self) -> None:
        self.watches: set[Watch] = set()
        self._closed = False

    def publish(
        self,
        what: pb.CollectorChange.What,
        collector: pb.CollectorInfo,
        ownership: Ownership = NOBODYS,
    ) -> None:
        """Queues a change of a session of that OWNERSHIP for every watcher. Never blocks."""
        if self.watches:
            change = pb.CollectorChange(what=what, collector=collector)
            size_bytes = change.ByteSize()
            for watch in self.watches:
                watch.offer(change, size_bytes, ownership)

    def watch(self, present: Iterable[tuple[pb.CollectorInfo, Ownership]]) -> Watch:
        """A new watcher, which gets those PRESENT first. Raises `UnavailableError` after
        `close`."""
        if self._closed:
            raise UnavailableError("the agent is shutting down")
        watch = Watch(self, present)
        self.watches.add(watch)
        return watch

    def close(self) -> None:
        """Ends every watch after the changes that it has not read yet."""
        self._closed = True
        for watch in self.watches:
            watch.end()


class Watch:
    """One watcher's end. Iterate over it to get changes; close it when done."""

    def __init__(
        self, changes: Changes, present: Iterable[tuple[pb.CollectorInfo, Ownership]]
    ) -> None:
        self._changes = changes
        self.about: Ownership | None = None
        """Of the session that the change which was taken last is about; None for the mark."""
        # Each with its size, which is 0 for those that were queued at the beginning.
        self._waiting: deque[tuple[pb.CollectorChange, int, Ownership | None]] = deque(
            (
                pb.CollectorChange(what=pb.CollectorChange.WHAT_PRESENT, collector=collector),
                0,
                ownership,
            )
            for collector, ownership in present
        )
        self._waiting.append((pb.CollectorChange(what=pb.CollectorChange.WHAT_SYNCED), 0, None))
        self._waiting_bytes = 0
        self._failed = self._ended = False
        self._news = asyncio.Event()

    def offer(
        self, change: pb.CollectorChange, size_bytes: int, ownership: Ownership = NOBODYS
    ) -> None:
        """Queues a change; without room the watch fails, and frees what it holds."""
        if self._failed:
            return
        self._waiting.append((change, size_bytes, ownership))
        self._waiting_bytes += size_bytes
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self._failed = True
            self._waiting.clear()
        self._news.set()

    def end(self) -> None:
        """Ends the watch once the waiting changes are taken."""
        self._ended = True
        self._news.set()

    def take(self) -> pb.CollectorChange | None:
        """The next change, or None where there is none yet. Raises EOFError after the end, and
        `LimitError` where changes were dropped because they were not read."""
        if self._failed:
            raise LimitError(
                f"more than {MAX_WAITING_BYTES} bytes of changes were waiting to be read: watch "
                "again, which begins with the collectors that are at work then",
                "changes that wait",
            )
        if self._waiting:
            change, size_bytes, self.about = self._waiting.popleft()
            self._waiting_bytes -= size_bytes
            return change
        if self._ended:
            raise EOFError
        return None

    def close(self) -> None:
        """Leaves. Safe to call twice."""
        self._changes.watches.discard(self)
        self._waiting.clear()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> pb.CollectorChange:
        while True:
            try:
                change = self.take()
            except EOFError:
                raise StopAsyncIteration from None
            if change:
                return change
            self._news.clear()
            await self._news.wait()
