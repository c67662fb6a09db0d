"""The text of /metrics says what prometheus-client's own encoders say, in both formats."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families as parse_text

from coral.agent.config import Config, Limits
from coral.agent.serving.exposition import OPENMETRICS, TEXT, encode
from coral.agent.serving.prometheus import MetricsPage, Registry
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.contract import Batch, Measures
from coral.collectors.syscall_stats.counters import COLUMNS
from coral.collectors.syscall_stats.measures import SyscallMeasures
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.summaries import connections, syscalls

HOSTILE = 'a"b\\c\nd{}=,\u2028é'


library_openmetrics: Any = openmetrics.generate_latest
openmetrics_families: Any = openmetrics_parser.text_string_to_metric_families


class Families:
    """What prometheus-client's encoders want of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def everything() -> Families:
    """Every metric of an agent that has measured both kinds, and some that are hostile."""
    supervisor = Supervisor(Config(limits=Limits(prometheus_series=20)))
    measured = (
        (pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, syscalls(1, 12, 0)),
        (pb.EBPF_COLLECTOR_KIND_TCP_METRICS, connections(1, 12, 0)),
    )
    for kind, summaries in measured:
        supervisor.measures[kind].observe(HOSTILE, Batch(summaries, 0, 1))
    gauge = GaugeMetricFamily("hostile", 'says "that"\nand \\ this', labels=("text",))
    for text, value in ((HOSTILE, 1.5), ("", float("nan")), ("x", float("-inf")), ("y", 1e-9)):
        gauge.add_metric((text,), value)
    units = CounterMetricFamily("with_unit_seconds", "A time.", 1e21, unit="seconds")
    # What does not change from one encoder to the next.
    registry = (f for f in Registry(supervisor).collect() if not f.name.startswith("process_"))
    return Families((*registry, gauge, units))


def comparable(families: Iterable[Metric]) -> list[object]:
    return [
        (
            (family.name, family.type, family.documentation, family.unit),
            [(s.name, sorted(s.labels.items()), repr(float(s.value))) for s in family.samples],
        )
        for family in families
    ]


def test_the_text_says_the_same_as_the_library_does() -> None:
    families = everything()
    ours, theirs = encode(families.collect(), TEXT), generate_latest(families)
    found = comparable(parse_text(ours.decode()))
    assert found == comparable(parse_text(theirs.decode()))
    assert len(found) > 25
    assert (
        f'text="{HOSTILE}"'.replace("\\", "\\\\").replace('a"b', 'a\\"b').replace("\n", "\\n")
        in ours.decode()
    )


def test_openmetrics_says_the_same_as_the_library_does() -> None:
    families = everything()
    ours = encode(families.collect(), OPENMETRICS).decode()
    found = comparable(openmetrics_families(ours))
    assert found == comparable(openmetrics_families(library_openmetrics(families).decode()))
    assert len(found) > 25
    assert ours.endswith("\n# EOF\n")


def test_a_name_that_is_no_unicode_is_escaped() -> None:
    gauge = GaugeMetricFamily("name", "A name.", labels=("name",))
    gauge.add_metric(("\udcff",), 1)
    assert b'name{name="\\udcff"} 1\n' in encode((gauge,), TEXT)


class CountedRegistry(Registry):
    """Counts how often its figures are read."""

    reads = 0

    def collect(self) -> Iterable[Metric]:  # type: ignore[override]
        self.reads += 1
        return super().collect()


async def test_figures_are_read_once_a_second_however_many_ask_and_leave() -> None:
    registry = CountedRegistry(Supervisor())
    page = MetricsPage(registry)
    leaves = asyncio.create_task(page({}))
    await asyncio.sleep(0)
    leaves.cancel()
    pages = await asyncio.gather(*(page({b"accept": b"text/plain"}) for _ in range(50)))
    assert len({each.body for each in pages}) == registry.reads == 1
    other = await page({b"accept": b"application/openmetrics-text;version=99.9,x"})
    assert other.headers["Content-Type"] == OPENMETRICS
    assert registry.reads == 2
    await asyncio.sleep(1)
    assert (await page({})).headers["Date"] != pages[0].headers["Date"]
    assert registry.reads == 3


@pytest.mark.parametrize("measures", [SyscallMeasures(200)])
async def test_the_loop_goes_on_while_a_long_text_is_made(measures: Measures) -> None:
    assert isinstance(measures, SyscallMeasures)
    for number in range(200):
        measures._series.add(("shop", str(number)), np.ones(COLUMNS, np.uint64))
    supervisor = Supervisor()
    supervisor._feed.measures[pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS] = measures
    text = asyncio.create_task(MetricsPage(Registry(supervisor))({}))
    turns = 0
    while not text.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len((await text).body) > 200_000
    assert turns > 5
