"""The gRPC server: where it listens, who may call, health and reflection."""

from __future__ import annotations

import fcntl
import hmac
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from coral.agent.config import MAX_PORT, Config, ConfigError, Limits
from coral.agent.serving.service import SERVICE, EbpfService, handlers
from coral.agent.sessions.supervisor import Supervisor

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

_GRACE_S: Final = 1.0
_PATIENCE_MS: Final = 5_000
_HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Server:
    """The server, from bind to the last goodbye. Use it as a context manager."""

    def __init__(self, supervisor: Supervisor, config: Config, token: str) -> None:
        self._supervisor = supervisor
        self._sockets: list[_UnixSocket] = []
        interceptors = [_TokenInterceptor(token)] if token else []
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config.limits))
        self._server.add_generic_rpc_handlers((handlers(EbpfService(supervisor)),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE.full_name, reflection.SERVICE_NAME, _HEALTH_NAME), self._server
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
                unix_socket = _UnixSocket(Path(address.removeprefix("unix:")))
                self._sockets.append(unix_socket)
                with unix_socket.owner_only():
                    self._server.add_insecure_port(address)
                return address
            host = _loopback_host(address)
            port = self._server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"listen: {address}: {error}") from error
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        for name in ("", SERVICE.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Tells subscribers why, lets them read it, and stops. At most a little over a second."""
        await self._health.enter_graceful_shutdown()
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
        ("grpc.so_reuseport", 0),  # or a second agent would take every other connection, silently
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", patience_ms),
        ("grpc.http2.ping_timeout_ms", patience_ms),  # or a frozen client goes unseen for a minute
        ("grpc.http2.max_pings_without_data", 0),
        # A call stalled in a write cannot be ended by us; the connection's age ends it.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", min(age_ms, _PATIENCE_MS)),
    )


class _UnixSocket:
    """A socket's path, held by a lock: a second server on a live path would bind without a word."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            raise ConfigError(
                f"listen: unix:{path}: user {os.geteuid()} may not write {path}.lock: give it "
                f"{path.parent} and what is in it"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(f"listen: unix:{path}: another agent is listening there") from error
        path.unlink(missing_ok=True)

    def owner_only(self) -> _Umask:
        """While it lasts, sockets are made for their owner alone (0600)."""
        return _Umask(0o177)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._lock)


class _Umask:
    def __init__(self, mask: int) -> None:
        self._mask = mask

    def __enter__(self) -> None:
        self._before = os.umask(self._mask)

    def __exit__(self, *_: object) -> None:
        os.umask(self._before)


def _loopback_host(address: str) -> str:
    """The host of ADDRESS, if it is this machine's own. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"listen: {address!r} is not accepted; give unix:PATH or 127.0.0.1:PORT")
    plain = host.strip("[]")
    try:
        found = {info[4][0] for info in socket.getaddrinfo(plain, None)}
    except OSError as error:
        raise ConfigError(f"listen: {address!r}: {error}") from error
    if not plain or not all(ipaddress.ip_address(a).is_loopback for a in found):
        raise ConfigError(
            f"listen: {address!r} is beyond loopback, and there is no TLS yet: anybody who reaches "
            "it could start collectors; give 127.0.0.1:PORT or unix:PATH"
        )
    return host


def read_token(config: Config) -> str:
    """The token that callers must send, or none. Raises `ConfigError`."""
    if not config.auth.token_file:
        return ""
    try:
        token = Path(config.auth.token_file).read_text().strip()
    except OSError as error:
        raise ConfigError(f"auth.token_file: {config.auth.token_file}: {error.strerror}") from error
    if not token:
        raise ConfigError(f"auth.token_file: {config.auth.token_file} is empty")
    return token


class _TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets only those in who know the token; health checks need none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on, or answers it with UNAUTHENTICATED."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = str(metadata.get("authorization", ""))
        if hmac.compare_digest(given.encode(), self._expected.encode()) or method.startswith(
            f"/{_HEALTH_NAME}/"
        ):
            return handler

        async def refuse(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            reason = "authorization: the token is wrong" if given else "authorization: no token"
            log.warning(
                "refused", peer=context.peer(), code="UNAUTHENTICATED", method=method, reason=reason
            )
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"{reason}; send `authorization: Bearer TOKEN` with this agent's token",
            )

        # The answer must have the arity of the method that was asked for.
        if handler is not None and handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)
