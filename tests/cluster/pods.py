"""Pods that serve HTTP and count what they serve, and clients that count what they ask for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Final

from tests.cluster.node import Cluster
from tests.support import wait_until

IMAGE: Final = "localhost/coral-agent:0.1.0"  # it has an interpreter
PYTHON: Final = ("/usr/bin/python3.11", "-P", "-c")
PORT: Final = 8080
OWN_REQUESTS: Final = 5
READY_S: Final = 300
# The first thing that it does is to serve its own requests for /own.
_SERVE: Final = f"""
import http.server, threading, urllib.request
class Shop(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served = 0
    def do_GET(self):
        Shop.served += self.path != "/own"
        body = str(Shop.served).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("", {PORT}), Shop)
threading.Thread(target=server.serve_forever).start()
for _ in range({OWN_REQUESTS}): urllib.request.urlopen("http://127.0.0.1:{PORT}/own").read()
"""
# Prints what each answer says. Until the first, it tries again and again.
_ASK: Final = """
import sys, time, urllib.request
url, count = sys.argv[1], int(sys.argv[2])
while count:
    try:
        with urllib.request.urlopen(url) as answer: print(answer.read().decode(), flush=True)
        count -= 1
    except OSError:
        time.sleep(0.002)
"""


def template(labels: dict[str, str]) -> dict[str, Any]:
    """A pod that serves, as it stands in a workload."""
    return {
        "metadata": {"labels": labels},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "server",
                    "image": IMAGE,
                    "imagePullPolicy": "Never",
                    "command": [*PYTHON, _SERVE],
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                }
            ],
        },
    }


def deploy(running: Cluster, namespace: str, name: str) -> str:
    """A Deployment of one pod that serves; returns the pod's name once it is ready."""
    labels = {"app": name}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template(labels)}
    manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
    running.kubectl("apply", "--filename", "-", said=json.dumps(manifest))
    where = ("--namespace", namespace)
    running.kubectl("rollout", "status", *where, f"deployment/{name}", f"--timeout={READY_S}s")
    (pod,) = names(running, namespace, name)
    return pod


def names(running: Cluster, namespace: str, app: str) -> list[str]:
    """The pods of a Deployment that are not about to end."""
    items = running.get("pods", "--namespace", namespace, "--selector", f"app={app}")["items"]
    alive = [it["metadata"] for it in items if "deletionTimestamp" not in it["metadata"]]
    return [str(it["name"]) for it in alive]


def url(running: Cluster, namespace: str, pod: str, path: str = "/") -> str:
    """Where a pod serves, as soon as it has an address."""
    address = wait_until(
        lambda: running.get("pod", pod, "--namespace", namespace)["status"].get("podIP"), READY_S
    )
    return f"http://{address}:{PORT}{path}"


def ask(running: Cluster, address: str, count: int) -> list[int]:
    """Makes COUNT requests, from the node, as soon as somebody answers; which request of its pod
    each was."""
    done = subprocess.run(
        running.inside("python3", "-I", "-c", _ASK, address, str(count)),
        stdout=subprocess.PIPE, text=True, check=True, timeout=READY_S,
    )  # fmt: skip
    return [int(line) for line in done.stdout.split()]


def process_of(running: Cluster, namespace: str, name: str) -> int:
    """The process id, on this machine, of the first container of the pod whose name begins so."""
    pods = running.get("pods", "--namespace", namespace)["items"]
    (pod,) = (it for it in pods if it["metadata"]["name"].startswith(name))
    container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
    (file,) = (running.directory / "run").glob(f"*/k8s.io/{container}/init.pid")
    return int(file.read_text())


def cgroup_of(pid: int) -> str:
    """The path of a process's cgroup, in the hierarchy of the memory controller."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    paths = {controllers: path for _, controllers, path in (it.split(":", 2) for it in lines)}
    return paths.get("memory", paths.get("", ""))
