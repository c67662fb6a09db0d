"""The pages for monitoring, over HTTP: /metrics, /healthz, /readyz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coral.agent.config import MAX_PORT, ConfigError
from coral.agent.serving.counts import Counts
from coral.agent.serving.health import Readiness, ReadyPage, healthz
from coral.agent.serving.http import Handler, HttpServer
from coral.agent.serving.prometheus import MetricsPage, Registry
from coral.agent.sessions.supervisor import Supervisor


@contextmanager
def serve(
    address: str, supervisor: Supervisor, readiness: Readiness, counts: Counts
) -> Iterator[str]:
    """Serves the pages at ADDRESS on the running loop, and yields the address with its port. An
    empty ADDRESS serves nothing. Raises `ConfigError`."""
    if not address:
        yield ""
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"metrics: {address!r} is not accepted; give HOST:PORT, or nothing")
    pages: dict[str, Handler] = {
        "/metrics": MetricsPage(Registry(supervisor, counts)),
        "/healthz": healthz,
        "/readyz": ReadyPage(readiness),
    }
    try:
        server = HttpServer(host.strip("[]"), int(port), pages)
    except OSError as error:
        raise ConfigError(f"metrics: {address}: {error.strerror}") from error
    with server:
        yield f"{host}:{server.port}"
