"""Pods that a real containerd runs, seen by name, and from a new one's first call on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from coral import bpf
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.machine.pods.node import Pods
from coral.collectors.hierarchies import hierarchies
from tests.containerd import Containerd, containerd, image
from tests.kernel.test_pods import watching
from tests.pods import HASH
from tests.support import ROOT, built, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.long]

BINARIES = ROOT / "build/containerd"
CALLS = 1000


@dataclass
class Node:
    pods: Pods


def _static(name: str) -> Path:
    """A program of tests/programs, linked so that it runs without any file."""
    source = ROOT / f"tests/programs/{name}.c"
    command = ["cc", "-O2", "-static", "-pthread", str(source), "-o"]
    return built(f"{name}-static", [source], lambda output: [*command, output])


@pytest.fixture(scope="module")
def top() -> Iterator[str]:
    """The cgroup in which the pods' are made, from the root of each hierarchy."""
    name = f"/kubepods-{uuid.uuid4().hex[:8]}"
    yield name
    for cgroups in Path("/sys/fs/cgroup").glob(f"*{name}"):
        for below in (*sorted(cgroups.rglob("*/"), reverse=True), cgroups):
            wait_until(partial(_has_gone, below))


@pytest.fixture(scope="module")
def runs(top: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:  # noqa: ARG001  removed after its pods
    if not (BINARIES / "containerd").exists() or not (BINARIES / "runc").exists():
        pytest.skip("`make test` unpacks containerd and runc to build/containerd")
    programs = {"pause": _static("paused"), "calls": _static("calls")}
    archive = image(programs, "pause")
    with containerd(BINARIES, tmp_path_factory.mktemp("containerd"), archive) as running:
        yield running


def _has_gone(directory: Path) -> bool:
    with suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def run(runs: Containerd, top: str, name: str, **labels: str) -> str:
    uid = str(uuid.uuid4())
    return runs.run_pod("shop", name, uid, f"{top}/pod{uid}", labels)


@pytest.mark.timed
def test_every_call_of_a_container_is_seen_from_its_exec_on(runs: Containerd, top: str) -> None:
    """The runtime needs some 50 ms from the cgroup to the exec; the agent a tenth of that."""
    if "memory" not in {found.kind for found in hierarchies()}:
        pytest.skip("this runc is told to drive cgroups v1")
    labels = {"app": "web", "pod-template-hash": HASH}
    web = f"web-{uuid.uuid4().hex[:5]}"  # another one at each try
    old, new = f"{web}-{HASH}-aaaaa", f"{web}-{HASH}-bbbbb"
    run(runs, top, old, **labels)
    node = Pods(Kubernetes(cri=str(runs.socket), api="off"))
    states = {state.name: state for state in node.sources(bpf.probe())}
    assert states["cri"].detail.startswith("containerd 1.")

    with watching(
        Node(node), f"workload:shop/deploy/{web}", mode="events", include="getppid"
    ) as counted:
        attributes = counted.collector.attributes
        assert attributes["k8s.pod.name"] == old
        assert attributes["k8s.deployment.name"] == web
        sandbox = run(runs, top, new, **labels)
        container = runs.create(sandbox, "app", "/calls", "getppid", str(CALLS))
        runs.start(container)

        def has_ended() -> bool:
            counted.drain()
            return counted.by_comm("getppid").get("calls", 0) >= CALLS

        wait_until(has_ended)
    # Not one less; runc's own process makes a few in the container before its exec.
    assert CALLS <= counted.of("getppid") < CALLS + 10
    known = {each.pod.name: each for each in node.listing()}
    assert known[new].attributes["k8s.workload.name"] == web
