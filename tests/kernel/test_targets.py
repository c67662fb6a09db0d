"""Which processes a session watches: from the start on, to the end of each, and no stranger."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coral.collectors import targets
from coral.collectors.cgroups import cgroup_tgids
from coral.collectors.hierarchies import hierarchies
from coral.collectors.hubs import HINTS
from coral.collectors.procfs import clock_ticks, start_time_of
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.collecting import Collected, both_modes, collecting, every_rung, session, waiting
from tests.support import Family, Puppet, at_work, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

FORKS = {"host": 20_000, "cgroup": 4_000, "pid": 4_000}


def members(collector: SyscallStatsCollector) -> set[int]:
    """The processes that run and are watched, as the kernel has them."""
    keys = collector.bpf_object.map("members").read_keys()
    return set(keys[keys < 1 << 32].tolist())


@both_modes
@every_rung
def test_a_stranger_with_the_id_of_a_process_that_has_ended_is_not_watched(
    without: tuple[str, ...], mode: str, programs: Path
) -> None:
    with Puppet() as puppet, collecting(without, pid=str(puppet.pid), mode=mode) as counted:
        child = int(puppet.ask("os.fork() or [os.getppid() for _ in range(10)] and os._exit(0)"))
        puppet.do("os.wait()")
        subprocess.run([programs / "stranger", str(child), "500"], check=True)
    assert counted.of("getppid") == 10
    assert counted.of_pid(child)["getppid"] == 10
    assert counted.of("getuid") == 0


@both_modes
def test_processes_of_one_id_have_names_of_their_own(mode: str, programs: Path) -> None:
    with Puppet() as puppet:
        puppet.do("import subprocess, ctypes")
        puppet.do("rename = lambda name: ctypes.CDLL(None).prctl(15, name, 0, 0, 0)")
        with collecting(pid=str(puppet.pid), mode=mode) as counted:
            puppet.do("child = os.fork() or [rename(b'first'), os.getuid(), os._exit(0)]")
            puppet.do("os.wait()")
            puppet.do(f"subprocess.run(['{programs}/stranger', str(child), '20'], check=True)")
    assert counted.by_comm("getuid") == {"first": 1, "stranger": 20}


def test_a_zombie_is_no_target() -> None:
    with Puppet() as puppet:
        collector = session(pid=str(puppet.pid))
        zombie = int(puppet.ask("os.fork() or os._exit(0)"))
        wait_until(lambda: Path(f"/proc/{zombie}/stat").read_text().split()[2] == "Z")
        with at_work(collector):
            assert members(collector) == {puppet.pid}
            puppet.do("os.wait()")


def test_a_session_tells_of_children_that_it_does_not_watch() -> None:
    with Puppet() as puppet:
        puppet.do("import signal")
        child = int(puppet.ask("os.fork() or signal.pause()"))
        started = start_time_of(child)
        assert started is not None
        wait_until(lambda: clock_ticks() > started)
        with at_work(session(pid=str(puppet.pid))) as collector:
            assert members(collector) == {puppet.pid}
            (note,) = collector.notes
            assert "not watched (1): name them in `pid`" in note
        with at_work(session(pid=f"{puppet.pid},{child}")) as collector:
            assert members(collector) == {puppet.pid, child}
            assert not collector.notes
        puppet.do(f"os.kill({child}, signal.SIGKILL); os.wait()")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["summaries", "events"])
@pytest.mark.parametrize("scope", ["host", "cgroup", "pid"])
def test_a_server_that_forks_for_each_connection_leaves_nothing_behind(
    scope: str, mode: str, unified: Path, programs: Path
) -> None:
    with waiting(programs / "forking", FORKS[scope]) as server:
        (unified / "cgroup.procs").write_text(str(server.pid))
        target = {"host": "host", "cgroup": str(unified), "pid": str(server.pid)}[scope]
        config = {"scope" if scope == "host" else scope: target, "include": "exit_group"}
        with collecting((), **config, mode=mode) as counted:
            server.go()
            while not server.has_written(0.1):
                counted.drain()
            # Dead ones are drained and tidied away, and hardly more hints than theirs are set.
            wait_until(partial(_drained_and_tidy, counted))
            running = members(counted.collector)
            if scope == "host":
                assert server.pid in running
                assert {pid for pid in running if not Path(f"/proc/{pid}").exists()} == set()
            else:
                assert running == {server.pid}
    # A new process needs a new element: the kernel may have none for a moment, which is told.
    lost = counted.losses.pop(pb.Loss.STAGE_KERNEL_BUSY, 0)
    assert not counted.losses
    assert lost <= FORKS[scope] // 20
    ends = counted.of("exit_group") + lost
    assert ends >= FORKS[scope] if scope == "host" else ends == FORKS[scope], (ends, lost)


def _drained_and_tidy(counted: Collected) -> bool:
    counted.drain()
    return _tidy(counted.collector)


def _tidy(collector: SyscallStatsCollector) -> bool:
    """Whether hardly more hints are set than there are members, and no ended ones are kept."""
    slot = collector.bpf_object
    keys = slot.map("members").read_keys()
    hints = slot.processes.map("hints")
    said = slot.processes.map("sessions").read_one(0)
    assert said is not None
    first = int(said["hints"] & 1) * HINTS
    marks, values = hints.read()
    marked = np.count_nonzero(values[(marks >= first) & (marks < first + HINTS)])
    return bool(marked <= len(members(collector)) + 256 and (keys >= 1 << 32).sum() <= 256)


@every_rung
def test_children_forked_while_a_session_begins_are_watched(without: tuple[str, ...]) -> None:
    with Puppet() as puppet, at_work(session(without, pid=str(puppet.pid))):
        puppet.do("ours, theirs = os.pipe(); back, forth = os.pipe()")
        collector = session(without, pid=str(puppet.pid), include="getppid")
        work = "[os.write(forth, b'x'), os.read(ours, 1), os.getppid(), os.getppid(), os._exit(0)]"
        puppet.do(f"os.fork() or (os.fork(), os.fork()) and {work}")
        puppet.do("for _ in range(4): os.read(back, 1)")  # a child, its two, and one more
        with at_work(collector):
            watched = members(collector)
            puppet.do("os.write(theirs, b'xxxx')")
            puppet.do("os.wait()")
            wait_until(lambda: members(collector) == {puppet.pid})
            counted = Collected(collector)
            counted.drain()
    assert len(watched) == 5
    assert counted.of("getppid") == 8


def test_chains_of_forks_are_watched_by_their_name(tmp_path: Path) -> None:
    """Each process of a chain forks the next one and ends, while sessions begin: each session finds
    the one that runs, and then follows."""
    comm = f"chain{os.getpid() % 100_000}"
    script = (
        "import ctypes, os, sys, time\n"
        f"ctypes.CDLL(None).prctl(15, b'{comm}', 0, 0, 0)\n"
        "print(flush=True)\n"
        "end = time.monotonic() + 20\n"
        "while not os.path.exists(sys.argv[1]) and time.monotonic() < end:\n"
        "    os.fork() and os._exit(0)\n"
        "os.getuid()\n"
    )
    with at_work(session(pid=str(os.getpid()))):
        for number in range(10):
            stop = tmp_path / str(number)
            command = [sys.executable, "-I", "-S", "-c", script, str(stop)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as chain:
                assert chain.stdout
                chain.stdout.readline()
                with collecting(comm=comm, include="getuid") as counted:
                    stop.touch()
                    chain.stdout.read()  # to the end of the last one
                assert counted.by_comm("getuid") == {comm: 1}


@pytest.fixture(params=["v2", "memory"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of this test, in each hierarchy that there is."""
    yield from _made(request.param)


@pytest.fixture
def unified() -> Iterator[Path]:
    """A cgroup (v2) of this test."""
    yield from _made("v2")


def _made(kind: str) -> Iterator[Path]:
    top = next((found.directory for found in hierarchies() if found.kind == kind), None)
    if top is None:
        pytest.skip(f"no hierarchy {kind} of cgroups is mounted here")
    directory = top / f"coral-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    yield directory
    _remove(directory)


def _remove(directory: Path) -> None:
    for below in sorted(directory.rglob("*/"), reverse=True):
        wait_until(partial(_has_gone, below))
    wait_until(partial(_has_gone, directory))


def _has_gone(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # a process in it has not quite ended
        return False
    return True


def move(pid: int, directory: Path, file: str = "cgroup.procs") -> None:
    directory.mkdir(exist_ok=True)
    (directory / file).write_text(str(pid))


@both_modes
@every_rung
def test_a_process_counts_while_it_is_in_the_cgroup(
    without: tuple[str, ...], mode: str, cgroup: Path
) -> None:
    with Puppet() as puppet, collecting(without, cgroup=str(cgroup), mode=mode) as counted:
        puppet.getppid(3)
        for _ in range(3):  # in one interval, and then in several
            move(puppet.pid, cgroup / "below")
            puppet.getppid(5)
            move(puppet.pid, cgroup.parent)
            puppet.getppid(7)
        counted.drain()
        move(puppet.pid, cgroup)
        puppet.getppid(11)
        counted.drain()
        puppet.do("os.fork() or [os.getppid(), os._exit(0)]")
        puppet.do("os.wait()")
        move(puppet.pid, cgroup.parent)
        puppet.getppid(13)
    assert counted.by_pid("getppid").pop(puppet.pid) == 3 * 5 + 11
    assert counted.of("getppid") == 3 * 5 + 11 + 1
    assert "" not in counted.by_comm("getppid")


@every_rung
def test_a_process_that_leaves_the_cgroup_while_a_session_starts_is_not_counted(
    without: tuple[str, ...], cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = cgroup_tgids
    with Puppet() as stays, Puppet() as leaves:
        move(stays.pid, cgroup)
        move(leaves.pid, cgroup)

        def list_and_leave(directory: Path) -> set[int]:
            found = listed(directory)
            move(leaves.pid, cgroup.parent)
            return found

        monkeypatch.setattr(targets, "cgroup_tgids", list_and_leave)
        with collecting(without, cgroup=str(cgroup), include="getppid") as counted:
            stays.getppid(300)
            leaves.getppid(400)
        move(stays.pid, cgroup.parent)
    assert counted.by_pid("getppid") == {stays.pid: 300}


@every_rung
def test_a_cgroup_that_is_made_again_goes_on_being_watched(
    without: tuple[str, ...], cgroup: Path
) -> None:
    wanted = cgroup / "wanted"
    wanted.mkdir()
    with collecting(without, cgroup=str(wanted)) as counted:
        for times in (2, 30, 400):
            with Puppet() as puppet, Puppet() as below, Puppet() as beside:
                move(puppet.pid, wanted)
                move(below.pid, wanted / "child")
                move(beside.pid, cgroup / "beside")
                for one in (puppet, below, beside):
                    one.getppid(times)
            _remove(wanted)
            wait_until(lambda: counted.collector.bpf_object.map("cgroups").read_keys().size == 0)
            wanted.mkdir()
    assert counted.of("getppid") == 2 * 432
    assert not counted.losses


def test_cgroups_that_come_and_go_do_not_use_up_the_room(unified: Path) -> None:
    with collecting(cgroup=str(unified)) as counted, Puppet() as puppet:
        for _ in range(5_000):
            (unified / "one").mkdir()
            (unified / "one").rmdir()
        move(puppet.pid, unified / "last")
        puppet.getppid(3)
        move(puppet.pid, unified.parent)
        assert counted.collector.bpf_object.map("cgroups").read_keys().size == 2
    assert counted.of("getppid") == 3
    assert not counted.losses


@every_rung
def test_cgroups_that_come_and_go_hinder_no_start(without: tuple[str, ...], cgroup: Path) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for name in "abc":
                (cgroup / name).mkdir()
            for name in "abc":
                (cgroup / name).rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        with collecting(without, cgroup=str(cgroup)), Puppet() as puppet:
            for times in range(1, 11):
                with collecting(without, cgroup=str(cgroup), include="getppid") as counted:
                    move(puppet.pid, cgroup)
                    puppet.getppid(times)
                    move(puppet.pid, cgroup.parent)
                assert counted.of("getppid") == times
                assert not counted.losses
    finally:
        over.set()
        thread.join()


@every_rung
def test_a_process_is_in_a_threaded_cgroup_with_its_threads(
    without: tuple[str, ...], unified: Path
) -> None:
    wanted, other = unified / "wanted", unified / "other"
    with Puppet() as puppet:
        puppet.do("import threading; go = threading.Semaphore(0); done = threading.Semaphore(0)")
        puppet.do("tid = []; run = lambda: [tid.append(threading.get_native_id()), go.acquire()]")
        puppet.do("thread = threading.Thread(target=run); thread.start()")
        move(puppet.pid, unified)
        for directory in (wanted, other):
            directory.mkdir()
            (directory / "cgroup.type").write_text("threaded")
        move(puppet.pid, other)
        thread = wait_until(lambda: int(puppet.ask("tid[0]")))
        with collecting(without, cgroup=str(wanted), include="getppid") as counted:
            puppet.getppid(1)
            move(thread, wanted, "cgroup.threads")  # one thread enters: the process counts
            puppet.getppid(10)
            move(thread, other, "cgroup.threads")
            puppet.getppid(100)
            move(puppet.pid, wanted, "cgroup.threads")  # the first thread
            move(thread, wanted, "cgroup.threads")
            puppet.getppid(1_000)
            move(thread, other, "cgroup.threads")  # the first one is still in it
            puppet.getppid(10_000)
            with collecting(without, cgroup=str(wanted), include="getppid") as second:
                puppet.getppid(100_000)
        puppet.do("go.release(), thread.join()")
        puppet.kill()
    assert counted.of("getppid") == 111_010
    assert second.of("getppid") == 100_000


def test_processes_without_room_at_the_start_are_a_loss(
    unified: Path, monkeypatch: pytest.MonkeyPatch, programs: Path
) -> None:
    monkeypatch.setattr(targets, "_MOST_MEMBERS", 4)
    families = [Family(programs / "family", "fork", children=0) for _ in range(7)]
    for family in families:
        move(family.pid, unified)
    with collecting(cgroup=str(unified)) as counted:
        assert len(members(counted.collector)) == 4
        assert counted.drain().losses == {pb.Loss.STAGE_MAP_FULL: 3}
        for family in families:
            family.run()
    assert counted.of("exit_group") == 4
    assert counted.losses == {pb.Loss.STAGE_MAP_FULL: 3}


@pytest.mark.parametrize("without", [(), ("ring_buffer",)], ids=["ring", "perf_buffer"])
def test_names_are_right_whatever_the_buffer_has_no_room_for(without: tuple[str, ...]) -> None:
    with Puppet() as puppet:
        puppet.do("import ctypes; libc = ctypes.CDLL(None)")
        puppet.do("rename = lambda name: libc.prctl(15, name, 0, 0, 0)")
        puppet.do("rename(b'before')")
        with collecting(without, pid=str(puppet.pid), mode="events", ring="64KiB") as counted:
            puppet.do("os.getuid()")
            counted.drain()
            puppet.getppid(5_000)  # more than there is room for
            puppet.do("rename(b'after')")
            puppet.do("child = os.fork() or [rename(b'child'), os._exit(0)]")
            puppet.do("os.waitpid(child, 0)")
            lost = counted.drain()
            puppet.do("os.getuid()")
            puppet.do("child = os.fork() or [rename(b'child'), os.getuid(), os._exit(0)]")
            puppet.do("os.waitpid(child, 0)")
            counted.drain()
            puppet.do("rename(b'last'), os.getuid()")
    assert lost.losses[pb.Loss.STAGE_KERNEL_BUFFER] > 1_000
    assert counted.by_comm("getuid") == {"before": 1, "after": 1, "child": 1, "last": 1}
