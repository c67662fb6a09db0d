"""The metrics for Prometheus: those of the collectors, and those of the agent itself.

All figures are copied on the event loop at one moment; a thread makes text of them. That happens at
most once a second, however many scrapers there are. docs/metrics.md is generated from this
registry; no registry is global.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from email.utils import formatdate
from itertools import chain
from typing import Any, Final, TypeVar

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coral.agent import logs
from coral.agent.serving.counts import Counts
from coral.agent.serving.exposition import OPENMETRICS, TEXT, encode
from coral.agent.serving.http import Headers, Page
from coral.agent.sessions.continuous import Standing
from coral.agent.sessions.costs import CpuUse
from coral.agent.sessions.supervisor import Supervisor
from coral.bpf import BpfError
from coral.bpf.libbpf import version as libbpf_version
from coral.collectors.registry import COLLECTORS
from coral.collectors.runner import in_thread
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name

T = TypeVar("T")

_FRESH_S: Final = 1.0


class Registry:
    """All metrics of one supervisor, and of the servers that keep COUNTS."""

    def __init__(self, supervisor: Supervisor, counts: Counts | None = None) -> None:
        self._agent = _AgentMetrics(supervisor, counts or Counts())
        self._measures = tuple(supervisor.measures.values())
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)

    def collect(self) -> Iterator[Metric]:
        """Copies the figures. Call it on the event loop; iterate over the families, which are made
        meanwhile, anywhere."""
        families = [self._agent.collect(), *(measures.collect() for measures in self._measures)]
        return chain(*families, _later(self._process.collect))


def _later(collect: Callable[[], Iterable[Metric]]) -> Iterator[Metric]:
    yield from collect()


class MetricsPage:
    """/metrics: in each format that scrapers ask for, a text that is at most a second old."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._texts: dict[str, tuple[float, asyncio.Task[Page]]] = {}

    async def __call__(self, headers: Headers) -> Page:
        """The page in the format that HEADERS accept. Its Date is when its figures were read."""
        accept = headers.get(b"accept", b"")
        wanted = OPENMETRICS if b"application/openmetrics-text" in accept else TEXT
        loop = asyncio.get_running_loop()
        began_at, text = self._texts.get(wanted, (0.0, None))
        if text is None or (text.done() and loop.time() - began_at >= _FRESH_S):
            # A task of its own: it goes on for others when its first reader leaves.
            text = loop.create_task(self._render(wanted))
            self._texts[wanted] = loop.time(), text
        return await asyncio.shield(text)

    async def _render(self, content_type: str) -> Page:
        date = formatdate(usegmt=True)
        families = self._registry.collect()
        body = await in_thread(lambda: encode(families, content_type))
        return Page(body, headers={"Content-Type": content_type, "Date": date})


class _AgentMetrics:
    """The metrics of the agent itself."""

    def __init__(self, supervisor: Supervisor, counts: Counts) -> None:
        self._supervisor = supervisor
        self._counts = counts
        self._build = _build_info()

    def collect(self) -> Iterable[Metric]:
        """The families, with figures of this moment."""
        supervisor = self._supervisor
        sessions = supervisor.at_work()
        active: Counter[int] = Counter(session.kind for session in sessions)
        starting: Counter[int] = Counter(s.kind for s in supervisor.sessions.values())
        starting -= active
        subscribers: Counter[int] = Counter()
        memory_bytes: Counter[int] = Counter()
        for session in sessions:
            subscribers[session.kind] += len(session.channel.subscriptions)
            memory_bytes[session.kind] += session.map_memory_bytes
        return (
            _gauge("sessions_active", "Sessions at work.", active),
            _gauge("sessions_starting", "Sessions that are being started.", starting),
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
            self._cpu(),
            *self._limits(),
            *self._program_stats(),
            *self._continuous(),
            *self._refusals(),
            *self._exported(),
            *self._access(),
            *self._pods(),
            *self._tls(),
            self._build,
            CounterMetricFamily(
                f"{_PREFIX}log_lines_dropped",
                "Lines of the agent's log that could not be written, or not in time.",
                logs.lines_dropped(),
            ),
        )

    def _cpu(self) -> Metric:
        family = CounterMetricFamily(
            _PREFIX + "cpu_seconds",
            "CPU time that sessions caused, which limits.cpu_percent is about, by what used it: "
            "programs, reading, subscribers.",
            labels=("kind", "cause"),
        )
        used = self._supervisor.totals.cpu()
        for kind in COLLECTORS:
            for cause, seconds in asdict(used.get(kind, CpuUse())).items():
                family.add_metric((kind_name(kind), cause), seconds)
        return family

    def _limits(self) -> Iterable[Metric]:
        """Alerts compare use with these."""
        limits = self._supervisor.config.limits
        return (
            GaugeMetricFamily(
                f"{_PREFIX}cpu_limit_ratio",
                "CPUs that all collectors together may use, limits.cpu_percent.",
                limits.cpu_percent / 100,
            ),
            GaugeMetricFamily(
                f"{_PREFIX}memory_bytes",
                "Maps in the kernel and buffers in the agent, which limits.memory is about.",
                self._supervisor.memory_bytes(),
            ),
            GaugeMetricFamily(
                f"{_PREFIX}memory_limit_bytes",
                "What maps and buffers together may take, limits.memory.",
                limits.memory,
            ),
        )

    def _continuous(self) -> tuple[Metric, Metric, Metric]:
        """Rules of one kind and service have one series, which is down if one of them is."""
        labels = ("kind", "service")
        up = GaugeMetricFamily(
            f"{_PREFIX}continuous_up",
            "Whether every continuous collector of this kind and service is at work.",
            labels=labels,
        )
        waiting = GaugeMetricFamily(
            f"{_PREFIX}continuous_waiting",
            "Continuous collectors that are not at work, by what they wait for.",
            labels=(*labels, "reason"),
        )
        failures = CounterMetricFamily(
            f"{_PREFIX}continuous_failures",
            "How often continuous collectors could not start, or ended.",
            labels=labels,
        )
        rules = self._supervisor.continuous
        for key, reasons in _by_labels(rules, lambda rule: rule.waits.reason).items():
            up.add_metric(key, float(not any(reasons)))
            for reason, count in Counter(filter(None, reasons)).items():
                waiting.add_metric((*key, reason), count)
        for key, failed in _by_labels(rules, lambda rule: rule.failures).items():
            failures.add_metric(key, sum(failed))
        return up, waiting, failures

    def _refusals(self) -> Iterable[Metric]:
        listener = ("listener",)
        connections = GaugeMetricFamily(
            f"{_PREFIX}connections", "gRPC connections that are open.", labels=listener
        )
        refused = CounterMetricFamily(
            f"{_PREFIX}connections_refused",
            "gRPC connections that were refused, by limit.",
            labels=(*listener, "limit"),
        )
        closed = CounterMetricFamily(
            f"{_PREFIX}connections_closed",
            "gRPC connections that the agent closed for what their clients did, by reason.",
            labels=(*listener, "reason"),
        )
        throttled = CounterMetricFamily(
            f"{_PREFIX}connections_throttled",
            "How often a gRPC connection had to wait because its peer sent too fast.",
            labels=listener,
        )
        for kind, counts in self._counts.listeners.items():
            connections.add_metric((kind,), counts.open)
            throttled.add_metric((kind,), counts.throttled)
            for limit, count in counts.refused.items():
                refused.add_metric((kind, limit), count)
            for reason, count in counts.closed.items():
                closed.add_metric((kind, reason), count)
        calls = CounterMetricFamily(
            f"{_PREFIX}calls_refused",
            "gRPC calls that were refused before they began, by limit.",
            labels=("limit",),
        )
        for limit, count in self._counts.calls_refused.items():
            calls.add_metric((limit,), count)
        return connections, refused, closed, throttled, calls

    def _exported(self) -> Iterable[Metric]:
        for result, text in (
            ("sent", "Data points of metrics, and spans, that an OTLP receiver accepted."),
            ("lost", "Data points of metrics, and spans, that no OTLP receiver accepted in time."),
        ):
            family = CounterMetricFamily(f"{_PREFIX}otlp_{result}", text, labels=("signal",))
            for signal in ("metrics", "spans"):
                family.add_metric((signal,), self._counts.exported[signal, result])
            yield family

    def _access(self) -> Iterable[Metric]:
        access = self._supervisor.access
        decisions = CounterMetricFamily(
            f"{_PREFIX}access_decisions",
            "Decisions about callers, by verdict; health checks are not among them.",
            labels=("verdict",),
        )
        for verdict, count in access.audit.decisions.items():
            decisions.add_metric((verdict,), count)
        dropped = CounterMetricFamily(
            f"{_PREFIX}audit_lines_dropped",
            "Lines of the audit that could not be written, or not in time.",
            access.audit.dropped,
        )
        unanswered = CounterMetricFamily(
            f"{_PREFIX}kubernetes_unanswered",
            "Questions about callers that the Kubernetes API server did not answer.",
            access.unanswered,
        )
        return decisions, dropped, unanswered

    def _pods(self) -> Iterable[Metric]:
        pods = self._supervisor.pods
        stale = GaugeMetricFamily(
            f"{_PREFIX}pod_source_stale_seconds",
            "For how long a source of pods' names has not answered; 0 for one that does.",
            labels=("source",),
        )
        for source, seconds in pods.stale_s.items():
            stale.add_metric((source,), seconds)
        used = CounterMetricFamily(
            f"{_PREFIX}pods_cpu_seconds",
            "CPU time that following pods used, for all sessions that watch some.",
            pods.cpu_s,
        )
        return stale, used

    def _tls(self) -> Iterable[Metric]:
        labels = ("listener",)
        expiry = GaugeMetricFamily(
            "coral_tls_certificate_expiry_timestamp_seconds",
            "When the certificate that the agent shows expires, the last of the authorities of "
            "clients, and the first of their lists of revoked certificates, of what is in use.",
            labels=(*labels, "file"),
        )
        reloads = CounterMetricFamily(
            "coral_tls_reloads", "Changed files of TLS that are in use since.", labels=labels
        )
        failures = CounterMetricFamily(
            "coral_tls_reload_failures",
            "Changed files of TLS that cannot be used; the ones before are in use.",
            labels=labels,
        )
        for listener, counts in self._counts.tls.items():
            reloads.add_metric((listener,), counts.reloads)
            failures.add_metric((listener,), counts.failures)
            for file, when_s in counts.expiries_s.items():
                expiry.add_metric((listener, file), when_s)
        return expiry, reloads, failures

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
        for (kind, program), run in self._supervisor.program_stats.estimates.items():
            seconds.add_metric((kind_name(kind), program), run.seconds)
            runs.add_metric((kind_name(kind), program), run.runs)
        return seconds, runs


_PREFIX: Final = "coral_agent_"


def _by_labels(
    rules: Iterable[Standing], value: Callable[[Standing], T]
) -> dict[tuple[str, str], list[T]]:
    """VALUE of each rule, by its labels."""
    grouped: dict[tuple[str, str], list[T]] = {}
    for rule in rules:
        grouped.setdefault((rule.kind, rule.service), []).append(value(rule))
    return grouped


def _build_info() -> Metric:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  megabytes

    try:
        agent = version("coral-ebpf-agent")
    except PackageNotFoundError:  # a copy of the sources
        agent = ""
    try:
        libbpf = libbpf_version()
    except BpfError:
        libbpf = ""
    values = {
        "version": agent,
        "python": platform.python_version(),
        "libbpf": libbpf,
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
    }
    family = GaugeMetricFamily(
        f"{_PREFIX}build_info", "What the agent is made of; always 1.", labels=tuple(values)
    )
    family.add_metric(tuple(values.values()), 1)
    return family


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
