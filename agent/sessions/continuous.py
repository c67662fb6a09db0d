"""Continuous collectors: those of the agent's configuration, at work as long as the agent is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import structlog

from coral.agent.config import Continuous
from coral.agent.errors import NotFoundError, RefusedError, UnavailableError
from coral.agent.sessions.background import Backoff
from coral.agent.sessions.budget import Needs
from coral.agent.sessions.session import Session, StartRequest
from coral.bpf import BpfError
from coral.collectors.registry import COLLECTORS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_of
from coral.wire.text import safe

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_ROOM_EVERY_S: Final = 1.0
_FINAL: Final = (pb.SessionEnd.REASON_STOPPED, pb.SessionEnd.REASON_AGENT_SHUTDOWN)

Start = Callable[[StartRequest], Awaitable[Session]]


class Waits(NamedTuple):
    """What a continuous collector waits for: a word for metrics, and a text for people. Both are
    empty while it is at work."""

    reason: str = ""
    text: str = ""


_AT_WORK: Final = Waits()
_STARTING: Final = Waits("starting", "it is being started")
_STOPPED: Final = Waits("stopped", "a caller stopped it")


class Standing:
    """How one continuous collector of the configuration stands. CHANGED is called when it does."""

    def __init__(self, rule: Continuous, changed: Callable[[], None]) -> None:
        self.rule = rule
        self.waits = _STARTING
        self.failures = 0  # how often it could not start, or ended
        self._changed = changed

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.rule.kind

    @property
    def service(self) -> str:
        """The service that it watches, as it is configured."""
        return self.rule.service

    def __str__(self) -> str:
        name = f"{self.kind} {self.service}".strip()
        return f"{name}: {self.waits.text or 'at work'}"

    def set(self, waits: Waits) -> None:
        """It waits for WAITS from now on, whose text may contain names of processes."""
        self.waits = waits._replace(text=safe(waits.text))
        self._changed()

    def fail(self, waits: Waits) -> None:
        """It could not start, or has ended, and waits for WAITS from now on."""
        self.failures += 1
        self.set(waits)


def _reason(error: Exception) -> str:
    """A word for a class of errors: `not_found` for NotFoundError."""
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


async def keep(standing: Standing, start: Start, has_room: Callable[[Needs], bool]) -> None:
    """Keeps a continuous collector at work until it is stopped or the agent shuts down. After a
    failure, and while it cannot start, tries again with growing pauses; after a preemption, only
    once it HAS_ROOM for what it used. Raises what it does not expect of START, which then is what
    STANDING waits for."""
    try:
        await _keep(standing, start, has_room)
    except Exception as error:
        standing.fail(Waits("failed", f"unexpected failure: {error!r}"))
        raise


async def _keep(standing: Standing, start: Start, has_room: Callable[[Needs], bool]) -> None:
    rule = standing.rule
    kind = COLLECTORS.get(kind_of(rule.kind))
    config = {**(kind.continuous_defaults if kind else {}), **rule.config}
    request = StartRequest(rule.kind, rule.service, config, continuous=True)
    backoff = Backoff()
    while True:
        needs: Needs | None = None
        try:
            session = await start(request)
        except UnavailableError:
            return
        except (RefusedError, BpfError) as error:
            reason = str(error)
            # Whoever reaches the agent's health reads it: not what else there is.
            waits = Waits(
                _reason(error), error.reason if isinstance(error, NotFoundError) else reason
            )
        else:
            backoff.begin()
            standing.set(_AT_WORK)
            await session.ended.wait()
            reason = str(session.end)
            if session.end and session.end.reason in _FINAL:
                standing.set(_STOPPED)
                return
            needs = session.needs
            waits = Waits(reason.partition(":")[0].lower(), reason)
        standing.fail(waits)
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
