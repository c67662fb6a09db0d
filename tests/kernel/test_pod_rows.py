"""Each row of a session that watches several pods says which container it is of: for every kind, as
summaries and as single events, also of a pod that comes later, and of a process that has ended
before the reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pytest

from coral import bpf
from coral.collectors import selectors
from coral.collectors.contract import Batch, Collector, EventRows, ServiceProcesses
from coral.collectors.cpu_profile.collector import CpuProfileCollector
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.collectors.hubs import Slot
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.kernel.conftest import BOTH_ENDS
from tests.pods import HASH, FakePod, Node, move
from tests.support import Puppet, wait_until

pytestmark = pytest.mark.usefixtures("http_supported", "http_programs")

LABELS: Final = {"app": "web", "pod-template-hash": HASH}
TARGET: Final = "shop/deploy/web"
Place = tuple[str, str]  # a pod and a container
# Makes some calls, some requests of one connection of its own, and is on a CPU for a while.
_WORK: Final = r"""
def work(calls, requests):
    for _ in range(calls):
        os.getppid()
    connect()
    for _ in range(requests):
        exchange(b"GET /work HTTP/1.1\r\nHost: shop\r\n\r\n")
    until = time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
def work_in_child(calls, requests):
    child = os.fork()
    if not child:
        work(calls, requests)
        os._exit(0)
    os.waitpid(child, 0)
"""


def worker(puppet: Puppet) -> None:
    """Lets PUPPET `work`."""
    puppet.do(f"exec({BOTH_ENDS + _WORK!r})")


def _calls(rows: Any, strings: Sequence[str]) -> Any:
    is_it = np.array([text == "getppid" for text in strings])[rows["syscall"]]
    return is_it * _value(rows, "call_count")


def _requests(rows: Any, _strings: Sequence[str]) -> Any:
    return (rows["role"] == pb.HTTP_ROLE_SERVER) * _value(rows, "count")


def _samples(rows: Any, _strings: Sequence[str]) -> Any:
    return rows["count"]


def _opened(rows: Any, _strings: Sequence[str]) -> Any:
    return (rows["role"] == pb.TCP_ROLE_CLIENT) * rows["opened"]


def _opened_by_peer(rows: Any, _strings: Sequence[str]) -> Any:
    return (rows["role"] == pb.TCP_ROLE_CLIENT) * rows["connections_opened"]


def _established(rows: Any, _strings: Sequence[str]) -> Any:
    state = rows["new_state"] == pb.TCP_STATE_ESTABLISHED
    return state & (rows["old_state"] != rows["new_state"]) & (rows["role"] == pb.TCP_ROLE_CLIENT)


def _value(rows: Any, name: str) -> Any:
    return rows[name] if isinstance(rows, Mapping) else 1


@dataclass
class Tally:
    """What a session counted of each container."""

    collector: Collector
    count: Callable[[Any, Sequence[str]], Any]
    of: Counter[Place] = field(default_factory=Counter)
    containers: dict[Place, Mapping[str, str]] = field(default_factory=dict)

    def drain(self) -> Batch:
        batch = self.collector.drain()
        rows = batch.rows
        assert not batch.losses
        values: Any = rows.records if isinstance(rows, EventRows) else rows.columns
        if not len(rows):
            return batch
        attributes = [
            dict(batch.attributes),
            *({**batch.attributes, **each.attributes} for each in rows.resources),
        ]
        for at, count in zip(
            values["resource"].tolist(),
            np.broadcast_to(self.count(values, rows.strings), len(rows)).tolist(),
            strict=True,
        ):
            told = attributes[at]
            place = told.get("k8s.pod.name", ""), told.get("k8s.container.name", "")
            self.containers[place] = told
            self.of[place] += int(count)
        return batch

    def watches(self, puppet: Puppet) -> bool:
        slot = self.collector.bpf_object
        assert isinstance(slot, Slot)
        return puppet.pid in slot.keys_of("members")


# By mode: what each session's collector is, its options, and what is counted.
_SESSIONS: Final[dict[str, list[tuple[str, type[Any], dict[str, str], Any]]]] = {
    "summaries": [
        ("calls", SyscallStatsCollector, {}, _calls),
        ("requests", HttpLatencyCollector, {}, _requests),
        ("samples", CpuProfileCollector, {}, _samples),
        ("connections", TcpMetricsCollector, {}, _opened),
        ("connections", TcpMetricsCollector, {"by": "peer"}, _opened_by_peer),
    ],
    "events": [
        ("calls", SyscallStatsCollector, {"mode": "events", "include": "getppid"}, _calls),
        ("requests", HttpLatencyCollector, {"mode": "events"}, _requests),
        ("connections", TcpMetricsCollector, {"mode": "events"}, _established),
    ],
}


@contextmanager
def tallying(node: Node, mode: str) -> Iterator[list[tuple[str, Tally]]]:
    """A session of each kind in this MODE that watches the workload; what is left is drained at the
    end of the block."""
    features = bpf.probe()
    with ExitStack() as stack:
        tallies = []
        for what, kind, config, count in _SESSIONS[mode]:
            found = node.pods.target(selectors.parse("workload", TARGET), features)
            service = ServiceProcesses(found.label, (), found)
            collector = kind.create({"workload": TARGET, **config}, service, features)
            stack.callback(collector.close)
            collector.open()
            tallies.append((what, Tally(collector, count)))
        yield tallies
        for _, tally in tallies:
            tally.collector.bpf_object.detach()
            tally.drain()


def pod(node: Node, letter: str, *containers: str) -> FakePod:
    return node.pod("shop", f"web-{HASH}-{5 * letter}", *containers, **LABELS)


@pytest.mark.parametrize(
    ("top", "mode"), [("v2", "summaries"), ("memory", "events")], indirect=["top"]
)
def test_each_row_says_which_container_of_which_pod_it_is_of(node: Node, mode: str) -> None:
    first = pod(node, "a", "app", "proxy")
    stranger = node.pod("shop", "other", "app")
    with Puppet() as app, Puppet() as proxy, Puppet() as later, Puppet() as other:
        for puppet in (app, proxy, later, other):
            worker(puppet)
        move(app, first.directory_of("app"))
        move(proxy, first.directory_of("proxy"))
        move(other, stranger.directory_of("app"))
        with tallying(node, mode) as tallies:
            app.do("work(3, 2)")
            proxy.do("work_in_child(50, 4)")
            other.do("work(7, 7)")
            for _, tally in tallies:
                tally.drain()
            second = pod(node, "b", "app")
            move(later, second.directory_of("app"))
            wait_until(lambda: all(tally.watches(later) for _, tally in tallies))
            later.do("work(700, 6)")
            later.do("work_in_child(1, 1)")
            app.do("work(2, 1)")
    places = {
        (first.name, "app"): {"calls": 5, "requests": 3, "connections": 2},
        (first.name, "proxy"): {"calls": 50, "requests": 4, "connections": 1},
        (second.name, "app"): {"calls": 701, "requests": 7, "connections": 2},
    }
    for what, tally in tallies:
        if what == "samples":
            assert {place for place, count in tally.of.items() if count >= 5} == places.keys()
        else:
            assert +tally.of == {place: counts[what] for place, counts in places.items()}
        for (name, container), told in tally.containers.items():
            of = first if name == first.name else second
            assert told == {
                "k8s.namespace.name": "shop",
                "k8s.pod.name": name,
                "k8s.container.name": container,
                "container.id": of.containers[container],
                "k8s.replicaset.name": f"web-{HASH}",
                "k8s.deployment.name": "web",
                "k8s.workload.kind": "deployment",
                "k8s.workload.name": "web",
                "service.namespace": "shop",
                "service.name": "web",
            }
