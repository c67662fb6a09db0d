"""The pages for monitoring, over HTTP: /metrics, /healthz, /readyz."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from coral.agent.config import ConfigError, host_and_port
from coral.agent.serving.counts import Counts
from coral.agent.serving.health import Readiness, ReadyPage, healthz
from coral.agent.serving.http import Handler, HttpServer
from coral.agent.serving.prometheus import MetricsPage, Registry
from coral.agent.sessions.supervisor import Supervisor

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")


@contextmanager
def serve(
    address: str, supervisor: Supervisor, readiness: Readiness, counts: Counts
) -> Iterator[str]:
    """Serves the pages at ADDRESS on the running loop, and yields the address with its port. An
    empty ADDRESS serves nothing. Raises `ConfigError`."""
    if not address:
        yield ""
        return
    parts = host_and_port(address)
    if not parts:
        raise ConfigError(f"metrics: {address!r} is not accepted; give HOST:PORT, or nothing")
    host, port = parts
    pages: dict[str, Handler] = {
        "/metrics": MetricsPage(Registry(supervisor, counts)),
        "/healthz": healthz,
        "/readyz": ReadyPage(readiness),
    }
    try:
        server = HttpServer(host.strip("[]"), port, pages)
    except OSError as error:
        raise ConfigError(f"metrics: {address}: {error.strerror}") from error
    if not _is_loopback(host.strip("[]")):
        log.warning(
            "metrics without a token beyond this machine: whoever reaches this address can read "
            "names of services and addresses of peers",
            metrics=address,
        )
    with server:
        yield f"{host}:{server.port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
