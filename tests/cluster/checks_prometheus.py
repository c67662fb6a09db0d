"""A real Prometheus finds the agent's pod by the PodMonitor, as the Prometheus operator translates
it, and has the agent's figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import yaml

from tests.cluster.agents import Agent, requests
from tests.cluster.node import Cluster
from tests.cluster.pods import READY_S, ask, deploy, url
from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(900)

REQUESTS: Final = 25
_LISTEN: Final = "127.0.0.1:9090"
_META: Final = "__meta_kubernetes_"
# What the operator attaches to each target of a PodMonitor.
_ATTACHED: Final = {
    "namespace": "namespace",
    "container": "pod_container_name",
    "pod": "pod_name",
}

Query = Callable[[str], list[Any]]


def scrape_config(monitor: dict[str, Any], kubeconfig: str) -> dict[str, Any]:
    """What the Prometheus operator makes of a PodMonitor with one endpoint: its design document
    lists these steps."""
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (label, value), *_ = monitor["spec"]["selector"]["matchLabels"].items()
    about = monitor["metadata"]
    label = label.replace(".", "_").replace("/", "_")
    steps: list[dict[str, Any]] = [
        {"source_labels": [f"{_META}pod_phase"], "regex": "(Failed|Succeeded)", "action": "drop"},
        {"source_labels": [f"{_META}pod_label_{label}"], "regex": value, "action": "keep"},
        {"source_labels": [f"{_META}pod_container_port_name"], "regex": endpoint["port"],
         "action": "keep"},
        *({"source_labels": [f"{_META}{source}"], "target_label": target}
          for target, source in _ATTACHED.items()),
        {"target_label": "job", "replacement": f"{about['namespace']}/{about['name']}"},
        *({"target_label": step["targetLabel"], "replacement": step["replacement"]}
          for step in endpoint["relabelings"]),
    ]  # fmt: skip
    place = {"role": "pod", "kubeconfig_file": kubeconfig,
             "namespaces": {"names": [about["namespace"]]}}  # fmt: skip
    return {
        "job_name": f"podMonitor/{about['namespace']}/{about['name']}/0",
        "honor_labels": endpoint["honorLabels"],
        "metrics_path": endpoint["path"],
        "scrape_interval": "500ms",  # in place of the monitor's, for which a test would wait
        "scrape_timeout": "500ms",
        "kubernetes_sd_configs": [place],
        "relabel_configs": steps,
    }


@pytest.fixture(scope="module")
def query(running: Cluster) -> Iterator[Query]:
    directory = running.directory / "prometheus"
    directory.mkdir()
    kustomize = running.kubectl("kustomize", ROOT / "deploy/kubernetes/podmonitor")
    job = scrape_config(yaml.safe_load(kustomize), str(running.kubeconfig))
    (directory / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = (
        ROOT / "build/prometheus-kubernetes/prometheus",
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={_LISTEN}",
    )
    with running.begin(*command) as process:

        def ask_it(expression: str) -> list[Any]:
            assert process.process.poll() is None, process.errors
            words = ("--get", f"http://{_LISTEN}/api/v1/query")
            done = subprocess.run(
                running.inside("curl", "-sf", "--data-urlencode", f"query={expression}", *words),
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:  # it is still starting
                return []
            found: list[Any] = json.loads(done.stdout)["data"]["result"]
            return found

        yield ask_it


def test_prometheus_finds_the_agents_pod_as_the_job_of_the_rules(
    agent: Agent, query: Query
) -> None:
    (found,) = wait_until(lambda: query('up{job="coral"} == 1'), READY_S)
    labels = found["metric"]
    assert (labels["namespace"], labels["container"]) == ("coral", "agent")
    assert labels["pod"] == agent.pod["metadata"]["name"]
    assert labels["instance"] == f"{agent.pod['status']['podIP']}:9464"
    assert len(query("up")) == 1


def test_a_query_returns_the_requests_of_a_watched_deployment(
    running: Cluster, agent: Agent, query: Query
) -> None:
    pod = deploy(running, "bank", "vault")
    with agent.tap("bank", "workload:bank/deploy/vault", "--http-latency") as tap:
        agent.wait_for_sessions("bank")
        ask(running, url(running, "bank", pod, "/vault"), REQUESTS)
        wait_until(lambda: requests(tap.lines(), "/vault") >= REQUESTS, READY_S)
        counted = (
            "sum by (job, namespace, workload, http_route) "
            '(http_server_request_duration_seconds_count{service="vault"})'
        )
        expected = {
            "job": "coral", "namespace": "bank", "workload": "deployment/vault",
            "http_route": "/vault",
        }  # fmt: skip

        def has_all() -> bool:
            found = query(counted)
            return [(it["metric"], it["value"][1]) for it in found] == [(expected, str(REQUESTS))]

        wait_until(has_all, READY_S)
