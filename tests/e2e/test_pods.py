"""Pods by name through a real agent: in requests, in the CLI and its completion, in the
configuration, in metrics, and the refusals in the user's words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_health import page
from tests.e2e.test_refusals import start, start_request, stop
from tests.pods import HASH, FakePod, Runtime, kubepods, move, runtime
from tests.support import (
    Puppet,
    RunningAgent,
    code_and_text,
    coral,
    running_agent,
    samples,
    scrape,
    streaming,
    wait_until,
)

LABELS = {"app": "web", "pod-template-hash": HASH}
NAME = f"web-{HASH}-aaaaa"


@dataclass
class Node:
    """An agent, the runtime that it asks, and a pod that runs."""

    agent: RunningAgent
    runtime: Runtime
    pod: FakePod

    def coral(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = coral(*arguments, "--agent", self.agent.address)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("pods")
    with kubepods() as top:
        pod = FakePod(top, "shop", NAME, LABELS)
        for name in ("app", "proxy"):
            pod.add(name)
            pod.make(name)
        with runtime(directory) as served:
            served.pods.append(pod)
            config = {
                "kubernetes": {"cri": str(served.socket), "api": "off"},
                "limits": {"cpu_percent": 1000, "concurrent_collectors": 10},
                "audit": {"file": str(directory / "audit.jsonl")},
                "services": {"front": {"workload": "shop/deploy/web"}},
            }
            with running_agent(directory / "agent", config) as agent:
                yield Node(agent, served, pod)


@pytest.fixture
def puppet(node: Node) -> Iterator[Puppet]:
    """A process in the container `app`."""
    with Puppet() as inside:
        (node.pod.directory_of("app") / "cgroup.procs").write_text(str(inside.pid))
        yield inside


def test_metrics_have_the_namespace_the_workload_and_the_container(
    node: Node, puppet: Puppet
) -> None:
    session = start(node.agent, {"pod": f"shop/{NAME}/app", "interval": "100ms"})
    whole = start(node.agent, {"namespace": "shop", "interval": "100ms"})
    puppet.getppid(7)
    stream = pb.EbpfEventStreamRequest(collector_id=session)
    with streaming(node.agent, "StreamEventBatches", stream) as messages:
        batch = next(it for it in messages if it.count)
    assert batch.attributes["k8s.container.name"] == "app"
    assert batch.attributes["service.name"] == "web"

    def counted() -> bool:
        found = samples(scrape(node.agent), "coral_syscall_calls_total", syscall="getppid")
        return len(found) == 2 and set(found.values()) == {7.0}

    wait_until(counted)
    found = samples(scrape(node.agent), "coral_syscall_calls_total", syscall="getppid")
    assert sorted(map(sorted, found)) == [
        [("container", "app"), ("namespace", "shop"), ("service", "web"), ("syscall", "getppid"),
         ("workload", "deployment/web")],
        [("namespace", "shop"), ("service", "web"), ("syscall", "getppid"),
         ("workload", "deployment/web")],
    ]  # fmt: skip
    listed = node.agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    attributes = {each.collector_id: dict(each.attributes) for each in listed}
    assert attributes[session]["k8s.pod.name"] == NAME
    assert attributes[session]["container.id"] == node.pod.containers["app"]
    assert attributes[whole]["k8s.deployment.name"] == "web"
    stop(node.agent, session)
    stop(node.agent, whole)


@pytest.fixture
def second(node: Node) -> Iterator[tuple[FakePod, Puppet]]:
    """Another pod of the workload, which comes now, and a process in its container."""
    pod = FakePod(node.pod.top, "shop", f"web-{HASH}-bbbbb", LABELS)
    pod.add("app")
    node.runtime.pods.append(pod)
    with Puppet() as inside:
        move(inside, pod.make("app"))
        yield pod, inside
    node.runtime.pods.remove(pod)
    for directory in (pod.directory_of("app"), pod.directory):
        wait_until(lambda: not (directory / "cgroup.procs").read_text())  # noqa: B023  at once
        directory.rmdir()


def audited(node: Node, event: str) -> list[Any]:
    """The lines of the audit about an EVENT, but for one that is being written."""
    path = node.agent.log_path.parent.parent / "audit.jsonl"
    whole, _, _ = path.read_text().rpartition("\n")
    return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]


def test_each_row_of_a_workload_says_which_pod_it_is_of(
    node: Node, puppet: Puppet, second: tuple[FakePod, Puppet]
) -> None:
    pod, other = second
    session = start(node.agent, {"workload": "shop/deploy/web", "interval": "100ms"})
    everyone = {NAME: 3, pod.name: 5}
    for terms, expected in (
        ({"summaries": pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS}, everyone),
        ({}, everyone),
        ({"filter": pb.EventFilter(pods=[pod.name])}, {pod.name: 5}),
    ):
        request: Any = pb.EbpfEventStreamRequest(
            collector_id=session, after_seq=produced(node), **terms
        )
        counted: Counter[str] = Counter()
        with streaming(node.agent, "StreamEventBatches", request) as messages:
            puppet.getppid(3)
            other.getppid(5)
            for message in messages:
                count_calls(Batch.parse(message.SerializeToString()), counted)
                if counted.total() >= sum(expected.values()):
                    break
        assert counted == expected
    stop(node.agent, session)


def produced(node: Node) -> int:
    (info,) = node.agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    return int(info.produced)


def count_calls(batch: Batch, counted: Counter[str]) -> None:
    """Adds the calls of getppid by pod, in whatever form they are."""
    rows = zip(batch.message.syscall_stats, batch.row_resources.tolist(), strict=False)
    for row, at in rows:
        if row.syscall_name == "getppid":
            counted[batch.resources[at]["k8s.pod.name"]] += row.call_count
            assert row.labels["k8s.pod.name"] == batch.resources[at]["k8s.pod.name"]
    if not batch.columns:
        return
    named = zip(
        batch.strings[batch.columns["syscall"]].tolist(),
        batch.columns["call_count"].tolist(),
        batch.row_resources.tolist(),
        strict=True,
    )
    for name, count, at in named:
        if name == "getppid":
            counted[batch.resources[at]["k8s.pod.name"]] += count


def test_a_pod_that_joins_a_session_is_audited(node: Node) -> None:
    session = start(node.agent, {"namespace": "shop"})
    pod = FakePod(node.pod.top, "shop", f"web-{HASH}-ccccc", LABELS)
    pod.add("app")
    node.runtime.pods.append(pod)
    pod.make("app")

    def joined() -> list[Any]:
        return [line for line in audited(node, "joined") if line["session"] == session]

    (line,) = wait_until(joined)
    assert (line["pods"], line["number"]) == ([f"shop/{pod.name}"], 1)
    (decision,) = (it for it in audited(node, "decision") if it.get("session") == session)
    assert decision["resolved"]["pods"] == [f"shop/{NAME}"]
    assert samples(scrape(node.agent), "coral_agent_pods_cpu_seconds_total")[frozenset()] > 0
    stale = samples(scrape(node.agent), "coral_agent_pod_source_stale_seconds", source="cri")
    assert list(stale.values()) == [0.0]
    stop(node.agent, session)
    node.runtime.pods.remove(pod)
    pod.directory_of("app").rmdir()
    pod.directory.rmdir()


def test_a_tap_of_several_pods_has_them_in_a_column(
    node: Node, puppet: Puppet, second: tuple[FakePod, Puppet]
) -> None:
    pod, other = second
    for inside in (puppet, other):
        inside.begin("while os.getppid(): time.sleep(0.001)")
    arguments = ("tap", "workload:shop/deploy/web", "--syscall-stats", "-d", "1s")
    lines = node.coral(*arguments).stdout.splitlines()
    found = {tuple(line.split()[:2]) for line in lines if "getppid" in line}
    assert found == {(f"{NAME}/app", "getppid"), (f"{pod.name}/app", "getppid")}
    assert any(line.split()[:2] == ["POD", "SYSCALL"] for line in lines)
    rows = [json.loads(line) for line in node.coral(*arguments, "--json").stdout.splitlines()]
    told = {row["attributes"]["container.id"] for row in rows if row.get("syscall") == "getppid"}
    assert told == {each.containers["app"] for each in (node.pod, pod)}
    events = node.coral(*arguments, "--events", "--include", "getppid")
    ends = {line.split()[-1] for line in events.stdout.splitlines() if " getppid " in line}
    assert {f"{NAME}/app", f"{pod.name}/app"} <= ends


def test_a_configured_service_is_a_workload(node: Node) -> None:
    answer = node.agent.call("StartCollector", start_request({}, service_name="front"))
    assert answer.notes[0].startswith("workloads are told by the names and labels of pods")
    (info,) = node.agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    assert info.service_name == "front"
    assert info.attributes["k8s.workload.name"] == "web"
    stop(node.agent, answer.collector_id)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"namespace": "shpo"}, ("config[\"namespace\"]: no pod of a namespace 'shpo' runs on this "
                                "node; the nearest names are shop")),
        ({"pod": "shop/web"}, 'config["pod"]: no pod shop/web runs on this node'),
        ({"workload": "shop/deploy/wbe"}, ("config[\"workload\"]: no pod of a workload "
         "'shop/deploy/wbe' runs on this node; the nearest names are shop/deployment/web")),
        ({"container": "abcd"}, "config[\"container\"]: no container 'abcd' runs on this node"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_not_found(node: Node, config: dict[str, str], text: str) -> None:
    code, said = code_and_text(node.agent, "StartCollector", start_request(config))
    assert code is grpc.StatusCode.NOT_FOUND
    assert said.startswith(text)


def test_a_malformed_selector_is_refused_with_what_is_accepted(node: Node) -> None:
    request = start_request({"workload": "web"})
    assert code_and_text(node.agent, "StartCollector", request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "config[\"workload\"]: 'web' is not accepted; give NAMESPACE/KIND/NAME, such as "
            "shop/deploy/checkout"
        ),
    )


def test_without_a_source_of_names_the_refusal_says_how_to_have_one(tmp_path: Path) -> None:
    config = {"kubernetes": {"cri": str(tmp_path / "none.sock"), "api": "off"}}
    with running_agent(tmp_path / "agent", config) as agent:
        code, text = code_and_text(agent, "StartCollector", start_request({"namespace": "shop"}))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text.startswith('config["namespace"]: nothing here knows the names of pods: ')
        assert "mount the runtime's socket, or name it in kubernetes.cri" in text
        assert "kubernetes.kubelet is not set" in text


def test_whoever_reaches_the_agents_health_is_told_of_no_other_pod(
    node: Node, tmp_path: Path
) -> None:
    config = {
        "kubernetes": {"cri": str(node.runtime.socket), "api": "off"},
        "continuous": [{"kind": "syscall_stats", "config": {"pod": "shop/web"}}],
    }
    with running_agent(tmp_path / "agent", config) as agent:
        wait_until(lambda: "no pod shop/web runs" in page(agent, "/readyz")[1])
        assert NAME not in page(agent, "/readyz")[1]
        line = next(it for it in agent.log() if "continuous collector is not" in str(it["event"]))
        assert f"the nearest names are shop/{NAME}" in str(line["reason"])


def test_a_tap_of_a_pod_and_its_refusal_in_the_users_words(node: Node, puppet: Puppet) -> None:
    puppet.begin("while os.getppid(): time.sleep(0.001)")
    tapped = node.coral("tap", f"pod:shop/{NAME}", "--syscall-stats", "-d", "1s", "--json")
    assert tapped.returncode == 0, tapped.stderr
    names = {json.loads(line).get("syscall") for line in tapped.stdout.splitlines()}
    assert "getppid" in names
    refused = node.coral("tap", "namespace:shpo", "--syscall-stats")
    assert refused.stderr == (
        "coral: namespace:shpo: no pod of a namespace 'shpo' runs on this node; the nearest names "
        "are shop\n"
    )
    empty = node.coral("tap", "pods:", "--syscall-stats")
    assert "pods:: give a namespace and labels, such as 'pods:shop?app=web'" in empty.stderr


def test_pods_and_their_sources_are_listed(node: Node) -> None:
    listed = node.coral("pods").stdout
    row = next(line for line in listed.splitlines() if NAME in line)
    assert row.split() == ["shop", NAME, "deployment/web", "web", "app,", "proxy"]
    assert f"test-runtime 1.2.3 at {node.runtime.socket}, runtime.v1" in " ".join(listed.split())
    answer = json.loads(node.coral("pods", "shop", "--json").stdout)
    assert answer["pods"][0]["attributes"]["k8s.deployment.name"] == "web"
    assert "pods" not in json.loads(node.coral("pods", "bank", "--json").stdout)
    assert "no pod of bank is known here" in node.coral("pods", "bank").stdout
    assert "cgroup changes" in node.coral("capabilities").stdout


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("pod:", {f"pod:shop/{NAME}", f"pod:shop/{NAME}/app", f"pod:shop/{NAME}/proxy"}),
        ("pods:shop?a", {"pods:shop?app=web"}),
        ("namespace:", {"namespace:shop"}),
        ("workload:shop/", {"workload:shop/deployment/web"}),
        ("po", {"pod:", "pods:"}),
        ("namespace:x", set()),
    ],
)
def test_a_shell_is_offered_what_is_there(node: Node, word: str, offered: set[str]) -> None:
    environment = {
        **os.environ,
        "_CORAL_COMPLETE": "bash_complete",
        "COMP_WORDS": f"coral tap {word}",
        "COMP_CWORD": "2",
        "CORAL_AGENT": node.agent.address,
    }
    command = Path(sys.executable).with_name("coral")
    done = subprocess.run(
        [command], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    found = {line.removeprefix("plain,") for line in done.stdout.split()}
    assert found == offered, done.stderr
