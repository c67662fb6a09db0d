"""Pods by name in a real Kubernetes: their requests, from the first to the last, while pods come
and while agents go."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
import yaml

from tests.cluster.agents import AGENT, Agent, ready, requests
from tests.cluster.node import NODE, Cluster
from tests.cluster.pods import (
    OWN_REQUESTS,
    READY_S,
    ask,
    cgroup_of,
    deploy,
    names,
    process_of,
    template,
    url,
)
from tests.support import ROOT, wait_until

pytestmark = pytest.mark.timeout(900)

OLD, NEW = 20, 30


@pytest.fixture(scope="module")
def shop(agent: Agent) -> str:
    """The name of a pod of shop/deploy/shop, which serves."""
    return deploy(agent.running, "shop", "shop")


def test_a_deployment_is_scaled_up_and_every_request_of_the_new_pod_is_seen(
    running: Cluster, agent: Agent, shop: str
) -> None:
    with agent.tap("shop", "workload:shop/deploy/shop", "--http-latency") as tap:
        agent.wait_for_sessions("shop")
        asked = ask(running, url(running, "shop", shop, "/old"), OLD)
        running.kubectl("scale", "--namespace=shop", "deployment/shop", "--replicas=2")
        wait_until(lambda: len(names(running, "shop", "shop")) == 2, READY_S)
        (new,) = set(names(running, "shop", "shop")) - {shop}
        # The pod counts them: none came before.
        assert ask(running, url(running, "shop", new, "/new"), NEW) == list(range(1, NEW + 1))
        wait_until(lambda: requests(tap.lines(), "/new") >= NEW, READY_S)
        tap.process.send_signal(signal.SIGINT)
        assert tap.leave() == 128 + signal.SIGINT
        seen = {
            (role, route): requests(tap.lines(), route, role)
            for role in ("server", "client")
            for route in ("/old", "/new", "/own")
        }
        assert seen == {
            ("server", "/old"): len(asked),
            ("server", "/new"): NEW,
            ("server", "/own"): OWN_REQUESTS,
            ("client", "/old"): 0,  # the node asked
            ("client", "/new"): 0,
            ("client", "/own"): OWN_REQUESTS,
        }
        assert losses(tap.lines()) == []
        assert tap.lines()[-1]["end"] == "stopped"
        assert {line["service"] for line in tap.lines() if "service" in line} == {"shop"}


def losses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "lost" in line or "unread" in line]


def test_a_static_pod_is_tapped_by_its_name(running: Cluster, agent: Agent) -> None:
    manifest = {"apiVersion": "v1", "kind": "Pod", **template({"app": "till"})}
    manifest["metadata"] |= {"name": "till", "namespace": "shop"}
    name = f"till-{NODE}"
    file = running.directory / "static/till.yaml"
    file.write_text(yaml.safe_dump(manifest))
    wait_until(lambda: running.try_kubectl("get", "pod", name, "--namespace=shop"), READY_S)
    running.kubectl(
        *("wait", "--for=condition=Ready", f"pod/{name}", "--namespace=shop"),
        f"--timeout={READY_S}s",
    )
    # Its UID is no UUID: 32 digits, without dashes.
    place = cgroup_of(process_of(running, "shop", name)).split("/")
    (uid,) = (part.removeprefix("pod") for part in place if part.startswith("pod"))
    assert len(uid) == 32
    assert int(uid, 16)
    with agent.tap("shop", f"pod:shop/{name}", "--http-latency") as tap:
        agent.wait_for_sessions("shop")
        (session,) = agent.sessions("shop")
        assert session["attributes"]["k8s.pod.name"] == name
        assert len(ask(running, url(running, "shop", name, "/till"), OLD)) == OLD
        wait_until(lambda: requests(tap.lines(), "/till") >= OLD, READY_S)
        tap.process.send_signal(signal.SIGINT)
        assert tap.leave() == 128 + signal.SIGINT
        assert requests(tap.lines(), "/till") == OLD
        assert losses(tap.lines()) == []
    file.unlink()


def test_a_rollout_replaces_the_agent_tells_its_client_and_loses_no_request_before_it(
    running: Cluster, agent: Agent, shop: str
) -> None:
    before = process_of(running, "coral", "coral-agent")
    with agent.tap("shop", f"pod:shop/{shop}", "--http-latency") as tap:
        agent.wait_for_sessions("shop")
        ask(running, url(running, "shop", shop, "/before"), OLD)
        # Nobody waits for these to be shown: the agent has them when it is told to go.
        running.kubectl("rollout", "restart", *AGENT, "daemonset/coral-agent")
        assert tap.leave(READY_S) == 1
        assert tap.lines()[-1]["end"] == "agent_shutdown"
        assert requests(tap.lines(), "/before") == OLD
        assert losses(tap.lines()) == []
    ready(running)
    assert process_of(running, "coral", agent.pod["metadata"]["name"]) != before
    (status,) = agent.pod["status"]["containerStatuses"]
    assert status["restartCount"] == 0
    again(running, agent, shop)


def test_a_client_of_an_agent_that_was_killed_is_told_and_its_account_adds_up(
    running: Cluster, agent: Agent, shop: str
) -> None:
    follower = ("-P", str(ROOT / "tests/cluster/follower.py"), f"shop/{shop}")
    environment = agent.environment(agent.tokens["shop"])
    with running.begin(sys.executable, *follower, environment=environment) as client:
        wait_until(lambda: client.lines() or client.process.poll() is not None, READY_S)
        assert client.lines(), client.errors
        ask(running, url(running, "shop", shop, "/before"), OLD)
        wait_until(lambda: client.lines()[-1].get("delivered") == OLD, READY_S)
        os.kill(process_of(running, "coral", "coral-agent"), signal.SIGKILL)
        assert client.leave(READY_S) == 0, client.errors
        told = client.lines()[-1]
    assert told["error"] == "StreamLostError"
    assert told["last_seq"] - told["after_seq"] == told["delivered"] + told["filtered"] == OLD
    assert (told["lost"], told["lost_in_kernel"]) == ({}, {})
    assert "the agent was restarted" in told["message"]
    ready(running)
    (status,) = agent.pod["status"]["containerStatuses"]
    assert status["restartCount"] == 1
    again(running, agent, shop)


def again(running: Cluster, agent: Agent, shop: str) -> None:
    """The new agent has no session, and counts those of a new one."""
    wait_until(lambda: agent.coral("shop", "collectors", "--json").returncode == 0, READY_S)
    assert agent.sessions("shop") == []
    with agent.tap("shop", f"pod:shop/{shop}", "--http-latency") as tap:
        agent.wait_for_sessions("shop")
        ask(running, url(running, "shop", shop, "/after"), OLD)
        wait_until(lambda: requests(tap.lines(), "/after") >= OLD, READY_S)
        assert requests(tap.lines(), "/after") == OLD
    wait_until(lambda: agent.sessions("shop") == [], READY_S)
