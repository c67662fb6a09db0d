"""Prometheus families as OTLP metrics, with the names that OpenTelemetry has for them.

A collector that writes them on to Prometheus gets the names of /metrics again. Synchronous: call it
in a thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2 as otlp
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from prometheus_client import Metric
from prometheus_client.samples import Sample

# Prefixes, and labels, whose underscores stand for dots in OpenTelemetry's conventions.
_NAMESPACES: Final = (
    "coral_agent_", "coral_http_", "coral_profile_", "coral_syscall_", "http_client_request_",
    "http_client_response_", "http_server_request_", "http_server_response_",
    "system_network_tcp_",
)  # fmt: skip
_DOTTED: Final = {"body_size": "body.size", "rtt_duration": "rtt.duration"} | {
    f"{what}_duration": f"{what}.duration" for what in ("connection", "handshake")
}
_UNITS: Final = {"_seconds": "s", "_bytes": "By", "_ratio": "1"}
_LABELS: Final = {
    "http_request_method": "http.request.method",
    "http_response_status_code": "http.response.status_code",
    "http_route": "http.route",
    "error_type": "error.type",
    "url_scheme": "url.scheme",
    "network_protocol_version": "network.protocol.version",
    "network_peer_address": "network.peer.address",
    "server_port": "server.port",
}
# Of the resource, not of the series.
_SERVICE: Final = "service"
_CUMULATIVE: Final = otlp.AGGREGATION_TEMPORALITY_CUMULATIVE

Series = tuple[str, tuple[tuple[str, str], ...]]


def name_and_unit(family: str) -> tuple[str, str]:
    """The name that OpenTelemetry has for a family, and its unit."""
    suffix = next((suffix for suffix in _UNITS if family.endswith(suffix)), "")
    name = family.removesuffix(suffix)
    for namespace in _NAMESPACES:
        if name.startswith(namespace):
            rest = name.removeprefix(namespace)
            return namespace.replace("_", ".") + _DOTTED.get(rest, rest), _UNITS.get(suffix, "")
    return name, _UNITS.get(suffix, "")


def prometheus_name(name: str, unit: str) -> str:
    """What a collector that follows OpenTelemetry's rules for Prometheus calls a metric; without
    the `_total` of counters."""
    suffix = next((suffix for suffix, of in _UNITS.items() if unit and of == unit), "")
    return re.sub(r"[^a-zA-Z0-9_]", "_", name) + suffix


class Resources(Protocol):
    """Who says it."""

    @property
    def scope(self) -> InstrumentationScope:
        """The software that measures."""

    def of(self, service: str) -> Resource:
        """The resource of SERVICE, which is empty for what belongs to none."""


class Starts:
    """Since when each series has been counted. A series that is new, or that vanished and began
    again at 0, has begun after the export before."""

    def __init__(self, began_ns: int) -> None:
        self._exported_ns = began_ns
        self._known: dict[Series, tuple[int, float]] = {}
        self._seen: dict[Series, tuple[int, float]] = {}

    def of(self, series: Series, count: float) -> int:
        """Since when SERIES, which stands at COUNT, has been counted, as Unix time in ns."""
        start_ns, before = self._known.get(series, (self._exported_ns, 0.0))
        if count < before:
            start_ns = self._exported_ns
        self._seen[series] = start_ns, count
        return start_ns

    def done(self, now_ns: int) -> None:
        """Ends an export: what was not in it is forgotten."""
        self._known, self._seen, self._exported_ns = self._seen, {}, now_ns


def request_of(
    families: Iterable[Metric], resources: Resources, starts: Starts, now_ns: int
) -> ExportMetricsServiceRequest:
    """FAMILIES as they are at NOW_NS: a resource for each service, and one for what belongs
    to none."""
    metrics: defaultdict[str, list[otlp.Metric]] = defaultdict(list)
    for family in families:
        make = _MAKERS.get(family.type)
        if make is None:
            continue
        for service, samples in _by_service(family.samples).items():
            name, unit = name_and_unit(family.name)
            metric = otlp.Metric(name=name, unit=unit, description=family.documentation)
            make(metric, family.name, samples, starts.of, now_ns)
            metrics[service].append(metric)
    starts.done(now_ns)
    request = ExportMetricsServiceRequest()
    for service, of_service in metrics.items():
        made = request.resource_metrics.add(resource=resources.of(service))
        made.scope_metrics.add(scope=resources.scope, metrics=of_service)
    return request


def points_in(request: ExportMetricsServiceRequest) -> int:
    """How many data points a request has."""
    return sum(
        len(getattr(metric, str(metric.WhichOneof("data"))).data_points)
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )


StartOf = Callable[[Series, float], int]
Maker = Callable[[otlp.Metric, str, Sequence[Sample], StartOf, int], None]


def _by_service(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    grouped: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[sample.labels.get(_SERVICE, "")].append(sample)
    return grouped


def _gauge(
    metric: otlp.Metric, _family: str, samples: Sequence[Sample], _start: StartOf, now_ns: int
) -> None:
    for sample in samples:
        metric.gauge.data_points.add(
            attributes=_attributes(sample.labels), time_unix_nano=now_ns, as_double=sample.value
        )


def _sum(
    metric: otlp.Metric, family: str, samples: Sequence[Sample], start: StartOf, now_ns: int
) -> None:
    metric.sum.is_monotonic = True
    metric.sum.aggregation_temporality = _CUMULATIVE
    for sample in samples:
        if sample.name == f"{family}_created":
            continue
        metric.sum.data_points.add(
            attributes=_attributes(sample.labels),
            start_time_unix_nano=start(_series(family, sample.labels), sample.value),
            time_unix_nano=now_ns,
            as_double=sample.value,
        )


def _histogram(
    metric: otlp.Metric, family: str, samples: Sequence[Sample], start: StartOf, now_ns: int
) -> None:
    metric.histogram.aggregation_temporality = _CUMULATIVE
    for labels, by_name in _points(samples):
        buckets = by_name[f"{family}_bucket"]
        cumulative = [int(sample.value) for sample in buckets]
        count = cumulative[-1]
        metric.histogram.data_points.add(
            attributes=_attributes(labels),
            start_time_unix_nano=start(_series(family, labels), count),
            time_unix_nano=now_ns,
            count=count,
            sum=by_name[f"{family}_sum"][0].value,
            explicit_bounds=[float(sample.labels["le"]) for sample in buckets[:-1]],
            bucket_counts=[
                here - before for before, here in zip([0, *cumulative], cumulative, strict=False)
            ],
        )


def _summary(
    metric: otlp.Metric, family: str, samples: Sequence[Sample], start: StartOf, now_ns: int
) -> None:
    for labels, by_name in _points(samples):
        count = int(by_name[f"{family}_count"][0].value)
        metric.summary.data_points.add(
            attributes=_attributes(labels),
            start_time_unix_nano=start(_series(family, labels), count),
            time_unix_nano=now_ns,
            count=count,
            sum=by_name[f"{family}_sum"][0].value,
        )


_MAKERS: Final[Mapping[str, Maker]] = {
    "counter": _sum,
    "gauge": _gauge,
    "histogram": _histogram,
    "summary": _summary,
}


def _points(
    samples: Sequence[Sample],
) -> Iterator[tuple[dict[str, str], dict[str, list[Sample]]]]:
    """The samples that make one point, by name, with its labels."""
    points: dict[tuple[tuple[str, str], ...], defaultdict[str, list[Sample]]] = {}
    for sample in samples:
        labels = tuple(item for item in sample.labels.items() if item[0] != "le")
        points.setdefault(labels, defaultdict(list))[sample.name].append(sample)
    for key, by_name in points.items():
        yield dict(key), by_name


def _series(family: str, labels: Mapping[str, str]) -> Series:
    return family, tuple(labels.items())


def _attributes(labels: Mapping[str, str]) -> list[KeyValue]:
    """The labels that say something; the service is the resource's."""
    return [
        KeyValue(key=_LABELS.get(name, name), value=AnyValue(string_value=_utf8(value)))
        for name, value in labels.items()
        if value and name != _SERVICE
    ]


def _utf8(text: str) -> str:
    # A name from /proc can have lone surrogates.
    return text.encode(errors="backslashreplace").decode()
