"""Counts over all sessions that there ever were, for Prometheus.

At every moment, started - ended = at work: a session that could not be attached is in none of them.
"""

from __future__ import annotations

from collections import Counter

from coral.agent.sessions.costs import CpuUse
from coral.agent.sessions.session import Session
from coral.collectors.contract import Batch


class Totals:
    """Sessions and events by kind; ends by kind and reason; losses by kind and stage; CPU time by
    kind and cause."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.ended: Counter[tuple[int, int]] = Counter()
        self.events: Counter[int] = Counter()
        self._lost: Counter[tuple[int, int]] = Counter()
        self._cpu: dict[int, CpuUse] = {}
        self._counted: dict[str, Session] = {}  # their channels count what their subscribers lose

    def add(self, session: Session) -> None:
        """Counts a session that is attached, and what its subscribers lose until `leave`."""
        self.started[session.kind] += 1
        self._counted[session.id] = session

    def leave(self, session: Session) -> None:
        """Settles the losses of a session that has no subscribers and gets no more."""
        if self._counted.pop(session.id, None):
            for stage, count in session.channel.subscribers_lost.items():
                self._lost[session.kind, stage] += count
            self._cpu[session.kind] = session.costs.used + self._cpu.get(session.kind, CpuUse())

    def add_batch(self, kind: int, batch: Batch) -> None:
        """Counts a batch that was published."""
        self.events[kind] += len(batch.rows)
        for stage, count in batch.losses.items():
            self._lost[kind, stage] += count

    def losses(self) -> Counter[tuple[int, int]]:
        """Events lost so far: in the kernel, and by each subscriber."""
        total = self._lost.copy()
        for session in self._counted.values():
            for stage, count in session.channel.subscribers_lost.items():
                total[session.kind, stage] += count
        return total

    def cpu(self) -> dict[int, CpuUse]:
        """CPU time that sessions have caused so far, in seconds, by kind."""
        total = self._cpu.copy()
        for session in self._counted.values():
            total[session.kind] = session.costs.used + total.get(session.kind, CpuUse())
        return total
