"""Two teams by RoleBindings of a real Kubernetes: its TokenReview says who they are, and its
SubjectAccessReview what they may trace."""

from __future__ import annotations

import json

import pytest

from tests.cluster.agents import TEAMS, Agent, requests, token
from tests.cluster.node import Cluster
from tests.cluster.pods import READY_S, ask, deploy, process_of, url
from tests.support import wait_until

pytestmark = pytest.mark.timeout(900)

REQUESTS = 10


@pytest.fixture(scope="module")
def pods(agent: Agent) -> dict[str, str]:
    """A pod that serves, of each team."""
    return {team: deploy(agent.running, team, "front") for team in TEAMS}


def other(team: str) -> str:
    return TEAMS[1 - TEAMS.index(team)]


@pytest.mark.parametrize("team", TEAMS)
def test_a_team_traces_its_own_pods_and_sees_no_others(
    running: Cluster, agent: Agent, pods: dict[str, str], team: str
) -> None:
    with agent.tap(team, f"namespace:{team}", "--http-latency") as tap:
        agent.wait_for_sessions(team)
        assert agent.sessions(other(team)) == []
        for each, pod in pods.items():
            ask(running, url(running, each, pod, f"/of-{each}"), REQUESTS)
        wait_until(lambda: requests(tap.lines(), f"/of-{team}") >= REQUESTS, READY_S)
        assert requests(tap.lines(), f"/of-{team}") == REQUESTS
        assert requests(tap.lines(), f"/of-{other(team)}") == 0
    wait_until(lambda: agent.sessions(team) == [], READY_S)
    listed = json.loads(agent.coral(team, "pods", "--json").stdout)["pods"]
    assert {it["namespace"] for it in listed} == {team}
    assert pods[team] in {it["name"] for it in listed}


@pytest.mark.parametrize("team", TEAMS)
def test_a_team_traces_neither_the_others_pods_nor_the_host(
    running: Cluster, agent: Agent, pods: dict[str, str], team: str
) -> None:
    strange = other(team)
    process = f"pid:{process_of(running, strange, pods[strange])}"
    pod = f"pod:{strange}/{pods[strange]}"
    refused = {}
    for target in (
        *(pod, f"pod:{strange}/absent", f"workload:{strange}/deploy/front"),
        *(process, "--host"),
    ):
        done = agent.coral(team, "tap", target, "--http-latency", "--duration", "1s")
        assert (done.returncode, done.stdout) == (1, ""), done
        refused[target] = done.stderr
    account = f"which Kubernetes does not give system:serviceaccount:{team}:tracer"
    needed = "coral: StartCollector needs the right to create collectors.coral.io in"
    for target in (process, "--host"):
        assert refused[target].startswith(f"{needed} every namespace"), refused
        assert account in refused[target]
    # Whether a pod is there is no part of the answer.
    for target in (pod, f"pod:{strange}/absent", f"workload:{strange}/deploy/front"):
        assert refused[target] == f"{needed} the namespace {strange}, {account}\n"


def test_a_token_for_the_api_server_is_no_token_for_the_agent(
    running: Cluster, agent: Agent
) -> None:
    agent.tokens["forged"] = token(running, "shop")
    done = agent.coral("forged", "pods")
    assert (done.returncode, done.stdout) == (1, "")
    assert "token" in done.stderr
