"""What is kept of ended sessions: for a while their streams, for longer how they ended. Loop-free.

An ended session's stream can be read for `limits.ended_sessions`, or less: all ended sessions
together keep at most `limits.ended_bytes`, and they give way before any session at work does.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from coral.agent.access.target import Ownership
from coral.agent.config import Limits
from coral.agent.sessions.session import End, Session

_ENDS_KEPT: Final = 1000
# What a session takes as Python objects, with a few frames; tests/unit/test_ended_sessions.py
# measures it.
SESSION_BYTES: Final = 12 << 10


@dataclass(frozen=True, slots=True)
class _Kept:
    session: Session
    until_s: float
    size_bytes: int


class EndedSessions:
    """The sessions that ended last. FORGOTTEN is called with each session that nobody can or does
    read any more."""

    def __init__(
        self,
        limits: Limits,
        forgotten: Callable[[Session], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_s = limits.ended_sessions
        self._most_bytes = limits.ended_bytes
        self._forgotten = forgotten
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the oldest first
        self._kept_bytes = 0
        self._only_read: dict[str, Session] = {}  # closed to new subscribers, and still read
        self._ends: OrderedDict[str, tuple[End, Ownership]] = OrderedDict()

    def add(self, session: Session) -> None:
        """Keeps a session that has just ended."""
        assert session.end  # noqa: S101  it has ended
        self._ends[session.id] = session.end, session.ownership
        while len(self._ends) > _ENDS_KEPT:
            self._ends.popitem(last=False)
        size_bytes = SESSION_BYTES + session.channel.kept_bytes
        self._kept[session.id] = _Kept(session, self._clock() + self._keep_s, size_bytes)
        self._kept_bytes += size_bytes
        while self._kept_bytes > self._most_bytes:
            self._close_oldest()

    def find(self, session_id: str) -> Session | None:
        """The session of that id, if its stream can still be subscribed to."""
        self._expire()
        kept = self._kept.get(session_id)
        return kept.session if kept else None

    def end_of(self, session_id: str) -> End | None:
        """How the session of that id ended; None for one that did not, or too long ago."""
        found = self._ends.get(session_id)
        return found[0] if found else None

    def ownership_of(self, session_id: str) -> Ownership | None:
        """Whose the session of that id was, as long as `end_of` knows it."""
        found = self._ends.get(session_id)
        return found[1] if found else None

    def readable(self) -> list[Session]:
        """Those whose streams can still be subscribed to, in the order in which they ended."""
        self._expire()
        return [kept.session for kept in self._kept.values()]

    def in_memory(self) -> Iterator[Session]:
        """The readable ones, and those that are closed to new subscribers and still being read."""
        yield from self._only_read.values()
        for kept in self._kept.values():
            yield kept.session

    @property
    def memory_bytes(self) -> int:
        """What all of them hold, the queues of their subscribers included."""
        return sum(map(_memory_bytes, self.in_memory()))

    def make_room(self, wanted_bytes: int) -> None:
        """Closes sessions, oldest first, until WANTED_BYTES are free or none is left. One that is
        being read is closed to others, and frees nothing yet."""
        freed_bytes = 0
        while self._kept and freed_bytes < wanted_bytes:
            freed_bytes += self._close_oldest()

    def tick(self) -> None:
        """Lets go of those whose time is up, and of those that nobody reads any more."""
        self._expire()
        for session in tuple(self._only_read.values()):
            if not session.channel.subscriptions:
                del self._only_read[session.id]
                self._forgotten(session)

    def _expire(self) -> None:
        now = self._clock()
        while self._kept and next(iter(self._kept.values())).until_s <= now:
            self._close_oldest()

    def _close_oldest(self) -> int:
        """Returns how many bytes that frees."""
        session_id, kept = self._kept.popitem(last=False)
        self._kept_bytes -= kept.size_bytes
        if kept.session.channel.subscriptions:
            self._only_read[session_id] = kept.session
            return 0
        self._forgotten(kept.session)
        return _memory_bytes(kept.session)


def _memory_bytes(session: Session) -> int:
    return SESSION_BYTES + session.channel.buffered_bytes
