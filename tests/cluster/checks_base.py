"""The kustomize base in a real Kubernetes, as it is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coral.bpf.probing.capabilities import NAMES
from tests.cluster.agents import AGENT, EXEC, ready, requests
from tests.cluster.node import NODE, Cluster
from tests.cluster.pods import READY_S, ask, deploy, process_of, url
from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(1800)  # the first time, Kubernetes is built

BASE = ROOT / "deploy/kubernetes/base"
REQUESTS = 50


@pytest.fixture(scope="module", autouse=True)
def _installed(running: Cluster) -> Iterator[None]:
    # 1.20 does not know maxSurge for DaemonSets: it never has a second pod on a node.
    running.kubectl("apply", "--validate=false", "--kustomize", BASE)
    ready(running)
    yield
    running.kubectl("delete", "--kustomize", BASE, "--wait")


def test_the_agent_is_ready_with_two_capabilities_and_a_seccomp_filter(running: Cluster) -> None:
    pid = process_of(running, "coral", "coral-agent")
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    for which in ("CapEff", "CapPrm", "CapBnd"):
        mask = int(status[which], 16)
        assert {name for bit, name in enumerate(NAMES) if mask >> bit & 1} == {
            "CAP_BPF",
            "CAP_PERFMON",
        }
    assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
    with pytest.raises(OSError, match="Read-only"):
        (Path(f"/proc/{pid}/root") / "usr/new").touch()


def test_the_agents_id_is_the_nodes_name(running: Cluster) -> None:
    lines = running.kubectl("logs", *AGENT, "daemonset/coral-agent").splitlines()
    listening = [json.loads(line) for line in lines if '"listening"' in line]
    assert [it["agent"] for it in listening] == [NODE]


def test_the_doctor_finds_everything_in_order_in_the_pod(running: Cluster) -> None:
    checks = json.loads(running.kubectl(*EXEC, "coral", "doctor", "--json"))["checks"]
    assert [it for it in checks if it["status"] == "fail"] == []
    found = {it["check"]: it["found"] for it in checks}
    assert found["http_latency, summaries"].startswith("200 of 200 requests")


def test_a_tap_counts_every_request_of_another_pod(running: Cluster) -> None:
    pod = deploy(running, "default", "shop")
    pid = process_of(running, "default", pod)
    address = url(running, "default", pod)
    command = ("coral", "tap", f"pid:{pid}", "--http-latency", "--json")
    with running.begin_kubectl(*EXEC, *command) as tap:
        # It watches once the agent has it among its collectors.
        wait_until(lambda: "http_latency" in collectors(running).lower(), READY_S)
        assert ask(running, address, REQUESTS) == list(range(1, REQUESTS + 1))
        wait_until(lambda: requests(tap.lines(), "/") >= REQUESTS, READY_S)
        assert requests(tap.lines(), "/") == REQUESTS
    running.kubectl("delete", "deployment", "shop", "--wait=false")


def collectors(running: Cluster) -> str:
    return running.try_kubectl(*EXEC, "coral", "collectors", "--json")
