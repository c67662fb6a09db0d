"""Health: whether the agent is alive, and whether what its configuration asks for is at work.

gRPC's health (grpc.health.v1) and the pages /healthz and /readyz say the same. The name "" and
/healthz are about life: they answer as long as the event loop turns. The service's name and /readyz
are about readiness: the listeners stand and every continuous collector is at work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from coral.agent import logs
from coral.agent.notify import Notifier
from coral.agent.serving.http import Headers, Page
from coral.agent.sessions.background import keep_going
from coral.agent.sessions.supervisor import Supervisor

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")

HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_EVERY_S: Final = 1.0


class Health:
    """The health of the server as a whole (the name "") and of the services in it."""

    def __init__(self, server: grpc.aio.Server, *services: str) -> None:
        self._services = services
        self._servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start_serving(self) -> None:
        """Alive from now on; not ready yet."""
        await self._servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(ready=False)

    async def set_ready(self, *, ready: bool) -> None:
        """Whether the services are ready."""
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._services:
            await self._servicer.set(name, status)

    async def shut_down(self) -> None:
        """NOT_SERVING from now on."""
        await self._servicer.enter_graceful_shutdown()


class Serving(Protocol):
    """A server with health checks."""

    async def set_ready(self, *, ready: bool) -> None:
        """Whether its services are ready."""


class Readiness:
    """What is missing until the agent is ready, in words; kept up to date by `kept_up`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.missing: tuple[str, ...] = ("the agent is starting",)
        self._reported: tuple[str, ...] | None = None

    @property
    def ready(self) -> bool:
        """Whether everything that is configured is at work."""
        return not self.missing

    @asynccontextmanager
    async def kept_up(self, server: Serving, notifier: Notifier) -> AsyncIterator[None]:
        """Inside the block the listeners stand: at every change, and every second, finds out what
        is missing and reports it to SERVER and NOTIFIER."""
        await self._report(server, notifier)
        notifier.ready()
        every_s = min(_EVERY_S, notifier.watchdog_s / 2) if notifier.watchdog_s else _EVERY_S
        # Whatever fails, the next sign of life is to come before the watchdog's time is up.
        keep_up = partial(self._keep_up, server, notifier, every_s)
        task = asyncio.create_task(keep_going("readiness", keep_up, every_s / 2), name="readiness")
        try:
            yield
        finally:
            notifier.stopping()
            self.missing = ("the agent is shutting down",)
            task.cancel()
            await asyncio.wait([task])

    async def _keep_up(self, server: Serving, notifier: Notifier, every_s: float) -> None:
        changed = self._supervisor.continuous_changed
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await changed.wait()
            changed.clear()
            # From the loop: one that is stuck is not alive, whatever other threads do.
            notifier.alive()
            await self._report(server, notifier)
            logs.tell_left_out()

    async def _report(self, server: Serving, notifier: Notifier) -> None:
        standings = self._supervisor.continuous
        missing = self.missing = tuple(str(each) for each in standings if each.waits.reason)
        if missing != self._reported:
            await server.set_ready(ready=self.ready)
            notifier.status("; ".join(missing) or "ready")
            self._reported = missing


async def healthz(_headers: Headers) -> Page:
    """/healthz: that this is answered says that the loop turns."""
    return Page(b"ok\n")


class ReadyPage:
    """/readyz: 200, or 503 with a line for everything that is missing."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    async def __call__(self, _headers: Headers) -> Page:
        """The page."""
        if self._readiness.ready:
            return Page(b"ready\n")
        lines = "".join(f"{line}\n" for line in self._readiness.missing)
        return Page(lines.encode(errors="backslashreplace"), 503)
