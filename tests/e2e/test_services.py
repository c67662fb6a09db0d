"""A service's name finds its processes: all matches of the first step, in the documented order,
that has any."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coral.agent.config import ServiceRule
from coral.agent.errors import NotFoundError
from coral.agent.machine.resolve import resolve
from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.procfs import comm_of, process_of
from tests.support import running_agent, wait_until, watching

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


# Listens, and forks workers that share the socket; all print their ids, the master its port too.
# With `worker`, the master closes it: the workers alone listen. Each worker has a child of its own,
# with another command name, and calls getppid 10 times for each connection.
PREFORK = """
import os, select, socket, subprocess, sys
_, host, count, who = sys.argv
sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
sock.setblocking(False)
print(os.getpid(), sock.getsockname()[1], flush=True)
for _ in range(int(count)):
    if not os.fork():
        break
else:
    if who == "worker":
        sock.close()
    sys.stdin.read()
    os._exit(0)
print(os.getpid(), subprocess.Popen(["cat"]).pid, flush=True)
while select.select([sock, 0], [], [])[0][0] is sock:
    try:
        connection, _ = sock.accept()
    except BlockingIOError:
        continue  # another one has it
    for _ in range(10):
        os.getppid()
    connection.sendall(b"%d" % os.getpid())
    connection.close()
"""


@dataclass(frozen=True)
class Server:
    """A server that has forked its workers: the ids of all of its processes, and its port."""

    pids: set[int]
    master: int
    port: int

    def visit(self) -> int:
        """Connects once; the id of the worker that served it."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            return int(connection.recv(16))


@contextmanager
def prefork(
    directory: Path,
    comm: str,
    *,
    host: str = "127.0.0.1",
    workers: int = 3,
    who: str = "all",
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """A server with the command name COMM. Its processes hold their input open, and end with it."""
    program = directory / comm
    if not program.exists():
        program.symlink_to(os.path.realpath(sys.executable))
    with subprocess.Popen(
        [*prefix, program, "-I", "-S", "-c", PREFORK, host, str(workers), who],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        master, port = map(int, process.stdout.readline().split())
        lines = [process.stdout.readline().split() for _ in range(workers)]
        cats = [int(child) for _, child in lines]
        wait_until(lambda: all(comm_of(cat) == "cat" for cat in cats))  # their exec is over
        yield Server({master, *(int(pid) for line in lines for pid in line)}, master, port)


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


@pytest.mark.parametrize("who", ["all", "worker"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_service_is_its_master_its_workers_and_their_children(
    tmp_path: Path, name: str, who: str, host: str
) -> None:
    with prefork(tmp_path, name, host=host, who=who) as server:
        named = {pid for pid in server.pids if comm_of(pid) == name}
        assert len(named) == 4
        assert set(resolve(name, {}).tgids) == server.pids
        assert set(resolve(name, {}, descendants=False).tgids) == named


def test_a_listener_in_another_network_namespace_is_found(tmp_path: Path, name: str) -> None:
    inside = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    with prefork(tmp_path, name) as here, prefork(tmp_path, name, prefix=inside) as there:
        assert set(resolve(name, {}).tgids) == here.pids | there.pids
        with pytest.raises(NotFoundError, match=f"the nearest names are {name}"):
            resolve(f"{name}x", {})


# Its first thread ends, another one has the listening socket.
FIRST_THREAD_ENDS = """
import ctypes, socket, sys, threading
sock = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).pthread_exit(None)
"""
MULTIPATH = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
sock.bind(("127.0.0.1", 0))
sock.listen()
sys.stdin.read()
"""


@pytest.mark.parametrize("code", [FIRST_THREAD_ENDS, MULTIPATH], ids=["thread", "MPTCP"])
def test_a_listener_that_proc_shows_in_its_own_way_is_found(
    tmp_path: Path, name: str, code: str
) -> None:
    if code is MULTIPATH and not Path("/proc/sys/net/mptcp").exists():
        pytest.skip("this kernel has no MPTCP")
    program = tmp_path / name
    program.symlink_to(os.path.realpath(sys.executable))
    with subprocess.Popen([program, "-I", "-S", "-c", code], stdin=subprocess.PIPE) as process:
        assert wait_until(lambda: tgids_of(name)) == (process.pid,)
        if code is FIRST_THREAD_ENDS:
            wait_until(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
            assert tgids_of(name) == (process.pid,)


def tgids_of(name: str) -> tuple[int, ...]:
    try:
        return resolve(name, {}).tgids
    except NotFoundError:
        return ()


@pytest.mark.parametrize("rule", ["comm", "pid_file"])
def test_a_configured_service_has_the_children_of_its_processes(
    tmp_path: Path, name: str, rule: str
) -> None:
    with prefork(tmp_path, name) as server:
        (tmp_path / "pid").write_text(f"{server.master}\n")
        rules = {
            "comm": ServiceRule(comm=name),
            "pid_file": ServiceRule(pid_file=str(tmp_path / "pid")),
        }
        assert set(resolve("shop", {"shop": rules[rule]}).tgids) == server.pids


def test_a_command_that_does_not_listen_is_no_service_and_near_none(
    tmp_path: Path, name: str
) -> None:
    program = tmp_path / name
    program.symlink_to(os.path.realpath(sys.executable))
    with subprocess.Popen(
        [program, "-I", "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        wait_until(lambda: comm_of(process.pid) == name)
        with pytest.raises(NotFoundError) as refused:
            resolve(name, {})
        assert f"names are {name}" not in str(refused.value)


@pytest.mark.usefixtures("nothing_left")
def test_every_call_of_every_worker_of_a_service_is_counted(tmp_path: Path, name: str) -> None:
    with (
        prefork(tmp_path, name, workers=4) as server,
        running_agent(tmp_path / "agent") as agent,
        watching(agent, 60.0, name, include="getppid") as watch,
    ):
        visits = Counter(server.visit() for _ in range(200))
        watch.read_until_calls("getppid", 2000)
        assert len(visits) > 1
        counted = Counter[int]()
        for row in watch.rows:
            counted[row.pid] += row.call_count
        assert counted == {pid: 10 * count for pid, count in visits.items()}


# A master without a socket. For each line of its input it forks a worker, which prints its id and
# listens on a socket of its own, on the same port as the others; they end with the master.
REUSEPORT = """
import ctypes, os, signal, socket, sys
while os.read(0, 1):
    if not os.fork():
        break
else:
    os._exit(0)
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind(("127.0.0.1", int(sys.argv[1])))
sock.listen()
print(os.getpid(), flush=True)
while True:
    connection, _ = sock.accept()
    os.getppid()
    connection.close()
"""


@pytest.mark.usefixtures("nothing_left")
def test_a_worker_is_counted_that_a_master_without_a_listener_forks_later(
    tmp_path: Path, name: str
) -> None:
    program = tmp_path / name
    program.symlink_to(os.path.realpath(sys.executable))
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with (
            subprocess.Popen(
                [program, "-I", "-S", "-c", REUSEPORT, str(port)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            ) as master,
            running_agent(tmp_path / "agent") as agent,
        ):  # fmt: skip
            assert master.stdin
            assert master.stdout
            master.stdin.write(b"w")
            first = int(master.stdout.readline())
            with watching(agent, 60.0, name, include="getppid") as watch:
                os.kill(first, signal.SIGKILL)
                master.stdin.write(b"w")
                later = int(master.stdout.readline())
                # The kernel sends nothing to its socket any more.
                wait_until(lambda: (found := process_of(first)) and found.is_zombie)
                for _ in range(20):
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        assert not connection.recv(1)
                watch.read_until_calls("getppid", 20)
                assert {row.pid for row in watch.rows} == {later}
            master.stdin.close()
