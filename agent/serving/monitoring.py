"""The pages for monitoring, over HTTP: /metrics, /healthz, /readyz."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import structlog

from coral.agent.config import Config, ConfigError, host_and_port
from coral.agent.serving.counts import Counts
from coral.agent.serving.health import Readiness, ReadyPage, healthz
from coral.agent.serving.http import Handler, HttpServer
from coral.agent.serving.prometheus import MetricsPage, Registry
from coral.agent.serving.web_guard import WebGuard
from coral.agent.sessions.supervisor import Supervisor

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.agent")


@contextmanager
def serve(
    config: Config,
    supervisor: Supervisor,
    readiness: Readiness,
    counts: Counts,
    guard: WebGuard | None = None,
) -> Iterator[tuple[str, str]]:
    """Serves the pages where CONFIG says, on the running loop, and yields both addresses, of
    metrics and of health, with their ports; an address that is not configured is empty. GUARD is of
    the metrics alone. Raises `ConfigError`."""
    health: dict[str, Handler] = {"/healthz": healthz, "/readyz": ReadyPage(readiness)}
    metrics: dict[str, Handler] = {"/metrics": MetricsPage(Registry(supervisor, counts)), **health}
    guards = guard is not None and guard.refuses
    if config.metrics and not guards and not _is_loopback(config.metrics):
        log.warning(
            "metrics without a token beyond this machine: whoever reaches this address can read "
            "names of services and addresses of peers; see metrics_web_config",
            metrics=config.metrics,
        )
    with (
        _served("metrics", config.metrics, metrics, guard) as of_metrics,
        _served("health", config.health, health, None) as of_health,
    ):
        yield of_metrics, of_health


@contextmanager
def _served(
    key: str, address: str, pages: Mapping[str, Handler], guard: WebGuard | None
) -> Iterator[str]:
    if not address:
        yield ""
        return
    parts = host_and_port(address)
    if not parts:
        raise ConfigError(f"{key}: {address!r} is not accepted; give HOST:PORT, or nothing")
    host, port = parts
    try:
        server = HttpServer(host.strip("[]"), port, pages, guard)
    except OSError as error:
        raise ConfigError(f"{key}: {address}: {error.strerror}") from error
    with server:
        yield f"{host}:{server.port}"


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
