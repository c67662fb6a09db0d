"""Continuous collectors: those of the agent's configuration, at work as long as the agent is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from coral.agent.config import Continuous
from coral.agent.errors import RefusedError, UnavailableError
from coral.agent.sessions.background import Backoff
from coral.agent.sessions.budget import Needs
from coral.agent.sessions.session import Session, StartRequest
from coral.bpf import BpfError
from coral.mesh.v1 import ebpf_pb2 as pb

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_ROOM_EVERY_S: Final = 1.0
_FINAL: Final = (pb.SessionEnd.REASON_STOPPED, pb.SessionEnd.REASON_AGENT_SHUTDOWN)

Start = Callable[[StartRequest], Awaitable[Session]]


async def keep(rule: Continuous, start: Start, has_room: Callable[[Needs], bool]) -> None:
    """Keeps a continuous collector at work until it is stopped or the agent shuts down. After a
    failure, and while it cannot start, tries again with growing pauses; after a preemption, only
    once it HAS_ROOM for what it used."""
    request = StartRequest(rule.kind, rule.service, rule.config, continuous=True)
    backoff = Backoff()
    while True:
        needs: Needs | None = None
        try:
            session = await start(request)
        except UnavailableError:
            return
        except (RefusedError, BpfError) as error:
            reason = str(error)
        else:
            backoff.begin()
            await session.ended.wait()
            reason = str(session.end)
            if session.end and session.end.reason in _FINAL:
                return
            needs = session.needs
        pause_s = backoff.pause_s()
        log.warning(
            "continuous collector is not at work",
            kind=rule.kind,
            service=rule.service,
            reason=reason,
            again_in=f"{pause_s:.1f}s",
        )
        await asyncio.sleep(pause_s)
        while needs and not has_room(needs):  # noqa: ASYNC110  nothing says when there is room
            await asyncio.sleep(_ROOM_EVERY_S)
