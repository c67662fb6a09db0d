"""A service's name finds its processes: all matches of the first step, in the documented order,
that has any."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coral.agent.config import ServiceRule
from coral.agent.errors import NotFoundError
from coral.agent.machine.resolve import resolve
from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.procfs import comm_of
from tests.support import wait_until

LISTENER = (
    "import socket,sys\n"
    "s=socket.socket();s.bind(('127.0.0.1',0));s.listen();print(flush=True);sys.stdin.read()"
)


@pytest.fixture
def name() -> str:
    """A name that nothing on this machine has, short enough for a command name."""
    return f"svc{uuid.uuid4().hex[:8]}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def listening(directory: Path, comm: str) -> Iterator[int]:
    """A process with the command name COMM that listens on a TCP port."""
    program = directory / comm
    if not program.exists():
        program.symlink_to(os.path.realpath(sys.executable))
    with subprocess.Popen(
        [program, "-I", "-S", "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert comm_of(process.pid) == comm
        yield process.pid


@contextmanager
def in_cgroup(path: str, *tgids: int) -> Iterator[None]:
    """Moves those processes into a cgroup (v2) of that path, and afterwards back into the root."""
    mount = cgroup2_mount()
    assert mount
    directory = mount / path
    directory.mkdir(parents=True)
    for tgid in tgids:
        (directory / "cgroup.procs").write_text(str(tgid))
    try:
        yield
    finally:
        for tgid in tgids:
            (mount / "cgroup.procs").write_text(str(tgid))
        wait_until(lambda: not (directory / "cgroup.procs").read_text())
        while directory != mount:
            directory.rmdir()
            directory = directory.parent


def test_a_listening_command_is_found_with_all_its_processes(
    tmp_path: Path, name: str, stack: ExitStack
) -> None:
    pids = [stack.enter_context(listening(tmp_path, name)) for _ in range(2)]
    assert sorted(resolve(name, {}).tgids) == sorted(pids)


def test_a_systemd_unit_is_found_by_its_cgroup_and_wins_over_a_listener(
    tmp_path: Path, name: str, stack: ExitStack
) -> None:
    stack.enter_context(listening(tmp_path, name))
    other = stack.enter_context(listening(tmp_path, "other"))
    stack.enter_context(in_cgroup(f"{name}.slice/{name}.service", other))
    assert resolve(name, {}).tgids == (other,)
    assert resolve(f"{name}.service", {}).tgids == (other,)


def test_a_container_is_found_by_its_id_and_a_pod_by_its_uid(
    tmp_path: Path, name: str, stack: ExitStack
) -> None:
    pid = stack.enter_context(listening(tmp_path, name))
    container, uid = uuid.uuid4().hex * 2, str(uuid.uuid4())
    pod = f"kubepods-burstable-pod{uid.replace('-', '_')}.slice"
    stack.enter_context(in_cgroup(f"{name}/{pod}/cri-containerd-{container}.scope", pid))
    for wanted in (container, container[:12], uid):
        assert resolve(wanted, {}).tgids == (pid,)


@pytest.mark.parametrize("rule", ["comm", "cgroup", "pid_file"])
def test_the_configuration_comes_first(
    tmp_path: Path, name: str, stack: ExitStack, rule: str
) -> None:
    stack.enter_context(listening(tmp_path, name))
    other_name = f"other{name}"[:15]
    wanted = stack.enter_context(listening(tmp_path, other_name))
    if rule == "comm":
        rules = {name: ServiceRule(comm=other_name)}
    elif rule == "cgroup":
        stack.enter_context(in_cgroup(f"{name}-group", wanted))
        rules = {name: ServiceRule(cgroup=f"/{name}-group")}
    else:
        (tmp_path / "pid").write_text(f"{wanted}\n")
        rules = {name: ServiceRule(pid_file=str(tmp_path / "pid"))}
    assert resolve(name, rules).tgids == (wanted,)


def test_a_configured_service_without_a_process_is_not_looked_for_elsewhere(
    tmp_path: Path, name: str, stack: ExitStack
) -> None:
    stack.enter_context(listening(tmp_path, name))
    with pytest.raises(NotFoundError, match="no process matches its rule now"):
        resolve(name, {name: ServiceRule(comm="nobody-has-this")})


def test_a_name_that_nothing_has_is_answered_with_the_nearest(
    tmp_path: Path, name: str, stack: ExitStack
) -> None:
    stack.enter_context(listening(tmp_path, name))
    with pytest.raises(NotFoundError, match=f"the nearest names are {name}"):
        resolve(f"{name}x", {})
