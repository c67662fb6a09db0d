"""The agent by the chart, as its operators and the teams reach it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster.files import SERVER, run
from tests.cluster.node import Cluster, Running
from tests.cluster.pods import READY_S
from tests.support import ROOT, coral, wait_until

CACHE: Final = Path(os.environ.get("CORAL_TEST_CACHE", "/var/cache/coral-tests"))
AGENT: Final = ("--namespace", "coral")
EXEC: Final = ("exec", *AGENT, "daemonset/coral-agent", "--")
TEAMS: Final = ("shop", "bank")
_PORT: Final = 9001
_NAME: Final = "coral-agent.coral.svc"  # in the agent's certificate
_VALUES: Final = {
    "serviceAccount": {"pods": True, "reviews": True},
    "grpc": {"tlsSecret": "coral-tls"},
    "config": {
        "auth": {"kubernetes": {"server": SERVER}},
        # The machine may be busy; what limits do is tested elsewhere.
        "limits": {"cpu_percent": 1000, "concurrent_collectors": 10},
    },
}
_VERBS: Final = ["create", "get", "list", "delete"]


@dataclass
class Agent:
    """The agent of the node, reached over TLS by the holders of tokens of the cluster."""

    running: Cluster
    authority: Path
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def pod(self) -> Any:
        """Its pod, which is ready."""
        items = self.running.get("pods", *AGENT)["items"]
        (pod,) = (it for it in items if "deletionTimestamp" not in it["metadata"])
        return pod

    def environment(self, token: str) -> dict[str, str]:
        """Of a client that has TOKEN."""
        return {
            "CORAL_AGENT": f"{self.pod['status']['podIP']}:{_PORT}",
            "CORAL_TOKEN": token,
            "CORAL_TLS_CA": str(self.authority),
            "CORAL_TLS_SERVER_NAME": _NAME,
        }

    def coral(self, team: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`coral`, on the node, by a team: what it prints."""
        command = self.running.inside(*coral(*arguments))
        environment = {**os.environ, **self.environment(self.tokens[team])}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=READY_S
        )

    def tap(self, team: str, *arguments: str) -> AbstractContextManager[Running]:
        """`coral tap` in JSON, on the node, by a team, for the duration of the block."""
        command = coral("tap", *arguments, "--json", "--duration", "5m")
        return self.running.begin(*command, environment=self.environment(self.tokens[team]))

    def sessions(self, team: str) -> list[Any]:
        """The sessions at work that a team sees."""
        done = self.coral(team, "collectors", "--json")
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout).get("collectors", [])
        return found

    def wait_for_sessions(self, team: str, count: int = 1) -> None:
        """Waits until COUNT sessions of a team are at work."""
        wait_until(lambda: len(self.sessions(team)) == count, READY_S)


def requests(lines: Sequence[dict[str, Any]], route: str, role: str = "server") -> int:
    """How many requests for ROUTE a tap has counted so far."""
    return sum(
        line["count"] for line in lines if (line.get("role"), line.get("route")) == (role, route)
    )


def ready(running: Cluster) -> None:
    """Waits until the agent is ready on every node."""
    daemon = "daemonset/coral-agent"
    done = running.try_kubectl("rollout", "status", *AGENT, daemon, f"--timeout={READY_S}s")
    assert done, running.kubectl("describe", *AGENT, "pods") + running.try_kubectl(
        "logs", *AGENT, daemon, "--tail=20"
    )


def installed(running: Cluster) -> Agent:
    """Installs the chart for two teams, each of which may trace in its namespace alone."""
    agent = Agent(running, running.directory / "agent.crt")
    key = running.directory / "agent.key"
    run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "2", "-subj", "/CN=agent", "-addext", f"subjectAltName=DNS:{_NAME}"),
        *("-keyout", key, "-out", agent.authority),
    )
    running.kubectl("create", "namespace", "coral")
    running.kubectl(
        "create", "secret", "tls", "coral-tls", *AGENT, f"--cert={agent.authority}", f"--key={key}"
    )
    for team in TEAMS:
        agent.tokens[team] = _team(running, team)
    install(running)
    return agent


def install(running: Cluster) -> None:
    """Installs the chart; returns when the agent is ready."""
    values = running.directory / "values.json"
    values.write_text(json.dumps(_VALUES))
    running.helm(
        *("install", "coral", ROOT / "deploy/helm/coral", *AGENT, "--values", values),
        *("--disable-openapi-validation", "--wait", f"--timeout={READY_S}s"),
    )


def _team(running: Cluster, name: str) -> str:
    """A namespace whose account `tracer` may trace in it; its token for the agent."""
    where = {"name": "tracer", "namespace": name}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": where}
    rules = [{"apiGroups": ["coral.io"], "resources": ["collectors"], "verbs": _VERBS}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "tracer"}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": where},
        {**rbac, "kind": "Role", "rules": rules},
        {**rbac, "kind": "RoleBinding", "roleRef": role,
         "subjects": [{"kind": "ServiceAccount", **where}]},
    ]  # fmt: skip
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    running.kubectl("apply", "--filename", "-", said=json.dumps(listed))
    return token(running, name, "coral.io")


def token(running: Cluster, namespace: str, *audiences: str) -> str:
    """A token of a namespace's account `tracer`, for AUDIENCES or for the API server."""
    wanted = [f"--audience={audience}" for audience in audiences]
    where = ("--namespace", namespace)
    return running.kubectl("create", "token", "tracer", *where, *wanted).strip()
