"""Agents and clients in namespaces of their own: what can be translated is watched to the call, and
what cannot is refused with the remedy."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.namespaces import namespace_of
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import start_request
from tests.support import (
    INSECURE,
    Calls,
    Puppet,
    RunningAgent,
    code_and_text,
    collectors_at_work,
    coral,
    running_agent,
    totals,
    wait_until,
    watching,
)

OWN_PIDS: Final = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
REMEDY: Final = "hostPID: true in Kubernetes, `docker run --pid=host`, or outside of the container"
# Of the command line: it taps what waits for a byte in the fifo $1, by the id that it has here.
TAP_BY_PID: Final = '"$0" --wait getppid 5000 < "$1" > /dev/null & shift; exec "$@" "pid:$!"'

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("namespaces") / "agent") as running:
        yield running


def tap(agent: RunningAgent, *arguments: object) -> list[str]:
    """The command line of a tap in a pid namespace of its own."""
    options = ("--syscall-stats", "-i", "100ms", "-o", "json")
    return coral("tap", "--agent", agent.address, *options, *arguments)


def own_namespace(kind: str) -> int:
    inode = namespace_of("self", kind)
    assert inode
    return inode


def counted(out: str) -> dict[str, int]:
    """Calls by name in what a tap has printed."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in out.splitlines() if line.startswith("{")
    ]
    found: dict[str, int] = {}
    for row in lines:
        if "syscall" in row:
            found[row["syscall"]] = found.get(row["syscall"], 0) + row["calls"]
    return found


def test_a_command_tapped_from_inside_a_container_is_itself(
    agent: RunningAgent, programs: Path
) -> None:
    command = (programs / "calls", "getppid", 5000, "openat", 70)
    done = subprocess.run(
        [*OWN_PIDS, *tap(agent, "--", *command)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = counted(done.stdout)
    assert (found["getppid"], found["execve"]) == (5000, 1)
    assert found["openat"] >= 70


def test_a_process_id_from_inside_a_container_is_that_process(
    agent: RunningAgent, programs: Path, tmp_path: Path
) -> None:
    with go_file(tmp_path) as (fifo, go):
        tapping = subprocess.Popen(
            [*OWN_PIDS, "sh", "-c", TAP_BY_PID, str(programs / "calls"), str(fifo),
             *tap(agent, "-c", "until_exit=true")],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        (info,) = wait_until(lambda: subscribed(agent))
        # The agent shows the id that the process has on its host.
        (line,) = [
            line
            for line in Path(f"/proc/{info.config['pid']}/status").read_text().splitlines()
            if line.startswith("NSpid:")
        ]
        assert line.split()[1] == info.config["pid"]
        assert len(line.split()) == 3
        go()
        out, err = tapping.communicate(timeout=30)
    assert (tapping.returncode, err) == (0, "")
    assert counted(out)["getppid"] == 5000


@contextmanager
def go_file(directory: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A fifo, and what lets the one go that reads it."""
    fifo = directory / "go"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        yield fifo, lambda: os.write(descriptor, b"x")
    finally:
        os.close(descriptor)


def subscribed(agent: RunningAgent) -> list[pb.CollectorInfo]:
    return [info for info in collectors_at_work(agent).values() if info.subscribers]


def test_a_process_that_is_not_in_the_container_is_not_found(agent: RunningAgent) -> None:
    with Puppet() as puppet:  # it is on the host, and has no id inside
        done = subprocess.run(
            [*OWN_PIDS, *tap(agent, f"pid:{puppet.pid}")],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"coral: pid:{puppet.pid}: there is no such process\n"


def test_ids_that_come_by_tcp_from_inside_a_container_are_refused(
    tmp_path: Path, programs: Path
) -> None:
    listen = ("--listen", "127.0.0.1:0")
    with running_agent(tmp_path / "agent", {"auth": INSECURE}, *listen) as agent:
        agent.address = str(agent.log()[-1]["grpc"][0])  # type: ignore[index]
        by_id, command = "pid:1", ("--", programs / "calls", "getppid", 5)
        refused = [
            subprocess.run(
                [*OWN_PIDS, *tap(agent, *target)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
            )
            for target in ((by_id,), command)
        ]  # fmt: skip
        assert [(done.returncode, done.stdout) for done in refused] == [(2, "")] * 2
        assert refused[0].stderr.startswith(
            "coral: pid:1: give the ids that the processes have in the agent's pid namespace: "
        )
        assert "it translates for callers on its unix socket only" in refused[0].stderr
        assert refused[1].stderr.startswith(
            f"coral: {programs / 'calls'} getppid 5: give it by the agent's unix socket, "
        )
        for done in refused:
            assert "start coral with hostPID: true or `docker run --pid=host`" in done.stderr
        # Its own namespace needs no translation, and neither do ids without one.
        with Puppet() as puppet:
            for namespace in (0, own_namespace("pid")):
                request = start_request({"pid": puppet.pid})
                request.pid_namespace = namespace
                started = agent.call("StartCollector", request)
                agent.call(
                    "StopCollector",
                    pb.StopEbpfCollectorRequest(collector_id=started.collector_id),
                )


def test_an_agent_that_may_not_look_at_the_caller_says_so(tmp_path: Path, programs: Path) -> None:
    prefix = ("setpriv", "--bounding-set=-sys_ptrace")
    with running_agent(tmp_path / "agent", prefix=prefix) as agent:
        done = subprocess.run(
            [*OWN_PIDS, *tap(agent, "--", programs / "calls", "getppid", 5)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert "it has ended, or CAP_SYS_PTRACE is missing" in done.stderr


def test_a_namespace_that_is_not_the_callers_is_refused(agent: RunningAgent) -> None:
    request = start_request({"pid": os.getpid()})
    request.pid_namespace = 7
    code, text = code_and_text(agent, "StartCollector", request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"config[\"pid\"]: '{os.getpid()}' is not accepted; give the ids that ")
    assert "the request names another one (7) than that of the process at the other end" in text
    assert f"({own_namespace('pid')})" in text


@pytest.mark.parametrize("config", [{"scope": "host"}, {"pid": "1"}], ids=["host", "pid"])
def test_an_agent_in_a_pid_namespace_of_its_own_says_that_it_can_do_nothing(
    config: dict[str, str], tmp_path: Path
) -> None:
    with running_agent(tmp_path / "agent", prefix=OWN_PIDS) as agent:
        can = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
        assert not can.supported
        assert can.unsupported_reason.startswith("the agent is in a pid namespace of its own")
        assert can.unsupported_reason.endswith(REMEDY)
        request = start_request(config)
        request.pid_namespace = own_namespace("pid")
        started = agent.call("StartCollector", request)
        assert not started.supported
        assert started.error == f"syscall_stats: {can.unsupported_reason}"


@pytest.fixture
def top() -> Iterator[Path]:
    """A cgroup (v2), with `own` and `other` in it."""
    mount = cgroup2_mount()
    if mount is None:
        pytest.skip("no cgroup2 hierarchy is mounted here")
    directory = mount / f"coral-namespaces-{os.getpid()}"
    made = [directory, directory / "own", directory / "other"]
    for path in made:
        path.mkdir()
    yield directory
    for path in reversed(made):
        wait_until(partial(is_removed, path))


def is_removed(directory: Path) -> bool:
    """Removes a cgroup, if its processes have ended."""
    with suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def in_own(top: Path, setup: str = "") -> tuple[str, ...]:
    """What runs a command in TOP/own and a cgroup namespace that begins there, after SETUP."""
    inner = f'{setup}\nexec "$@"'
    script = f'echo $$ > {top}/own/cgroup.procs; exec unshare --cgroup --mount sh -ec "$0" sh "$@"'
    return ("sh", "-ec", script, inner)


def test_an_agent_in_a_cgroup_namespace_of_its_own_watches_other_cgroups(
    tmp_path: Path, calls: Callable[..., Calls], top: Path
) -> None:
    with running_agent(tmp_path / "agent", prefix=in_own(top)) as agent:
        running = calls("getppid", 3000)
        (top / "other/cgroup.procs").write_text(str(running.pid))
        with watching(agent, cgroup=f"/{top.name}/other") as watch:
            running.go()
            running.finish()
            rows = watch.stop()
        assert totals(rows)["getppid"] == 3000


def test_a_cgroup_is_what_it_is_where_the_tap_runs(
    agent: RunningAgent, calls: Callable[..., Calls], top: Path
) -> None:
    # As in a container, `/` is the cgroup of the container.
    remounted = f"umount {top.parent}; mount -t cgroup2 none {top.parent}"
    inside, outside = calls("getppid", 3000), calls("getppid", 100)
    (top / "own/cgroup.procs").write_text(str(inside.pid))
    (top / "other/cgroup.procs").write_text(str(outside.pid))
    tapping = subprocess.Popen(
        [*in_own(top, remounted), *tap(agent, "cgroup:/")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    (info,) = wait_until(lambda: subscribed(agent))
    assert info.config["cgroup"] == str(top / "own")
    for running in (inside, outside):
        running.go()
        running.finish()
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=info.collector_id))
    out, err = tapping.communicate(timeout=30)
    assert (tapping.returncode, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert sum(row["calls"] for row in rows if row.get("syscall") == "getppid") == 3000
    refused = subprocess.run(
        [*in_own(top, remounted), *tap(agent, f"cgroup:/{top.name}/other")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there is no" in refused.stderr
    assert ", in the caller's container" in refused.stderr
