"""The Prometheus feed: whose batches are counted in the measures of each kind. Loop-free.

Two sessions that watch the same target under the same label would count its events twice, so one of
them feeds the measures: the fittest. It is chosen again whenever a session begins or ends.
"""

from __future__ import annotations

from typing import NamedTuple

from coral.agent.sessions.labels import label_of
from coral.agent.sessions.session import Session
from coral.collectors.contract import Batch, Coverage, Measures
from coral.collectors.registry import COLLECTORS


class _What(NamedTuple):
    """What is counted once."""

    kind: int
    service: str
    target: tuple[str, ...]


class _Fitness(NamedTuple):
    """The greatest feeds: it covers more, then it is continuous, then it began first."""

    coverage: Coverage
    continuous: bool
    began: int  # counted down


class Feed:
    """The measures of every kind, and the sessions that feed them."""

    def __init__(self, max_series: int, *, pod_label: bool = False) -> None:
        self._pod_label = pod_label
        self.measures: dict[int, Measures] = {
            kind: collector.measures(max_series) for kind, collector in COLLECTORS.items()
        }
        self._candidates: dict[_What, dict[str, _Fitness]] = {}
        self._what: dict[str, _What] = {}  # by session
        self._joined = 0

    def join(self, session: Session) -> None:
        """Lets SESSION, which is attached, feed the measures if it is the fittest."""
        collector = session.collector
        if collector.coverage is Coverage.NONE:
            return
        self._joined += 1
        what = _What(session.kind, session.service_name, collector.target)
        fitness = _Fitness(collector.coverage, session.continuous, -self._joined)
        self._what[session.id] = what
        self._candidates.setdefault(what, {})[session.id] = fitness

    def observe(self, session: Session, batch: Batch) -> None:
        """Counts a batch of SESSION, if that is the one that feeds."""
        if self.feeds(session.id):
            self.measures[session.kind].observe(label_of(session, pod_label=self._pod_label), batch)

    def feeds(self, session_id: str) -> bool:
        """Whether the session of that id is the fittest of those that watch the same."""
        if not (what := self._what.get(session_id)):
            return False
        candidates = self._candidates[what]
        return max(candidates, key=candidates.__getitem__) == session_id

    def leave(self, session: Session) -> None:
        """Forgets SESSION, which has ended; the next fittest feeds."""
        if what := self._what.pop(session.id, None):
            del self._candidates[what][session.id]
            if not self._candidates[what]:
                del self._candidates[what]
