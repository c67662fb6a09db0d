"""The metrics for Prometheus: those of the collectors, and those of the agent itself.

Figures that are kept elsewhere (in the kernel, by the supervisor) are read at scrape time, in the
scrape's thread. docs/metrics.md is generated from this registry; no registry is global.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from coral.agent import logs
from coral.agent.config import MAX_PORT, ConfigError
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.contract import Measures
from coral.collectors.registry import COLLECTORS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name


def registry(supervisor: Supervisor) -> CollectorRegistry:
    """A registry with all metrics of one supervisor."""
    new = CollectorRegistry()
    new.register(_AgentMetrics(supervisor))
    for measures in supervisor.measures.values():
        new.register(_Measures(measures))
    ProcessCollector(registry=new)
    PlatformCollector(registry=new)
    GCCollector(registry=new)
    return new


@contextmanager
def serve(address: str, supervisor: Supervisor) -> Iterator[str]:
    """Serves /metrics at ADDRESS from its own thread, and yields the address with its port. An
    empty ADDRESS serves nothing. Raises `ConfigError`."""
    if not address:
        yield ""
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > MAX_PORT:
        raise ConfigError(f"metrics: {address!r} is not accepted; give HOST:PORT, or nothing")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry(supervisor))
    except OSError as error:
        raise ConfigError(f"metrics: {address}: {error.strerror}") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Measures(Collector):
    def __init__(self, measures: Measures) -> None:
        self._measures = measures

    def collect(self) -> Iterable[Metric]:
        return self._measures.collect()


class _AgentMetrics(Collector):
    """The metrics of the agent itself."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        supervisor = self._supervisor
        sessions = tuple(supervisor.sessions.values())
        active: Counter[int] = Counter(session.kind for session in sessions)
        subscribers: Counter[int] = Counter()
        memory_bytes: Counter[int] = Counter()
        for session in sessions:
            subscribers[session.kind] += len(session.channel.subscriptions)
            memory_bytes[session.kind] += session.map_memory_bytes
        return (
            _gauge("sessions_active", "Sessions at work.", active),
            _gauge("subscribers", "Subscribers to sessions.", subscribers),
            _gauge("map_memory_bytes", "What the kernel charges for maps.", memory_bytes),
            _counter("sessions_started", "Sessions that were started.", supervisor.totals.started),
            _counter("events", "Events that sessions numbered.", supervisor.totals.events),
            _counter_by(
                "sessions_ended",
                "Sessions that ended, by reason.",
                "reason",
                supervisor.totals.ended,
                _label_values(pb.SessionEnd.Reason, "REASON_"),
            ),
            _counter_by(
                "events_lost",
                "Events not delivered, by stage; in a subscriber's stage, for each subscriber.",
                "stage",
                supervisor.totals.losses(),
                _label_values(pb.Loss.Stage, "STAGE_"),
            ),
            *self._program_stats(),
            CounterMetricFamily(
                f"{_PREFIX}log_lines_dropped",
                "Lines of the agent's log that could not be written, or not in time.",
                logs.lines_dropped(),
            ),
        )

    def _program_stats(self) -> tuple[Metric, Metric]:
        labels = ("kind", "program")
        seconds = CounterMetricFamily(
            "coral_agent_program_run_seconds",
            "Time that eBPF programs ran, estimated from samples of the kernel's statistics.",
            labels=labels,
        )
        runs = CounterMetricFamily(
            "coral_agent_program_runs",
            "How often eBPF programs ran, estimated from samples of the kernel's statistics.",
            labels=labels,
        )
        for (kind, program), run in tuple(self._supervisor.program_stats.estimates.items()):
            seconds.add_metric((kind_name(kind), program), run.seconds)
            runs.add_metric((kind_name(kind), program), run.runs)
        return seconds, runs


_PREFIX: Final = "coral_agent_"


def _label_values(enum: Any, prefix: str) -> Mapping[int, str]:  # noqa: ANN401  a protobuf enum
    return {value: name.removeprefix(prefix).lower() for name, value in enum.items() if value}


def _gauge(name: str, documentation: str, values: Counter[int]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("kind",))
    for kind in COLLECTORS:
        family.add_metric((kind_name(kind),), values[kind])
    return family


def _counter(name: str, documentation: str, values: Counter[int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, documentation, labels=("kind",))
    for kind in COLLECTORS:
        family.add_metric((kind_name(kind),), values[kind])
    return family


def _counter_by(
    name: str,
    documentation: str,
    label: str,
    values: Counter[tuple[int, int]],
    label_values: Mapping[int, str],
) -> Metric:
    """A counter by kind and one more label; samples of zero are exposed too."""
    family = CounterMetricFamily(_PREFIX + name, documentation, labels=("kind", label))
    for kind in COLLECTORS:
        for value, text in label_values.items():
            family.add_metric((kind_name(kind), text), values[kind, value])
    return family
