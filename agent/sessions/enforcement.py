"""The limits on CPU time and memory, enforced every second: sessions that have to go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final, Protocol

from coral.agent.config import Limits
from coral.agent.sessions.budget import CPU_WINDOW_S, Candidate, CpuBudget, first_to_go
from coral.agent.sessions.session import End, Session
from coral.mesh.v1 import ebpf_pb2 as pb

_ENFORCE_EVERY_S: Final = 1.0


class Spending(Protocol):
    """What is spent, and by which sessions."""

    def cpu_s(self) -> float:
        """CPU time used so far by the agent and its programs, in seconds."""

    def memory_bytes(self) -> int:
        """Maps and buffers in use, after everything that can be given up without a preemption."""

    def at_work(self) -> Iterable[Session]:
        """The sessions that can be preempted."""


async def enforce(limits: Limits, spending: Spending) -> None:
    """Every second: preempts the session of the lowest priority while a limit is exceeded."""
    cpu = CpuBudget(limits.cpu_percent)
    while True:
        await asyncio.sleep(_ENFORCE_EVERY_S)
        cpu.add(time.monotonic(), spending.cpu_s())
        if cpu.exceeded:
            await _preempt(
                spending.at_work(),
                f"limits.cpu_percent is {limits.cpu_percent:g} of one CPU; "
                f"{cpu.used_percent:.1f} were used over {CPU_WINDOW_S:g}s",
            )
            cpu.restart()
        if (used := spending.memory_bytes()) > limits.memory:
            await _preempt(
                spending.at_work(), f"limits.memory is {limits.memory} bytes; {used} were used"
            )


async def _preempt(sessions: Iterable[Session], detail: str) -> None:
    session = first_to_go(
        Candidate(session, session.priority, session.started_at) for session in sessions
    )
    if session:
        await session.stop(End(pb.SessionEnd.REASON_PREEMPTED, detail))
