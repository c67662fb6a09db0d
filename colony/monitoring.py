"""The colony's own metrics, and its health: how it follows, and how the loop fares."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from coral.colony.follow.fleet import Fleet
from coral.colony.follow.status import State
from coral.colony.pages import Page, Pages
from coral.colony.versions import version_of

Families = Callable[[], Iterable[Metric]]
Obstacle = Callable[[], str]

_LAG_EVERY_S: Final = 0.5


class Lag:
    """How late the loop is. `run` measures it until it is cancelled."""

    def __init__(self) -> None:
        self.last_s = 0.0
        self.worst_s = 0.0
        """Since it was read last."""

    async def run(self) -> None:
        """Measures."""
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(_LAG_EVERY_S)
            self.last_s = max(time.monotonic() - began_s - _LAG_EVERY_S, 0.0)
            self.worst_s = max(self.worst_s, self.last_s)

    def take_worst_s(self) -> float:
        """The worst since the call before."""
        worst_s, self.worst_s = self.worst_s, self.last_s
        return worst_s


def following_families(fleet: Fleet) -> Iterator[Metric]:
    """How FLEET stands, as families of metrics."""
    statuses = fleet.statuses
    agents = GaugeMetricFamily(
        "coral_colony_agents", "Addresses of agents, by how they stand.", labels=["state"]
    )
    for state in State:
        agents.add_metric([state.value], sum(status.state is state for status in statuses))
    yield agents
    yield GaugeMetricFamily(
        "coral_colony_sessions", "Sessions that are read now.",
        value=sum(status.sessions for status in statuses),
    )  # fmt: skip
    yield GaugeMetricFamily(
        "coral_colony_missing_collectors",
        "Collectors that are wanted on agents that are followed, and not at work there.",
        value=sum(map(len, fleet.missing().values())),
    )
    counts = fleet.counts
    for name, by_kind, text in (
        ("deliveries", counts.deliveries, "Batches handed to the store."),
        ("received_rows", counts.rows, "Rows received."),
        ("received_bytes", counts.bytes, "Bytes of batches received, as they are on the wire."),
        ("started", counts.started, "Collectors started."),
        ("refused", counts.refused, "Collectors that agents did not start or renew."),
    ):
        family = CounterMetricFamily(f"coral_colony_{name}", text, labels=["kind"])
        for kind, count in sorted(by_kind.items()):
            family.add_metric([kind], count)
        yield family
    lost = CounterMetricFamily(
        "coral_colony_lost_events",
        "Events that had a number and were lost on the way to the colony, by stage.",
        labels=["kind", "stage"],
    )
    for (kind, stage), count in sorted(counts.lost.items()):
        lost.add_metric([kind, stage], count)
    yield lost
    for name, value, text in (
        ("lost_sessions", counts.sessions_lost, "Sessions that ended with their agent."),
        ("connections", counts.connections, "Connections to agents that were made."),
        ("failures", counts.failures, "Connections to agents that failed or broke."),
    ):
        yield CounterMetricFamily(f"coral_colony_{name}", text, value=value)


def lag_families(lag: Lag) -> Iterator[Metric]:
    """How late the loop is."""
    yield GaugeMetricFamily(
        "coral_colony_loop_lag_seconds",
        "The longest that the event loop was late since the last scrape.",
        value=lag.take_worst_s(),
    )


def log_families(lines_dropped: int) -> Iterator[Metric]:
    """How many lines the log has lost."""
    yield CounterMetricFamily(
        "coral_colony_log_lines_dropped",
        "Lines of the colony's log that could not be written, or not in time.",
        value=lines_dropped,
    )


def build_info() -> Metric:
    """What this process is made of. Make it once: it reads the files of installed packages."""
    values = {
        "version": version_of("coral-ebpf-agent"),
        "python": platform.python_version(),
        "duckdb": version_of("duckdb"),
        "architecture": platform.machine(),
    }
    family = GaugeMetricFamily(
        "coral_colony_build_info", "What the colony is made of; always 1.", labels=tuple(values)
    )
    family.add_metric(tuple(values.values()), 1)
    return family


class _AtScrape(Collector):
    """Makes families when they are asked for."""

    def __init__(self, makers: Iterable[Families]) -> None:
        self._makers = tuple(makers)

    def collect(self) -> Iterator[Metric]:
        for make in self._makers:
            yield from make()


def pages(makers: Iterable[Families], obstacles: Mapping[str, Obstacle]) -> Pages:
    """/metrics has the families of MAKERS; /healthz says that the loop turns; /readyz is 503 while
    one of OBSTACLES, by what is in the way, has something to say."""
    registry = CollectorRegistry()
    registry.register(_AtScrape(makers))
    ProcessCollector(registry=registry)

    def metrics() -> Page:
        return Page(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    def ready() -> Page:
        said = {what: why for what, ask in obstacles.items() if (why := ask())}
        if not said:
            return Page(b"ready\n")
        text = "".join(f"{what}: {why}\n" for what, why in said.items())
        return Page(text.encode(), HTTPStatus.SERVICE_UNAVAILABLE)

    return {"/metrics": metrics, "/healthz": lambda: Page(b"ok\n"), "/readyz": ready}
