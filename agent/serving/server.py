"""The gRPC servers and the gate before them, from bind to shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
import structlog

from coral.agent.access.kubernetes import Reviews
from coral.agent.access.tokens import Tokens
from coral.agent.config import Config, ConfigError, Limits
from coral.agent.serving.caller import Callers
from coral.agent.serving.calls import Quotas, handlers
from coral.agent.serving.certificates import Distrusted
from coral.agent.serving.counts import Counts
from coral.agent.serving.door import Door
from coral.agent.serving.gate import Side, use_all_descriptors
from coral.agent.serving.health import HEALTH, Health
from coral.agent.serving.listening import Listener, listen
from coral.agent.serving.reflection import REFLECTION, Reflection
from coral.agent.serving.relay import AGE_GRACE_S, Connection
from coral.agent.serving.rotation import Rotation
from coral.agent.serving.service import SERVICE, EbpfService
from coral.agent.serving.upstream import Upstream
from coral.agent.sessions.supervisor import Supervisor

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")

# Together with the rest of a stop they stay below two seconds.
_GRACE_S: Final = 0.6
_FLUSH_S: Final = 0.2  # for what gRPC has sent and clients have not read
_PATIENCE_MS: Final = 5_000
_HEADERS_BYTES: Final = 8 << 10
# Up to here the agent itself refuses a request that is too long, and says how long it may be.
_MESSAGE_BYTES: Final = 8 << 20


class Server:
    """The server, from bind to shutdown. Use it as a context manager."""

    def __init__(
        self,
        supervisor: Supervisor,
        config: Config,
        tokens: Tokens,
        reviews: Reviews | None,
        counts: Counts,
        *,
        tls: Rotation | None = None,
    ) -> None:
        """Binds every address; `addresses` has them with the ports that were taken. Callers are let
        in by TOKENS and REVIEWS; COUNTS is kept up to date. Raises `ConfigError`."""
        self._supervisor = supervisor
        door = Door(supervisor, tokens, reviews)
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_fault)
        use_all_descriptors()
        self._listeners = listen(config, has_token=config.auth.asks_for_tokens, tls=tls)
        self.addresses = [listener.address for listener in self._listeners]
        try:
            self._servers = [
                _Backend(kind, self._listeners, supervisor, door, counts)
                for kind in sorted({listener.kind for listener in self._listeners})
            ]
        except ConfigError:
            for listener in self._listeners:
                listener.close()
            raise
        if tls:
            tls.changed = self._distrust
        if config.auth.insecure_loopback and not config.auth.asks_for_tokens and not tls:
            self._warn()

    def _warn(self) -> None:
        user = f"user {os.geteuid()}" if os.geteuid() else "root"
        warning = (
            f"every local user may trace as {user}: auth.insecure_loopback is set, and there is "
            "no token"
        )
        for listener in self._listeners:
            if listener.kind == "tcp":
                log.warning(warning, address=listener.address)

    def _distrust(self, distrusted: Distrusted) -> None:
        for server in self._servers:
            server.side.distrust(distrusted)

    def set_ready(self, *, ready: bool) -> None:
        """Whether the service is ready, for health checks."""
        for server in self._servers:
            server.health.set_ready(ready=ready)

    async def __aenter__(self) -> Self:
        for server in self._servers:
            await server.start()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Sends every subscriber the end, lets them read it, and stops, within about a second,
        whatever clients do."""
        for server in self._servers:
            server.announce_end()
        await self._supervisor.shutdown()
        await asyncio.gather(*(server.stop() for server in self._servers))


class _Backend:
    """One gRPC server, and the side of the gate that leads to it."""

    def __init__(
        self,
        kind: str,
        listeners: Sequence[Listener],
        supervisor: Supervisor,
        door: Door,
        counts: Counts,
    ) -> None:
        limits = supervisor.config.limits
        callers = Callers(self._find)
        self._server = grpc.aio.server(options=_options(limits))
        quotas = Quotas.of(limits, counts.calls_refused)
        # Health checks need no token. They do not take places from calls that do, nor these from
        # them: an agent with slow calls is not dead.
        checks = Quotas.of(limits, counts.calls_refused)
        readers = supervisor.readers
        self.health = Health(readers, SERVICE.full_name)
        reflection = Reflection(readers, SERVICE.full_name, HEALTH.full_name)
        self._server.add_generic_rpc_handlers(
            (
                handlers(SERVICE, EbpfService(supervisor), callers.of, quotas, door),
                handlers(HEALTH, self.health, callers.of, checks, door),
                handlers(REFLECTION, reflection, callers.of, quotas, door),
            )
        )
        unix = [Path(one.address.removeprefix("unix:")) for one in listeners if one.kind == "unix"]
        self._upstream = Upstream(self._server, unix[0].parent if unix else None)
        own = [listener for listener in listeners if listener.kind == kind]
        self.side = Side(own, self._upstream.dial, limits, counts.listeners[kind])

    def _find(self, name: str) -> Connection | None:
        return self.side.find(name)

    async def start(self) -> None:
        """Serves from now on."""
        await self._server.start()
        self.health.set_alive()
        self.side.open()

    def announce_end(self) -> None:
        """Accepts no more, and is no longer healthy."""
        self.side.stop_accepting()
        self.health.shut_down()

    async def stop(self) -> None:
        """Ends every call and connection, whatever clients do."""
        # gRPC waits for connections whose clients read nothing, until the gate closes them.
        stopping = asyncio.ensure_future(self._server.stop(_GRACE_S))
        await asyncio.wait([stopping], timeout=_GRACE_S)
        await self.side.close(_FLUSH_S)
        await asyncio.wait([stopping], timeout=_FLUSH_S)
        self._upstream.close()


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether what gRPC logs is more than that a call ended while its answer was being sent, as
    callers can make any call end, by its deadline for one."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "ExecuteBatchError"


def _options(limits: Limits) -> tuple[tuple[str, int], ...]:
    """How gRPC keeps connections."""
    age_ms, keepalive_ms = int(limits.connection_age * 1000), int(limits.keepalive * 1000)
    patience_ms = min(keepalive_ms, _PATIENCE_MS)
    return (
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", patience_ms),
        # Otherwise a frozen client goes unnoticed for a minute.
        ("grpc.http2.ping_timeout_ms", patience_ms),
        ("grpc.http2.max_pings_without_data", 0),
        # The agent cannot end a call that is stuck in a write; the connection's age does.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", min(age_ms, int(AGE_GRACE_S * 1000))),
        ("grpc.max_connection_idle_ms", int(limits.connection_idle * 1000)),
        ("grpc.max_concurrent_streams", limits.calls_per_connection),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ("grpc.max_metadata_size", _HEADERS_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _HEADERS_BYTES),
    )
