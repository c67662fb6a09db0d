"""Which callers get in, and what the agent knows of them: from gRPC's context to a `Caller`."""

from __future__ import annotations

import hmac
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import structlog

from coral.agent.caller import Caller, Trust
from coral.agent.config import Config, ConfigError
from coral.agent.files import read_with_mode
from coral.agent.serving.counts import STALLED
from coral.agent.serving.health import HEALTH
from coral.agent.serving.relay import Connection

_MOST_TOKEN_BYTES: Final = 4096
_LEAST_TOKEN_BYTES: Final = 16

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

Context = grpc.aio.ServicerContext[Any, Any]
CallerOf = Callable[[Context], Caller]


def read_token(config: Config) -> str:
    """The token that callers must send, or none. Raises `ConfigError`."""
    path = config.auth.token_file
    if not path:
        return ""
    try:
        content, mode = read_with_mode(Path(path), _MOST_TOKEN_BYTES)
        token = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"auth.token_file: {path}: not UTF-8") from error
    except OSError as error:
        raise ConfigError(f"auth.token_file: {path}: {error.strerror}") from error
    shown = f"{stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"auth.token_file: {path}: others than its owner may write it (mode {shown}), and "
            "could choose the token; give a file of mode 0600"
        )
    if not token:
        raise ConfigError(f"auth.token_file: {path} is empty")
    if (size_bytes := len(token.encode())) < _LEAST_TOKEN_BYTES:
        raise ConfigError(
            f"auth.token_file: {path}: the token has {size_bytes} bytes; give at least "
            f"{_LEAST_TOKEN_BYTES}, such as from `openssl rand -hex 32`"
        )
    # Kubernetes mounts secrets like that, where only the container's users see them.
    if mode & stat.S_IROTH:
        log.warning("every user may read the token", file=path, mode=shown, better="0600")
    return token


def unknown_caller(context: Context) -> Caller:
    """The caller, as gRPC knows it; for servers without a gate."""
    return Caller(peer=context.peer(), principal=context.peer(), trust=Trust.ANYONE)


class Callers:
    """Knows callers by their connection, which FIND finds by the name that gRPC has for it."""

    def __init__(self, find: Callable[[str], Connection | None], *, has_token: bool) -> None:
        self._find, self._has_token = find, has_token

    def of(self, context: Context) -> Caller:
        """The caller. Where the agent has a token, only those that sent it get to a method."""
        name = context.peer()
        connection = self._find(name)
        if not connection:  # it was closed meanwhile
            return unknown_caller(context)
        origin, trust = connection.origin, connection.origin.trust
        if trust is Trust.ANYONE and self._has_token:
            trust = Trust.TOKEN
        return Caller(
            peer=origin.address,
            principal=f"{origin.principal}, {name}" if trust is Trust.OWNER else origin.principal,
            trust=trust,
            pid=origin.pid,
            hang_up=partial(connection.close, STALLED),
        )


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets callers in that send the token; health checks need none."""

    def __init__(self, token: str, caller_of: CallerOf) -> None:
        self._expected = f"Bearer {token}"
        self._caller_of = caller_of

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
        if hmac.compare_digest(
            given.encode(errors="replace"), self._expected.encode()
        ) or method.startswith(f"/{HEALTH.full_name}/"):
            return handler

        async def refuse(_request: object, context: Context) -> None:
            reason = "authorization: the token is wrong" if given else "authorization: no token"
            caller = self._caller_of(context)
            log.warning(
                "refused", peer=caller.peer, principal=caller.refusals_of, code="UNAUTHENTICATED",
                method=method, reason=reason,
            )  # fmt: skip
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"{reason}; send `authorization: Bearer TOKEN` with this agent's token",
            )

        # The answer must have the arity of the method that was asked for.
        if handler is not None and handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)
