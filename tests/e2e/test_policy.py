"""What callers may watch is decided on what a request resolves to. SECURITY.md has the rules."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.hierarchies import hierarchies
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import start, start_request, stop
from tests.e2e.test_services import in_cgroup
from tests.support import (
    Calls,
    RunningAgent,
    code_and_text,
    running_agent,
    streaming,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

DENIED = grpc.StatusCode.PERMISSION_DENIED


@contextmanager
def agent_with(
    directory: Path, policy: Mapping[str, object], services: Mapping[str, object] | None = None
) -> Iterator[RunningAgent]:
    config = {"policy": dict(policy), "services": dict(services or {})}
    with running_agent(directory / "agent", config) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def group() -> str:
    """The name of a cgroup that nothing on this machine has."""
    return f"coral-test-{uuid.uuid4().hex[:8]}"


def sleeper(stack: ExitStack) -> int:
    """A process that waits."""
    return stack.enter_context(ended_process()).pid


@contextmanager
def ended_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def denied(agent: RunningAgent, config: Mapping[str, object], **more: str) -> str:
    """Why a start is denied."""
    code, text = code_and_text(agent, "StartCollector", start_request(config, **more))  # type: ignore[arg-type]
    assert code is DENIED, text
    return text


def test_no_words_for_the_whole_machine_pass_without_host_scope(
    tmp_path: Path, stack: ExitStack, group: str
) -> None:
    mount = cgroup2_mount()
    pid = sleeper(stack)
    stack.enter_context(in_cgroup(f"{group}/inner", pid))
    with agent_with(tmp_path, {"host_scope": False}) as agent:
        for path in (
            *("/", ".", "//", f"{group}/..", f"/{group}/inner/../.."),
            *(f"{mount}", f"{mount}/", f"{mount}/.", f"{mount}/{group}/..", f"/proc/../{mount}"),
            *(f"{found.mount_point}" for found in hierarchies()),
        ):
            told = denied(agent, {"cgroup": path})
            assert "policy.host_scope: this cgroup holds " in told, path
        assert "policy.host_scope" in denied(agent, {"scope": "host"})
        stop(agent, start(agent, {"cgroup": f"{group}"}))
        stop(agent, start(agent, {"cgroup": f"{mount}/{group}/inner/.."}))
        stop(agent, start(agent, {"pid": pid}))
        for path in ("/proc", "/tmp", "/..", "../..", f"{mount}/..", "/sys/fs/cgroup/pids"):
            code, text = code_and_text(agent, "StartCollector", start_request({"cgroup": path}))
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, DENIED), (path, text)


def test_a_mount_of_the_root_inside_the_hierarchy_is_the_root(
    tmp_path: Path, stack: ExitStack, group: str
) -> None:
    mount = cgroup2_mount()
    assert mount
    directory = mount / group
    directory.mkdir()
    stack.callback(directory.rmdir)
    subprocess.run(["mount", "--bind", str(mount), str(directory)], check=True)
    stack.callback(subprocess.run, ["umount", str(directory)], check=True)
    with agent_with(tmp_path, {"host_scope": False}) as agent:
        told = denied(agent, {"cgroup": group})
        assert f"config[\"cgroup\"]: '{directory}' is not allowed" in told
        assert "policy.host_scope: this cgroup holds the machine's first process" in told


def test_a_cgroup_that_holds_the_agent_is_not_a_way_around(tmp_path: Path, group: str) -> None:
    with (
        agent_with(tmp_path, {"host_scope": False}) as agent,
        in_cgroup(f"{group}/agent", agent.process.pid),
    ):
        told = denied(agent, {"cgroup": group})
        assert told.endswith(
            "policy.host_scope: this cgroup holds this agent, as the root of all cgroups does"
        )


def test_the_agent_and_process_1_are_not_watched(tmp_path: Path) -> None:
    services = {
        "self": {"pid_file": str(tmp_path / "self.pid")},
        "init": {"pid_file": str(tmp_path / "init.pid")},
    }
    with agent_with(tmp_path, {}, services) as agent:
        (tmp_path / "self.pid").write_text(str(agent.process.pid))
        (tmp_path / "init.pid").write_text("1")
        init = "policy.allow_init: it is the machine's first process"
        own = "policy.allow_agent: it is this agent"
        assert (
            denied(agent, {"pid": 1})
            == f"config[\"pid\"]: '1' is not allowed by this agent's {init}"
        )
        assert denied(agent, {"pid": f"{os.getpid()},1"}).endswith(init)
        assert denied(agent, {"pid": agent.process.pid}).endswith(own)
        assert denied(agent, {}, service_name="init") == (
            f"service_name: 'init' is not allowed by this agent's {init}"
        )
        assert denied(agent, {}, service_name="self").endswith(own)


def test_the_policy_may_allow_the_agent_and_process_1(tmp_path: Path) -> None:
    policy = {"allow_agent": True, "allow_init": True, "host_scope": False}
    with agent_with(tmp_path, policy) as agent:
        stop(agent, start(agent, {"pid": agent.process.pid}))
        stop(agent, start(agent, {"pid": 1, "follow_children": "false"}))
        assert denied(agent, {"pid": 1}).endswith(
            "policy.host_scope: every process descends from it; give follow_children=false too"
        )


@pytest.mark.parametrize("allowed", [False, True])
def test_the_agents_own_calls_are_in_no_session_of_the_whole_machine(
    tmp_path: Path, allowed: bool, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 100)
    with agent_with(tmp_path, {"allow_agent": allowed}) as agent:
        collector_id = start(agent, {"scope": "host", "interval": "100ms"})
        request = pb.EbpfEventStreamRequest(collector_id=collector_id)
        pids: set[str] = set()
        with streaming(agent, "StreamEventBatches", request) as batches:
            running.go()
            running.finish()
            for batch in batches:
                pids.update(row.labels["pid"] for row in batch.syscall_stats)
                if str(running.pid) in pids and batch.count and len(pids) > 1:
                    break
        stop(agent, collector_id)
        assert str(running.pid) in pids
        assert (str(agent.process.pid) in pids) == allowed


NAMED = """import os, sys
open("/proc/self/comm", "w").write(sys.argv[1])
print(flush=True)
for _ in iter(os.getppid, -1): pass"""


def test_a_command_name_that_is_the_agents_too_leaves_the_agent_out(tmp_path: Path) -> None:
    with agent_with(tmp_path, {}, {}) as agent:
        comm = Path(f"/proc/{agent.process.pid}/comm").read_text().strip()
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", NAMED, comm],
            stdout=subprocess.PIPE,
        ) as other:
            try:
                assert other.stdout
                other.stdout.readline()
                collector_id = start(agent, {"comm": comm, "interval": "100ms"})
                request = pb.EbpfEventStreamRequest(collector_id=collector_id)
                with streaming(agent, "StreamEventBatches", request) as batches:
                    pids = {
                        row.labels["pid"]
                        for _, batch in zip(range(8), batches, strict=False)
                        for row in batch.syscall_stats
                    }
                stop(agent, collector_id)
            finally:
                other.kill()
        assert str(other.pid) in pids
        assert str(agent.process.pid) not in pids


def test_only_processes_in_the_listed_cgroups_are_watched(
    tmp_path: Path, stack: ExitStack, group: str
) -> None:
    inside, outside = sleeper(stack), sleeper(stack)
    stack.enter_context(in_cgroup(f"{group}/shop/web", inside))
    stack.enter_context(in_cgroup(f"{group}-other", outside))
    services = {"in": {"cgroup": f"{group}/shop/web"}, "out": {"cgroup": f"{group}-other"}}
    with agent_with(tmp_path, {"cgroups": [f"/{group}/shop"]}, services) as agent:
        stop(agent, start(agent, {"cgroup": f"{group}/shop"}))
        stop(agent, start(agent, {"cgroup": f"{group}/shop/web"}))
        stop(agent, start(agent, {"pid": inside}))
        stop(agent, agent.call("StartCollector", start_request(service_name="in")).collector_id)
        for config in (
            {"cgroup": group},
            {"cgroup": f"{group}/shop/.."},
            {"cgroup": f"{group}/shop/../../{group}-other"},
            {"pid": outside},
            {"pid": f"{inside},{outside}"},
            {"comm": "sleep"},
            {"scope": "host"},
        ):
            told = denied(agent, config)
            assert told.endswith(
                f"policy.cgroups: give processes in policy.cgroups (/{group}/shop)"
            ), (config, told)
        assert denied(agent, {}, service_name="out").startswith("service_name: 'out'")


def test_only_the_listed_services_are_watched(tmp_path: Path, stack: ExitStack) -> None:
    pid = sleeper(stack)
    (tmp_path / "pid").write_text(str(pid))
    rule = {"pid_file": str(tmp_path / "pid")}
    services = {"shop-web": rule, "shop": rule, "bank": rule}
    with agent_with(tmp_path, {"services": ["shop-*"]}, services) as agent:
        started = agent.call("StartCollector", start_request(service_name="shop-web"))
        stop(agent, started.collector_id)
        for config, service in (
            ({}, "shop"),
            ({}, "bank"),
            ({"pid": pid}, ""),
            ({"pid": pid}, "shop-web"),  # a label alone does not name what is watched
            ({"scope": "host"}, "shop-web"),
        ):
            told = denied(agent, config, service_name=service)
            assert "policy.services: give a service_name of policy.services (shop-*)" in told


def test_a_continuous_collector_of_the_operator_is_exempt(tmp_path: Path) -> None:
    config = {
        "policy": {"host_scope": False, "services": ["none"]},
        "continuous": [{"kind": "syscall_stats", "config": {"scope": "host"}}],
    }
    with running_agent(tmp_path / "agent", config) as agent:
        request = pb.ListCollectorsRequest()
        (info,) = wait_until(lambda: agent.call("ListCollectors", request).collectors)
        assert info.continuous
        assert info.service_name == "host"


@pytest.mark.timeout(60)
def test_pid_files_that_block_or_never_end_take_no_slot(tmp_path: Path, stack: ExitStack) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "pid")
    pid = sleeper(stack)
    (tmp_path / "pid").write_text(f"{pid}\n")
    services = {
        name: {"pid_file": str(path)}
        for name, path in {
            "fifo": tmp_path / "fifo",
            "zero": "/dev/zero",
            "link": tmp_path / "link",
            "good": tmp_path / "pid",
        }.items()
    }
    with agent_with(tmp_path, {}, services) as agent:
        for _ in range(2):  # more often than there are slots
            for name in ("fifo", "zero", "link"):
                code, text = code_and_text(
                    agent, "StartCollector", start_request(service_name=name)
                )
                assert code is grpc.StatusCode.NOT_FOUND
                assert text.startswith(f"services.{name}.pid_file: ")
        started = agent.call("StartCollector", start_request(service_name="good"))
        stop(agent, started.collector_id)
