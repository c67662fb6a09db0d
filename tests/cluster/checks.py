"""The agent in a real Kubernetes: `make test-cluster`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from coral.bpf.probing.capabilities import NAMES
from tests.cluster.node import NODE, Cluster, cluster
from tests.containers import build
from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(1800)  # the first time, Kubernetes is built

CACHE: Final = Path(os.environ.get("CORAL_TEST_CACHE", "/var/cache/coral-tests"))
AGENT: Final = ("--namespace", "coral")
EXEC: Final = ("exec", *AGENT, "daemonset/coral-agent", "--")
READY_S: Final = 300
# A server of HTTP in the agent's own image, which has an interpreter.
SHOP: Final = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "shop", "namespace": "default"},
    "spec": {
        "replicas": 1,
        "selector": {"matchLabels": {"app": "shop"}},
        "template": {
            "metadata": {"labels": {"app": "shop"}},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "containers": [
                    {
                        "name": "server",
                        "image": "localhost/coral-agent:0.1.0",
                        "imagePullPolicy": "Never",
                        "command": ["/usr/bin/python3.11", "-P", "-m", "http.server", "8080"],
                        "workingDir": "/tmp",
                        "readinessProbe": {"tcpSocket": {"port": 8080}},
                    }
                ],
            },
        },
    },
}
REQUESTS: Final = 50
ASK: Final = (
    "import sys, urllib.request\n"
    "for _ in range(int(sys.argv[2])): urllib.request.urlopen(sys.argv[1]).read()\n"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that has the image and, by the base, a ready agent."""
    made = build(tmp_path_factory.mktemp("image"), CACHE / "image.pem")
    with cluster(CACHE) as it:
        it.load(made.archive)
        # 1.20 does not know maxSurge for DaemonSets: it never has a second pod on a node.
        it.kubectl("apply", "--validate=false", "--kustomize", ROOT / "deploy/kubernetes/base")
        ready(it)
        yield it


def ready(running: Cluster) -> None:
    """Waits until the agent is ready on every node."""
    daemon = "daemonset/coral-agent"
    done = running.try_kubectl("rollout", "status", *AGENT, daemon, f"--timeout={READY_S}s")
    assert done, running.kubectl("describe", *AGENT, "pods") + running.try_kubectl(
        "logs", *AGENT, daemon, "--tail=20"
    )


def process_of(running: Cluster, namespace: str, name: str) -> int:
    """The process id, on this machine, of the first container of the pod whose name begins so."""
    pods = running.get("pods", "--namespace", namespace)["items"]
    (pod,) = (it for it in pods if it["metadata"]["name"].startswith(name))
    container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
    (file,) = (running.directory / "run").glob(f"*/k8s.io/{container}/init.pid")
    return int(file.read_text())


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
    assert [it for it in checks if it["status"] == "FAIL"] == []
    found = {it["check"]: it["found"] for it in checks}
    assert found["http_latency, summaries"].startswith("200 of 200 requests")


def test_a_tap_counts_every_request_of_another_pod(running: Cluster) -> None:
    running.kubectl("apply", "--filename", "-", said=json.dumps(SHOP))
    running.kubectl("rollout", "status", "deployment/shop", f"--timeout={READY_S}s")
    pid = process_of(running, "default", "shop")
    (pod,) = running.get("pods", "--selector", "app=shop")["items"]
    url = f"http://{pod['status']['podIP']}:8080/"
    with running.begin(*EXEC, "coral", "tap", f"pid:{pid}", "--http-latency", "--json") as tap:
        # It watches once the agent has it among its collectors.
        wait_until(lambda: "http_latency" in collectors(running).lower(), READY_S)
        running.kubectl(*EXEC, "/usr/bin/python3.11", "-P", "-c", ASK, url, str(REQUESTS))
        wait_until(lambda: requests(tap.lines()) >= REQUESTS, READY_S)
        assert requests(tap.lines()) == REQUESTS


def collectors(running: Cluster) -> str:
    return running.try_kubectl(*EXEC, "coral", "collectors", "--json")


def requests(lines: list[dict[str, Any]]) -> int:
    return sum(line["count"] for line in lines if line.get("role") == "server")


def test_a_rollout_replaces_the_agent_and_never_runs_two(running: Cluster) -> None:
    before = process_of(running, "coral", "coral-agent")
    running.kubectl("rollout", "restart", *AGENT, "daemonset/coral-agent")
    ready(running)
    (pod,) = running.get("pods", *AGENT)["items"]
    assert process_of(running, "coral", pod["metadata"]["name"]) != before
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_real_helm_installs_the_chart_beside_nothing_else(running: Cluster) -> None:
    running.kubectl("delete", "--kustomize", ROOT / "deploy/kubernetes/base", "--wait")
    running.kubectl("create", "namespace", "coral")
    began = time.monotonic()
    running.helm(
        *("install", "coral", ROOT / "deploy/helm/coral", *AGENT, "--disable-openapi-validation"),
        *("--wait", f"--timeout={READY_S}s"),
    )
    print(f"helm install to ready: {time.monotonic() - began:.1f} s")
    ready(running)
    listed = running.helm("list", *AGENT)
    assert re.search(r"^coral\s+coral\s+1\s.*\sdeployed\s", listed, re.MULTILINE)
