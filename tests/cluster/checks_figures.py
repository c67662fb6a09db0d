"""What the agent takes in its pod, and how soon it is ready: the figures of
docs/benchmarks_kubernetes.md, printed by `make test-cluster`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median
from typing import Final

import pytest

from tests.cluster.agents import AGENT, Agent, install, ready
from tests.cluster.janitor import hierarchies
from tests.cluster.node import Cluster
from tests.cluster.pods import READY_S, cgroup_of, deploy, process_of
from tests.support import wait_until

pytestmark = pytest.mark.timeout(900)

KINDS: Final = ("--syscall-stats", "--tcp-metrics", "--cpu-profile", "--http-latency")
INSTALLS: Final = 3
LIMIT_BYTES: Final = 1 << 30
_MB: Final = 1e6


def memory_of(pid: int) -> dict[str, int]:
    """Bytes that the cgroup of a process is charged: all, all but the page cache that can be taken
    back (the kubelet's working set), and what is no file's and not the kernel's."""
    path = cgroup_of(pid).lstrip("/")
    (directory,) = (
        top / path for top in hierarchies()
        if any((top / path / name).exists() for name in ("memory.current", "memory.stat"))
    )  # fmt: skip
    is_v2 = (directory / "memory.current").exists()
    stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    usage = directory / ("memory.current" if is_v2 else "memory.usage_in_bytes")
    inactive = int(stat["inactive_file" if is_v2 else "total_inactive_file"])
    charged = int(usage.read_text())
    anonymous = int(stat["anon" if is_v2 else "total_rss"])
    return {"charged": charged, "working set": charged - inactive, "anonymous": anonymous}


def said(pid: int, when: str) -> dict[str, int]:
    """Prints the memory of the agent, and returns it."""
    found = memory_of(pid)
    print(f"\nmemory, {when}: " + ", ".join(f"{k} {v / _MB:.1f} MB" for k, v in found.items()))
    return found


def test_how_soon_the_agent_is_ready_after_helm_install(running: Cluster, agent: Agent) -> None:
    took_s = []
    for _ in range(INSTALLS):
        running.helm("uninstall", "coral", *AGENT)
        wait_until(lambda: not running.get("pods", *AGENT)["items"], READY_S)
        began_s = time.monotonic()
        install(running)
        took_s.append(time.monotonic() - began_s)
    each = ", ".join(f"{it:.1f}" for it in sorted(took_s))
    print(f"\nhelm install to ready: median {median(took_s):.1f} s, of {each} s")
    ready(running)
    assert "deployed" in running.helm("list", *AGENT)
    assert agent.pod["status"]["containerStatuses"][0]["restartCount"] == 0


def test_the_memory_of_the_agent_in_its_pod(running: Cluster, agent: Agent) -> None:
    deploy(running, "shop", "busy")
    pid = process_of(running, "coral", "coral-agent")
    idle = said(pid, "idle")
    with ExitStack() as stack:
        for count, kind in enumerate(KINDS, 1):
            stack.enter_context(agent.tap("shop", "workload:shop/deploy/busy", kind))
            agent.wait_for_sessions("shop", count)
            busy = said(pid, f"{count} of 4 kinds, the last {kind}")
        assert idle["working set"] < busy["working set"] < LIMIT_BYTES
