"""The limits, enforced every second: sessions that have to go, subscribers that do not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from coral.agent.config import Limits
from coral.agent.sessions.budget import CPU_WINDOW_S, Candidate, CpuBudget, first_to_go
from coral.agent.sessions.session import End, Session
from coral.collectors.options import format_duration
from coral.mesh.v1 import ebpf_pb2 as pb

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_ENFORCE_EVERY_S: Final = 1.0


async def enforce(
    limits: Limits,
    sessions: Callable[[], Iterable[Session]],
    cpu_s: Callable[[], float],
    memory_bytes: Callable[[], int],
) -> None:
    """Every second: preempts the session of the lowest priority while a limit is passed, and lets
    go of subscribers that do not read."""
    cpu = CpuBudget(limits.cpu_percent)
    while True:
        await asyncio.sleep(_ENFORCE_EVERY_S)
        cpu.add(time.monotonic(), cpu_s())
        if cpu.exceeded:
            await _preempt(
                sessions(),
                f"limits.cpu_percent is {limits.cpu_percent:g} of one CPU; "
                f"{cpu.used_percent:.1f} were used over {CPU_WINDOW_S:g}s",
            )
            cpu.restart()
        if (used := memory_bytes()) > limits.memory:
            await _preempt(sessions(), f"limits.memory is {limits.memory} bytes; {used} were used")
        _release_stalled(sessions(), limits.stalled_subscriber)


async def _preempt(sessions: Iterable[Session], detail: str) -> None:
    session = first_to_go(
        Candidate(session, session.priority, session.started_at)
        for session in sessions
        if session.started_at
    )
    if session:
        await session.stop(End(pb.SessionEnd.REASON_PREEMPTED, detail))


def _release_stalled(sessions: Iterable[Session], patience_s: float) -> None:
    now = time.monotonic()
    for session in sessions:
        for subscription in tuple(session.channel.subscriptions):
            since = subscription.blocked_since
            if since is not None and now - since > patience_s:
                log.warning("subscriber let go", session=session.id, peer=subscription.terms.peer)
                subscription.fail(
                    f"nothing was read for {format_duration(patience_s)}, this agent's "
                    "limits.stalled_subscriber"
                )
                subscription.close()
