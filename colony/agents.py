"""What the configuration says of agents, as the objects that find them and connect to them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import grpc

from coral.client import AgentClient, UnauthenticatedError
from coral.colony.config import Agents, ConfigError, Endpoints
from coral.colony.follow.discovery.dns import Named
from coral.colony.follow.discovery.http_json import Server
from coral.colony.follow.discovery.kubernetes import ACCOUNT, server_in_cluster
from coral.colony.follow.discovery.kubernetes import Endpoints as EndpointsOf
from coral.colony.follow.discovery.listed import Listed, Watched
from coral.colony.follow.discovery.source import Source
from coral.colony.follow.follower import ONCE
from coral.colony.follow.status import Connect
from coral.wire.settings.files import read_regular

_MOST_TOKEN_BYTES: Final = 64 << 10
_READ_AHEAD_BYTES: Final = 64 << 10
"""A batch is not much larger. What a slow store cannot take waits at the agents, which bound it."""


def sources(agents: Agents) -> list[Source]:
    """All that is to find agents. Raises `ConfigError`."""
    found: list[Source] = []
    if agents.addresses:
        found.append(Listed(agents.addresses))
    if agents.file:
        found.append(Watched(Path(agents.file)))
    found += (Named(name, agents.dns_every) for name in agents.dns)
    if agents.kubernetes.service:
        found.append(_endpoints(agents.kubernetes))
    return found


def connecting(agents: Agents) -> Connect:
    """What makes the client of the agent at an address."""
    tls = agents.tls.as_client()

    def connect(address: str) -> AgentClient:
        token = _token(agents.token_file) if agents.token_file else None
        return AgentClient(
            address, token, tls=tls, timeout_s=agents.timeout, retry=ONCE,
            read_ahead_bytes=_READ_AHEAD_BYTES,
        )  # fmt: skip

    return connect


def _token(path: str) -> str:
    """Raises `UnauthenticatedError`, as an agent would without it."""
    try:
        return read_regular(Path(path), _MOST_TOKEN_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnauthenticatedError(
            grpc.StatusCode.UNAUTHENTICATED, f"agents.token_file: {path}: {reason}"
        ) from error


def _endpoints(told: Endpoints) -> EndpointsOf:
    try:
        url = told.server or server_in_cluster()
    except ValueError as error:
        raise ConfigError(f"agents.kubernetes.server: {error}") from error
    in_pod = {name: str(ACCOUNT / name) for name in ("token", "ca.crt")}
    if told.server:  # what is no pod's own server gets no pod's token
        in_pod = dict.fromkeys(in_pod, "")
    server = Server(url, told.token_file or in_pod["token"], told.ca_file or in_pod["ca.crt"])
    namespace, _, name = told.service.partition("/")
    return EndpointsOf(server, namespace, name, told.port)
