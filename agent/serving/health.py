"""Health: whether the agent is alive, and whether what its configuration asks for is at work.

gRPC's health (grpc.health.v1) and the pages /healthz and /readyz say the same. The name "" and
/healthz are about life: they answer as long as the event loop turns. The service's name and /readyz
are about readiness: the listeners stand and every continuous collector is at work; /readyz also
waits until the kernel has been probed, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Final, Protocol, cast

import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from coral.agent import logs
from coral.agent.caller import Caller
from coral.agent.errors import NotFoundError
from coral.agent.notify import Notifier
from coral.agent.serving.http import Headers, Page
from coral.agent.sessions.background import keep_going
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams import Readers
from coral.collectors.metering import Charge, uncharged

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")

HEALTH: Final = cast("ServiceDescriptor", health_pb2.DESCRIPTOR.services_by_name["Health"])
Status: Final = health_pb2.HealthCheckResponse
_EVERY_S: Final = 1.0


class Health:
    """The health of the server as a whole (the name "") and of SERVICES in it, and the methods of
    grpc.health.v1 for calls.py.

    A change of status waits for nobody. A watcher that was slow to read the last status gets the
    latest one next, and not those between.
    """

    def __init__(self, readers: Readers, *services: str) -> None:
        self._readers = readers
        self._statuses: dict[str, int] = dict.fromkeys(("", *services), Status.NOT_SERVING)
        self._changed = asyncio.Event()  # another one after each change

    def set_alive(self) -> None:
        """SERVING, apart from the services, which are not ready yet."""
        self._set({"": Status.SERVING})

    def set_ready(self, *, ready: bool) -> None:
        """Whether the services are ready."""
        status = Status.SERVING if ready else Status.NOT_SERVING
        self._set({name: status for name in self._statuses if name})

    def shut_down(self) -> None:
        """NOT_SERVING from now on."""
        self._set(dict.fromkeys(self._statuses, Status.NOT_SERVING))

    def _set(self, statuses: Mapping[str, int]) -> None:
        self._statuses.update(statuses)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802  the RPC's name
        self, request: health_pb2.HealthCheckRequest, _caller: Caller
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service. Raises `NotFoundError`."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFoundError(f"service: {request.service!r} is not here")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, _request: Message, _caller: Caller
    ) -> Message:
        """The status of every service."""
        statuses = {name: Status(status=status) for name, status in self._statuses.items()}
        response = GetMessageClass(HEALTH.methods_by_name["List"].output_type)
        return response(statuses=statuses)

    @contextmanager
    def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        """The status of one service, then every change."""
        with self._readers.open(caller) as reader:
            yield reader.timed(self._watched(request.service)), uncharged

    async def _watched(self, service: str) -> AsyncIterator[bytes]:
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, Status.SERVICE_UNKNOWN)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status).SerializeToString()
            await changed.wait()


class Serving(Protocol):
    """A server with health checks."""

    def set_ready(self, *, ready: bool) -> None:
        """Whether its services are ready."""


class Readiness:
    """What is missing until the agent is ready, in words; kept up to date by `kept_up`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.missing: tuple[str, ...] = ("the agent is starting",)
        self._reported: tuple[str, ...] | None = None
        self._probed = False

    def set_probed(self) -> None:
        """It is known by now which collectors this kernel can run."""
        self._probed = True

    @property
    def missing_for_pages(self) -> tuple[str, ...]:
        """The same, for those that send work to agents that are ready: probing may take a second
        in which calls are answered already, but late."""
        return self.missing or (() if self._probed else ("the kernel is being probed",))

    @property
    def ready(self) -> bool:
        """Whether everything that is configured is at work."""
        return not self.missing

    @asynccontextmanager
    async def kept_up(self, server: Serving, notifier: Notifier) -> AsyncIterator[None]:
        """Inside the block the listeners stand: at every change, and every second, finds out what
        is missing and reports it to SERVER and NOTIFIER."""
        self._report(server, notifier)
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
            self._report(server, notifier)
            logs.tell_left_out()

    def _report(self, server: Serving, notifier: Notifier) -> None:
        standings = self._supervisor.continuous
        missing = self.missing = tuple(str(each) for each in standings if each.waits.reason)
        if missing != self._reported:
            server.set_ready(ready=self.ready)
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
        missing = self._readiness.missing_for_pages
        if not missing:
            return Page(b"ready\n")
        lines = "".join(f"{line}\n" for line in missing)
        return Page(lines.encode(errors="backslashreplace"), 503)
