"""Where a session watches several pods, its tables, lines and data say whose each row is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.reading import samples
from coral.views.http_latency.story import HttpStory
from coral.views.pods import attributed, lines_width, pod_words, with_pods
from coral.views.syscall_stats.story import SyscallStory
from coral.views.tcp_metrics.story import TcpStory

PODS = ("web-1", "web-2")
REQUESTS = {
    "http_latency": [
        pb.HttpLatencyHistogram(
            role=pb.HTTP_ROLE_SERVER, method=pb.HTTP_METHOD_GET, route="/", status=200,
            count=number, resource=number, buckets=[1.0], counts=[number, 0], sum=0.5, min=0.5,
            max=0.5,
        )
        for number in (1, 2)
    ]
}  # fmt: skip
CALLS = {
    "syscall_stats": [
        pb.SyscallStats(syscall_name="read", call_count=number, resource=number)
        for number in (1, 2)
    ]
}
PEERS = {
    "tcp_peers": [
        pb.TcpPeerMetrics(
            remote_address="10.0.0.9", port=80, role=pb.TCP_ROLE_CLIENT, resource=number,
            connections_opened=number, connections_open=number,
        )
        for number in (1, 2)
    ]
}  # fmt: skip
CONNECTIONS = {
    "tcp_metrics": [
        pb.TcpMetrics(
            connection_id=number, remote_address="10.0.0.9", remote_port=80, pid=number,
            comm="curl", role=pb.TCP_ROLE_CLIENT, state=pb.TCP_STATE_ESTABLISHED, resource=number,
        )
        for number in (1, 2)
    ]
}  # fmt: skip


def batch(rows: dict[str, Any], *pods: str) -> Batch:
    """ROWS, of which each points to the resource of one of PODS."""
    (name,) = rows
    message = pb.EbpfEventBatch(
        first_seq=1, last_seq=2, count=2, interval_start_ns=10**18, interval_end_ns=10**18 + 10**9,
        attributes={"k8s.namespace.name": "shop"},
        resources=[
            pb.Resource(attributes={"k8s.pod.name": pod, "k8s.container.name": "app"})
            for pod in pods
        ],
        **rows,
    )  # fmt: skip
    return Batch(message, np.empty(0), rows=name)


@pytest.mark.parametrize(
    ("story", "rows"),
    [
        (SyscallStory, CALLS),
        (HttpStory, REQUESTS),
        (TcpStory, PEERS),
        (TcpStory, CONNECTIONS),
    ],
)
def test_a_table_has_a_row_for_each_pod_if_there_are_several(story: Any, rows: Any) -> None:
    several, one = story(), story()
    several.add(batch(rows, *PODS))
    one.add(batch(rows, "web-1", "web-1"))
    for lines in (list(several.interval_lines()), list(several.end_lines())):
        text = "\n".join(lines)
        assert all(f"{pod}/app" in text for pod in PODS)
        assert any(line.startswith("POD") for line in lines)
    for lines in (list(one.interval_lines()), list(one.end_lines())):
        assert not any("POD" in line or "web-1" in line for line in lines)


@pytest.mark.parametrize(
    ("story", "rows"), [(SyscallStory, CALLS), (HttpStory, REQUESTS), (TcpStory, PEERS)]
)
def test_data_have_the_attributes_of_their_container(story: Any, rows: Any) -> None:
    of = batch(rows, *PODS)
    told = list(attributed(of, story().records(of)))
    assert [row["attributes"] for row in told] == [
        {"k8s.namespace.name": "shop", "k8s.pod.name": pod, "k8s.container.name": "app"}
        for pod in PODS
    ]
    assert not any("resource" in row for row in told)
    bare = Batch(pb.EbpfEventBatch(count=2, **rows), np.empty(0), rows=next(iter(rows)))
    assert not any("attributes" in row for row in attributed(bare, story().records(bare)))


def test_lines_end_with_their_pod_and_leave_it_room() -> None:
    of = batch(CALLS, *PODS)
    assert pod_words(of) == ["", "web-1/app", "web-2/app"]
    assert list(with_pods(of, ["one", "two"])) == ["one  web-1/app", "two  web-2/app"]
    assert lines_width(of, 80) == 69
    assert lines_width(of, None) is None
    alone = batch(CALLS)
    assert list(with_pods(alone, ["one", "two"])) == ["one", "two"]
    assert lines_width(alone, 80) == 80


def test_a_profile_tells_processes_of_several_pods_apart() -> None:
    rows = [pb.CpuProfileSample(stack=["main"], count=1, process="java", resource=2)]
    (sampled,) = samples(batch({"cpu_profile": rows}, *PODS))
    assert sampled.origin.process == "java (web-2/app)"
