"""The label `service` of pods: it brings others with it, and is told apart by them."""

from __future__ import annotations

import numpy as np
from prometheus_client.core import CounterMetricFamily

from coral.agent.otlp.resource import Resource
from coral.agent.serving.exposition import TEXT, encode
from coral.wire.series import SeriesTable, Service

SHOP = Service(
    "web",
    {"namespace": "shop", "workload": "deployment/web"},
    {"k8s.namespace.name": "shop", "k8s.deployment.name": "web", "service.name": "web"},
)
BANK = Service("web", {"namespace": "bank"}, {"k8s.namespace.name": "bank"})


def test_services_of_one_name_in_two_namespaces_are_two_series() -> None:
    table: SeriesTable[tuple[str, str]] = SeriesTable(10, ("other", "other"))
    one = np.ones(1, np.uint64)
    for service in (SHOP, BANK, "web", Service("web", SHOP.more, {})):
        table.add((service, "read"), one)
    assert sorted(int(figures[0]) for figures in table.copy().values()) == [1, 1, 2]
    assert SHOP != "web"
    assert "web" != SHOP  # noqa: SIM300  the other way round
    assert str(SHOP) == "web"


def test_the_text_has_the_labels_that_come_with_a_service() -> None:
    family = CounterMetricFamily("calls", "Calls.", labels=("service", "syscall"))
    family.add_metric((SHOP, "read"), 1)
    family.add_metric(("web", "read"), 2)
    assert encode([family], TEXT).decode().splitlines()[2:] == [
        'calls_total{service="web",syscall="read",namespace="shop",workload="deployment/web"} 1',
        'calls_total{service="web",syscall="read"} 2',
    ]


def test_a_resource_has_the_attributes_of_its_pods() -> None:
    made = Resource("agent", {}).of(SHOP)
    found = [(it.key, it.value.string_value) for it in made.attributes]
    assert found[:3] == [
        ("service.name", "web"),
        ("k8s.namespace.name", "shop"),
        ("k8s.deployment.name", "web"),
    ]
