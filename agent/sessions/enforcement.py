"""The limits on CPU time and memory, enforced every second: sessions that have to go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final, Protocol

from coral.agent.config import Limits
from coral.agent.sessions.budget import Candidate, Needs, cpu_excess, first_to_go
from coral.agent.sessions.costs import CPU_WINDOW_S, CpuUse
from coral.agent.sessions.session import End, Session
from coral.mesh.v1 import ebpf_pb2 as pb

_ENFORCE_EVERY_S: Final = 1.0
_REMEDIES: Final = {
    "programs": "watch fewer processes or fewer calls",
    "reading": "ask for summaries, longer intervals, or less with the collector's own options",
    "subscribers": "let fewer subscribers read, or each less with a filter",
}


class Spending(Protocol):
    """What is spent, and by which sessions."""

    def memory_bytes(self) -> int:
        """Maps and buffers in use, after everything that can be given up without a preemption."""

    def shorten_queues(self, wanted_bytes: int) -> None:
        """Frees WANTED_BYTES of what waits for subscribers that do not keep up, or all of it."""

    def at_work(self) -> Iterable[Session]:
        """The sessions that can be preempted."""


async def enforce(limits: Limits, spending: Spending) -> None:
    """Every second: preempts a session while a limit is exceeded. Does not wait for its end: one
    that is slow to detach must not keep others over the limits."""
    while True:
        await asyncio.sleep(_ENFORCE_EVERY_S)
        _enforce_cpu(limits, spending)
        _enforce_memory(limits, spending)


def by_cpu(sessions: Iterable[Session]) -> list[Candidate[Session]]:
    """SESSIONS with their use of the last seconds, in percent of one CPU."""
    return [
        Candidate(session, session.priority, session.costs.recent.total) for session in sessions
    ]


def _enforce_cpu(limits: Limits, spending: Spending) -> None:
    now = time.monotonic()
    for session in spending.at_work():
        session.costs.sample(now)
    excess = cpu_excess(by_cpu(_staying(spending)), limits)
    if excess:
        costs = excess.session.costs
        _preempt(
            excess.session,
            f"{excess.limit} is {excess.value:g} of one CPU; collectors used {excess.used:.1f} "
            f"over {CPU_WINDOW_S:g}s, this one {costs.recent.total:.1f} "
            f"({costs.recent_by_cause()}): {_remedy(costs.recent)}, or raise the limit",
        )


def _remedy(used: CpuUse) -> str:
    return _REMEDIES[max(_REMEDIES, key=lambda cause: float(getattr(used, cause)))]


def _enforce_memory(limits: Limits, spending: Spending) -> None:
    used_bytes = spending.memory_bytes()
    if used_bytes > limits.memory:
        spending.shorten_queues(used_bytes - limits.memory)
        used_bytes = spending.memory_bytes()
    if used_bytes <= limits.memory:
        return
    staying = _staying(spending)
    # Sessions that are ending give back what they hold: nobody else has to go for that.
    used_bytes -= sum(each.memory_bytes for each in spending.at_work() if each not in staying)
    candidates = [Candidate(each, each.priority, each.memory_bytes) for each in staying]
    elsewhere = used_bytes - sum(candidate.used for candidate in candidates)
    if session := first_to_go(candidates, limits.memory - elsewhere):
        _preempt(
            session,
            f"limits.memory is {limits.memory} bytes; {used_bytes} were used, "
            f"{session.memory_bytes} by this collector: ask for smaller buffers, let its "
            "subscribers read faster, or raise the limit",
        )


def _staying(spending: Spending) -> list[Session]:
    """The sessions whose end is not decided."""
    return [session for session in spending.at_work() if not session.decided_end]


def _preempt(session: Session, detail: str) -> None:
    """Ends SESSION, unless its end is decided already."""
    if not session.decided_end:
        session.needs = Needs(session.costs.recent.total, session.memory_bytes)
        session.end_for(End(pb.SessionEnd.REASON_PREEMPTED, detail))
