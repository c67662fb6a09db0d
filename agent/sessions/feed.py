"""The Prometheus feed: which session's batches are counted in the measures of its kind."""

from __future__ import annotations

from coral.agent.sessions.session import Session
from coral.collectors.contract import Batch, Measures
from coral.collectors.registry import COLLECTORS


class Feed:
    """The measures of every kind, and the session that feeds them for each service.

    Two sessions that watch the same service would count its calls twice, so only the one that
    began first feeds the measures.
    """

    def __init__(self, max_series: int) -> None:
        self.measures: dict[int, Measures] = {
            kind: collector.measures(max_series) for kind, collector in COLLECTORS.items()
        }
        self._feeding: dict[tuple[int, str], str] = {}

    def observe(self, session: Session, batch: Batch) -> None:
        """Counts a batch of SESSION, if that is the one that feeds its service's measures."""
        feeds = self._feeding.setdefault((session.kind, session.service_name), session.id)
        if feeds == session.id:
            self.measures[session.kind].observe(session.service_name, batch)

    def leave(self, session: Session) -> None:
        """Lets another session feed the measures that this one fed."""
        if self._feeding.get((session.kind, session.service_name)) == session.id:
            del self._feeding[session.kind, session.service_name]
