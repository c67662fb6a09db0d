"""What is kept of ended sessions: how they ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from coral.agent.sessions.session import End, Session

_ENDS_KEPT: Final = 1000


class EndedSessions:
    """How the last sessions ended, by id."""

    def __init__(self) -> None:
        self._ends: OrderedDict[str, End] = OrderedDict()

    def add(self, session: Session, end: End) -> None:
        """Notes how SESSION has ended."""
        self._ends[session.id] = end
        while len(self._ends) > _ENDS_KEPT:
            self._ends.popitem(last=False)

    def end_of(self, session_id: str) -> End | None:
        """How the session of that id ended; None where this is not known."""
        return self._ends.get(session_id)
