"""The gRPC server, from bind to shutdown."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from grpc_reflection.v1alpha import reflection

from coral.agent.config import Config, ConfigError, Limits
from coral.agent.serving.caller import TokenInterceptor
from coral.agent.serving.calls import handlers
from coral.agent.serving.health import HEALTH_NAME, Health
from coral.agent.serving.listening import UnixSocket, loopback_host
from coral.agent.serving.service import SERVICE, EbpfService
from coral.agent.sessions.supervisor import Supervisor

_GRACE_S: Final = 1.0
_PATIENCE_MS: Final = 5_000


class Server:
    """The server, from bind to shutdown. Use it as a context manager."""

    def __init__(self, supervisor: Supervisor, config: Config, token: str) -> None:
        self._supervisor = supervisor
        self._sockets: list[UnixSocket] = []
        interceptors = [TokenInterceptor(token)] if token else []
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config.limits))
        self._server.add_generic_rpc_handlers((handlers(SERVICE, EbpfService(supervisor)),))
        self.health = Health(self._server, SERVICE.full_name)
        reflection.enable_server_reflection(
            (SERVICE.full_name, reflection.SERVICE_NAME, HEALTH_NAME), self._server
        )
        try:
            self.addresses = [self._bind(address) for address in config.listen]
        except ConfigError:
            self._unlink()
            raise

    def _bind(self, address: str) -> str:
        """Binds one address; returns it with the port that was taken. Raises `ConfigError`."""
        try:
            if address.startswith("unix:"):
                unix_socket = UnixSocket(Path(address.removeprefix("unix:")))
                self._sockets.append(unix_socket)
                with unix_socket.owner_only():
                    self._server.add_insecure_port(address)
                return address
            host = loopback_host(address)
            port = self._server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"listen: {address}: {error}") from error
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        await self.health.start_serving()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Sends every subscriber the end, lets them read it, and stops, within little more than a
        second."""
        await self.health.shut_down()
        await self._supervisor.shutdown()
        await self._server.stop(_GRACE_S)
        self._unlink()

    def _unlink(self) -> None:
        for unix_socket in self._sockets:
            unix_socket.release()


def _options(limits: Limits) -> tuple[tuple[str, int], ...]:
    """How gRPC keeps connections."""
    age_ms, keepalive_ms = int(limits.connection_age * 1000), int(limits.keepalive * 1000)
    patience_ms = min(keepalive_ms, _PATIENCE_MS)
    return (
        # Otherwise a second agent on the port would silently take every other connection.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", patience_ms),
        # Otherwise a frozen client goes unnoticed for a minute.
        ("grpc.http2.ping_timeout_ms", patience_ms),
        ("grpc.http2.max_pings_without_data", 0),
        # The agent cannot end a call that is stuck in a write; the connection's age does.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", min(age_ms, _PATIENCE_MS)),
    )
