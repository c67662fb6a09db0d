"""Which processes a collector watches: children from their first call on, command names, cgroups,
the host; when it begins and when it ends. Every count is exact."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from coral.collectors.cgroups import cgroup2_mount
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import (
    Calls,
    Family,
    Puppet,
    RunningAgent,
    collectors_at_work,
    running_agent,
    totals,
    wait_until,
    watching,
)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    # Memory that the kernel keeps ready for new elements of per-CPU maps can run out for a moment
    # while several agents' processes multiply. Such losses are told, but here every call counts.
    without = ",".join((os.environ.get("CORAL_WITHOUT", ""), "elements_on_demand")).strip(",")
    directory = tmp_path_factory.mktemp("following") / "agent"
    with running_agent(directory, environment={"CORAL_WITHOUT": without}) as running:
        yield running


def pids(rows: list[pb.SyscallStats], name: str) -> set[int]:
    """The ids of the processes that made the call NAME."""
    return {row.pid for row in rows if row.syscall_name == name}


def comms(rows: list[pb.SyscallStats], name: str) -> set[str]:
    """The command names of the processes that made the call NAME."""
    return {row.labels["comm"] for row in rows if row.syscall_name == name}


def errors(rows: list[pb.SyscallStats], name: str) -> int:
    """How many calls NAME failed."""
    return sum(row.error_count for row in rows if row.syscall_name == name)


def followed(agent: RunningAgent, family: Family) -> list[pb.SyscallStats]:
    """The rows of a session that follows FAMILY, all of whose children are counted."""
    with watching(agent, pid=str(family.pid)) as watch:
        family.run()
        rows = watch.stop()
    assert totals(rows)["getppid"] == family.children * family.calls
    assert len(pids(rows, "getppid") - {family.pid}) == family.children
    return rows


@pytest.mark.parametrize("way", ["fork", "vfork", "daemon"])
def test_a_forked_child_is_counted_from_its_first_call_on(
    way: str, agent: RunningAgent, programs: Path
) -> None:
    family = Family(programs / "family", way)
    rows = followed(agent, family)
    assert comms(rows, "getppid") == {"family"}
    between = family.children if way == "daemon" else 0
    assert totals(rows)["exit_group"] == family.children + between + 1


@pytest.mark.parametrize("way", ["spawn", "exec", "threadexec"])
def test_a_child_that_execs_stays_watched_under_its_new_name(
    way: str, agent: RunningAgent, programs: Path
) -> None:
    family = Family(programs / "family", way)
    rows = followed(agent, family)
    assert comms(rows, "getppid") == {"exe"}  # from /proc/self/exe
    assert totals(rows)["execve"] == family.children
    assert errors(rows, "execve") == 0


@pytest.mark.parametrize("follow_children", ["true", "false"])
def test_threads_belong_to_their_process(
    follow_children: str, agent: RunningAgent, programs: Path
) -> None:
    family = Family(programs / "family", "thread")
    with watching(agent, pid=str(family.pid), follow_children=follow_children) as watch:
        family.run()
        rows = watch.stop()
    assert totals(rows)["getppid"] == family.children * family.calls
    assert {row.pid for row in rows} == {family.pid}


@pytest.mark.parametrize("way", ["fork", "spawn", "daemon"])
def test_without_following_only_the_target_is_seen(
    way: str, agent: RunningAgent, programs: Path
) -> None:
    family = Family(programs / "family", way)
    with watching(agent, pid=str(family.pid), follow_children="false") as watch:
        family.run()
        rows = watch.stop()
    assert {row.pid for row in rows} == {family.pid}
    assert totals(rows)["getppid"] == 0
    assert totals(rows)["exit_group"] == 1


def test_a_call_that_a_kill_cuts_short_is_counted_as_an_error(agent: RunningAgent) -> None:
    with Puppet() as puppet, watching(agent, pid=str(puppet.pid)) as watch:
        puppet.begin("import signal; signal.sigwait([signal.SIGUSR1])")
        wait_until(lambda: puppet.is_in("rt_sigtimedwait"))
        puppet.kill()
        rows = watch.stop()
    assert totals(rows)["rt_sigtimedwait"] == errors(rows, "rt_sigtimedwait") == 1


@pytest.fixture
def comm() -> str:
    """A command name that nothing else on this machine has, of the 15 bytes that the kernel
    keeps."""
    return f"wanted{uuid.uuid4().hex[:9]}"


@pytest.mark.parametrize("more", ["", "-than-the-kernel-keeps"])
def test_a_process_that_execs_to_the_wanted_name_later_is_adopted(
    more: str, comm: str, agent: RunningAgent, programs: Path, tmp_path: Path
) -> None:
    name = comm + more
    for program in (name, "somebody-else"):
        (tmp_path / program).symlink_to(programs / "calls")
    with watching(agent, comm=comm) as watch:
        adopted = Calls(tmp_path / name, "getppid", 1000)
        other = Calls(tmp_path / "somebody-else", "getppid", 1000)
        for calls in (adopted, other):
            calls.go()
            calls.finish()
        rows = watch.stop()
    assert totals(rows)["getppid"] == 1000
    assert {row.pid for row in rows} == {adopted.pid}
    assert {row.labels["comm"] for row in rows} == {comm}


def test_a_name_finds_those_that_run_already_with_the_children_they_make(
    comm: str, agent: RunningAgent, programs: Path, tmp_path: Path
) -> None:
    (tmp_path / comm).symlink_to(programs / "family")
    first, second = (Family(tmp_path / comm, "fork") for _ in range(2))
    other = Family(programs / "family", "fork")
    with watching(agent, comm=comm) as watch:
        for family in (first, second, other):
            family.run()
        rows = watch.stop()
    assert totals(rows)["getppid"] == 2 * other.children * other.calls
    assert {first.pid, second.pid} < {row.pid for row in rows}
    assert {row.labels["comm"] for row in rows} == {comm}


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    """A cgroup (v2) for this test. It and those below are removed when their processes have
    ended."""
    mount = cgroup2_mount()
    assert mount
    top = mount / f"coral-{tmp_path.name[-20:]}-{os.getpid()}"
    top.mkdir()
    yield top
    for directory in (*sorted(top.rglob("*/"), reverse=True), top):
        wait_until(partial(_is_empty, directory))
        directory.rmdir()


def _is_empty(cgroup: Path) -> bool:
    return not (cgroup / "cgroup.procs").read_text()


def move(puppet: Puppet, cgroup: Path) -> None:
    """Moves a process into a cgroup, and creates the cgroup if necessary."""
    cgroup.mkdir(exist_ok=True)
    (cgroup / "cgroup.procs").write_text(str(puppet.pid))


def getppid_by_pid(rows: list[pb.SyscallStats]) -> dict[int, int]:
    """The number of getppid calls by process."""
    counted: Counter[int] = Counter()
    for row in rows:
        if row.syscall_name == "getppid":
            counted[row.pid] += row.call_count
    return dict(counted)


@pytest.mark.parametrize("below_the_mount", [False, True])
def test_a_cgroup_is_watched_with_all_below_it_and_none_beside_it(
    below_the_mount: bool, agent: RunningAgent, cgroup: Path
) -> None:
    wanted = cgroup / "wanted"
    with Puppet() as inside, Puppet() as below, Puppet() as beside, Puppet() as above:
        move(inside, wanted)
        move(below, wanted / "child")
        move(beside, cgroup / "sibling")
        move(above, cgroup)
        path = f"/{wanted.relative_to(cgroup.parent)}" if below_the_mount else str(wanted)
        with watching(agent, cgroup=path) as watch:
            for times, puppet in enumerate((inside, below, beside, above), start=11):
                puppet.getppid(times)
            rows = watch.stop()
    assert getppid_by_pid(rows) == {inside.pid: 11, below.pid: 12}
    assert {row.pid for row in rows} == {inside.pid, below.pid}


def test_a_process_is_seen_as_long_as_it_is_in_the_cgroup(
    agent: RunningAgent, cgroup: Path
) -> None:
    with Puppet() as puppet, watching(agent, cgroup=str(cgroup)) as watch:
        puppet.getppid(3)
        move(puppet, cgroup)
        puppet.getppid(50)
        puppet.do("child = os.fork() or [os.getppid() for _ in range(7)] and os._exit(0)")
        puppet.do("os.waitpid(child, 0)")
        move(puppet, cgroup.parent)
        puppet.getppid(5)
        rows = watch.stop()
    assert getppid_by_pid(rows).pop(puppet.pid) == 50
    assert totals(rows)["getppid"] == 50 + 7


@pytest.mark.parametrize(
    "kind", [pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, pb.EBPF_COLLECTOR_KIND_TCP_METRICS]
)
def test_a_target_that_nobody_matches_yet_is_told(
    kind: pb.EbpfCollectorKind, agent: RunningAgent, comm: str, cgroup: Path
) -> None:
    def notes(**config: str) -> list[str]:
        with watching(agent, 60.0, "", kind, **config) as watch:
            return watch.notes

    assert notes(comm=comm) == [
        f"no process has the command name '{comm}' now; those that get it later are watched"
    ]
    assert notes(cgroup=str(cgroup)) == [
        f"no process is in the cgroup {cgroup} now; those that come are watched"
    ]
    with Puppet() as puppet:
        puppet.do(f"open('/proc/self/comm', 'w').write('{comm}')")
        move(puppet, cgroup)
        assert notes(comm=comm) == notes(cgroup=str(cgroup)) == notes(pid=str(puppet.pid)) == []


def test_host_scope_sees_a_process_that_nobody_named(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    with watching(agent, scope="host", include="getppid") as watch:
        running = calls("getppid", 5000)
        running.go()
        running.finish()
        by_pid = getppid_by_pid(watch.stop())
    # Only numbers, so that a failure prints nothing about other processes.
    counted, all_counted = by_pid[running.pid], sum(by_pid.values())
    assert counted == 5000
    assert all_counted >= 5000


@pytest.mark.timed
def test_until_exit_ends_the_session_with_its_last_target_and_not_before(
    agent: RunningAgent,
) -> None:
    with (
        Puppet() as first,
        Puppet() as second,
        watching(agent, pid=f"{first.pid},{second.pid}", until_exit="true") as watch,
    ):
        first.begin("[os.getppid() for _ in range(5)]; os._exit(0)")
        first.leave()
        second.getppid(6)
        watch.read_until_calls("getppid", 5 + 6)
        assert watch.collector_id in collectors_at_work(agent)
        second.begin("[os.getppid() for _ in range(7)]; os._exit(0)")
        second.leave()
        left_at = time.monotonic()
        end = watch.read_to_end()
        assert time.monotonic() - left_at < 1
    assert end.reason == pb.SessionEnd.REASON_TARGET_EXITED
    assert getppid_by_pid(watch.rows) == {first.pid: 5, second.pid: 6 + 7}


def test_from_exec_counts_from_the_exec_on_that_succeeds(
    agent: RunningAgent, programs: Path
) -> None:
    calls = str(programs / "calls")
    with Puppet() as puppet:
        puppet.do("import contextlib")
        with watching(agent, pid=str(puppet.pid), from_exec="true", until_exit="true") as watch:
            puppet.getppid(7)
            puppet.do("with contextlib.suppress(OSError): os.execv('/nonexistent/coral', ['x'])")
            puppet.getppid(5)
            puppet.begin(f"os.execv({calls!r}, ['calls', 'getppid', '100'])")
            assert puppet.leave() == 0
            watch.read_to_end()
    assert watch.calls_of("getppid") == 100
    assert watch.calls_of("execve") == 1
    assert errors(watch.rows, "execve") == 0


def test_from_exec_holds_for_a_child_that_was_forked_before(
    agent: RunningAgent, programs: Path
) -> None:
    exec_calls = f"os.execv({str(programs / 'calls')!r}, ['calls', 'getppid', '%d'])"
    with (
        Puppet() as puppet,
        watching(agent, pid=str(puppet.pid), from_exec="true", until_exit="true") as watch,
    ):
        puppet.do(f"child = os.fork() or [os.close(1), os.getppid()] and {exec_calls % 30}")
        puppet.do("os.waitpid(child, 0)")
        puppet.begin(exec_calls % 100)
        assert puppet.leave() == 0
        watch.read_to_end()
    assert watch.calls_of("getppid") == 30 + 100
    assert watch.calls_of("execve") == 2
