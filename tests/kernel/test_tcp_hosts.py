"""`tcp_metrics` on hosts as they are: MPTCP, ports that several processes share, sockets that an
administrator destroys, segments that are dropped before they leave."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.contract import Summaries
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.collectors.tcp_metrics.file_walk import FileWalk
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.hidden import AGAIN_IF_HIDDEN
from tests.network import (
    Seen,
    Side,
    connected,
    following,
    listen,
    looks_up_owners,
    number,
    puppets,
    send,
    ss,
)
from tests.support import Puppet, at_work, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), *AGAIN_IF_HIDDEN]

CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER
LISTENER = pb.TCP_ROLE_LISTENER
RESET = (
    "import struct; {s}.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))"
)


@contextmanager
def asking(*processes: Puppet) -> Iterator[Seen]:
    """`tcp_metrics` of these processes, without programs that walk."""
    config = {"pid": ",".join(str(process.pid) for process in processes)}
    features = bpf.probe().without("iterator")
    with at_work(TcpMetricsCollector.create(config, None, features)) as collector:
        yield Seen(collector)


Following = Callable[..., AbstractContextManager[Seen]]
each_way = pytest.mark.parametrize("way", [following, asking])


def mptcp_socket(name: str, protocol: str = "socket.IPPROTO_MPTCP") -> str:
    return f"import socket; {name} = socket.socket(proto={protocol})"


@pytest.fixture
def mptcp() -> None:
    with puppets(1) as (puppet,):
        puppet.do("import socket")
        has = "exec('try: socket.socket(proto=socket.IPPROTO_MPTCP)\\nexcept OSError: has = 0')"
        puppet.do(f"has = 1; {has}")
        if not number(puppet, "has"):
            pytest.skip("the kernel has no MPTCP")


@pytest.mark.usefixtures("mptcp")
@each_way
@pytest.mark.parametrize("protocol", ["socket.IPPROTO_TCP", "socket.IPPROTO_MPTCP"])
def test_a_listener_of_mptcp_that_was_there_before_has_its_connections(
    protocol: str, way: Following
) -> None:
    with puppets(2) as (client, server):
        server.do(f"{mptcp_socket('l')}; l.bind(('127.0.0.1', 0)); l.listen()")
        at = server.ask("l.getsockname()")
        with way(server) as seen:
            for _ in range(5):
                client.do(f"{mptcp_socket('c', protocol)}; c.connect({at})")
                server.do("s, _ = l.accept()")
                send(client, "c", server, "s", 100)
                send(server, "s", client, "c", 50)
                client.do("c.close()")
                server.do("s.recv(1); s.close()")
            seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 5)
            assert sum(row.opened for row in seen.rows) == 5
            assert not any(row.preexisting for row in seen.rows)
            assert sum(row.delta.bytes_received for row in seen.rows) == 500
            assert sum(row.delta.bytes_sent for row in seen.rows) == 250
            assert {row.pid for row in seen.rows} == {server.pid}


@pytest.mark.usefixtures("mptcp")
@each_way
def test_a_connection_of_mptcp_that_was_there_before_goes_on(way: Following) -> None:
    with puppets(2) as (client, server):
        server.do(f"{mptcp_socket('l')}; l.bind(('127.0.0.1', 0)); l.listen()")
        client.do(f"{mptcp_socket('c')}; c.connect({server.ask('l.getsockname()')})")
        server.do("s, _ = l.accept()")
        send(client, "c", server, "s", 1000)
        with way(client, server) as seen:
            seen.drain()
            send(client, "c", server, "s", 23)
            seen.until(lambda: (row := seen.last(role=SERVER)) and row.delta.bytes_received == 23)
            client.do("c.close()")
            server.do("s.recv(1); s.close()")
            for role, puppet in ((CLIENT, client), (SERVER, server)):
                row = seen.ended(role=role)
                assert (row.pid, row.preexisting) == (puppet.pid, True)
                assert row.total.bytes_sent + row.total.bytes_received == 1023


SHARED = ["port", "address", "listener"]


def share(how: str, ours: Puppet, theirs: Puppet, path: str) -> tuple[tuple[str, int], ...]:
    """Makes both listen on one port; returns the address of each."""
    reuse = "l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"
    ours.do(f"import socket; l = socket.socket(); {reuse}; l.bind(('127.0.0.1', 0)); l.listen(64)")
    port = number(ours, "l.getsockname()[1]")
    if how == "listener":
        theirs.do(f"import socket; u = socket.socket(socket.AF_UNIX); u.bind({path!r}); u.listen()")
        ours.do(f"u = socket.socket(socket.AF_UNIX); u.connect({path!r})")
        ours.do("socket.send_fds(u, [b'x'], [l.fileno()])")
        theirs.do("v, _ = u.accept(); fds = socket.recv_fds(v, 1, 1)[1]")
        theirs.do("l = socket.socket(fileno=fds[0])")
        return (("127.0.0.1", port),) * 2
    other = "127.0.0.2" if how == "address" else "127.0.0.1"
    theirs.do(f"import socket; l = socket.socket(); {reuse}; l.bind(({other!r}, {port}))")
    theirs.do("l.listen(64)")
    return ("127.0.0.1", port), (other, port)


TAKE = (
    "while select.select([l], [], [], 0)[0]:\n"
    "  s, _ = l.accept(); took += 1; left.append(s)\n"
    "  try: received += len(s.recv(20))\n"
    "  except OSError: pass\n"
)


@each_way
@pytest.mark.parametrize("end", ["reset", "fin"])
@pytest.mark.parametrize("how", SHARED)
def test_two_that_share_a_port_have_their_own_connections(
    how: str, end: str, way: Following, tmp_path: object
) -> None:
    count = 40
    with puppets(3) as (client, ours, theirs):
        addresses = share(how, ours, theirs, f"{tmp_path}/share")
        servers = [ours, theirs]
        for server in servers:
            server.do("import select; took = received = 0; left = []")
        with way(ours) as seen:
            client.do("import socket")
            for at in addresses * (count // 2):
                client.do(f"c = socket.create_connection({at}); c.sendall(bytes(20))")
                client.do(f"{RESET.format(s='c')}; c.close()" if end == "reset" else "c.close()")
                servers.reverse()  # of a listener that they share, each takes every other one
                for server in servers:
                    server.do(f"exec({TAKE!r})")
            for server in servers:
                server.do("[s.close() for s in left]")
            took = number(ours, "took")
            assert took + number(theirs, "took") == count
            assert 0 < took < count
            seen.until(lambda: sum(row.end != 0 for row in seen.rows) >= took)
            seen.drain()
            ended = [row for row in seen.rows if row.end]
            assert len(ended) == took
            assert {row.pid for row in ended} == {ours.pid}
            assert sum(row.total.bytes_received for row in ended) == 20 * took
            assert not seen.lost


def test_a_connection_that_nobody_accepts_of_a_listener_that_is_shared_is_nobodys(
    tmp_path: object,
) -> None:
    if not looks_up_owners():
        pytest.skip("no program looks up which processes share a listener")
    with puppets(3) as (client, ours, theirs):
        at, _ = share("listener", ours, theirs, f"{tmp_path}/share")
        with following(theirs) as seen:
            client.do(f"import socket; c = socket.create_connection({at}); c.sendall(bytes(20))")
            assert not [row for row in seen.drain() if row.role == SERVER]
            client.do("c.close()")
            for puppet in (ours, theirs):
                puppet.do("l.close()")
            assert seen.ended(role=SERVER).pid == 0


def test_a_child_that_is_ending_does_not_share_the_listener() -> None:
    if not looks_up_owners():
        pytest.skip("no program looks up which processes share a listener")
    with puppets(2) as (client, server):
        port = listen(server, "127.0.0.1")
        with following(server) as seen:
            seen.drain()
            # It is no target any more once it ends, and closes its files after it has freed memory.
            server.do("r, w = os.pipe()")
            server.do(
                "exec('if not (child := os.fork()):\\n much = bytearray(1) * (1 << 29)\\n"
                " os.write(w, bytes(1))\\n time.sleep(99)')"
            )
            server.do("os.read(r, 1); os.kill(child, 9)")
            child = Path(f"/proc/{number(server, 'child')}/stat")
            seen.until(lambda: child.read_text().rpartition(")")[2].split()[0] == "Z")
            client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
            client.do("c.close()")
            server.do("l.close(); os.waitpid(child, 0)")
            assert seen.ended(role=SERVER).pid == server.pid


def test_a_listener_is_shared_no_longer_than_another_process_has_it() -> None:
    if not looks_up_owners():
        pytest.skip("no program looks up which processes share a listener")
    with puppets(2) as (client, server):
        port = listen(server, "127.0.0.1")
        with following(server, follow_children="false") as seen:

            def one_that_nobody_accepts_is_shown() -> bool:
                client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
                seen.walk()
                shown = any(row.role == SERVER and not row.end for row in seen.drain())
                client.do("c.close()")
                server.do("s, _ = l.accept(); s.close()")
                return shown

            assert one_that_nobody_accepts_is_shown()
            server.do("r, w = os.pipe()")
            server.do("exec('if not (child := os.fork()):\\n os.read(r, 1)\\n os._exit(0)')")
            wait_until(lambda: not one_that_nobody_accepts_is_shown())
            server.do("os.write(w, bytes(1)); os.waitpid(child, 0)")
            wait_until(one_that_nobody_accepts_is_shown)


@each_way
@pytest.mark.parametrize("role", [CLIENT, SERVER])
def test_a_connection_that_an_administrator_destroys_is_aborted(role: int, way: Following) -> None:
    with puppets(2) as (client, server), way(client, server) as seen:
        port = listen(server, "127.0.0.1")
        for _ in range(3):  # younger than the next look at open files
            client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
            server.do("s, _ = l.accept()")
            send(client, "c", server, "s", 30)
            end = "sport" if role == SERVER else "dport"
            subprocess.run(
                ["ss", "-KHtn", "state", "established", f"{end} = :{port}"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            client.do("c.close()")
            server.do("s.close()")
        seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 6)
        for row in (row for row in seen.rows if row.end):
            puppet = client if row.role == CLIENT else server
            assert row.pid == puppet.pid
            destroyed = (pb.TCP_END_ABORTED, "ECONNABORTED")
            reset = (pb.TCP_END_RESET_REMOTE, "ECONNRESET")
            assert (row.end, row.error) == (destroyed if row.role == role else reset)
            assert row.total.bytes_sent + row.total.bytes_received == 30


@each_way
@pytest.mark.parametrize("before", [True, False], ids=["listens before", "listens later"])
def test_what_a_full_backlog_drops_is_the_listeners(
    before: bool, way: Following, sides: tuple[Side, Side]
) -> None:
    left, right = sides
    backlog, attempts = 1, 20
    code = f"{{}}; l.bind(({right.v4!r}, 0)); l.listen({backlog})"
    with left.puppet() as client, right.puppet() as server:
        if before:
            server.do(code.format("import socket; l = socket.socket()"))
            fill(client, server, attempts)  # these are not counted
            client.do("[c.close() for c in cs]")  # by resets, which are not repeated
            before_it = right.counter("TcpExtListenDrops")
        with way(server) as seen:
            if not before:
                before_it = right.counter("TcpExtListenDrops")
                server.do(code.format("import socket; l = socket.socket()"))
            fill(client, server, attempts)

            def agrees() -> bool:
                dropped = sum(row.delta.listen_drops for row in seen.rows)
                return 0 < dropped == right.counter("TcpExtListenDrops") - before_it

            seen.until(agrees)
            row = seen.last(role=LISTENER)
            assert row
            assert (row.pid, row.local_port) == (server.pid, number(server, "l.getsockname()[1]"))
            assert (row.backlog, row.backlog_limit) == (backlog + 1, backlog)
            assert not row.total.bytes_sent
            assert right.counter("TcpExtListenOverflows") > 0
            client.do("[c.close() for c in cs]")
            server.do("l.close()")
            seen.drain()
            assert agrees()
            assert not seen.lost


def fill(client: Puppet, server: Puppet, attempts: int) -> None:
    """Begins to connect so many times, without waiting for an answer."""
    at = server.ask("l.getsockname()")
    client.do(f"import socket; cs = [socket.socket() for _ in range({attempts})]")
    client.do("[c.setblocking(False) for c in cs]")
    reset = r"b'\1\0\0\0\0\0\0\0'"  # what its end sends, and not a FIN
    client.do(f"[c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, {reset}) for c in cs]")
    client.do(f"[c.connect_ex({at}) for c in cs]")


@pytest.mark.parametrize("by", ["connection", "peer"])
def test_a_link_local_address_has_its_interface(by: str, sides: tuple[Side, Side]) -> None:
    left, right = sides
    with left.puppet() as client, right.puppet() as server:
        there = re.search(r"inet6 (fe80::\S+)/", right.run("ip", "-6", "addr", "show", "cable"))
        assert there
        index = number(client, "__import__('socket').if_nametoindex('cable')")
        with following(client, by=by) as seen:
            server.do("import socket; l = socket.socket(socket.AF_INET6)")
            server.do("l.bind(('::', 0)); l.listen()")
            port = number(server, "l.getsockname()[1]")
            client.do("import socket; c = socket.socket(socket.AF_INET6)")
            client.do(f"c.connect(({there[1]!r}, {port}, 0, {index}))")
            batch = seen.collector.drain()
            assert isinstance(batch.rows, Summaries)
            (row,) = batch.rows.as_messages()
            assert isinstance(row, pb.TcpMetrics | pb.TcpPeerMetrics)
            assert row.remote_address == f"{there[1]}%{index}"


def test_a_worker_that_is_passed_a_new_connection_has_all_that_it_moved(tmp_path: object) -> None:
    if not looks_up_owners():
        pytest.skip("no program walks through open files")
    with puppets(3) as (client, acceptor, worker):
        connected(client, acceptor, "127.0.0.1")
        at = acceptor.ask("l.getsockname()")
        pass_sockets(acceptor, worker, f"{tmp_path}/pass")
        send(client, "c", acceptor, "s", 1000)
        with following(worker) as seen:
            for looked in (False, True):  # ends before a walk finds it, and after
                client.do(f"d = socket.create_connection({at})")
                acceptor.do("t, _ = l.accept(); socket.send_fds(v, [b'x'], [t.fileno()])")
                acceptor.do("t.close()")
                worker.do("t = socket.socket(fileno=socket.recv_fds(u, 1, 1)[1][0])")
                send(client, "d", worker, "t", 100)
                send(worker, "t", client, "d", 50)
                if looked:
                    seen.until(lambda: seen.last(pid=worker.pid, end=0))
                worker.do("t.close()")
                client.do("d.recv(1); d.close()")
            seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 2)
            assert sum(row.delta.bytes_received for row in seen.rows) == 200
            assert sum(row.delta.bytes_sent for row in seen.rows) == 100
            # What an older connection carried before is of no interval.
            acceptor.do("socket.send_fds(v, [b'x'], [s.fileno()]); s.close()")
            worker.do("s = socket.socket(fileno=socket.recv_fds(u, 1, 1)[1][0])")
            peer = number(worker, "s.getpeername()[1]")
            seen.until(lambda: seen.last(remote_port=peer))
            row = seen.rows[-1]
            assert (row.total.bytes_received, row.delta.bytes_received) == (1000, 0)


@pytest.mark.parametrize("met_by_walk", [True, False])
def test_every_walk_tells_new_connections_from_older_ones(
    met_by_walk: bool, tmp_path: object
) -> None:
    """Marks of sockets have room for the numbers of 127 walks: the 128th has one that was there."""
    if not looks_up_owners():
        pytest.skip("no program walks through open files")
    with puppets(3) as (client, acceptor, worker):
        connected(client, acceptor, "127.0.0.1")
        at = acceptor.ask("l.getsockname()")
        pass_sockets(acceptor, worker, f"{tmp_path}/pass")
        with at_work(TcpMetricsCollector.create({"pid": str(worker.pid)}, None, bpf.probe())) as c:
            walk = c.bpf_object.common(FileWalk)
            while c.bpf_object.object.read_variable("walk") < 126 + met_by_walk:
                walk.run()
            for _ in range(4):
                walk.run()
                client.do(f"d = socket.create_connection({at})")
                acceptor.do("t, _ = l.accept(); socket.send_fds(v, [b'x'], [t.fileno()])")
                acceptor.do("t.close()")
                worker.do("t = socket.socket(fileno=socket.recv_fds(u, 1, 1)[1][0])")
                send(client, "d", worker, "t", 100)
                if met_by_walk:
                    walk.run()
                worker.do("t.close()")  # which a program finds it by, unless a walk did
                client.do("d.recv(1); d.close()")
            c.bpf_object.detach()
            rows = c.drain().rows
            assert isinstance(rows, Summaries)
            messages = [row for row in rows.as_messages() if isinstance(row, pb.TcpMetrics)]
            assert [row.delta.bytes_received for row in messages] == [100] * 4


def pass_sockets(giver: Puppet, taker: Puppet, path: str) -> None:
    """Connects two puppets, as `v` and `u`, for descriptors."""
    taker.do(f"import socket; w = socket.socket(socket.AF_UNIX); w.bind({path!r}); w.listen()")
    giver.do(f"v = socket.socket(socket.AF_UNIX); v.connect({path!r})")
    taker.do("u, _ = w.accept()")


LEAVES = "table inet leaves {{ chain out {{ type filter hook output priority 0; {rule}; }}; }}"


@pytest.mark.parametrize("watched", ["client", "server"])
@each_way
def test_segments_that_never_left_do_not_hide_the_role(
    watched: str, way: Following, sides: tuple[Side, Side]
) -> None:
    left, right = sides
    with left.puppet() as client, right.puppet() as server:
        port = listen(server, right.v4)
        client.do(f"import socket; c = socket.create_connection(({right.v4!r}, {port}))")
        server.do("s, _ = l.accept()")
        if way is following:  # sock_diag shows no other sign of a server
            server.do("l.close()")
        ours, theirs = (client, server) if watched == "client" else (server, client)
        side, mine, other = (left, "c", "s") if watched == "client" else (right, "s", "c")
        side.run("nft", LEAVES.format(rule="tcp flags psh numgen inc mod 4 < 2 drop"))
        for _ in range(4):
            send(ours, mine, theirs, other, 5000)
        side.run("nft", "delete table inet leaves")
        (fields,) = (f for f in ss(side, port).values() if "bytes_sent" in f)
        handed_over = int(fields["bytes_sent"]) - int(fields.get("bytes_retrans", 0))
        assert handed_over > 20_000 + 1  # the payload alone does not tell
        with way(ours) as seen:
            seen.drain()
            send(ours, mine, theirs, other, 1000)
            ours.do(f"{mine}.close()")
            row = seen.ended(pid=ours.pid)
            assert row.role == (CLIENT if watched == "client" else SERVER)
            assert row.total.bytes_sent == 21_000
            told = sum(r.delta.bytes_sent for r in seen.rows)
            # Where sock_diag is asked, its answer may count a FIN that comes meanwhile.
            assert told in ((1000,) if looks_up_owners() else (1000, 1001))


def test_a_walk_that_waits_for_a_cpu_does_not_rest_for_it() -> None:
    if not looks_up_owners():
        pytest.skip("no program walks through open files")
    with puppets(1) as (puppet,), following(puppet) as seen:
        slot = seen.collector.bpf_object
        files = slot.common(FileWalk)
        files.run(lambda _: time.sleep(0.5))
        before = slot.object.read_variable("walk")

        def walked_again() -> bool:
            files.run_if_rested()
            return bool(slot.object.read_variable("walk") > before)

        wait_until(walked_again)


@pytest.mark.long
def test_a_child_that_a_walk_meets_before_its_fork_is_told_makes_no_listener_shared() -> None:
    if not looks_up_owners():
        pytest.skip("no program walks through open files")
    forks = "for _ in range(2000):\n  if not os.fork(): os._exit(0)\n  os.wait()\n"
    with puppets(1) as (server,), following(server) as seen:
        listen(server, "127.0.0.1")
        walk = seen.collector.bpf_object.common(FileWalk)
        connections = seen.collector.bpf_object.map("connections")
        with ThreadPoolExecutor() as pool:
            forking = pool.submit(server.do, f"exec({forks!r})")
            while not forking.done():
                walk.run()
                seen.drain()
                assert connections.read()[1]["shared"].tolist() == [0]
        forking.result()


@pytest.mark.long
def test_a_million_open_files_are_walked_through() -> None:
    if not looks_up_owners():
        pytest.skip("no program walks through open files")
    with puppets(3) as (client, server, holder):
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 10)
        holder.do("import resource; most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]")
        holder.do("resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))")
        holder.do("n = 1_000_100 // (most - 100) + 1; r, w = os.pipe()")
        holder.do("files = [os.dup(0) for _ in range(min(most - 100, 1_000_100))]")
        # The children end with their parent's end of the pipe.
        holder.do(
            "exec('for _ in range(n):\\n"
            " if not os.fork(): os.close(w); os.read(r, 1); os._exit(0)')"
        )
        with following(client, server) as seen:
            seen.drain()
            assert {row.role: row.pid for row in seen.rows} == {
                CLIENT: client.pid,
                SERVER: server.pid,
            }
        holder.do("os.close(w); [os.wait() for _ in range(n)]")
