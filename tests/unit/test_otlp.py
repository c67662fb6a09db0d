"""Metrics and spans as OTLP has them: names, starts, what waits."""

from __future__ import annotations

from typing import Any

import numpy as np
from opentelemetry.proto.metrics.v1 import metrics_pb2
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)

from coral.agent.otlp import spans
from coral.agent.otlp.resource import Resource
from coral.agent.serving.prometheus import Registry
from coral.agent.sessions.supervisor import Supervisor
from coral.wire.otlp import metrics

RESOURCE = Resource("node-1", {"deployment.environment.name": "test"})
BEGAN_NS = 1_000
METHOD_GET = 1


async def test_a_collector_that_writes_to_prometheus_has_our_names_again() -> None:
    for family in Registry(Supervisor()).collect():
        name, unit = metrics.name_and_unit(family.name)
        assert metrics.prometheus_name(name, unit) == family.name


def test_names_are_those_of_the_conventions() -> None:
    assert metrics.name_and_unit("http_server_request_duration_seconds") == (
        "http.server.request.duration",
        "s",
    )
    assert metrics.name_and_unit("http_client_response_body_size_bytes") == (
        "http.client.response.body.size",
        "By",
    )
    assert metrics.name_and_unit("system_network_tcp_io_bytes") == ("system.network.tcp.io", "By")
    assert metrics.name_and_unit("coral_agent_events") == ("coral.agent.events", "")


def request(starts: metrics.Starts, now_ns: int, *families: Any) -> dict[tuple[str, str], Any]:
    """Metrics by service and name."""
    made = metrics.request_of(families, RESOURCE, starts, now_ns)
    found = {}
    for resource in made.resource_metrics:
        attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
        assert attributes["coral.agent.id"] == "node-1"
        assert attributes["deployment.environment.name"] == "test"
        for metric in resource.scope_metrics[0].metrics:
            found[attributes["service.name"], metric.name] = metric
    return found


def calls(count: int, service: str = "shop") -> CounterMetricFamily:
    family = CounterMetricFamily("coral_syscall_calls", "", labels=("service", "syscall"))
    family.add_metric((service, "read"), count)
    return family


def test_services_are_resources_and_labels_attributes() -> None:
    gauge = GaugeMetricFamily("coral_agent_sessions_active", "Sessions.", labels=("kind",))
    gauge.add_metric(("tcp_metrics",), 2)
    found = request(metrics.Starts(BEGAN_NS), 5_000, calls(7), gauge)
    assert found.keys() == {
        ("shop", "coral.syscall.calls"),
        ("coral-agent", "coral.agent.sessions_active"),
    }
    (point,) = found["shop", "coral.syscall.calls"].sum.data_points
    assert {one.key: one.value.string_value for one in point.attributes} == {"syscall": "read"}
    assert (point.as_double, point.start_time_unix_nano, point.time_unix_nano) == (7, 1_000, 5_000)
    counted = found["shop", "coral.syscall.calls"].sum
    assert counted.is_monotonic
    assert counted.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
    (active,) = found["coral-agent", "coral.agent.sessions_active"].gauge.data_points
    assert active.as_double == 2


def test_buckets_are_no_longer_cumulative() -> None:
    family = HistogramMetricFamily("http_server_request_duration_seconds", "", labels=("service",))
    family.add_metric(("shop",), [("0.1", 3), ("0.5", 5), ("+Inf", 9)], 12.5)
    sizes = SummaryMetricFamily("http_server_request_body_size_bytes", "", labels=("service",))
    sizes.add_metric(("shop",), 9, 4_500)
    found = request(metrics.Starts(BEGAN_NS), 5_000, family, sizes)
    (point,) = found["shop", "http.server.request.duration"].histogram.data_points
    assert list(point.explicit_bounds) == [0.1, 0.5]
    assert list(point.bucket_counts) == [3, 2, 4]
    assert (point.count, point.sum) == (9, 12.5)
    (size,) = found["shop", "http.server.request.body.size"].summary.data_points
    assert (size.count, size.sum) == (9, 4_500)


def test_a_series_that_begins_again_has_a_new_start() -> None:
    starts = metrics.Starts(BEGAN_NS)

    def start(now_ns: int, family: CounterMetricFamily) -> int:
        found = request(starts, now_ns, family)
        (metric,) = found.values()
        (point,) = metric.sum.data_points
        return int(point.start_time_unix_nano)

    assert start(2_000, calls(7)) == 1_000
    assert start(3_000, calls(9)) == 1_000
    assert start(4_000, calls(1)) == 3_000  # it vanished meanwhile
    assert start(5_000, calls(2)) == 3_000
    assert start(6_000, calls(5, service="new")) == 5_000
    assert start(7_000, calls(9)) == 6_000  # it was not in the export before


ROW = np.dtype([("trace_id", "<u4"), ("number", "<u4")])


def traced(*numbers: int) -> spans.Traced:
    return spans.Traced("shop", np.array([(1, number) for number in numbers], ROW), ("", "t"))


def taken(queue: spans.Queue, most: int) -> list[list[int]]:
    return [each.records["number"].tolist() for each in queue.take(most)]


def test_what_waits_is_bounded_and_the_oldest_gives_way() -> None:
    queue = spans.Queue(4)
    assert queue.add(traced(1, 2, 3)) == 0
    assert queue.add(traced(4, 5)) == 1
    assert queue.count == 4
    assert taken(queue, 3) == [[2, 3], [4]]
    assert taken(queue, 3) == [[5]]
    assert taken(queue, 3) == []
    assert queue.add(traced(*range(10))) == 6
    assert taken(queue, 100) == [[6, 7, 8, 9]]
    assert queue.count == 0
