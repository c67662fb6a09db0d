"""`tcp_metrics` against independent figures: the programs' own byte counts, `ss`, `nstat`."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from coral import bpf
from coral.agent.sessions.session import StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams import Terms
from coral.agent.streams.filter import Filter
from coral.client.batch import Batch as Received
from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.contract import EventRows, Measures, Summaries
from coral.collectors.procfs import comm_of
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.hidden import AGAIN_IF_HIDDEN
from tests.network import (
    Seen,
    Side,
    connected,
    following,
    has_cookies,
    identity,
    listen,
    looks_up_owners,
    number,
    puppets,
    send,
    socket_of,
    ss,
)
from tests.support import PATIENCE, Puppet, at_work, samples, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), *AGAIN_IF_HIDDEN]

CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER


@pytest.mark.parametrize("way", ["loopback", "v4", "v6", "mapped"])
def test_bytes_are_exact_each_way(way: str, sides: tuple[Side, Side]) -> None:
    right = sides[1]
    with ExitStack() as stack:
        if way == "loopback":
            client, server = stack.enter_context(puppets(2))
            address = "127.0.0.1"
        else:
            client, server = (stack.enter_context(side.puppet()) for side in sides)
            address = {"v4": right.v4, "v6": right.v6, "mapped": f"::ffff:{right.v4}"}[way]
        seen = stack.enter_context(following(client, server))
        port = connected(client, server, address)
        send(client, "c", server, "s", 3_000_001)
        send(server, "s", client, "c", 123_457)
        seen.drain()
        for role, sent, received in ((CLIENT, 3_000_001, 123_457), (SERVER, 123_457, 3_000_001)):
            row = seen.last(role=role)
            assert row
            assert (row.total.bytes_sent, row.total.bytes_received) == (
                sent,
                received,
            )
        send(client, "c", server, "s", 1)
        local_port = number(client, "c.getsockname()[1]")
        client.do("c.close()")
        server.do("s.close()")
        for puppet, role, sent, received in (
            (client, CLIENT, 3_000_002, 123_457),
            (server, SERVER, 123_457, 3_000_002),
        ):
            row = seen.ended(role=role)
            assert (row.total.bytes_sent, row.total.bytes_received) == (sent, received)
            assert row.total.bytes_acked == sent
            assert (row.pid, row.comm) == (puppet.pid, comm_of(puppet.pid))
            assert row.end == (pb.TCP_END_FIN_LOCAL if role == CLIENT else pb.TCP_END_FIN_REMOTE)
            assert 0 < row.duration_ns < 20e9
            ends = {row.local_address: row.local_port, row.remote_address: row.remote_port}
            if way != "loopback":
                shown = (sides[0].v6, right.v6) if way == "v6" else (sides[0].v4, right.v4)
                assert ends == {shown[0]: local_port, shown[1]: port}
        assert not seen.lost


def test_figures_are_those_of_ss(sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    with following(client, server) as seen:
        port = connected(client, server, sides[1].v4)
        with sides[1].dropping("tcp flags psh numgen random mod 10 < 2 drop"):
            for _ in range(20):
                send(client, "c", server, "s", 20_000)
                send(server, "s", client, "c", 5_000)

        def differing() -> dict[str, tuple[object, object]]:
            seen.drain()
            said = {**ss(sides[0], port), **ss(sides[1], port)}
            assert len(said) == 2
            return dict(
                it for ports, fields in said.items() for it in _differing(seen, ports, fields)
            )

        try:
            wait_until(lambda: not differing())
        except AssertionError:
            assert differing() == {}
            raise


def _differing(
    seen: Seen, ports: tuple[int, int], fields: dict[str, str]
) -> Iterator[tuple[str, tuple[object, object]]]:
    """The figures of a connection in which its row and `ss` differ."""
    row = seen.last(local_port=ports[0], remote_port=ports[1])
    assert row
    rtt, variation = (round(float(part) * 1000) for part in fields["rtt"].split("/"))
    sent_again = row.total.bytes_retransmitted
    for what, ours, theirs in (
        ("sk", row.connection_id, int(fields["sk"], 16) if has_cookies() else row.connection_id),
        ("rtt", (row.rtt_us, row.rtt_variation_us), (rtt, variation)),
        ("minrtt", row.rtt_min_us, round(float(fields["minrtt"]) * 1000)),
        ("cwnd", row.congestion_window, int(fields["cwnd"])),
        ("mss", row.segment_bytes, int(fields["mss"])),
        ("segs_out", row.total.segments_sent, int(fields["segs_out"])),
        ("segs_in", row.total.segments_received, int(fields["segs_in"])),
        ("retrans", row.total.retransmits, int(fields.get("retrans", "0/0").split("/")[1])),
        ("bytes_retrans", sent_again, int(fields.get("bytes_retrans", 0))),
        ("bytes_sent", row.total.bytes_sent + sent_again, int(fields["bytes_sent"])),
        ("bytes_received", row.total.bytes_received, int(fields["bytes_received"])),
    ):
        if ours != theirs:
            yield f"{what} of {pb.TcpRole.Name(row.role)}", (ours, theirs)


def test_retransmits_are_those_of_the_kernel(
    sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    left, right = sides
    names = ("TcpRetransSegs", "TcpExtTCPSynRetrans", "TcpExtTCPLossProbes")
    before = {name: left.counter(name) for name in names}
    with following(client) as seen:
        port = listen(server, sides[1].v4)
        server.begin(
            "exec('for _ in range(12):\\n s, _ = l.accept()\\n"
            " while s.recv(65536): pass\\n s.close()')"
        )
        sending = (
            "import socket, threading\n"
            "def send():\n"
            f"  c = socket.create_connection(({right.v4!r}, {port}))\n"
            "  c.sendall(bytes(100_000)); c.close()\n"
            "senders = [threading.Thread(target=send) for _ in range(12)]\n"
            "for sender in senders: sender.start()\n"
            "for sender in senders: sender.join()\n"
        )
        # A SYN whose repetitions were left to chance would be given up now and then.
        a_syn_surely = "tcp flags syn numgen inc mod 6 < 1 drop"
        with right.dropping(f"{a_syn_surely}; tcp flags & syn == 0 numgen random mod 10 < 3 drop"):
            client.do(f"exec({sending!r}, {{}})")
            server.done()
        seen.until(lambda: len([row for row in seen.rows if row.end]) == 12)
        made = {name: left.counter(name) - before[name] for name in names}
        totals = Counter[str]()
        for row in seen.rows:
            for field, value in row.delta.ListFields():
                totals[field.name] += value
        kinds = ("fast", "timeout", "tail_probe", "handshake")
        assert totals["retransmits"] == made["TcpRetransSegs"] > 0
        assert totals["retransmits_handshake"] == made["TcpExtTCPSynRetrans"] > 0
        assert sum(totals[f"retransmits_{kind}"] for kind in kinds) == totals["retransmits"]
        assert totals["retransmits_timeout"] > 0
        assert totals["bytes_sent"] == 1_200_000
        assert not seen.lost


def close_first(client: Puppet, server: Puppet) -> None:
    client.do("c.close()")
    server.do("s.recv(1); s.close()")


def close_second(client: Puppet, server: Puppet) -> None:
    server.do("s.close()")
    client.do("c.recv(1); c.close()")


def reset(client: Puppet, _: Puppet) -> None:
    client.do("import struct; linger = struct.pack('ii', 1, 0)")
    client.do("c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close()")


def close_with_unread_data(client: Puppet, server: Puppet) -> None:
    server.do("s.sendall(b'x')")
    client.do("c.recv(1, socket.MSG_PEEK); c.close()")


def shut_down(client: Puppet, server: Puppet) -> None:
    client.do("c.shutdown(socket.SHUT_WR)")
    server.do("s.recv(1); s.sendall(bytes(1000)); s.close()")
    client.do("exec('while c.recv(100): pass'); c.close()")


def kill(client: Puppet, server: Puppet) -> None:
    client.kill()
    server.do("s.recv(1); s.close()")


@pytest.mark.parametrize(
    ("act", "client_end", "server_end", "error", "reason"),
    [
        (close_first, "FIN_LOCAL", "FIN_REMOTE", "", ""),
        (close_second, "FIN_REMOTE", "FIN_LOCAL", "", ""),
        (reset, "RESET_LOCAL", "RESET_REMOTE", "ECONNRESET", "TCP_STATE"),
        (close_with_unread_data, "RESET_LOCAL", "RESET_REMOTE", "ECONNRESET", "TCP_ABORT_ON_CLOSE"),
        (shut_down, "FIN_LOCAL", "FIN_REMOTE", "", ""),
        (kill, "FIN_LOCAL", "FIN_REMOTE", "", ""),
    ],
)
def test_how_it_ended(
    act: object, client_end: str, server_end: str, error: str, reason: str
) -> None:
    with puppets(2) as (client, server), following(client, server) as seen:
        connected(client, server, "127.0.0.1")
        client_pid = client.pid
        act(client, server)  # type: ignore[operator]
        at_client, at_server = seen.ended(role=CLIENT), seen.ended(role=SERVER)
        assert pb.TcpEnd.Name(at_client.end) == f"TCP_END_{client_end}"
        assert pb.TcpEnd.Name(at_server.end) == f"TCP_END_{server_end}"
        assert (at_client.pid, at_server.pid) == (client_pid, server.pid)
        assert at_client.state == at_server.state == pb.TCP_STATE_CLOSE
        assert at_server.error == error
        assert at_client.reset_reason in ("", reason)  # kernels before 6.10 do not report it
        assert at_client.total.resets_sent == at_server.total.resets_received == bool(error)
        if act is shut_down:
            assert at_client.total.bytes_received == at_server.total.bytes_acked == 1000
            assert at_client.total.bytes_sent == at_server.total.bytes_received == 0


def test_both_close_at_once(sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    with following(client, server) as seen:
        connected(client, server, sides[1].v4)
        with sides[0].dropping("tcp flags fin drop"), sides[1].dropping("tcp flags fin drop"):
            client.do("c.close()")
            server.do("s.close()")
        # The side whose FIN came first only sees that the other one followed.
        ends = {seen.ended(role=CLIENT).end, seen.ended(role=SERVER).end}
        assert pb.TCP_END_FIN_BOTH in ends <= {pb.TCP_END_FIN_BOTH, pb.TCP_END_FIN_LOCAL}


def test_a_connection_that_fails(sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]) -> None:
    client, _ = pair
    attempt = "import socket; c = socket.socket(); c.setsockopt(socket.IPPROTO_TCP, 18, 200); c.{}"
    with following(client) as seen:
        client.do(attempt.format(f"connect_ex(({sides[1].v4!r}, 9))"))
        client.do("c.close()")
        refused = seen.ended()
        assert (refused.end, refused.error) == (pb.TCP_END_REFUSED, "ECONNREFUSED")
        assert (refused.remote_address, refused.remote_port) == (sides[1].v4, 9)
        assert refused.local_port
        assert refused.pid == client.pid
        assert not refused.connect_ns
        seen.rows.clear()
        with sides[1].dropping("tcp flags syn drop"):
            client.do(attempt.format(f"connect_ex(({sides[1].v4!r}, 9)); c.close()"))
        timed_out = seen.ended()
        assert (timed_out.end, timed_out.error) == (pb.TCP_END_TIMEOUT, "ETIMEDOUT")
        assert timed_out.duration_ns > 150e6
        seen.rows.clear()
        # Given up by the program, before there was an answer.
        with sides[1].dropping("tcp flags syn drop"):
            client.do(attempt.format(f"setblocking(False); c.connect_ex(({sides[1].v4!r}, 9))"))
            client.do("c.close()")
        assert seen.ended().end == pb.TCP_END_ABORTED


def test_a_peer_that_is_gone(sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    with following(client) as seen:
        connected(client, server, sides[1].v4)
        with sides[1].dropping("meta l4proto tcp drop"):
            client.do("c.setsockopt(socket.IPPROTO_TCP, 18, 100); c.sendall(bytes(777))")
            row = seen.ended()
        assert (row.end, row.error) == (pb.TCP_END_TIMEOUT, "ETIMEDOUT")
        assert (row.total.bytes_sent, row.total.bytes_acked) == (777, 0)
        assert row.total.retransmits > 0


SEND_FD = (
    "import socket, array; u = socket.socket(socket.AF_UNIX); u.connect({path!r}); "
    "socket.send_fds(u, [b'x'], [{s}.fileno()]); {s}.close()"
)
TAKE_FD = (
    "v, _ = u.accept(); _, fds, _, _ = socket.recv_fds(v, 1, 1); s = socket.socket(fileno=fds[0])"
)
LISTEN_FD = "import socket; u = socket.socket(socket.AF_UNIX); u.bind({path!r}); u.listen()"


@pytest.mark.parametrize("watched", ["both", "taker"])
def test_a_socket_that_is_passed_on_belongs_to_who_uses_it(watched: str, tmp_path: object) -> None:
    path = f"{tmp_path}/passing"
    with puppets(3) as (client, server, taker), ExitStack() as stack:
        watching = (server, taker) if watched == "both" else (taker,)
        seen = stack.enter_context(following(*watching))
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 100)
        if watched == "both":
            seen.until(lambda: seen.last(pid=server.pid, role=SERVER))
        taker.do(LISTEN_FD.format(path=path))
        server.do(SEND_FD.format(path=path, s="s"))
        taker.do(TAKE_FD)
        send(client, "c", taker, "s", 50)
        seen.until(lambda: seen.last(pid=taker.pid, role=SERVER))
        taker.do("s.close()")
        client.do("c.recv(1); c.close()")
        seen.until(lambda: seen.last(end=pb.TCP_END_FIN_LOCAL))
        row = seen.last(end=pb.TCP_END_FIN_LOCAL)
        assert row
        assert row.pid == taker.pid
        assert row.total.bytes_received == 150
        assert row.preexisting == (watched == "taker")


def test_a_child_that_inherits_owns_what_it_uses() -> None:
    with puppets(2) as (client, server), following(server) as seen:
        connected(client, server, "127.0.0.1")
        # The child answers and ends; the parent has closed the socket before.
        server.do("r, w = os.pipe()")
        server.do(
            "exec('if not (child := os.fork()):\\n os.read(r, 1)\\n"
            " s.sendall(s.recv(10))\\n s.close()\\n os._exit(0)')"
        )
        child = number(server, "child")
        server.do("s.close()")
        seen.until(lambda: seen.last(role=SERVER))
        client.do("c.sendall(bytes(10))")
        server.do("os.write(w, b'x')")
        client.do("c.recv(10); c.recv(1); c.close()")
        row = seen.ended()
        server.do("os.waitpid(child, 0)")
        assert (row.pid, row.end) == (child, pb.TCP_END_FIN_LOCAL)
        assert (row.total.bytes_received, row.total.bytes_sent) == (10, 10)


def test_a_connection_that_only_the_end_of_its_process_closes_is_told() -> None:
    with puppets(2) as (client, server), following(server) as seen:
        port = listen(server, "127.0.0.1")
        client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
        client.do("c.sendall(bytes(10))")
        # Nobody looks who has it while the child lives.
        server.do(
            "exec('r, w = os.pipe()\\ns, _ = l.accept()\\nif not (child := os.fork()):\\n"
            " s.sendall(s.recv(10))\\n os.read(r, 1)\\n os._exit(0)\\n"
            's.close()\\nos.write(w, b"x")\\nos.waitpid(child, 0)\')'
        )
        client.do("c.recv(10); c.recv(1); c.close()")
        row = seen.ended(role=SERVER)
        assert (row.end, row.total.bytes_received, row.total.bytes_sent) == (
            pb.TCP_END_FIN_LOCAL, 10, 10,
        )  # fmt: skip
        assert row.pid == number(server, "child")
        assert not seen.lost


@pytest.mark.parametrize("does", ["accepts", "receives"])
def test_a_workers_connection_is_the_workers(does: str) -> None:
    with puppets(2) as (client, master), following(master) as seen:
        port = listen(master, "127.0.0.1")
        master.do("r, w = os.pipe()")
        work = "s, _ = l.accept()" + ("; s.recv(1)" if does == "receives" else "")
        master.do(
            f"exec('if not (worker := os.fork()):\\n {work}\\n os.read(r, 1)\\n os._exit(0)')"
        )
        worker = number(master, "worker")
        client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
        client.do("c.sendall(b'x')")
        owner = worker if looks_up_owners() or does == "receives" else master.pid
        seen.until(lambda: (row := seen.last(role=SERVER)) and row.pid == owner)
        master.do("os.write(w, b'x'); os.waitpid(worker, 0)")
        assert seen.ended(role=SERVER).pid == worker


def test_a_connection_is_not_the_process_s_that_happens_to_close_it() -> None:
    if not looks_up_owners():
        pytest.skip("nothing tells which listeners are shared")
    with puppets(3) as (client, server, other), following(server) as seen:
        connected(client, server, "127.0.0.1")
        fd = number(server, "s.fileno()")
        other.do("import ctypes; from ctypes import c_long; call = ctypes.CDLL(None).syscall")
        other.do(f"fd = call(c_long(438), os.pidfd_open({server.pid}), {fd}, 0)  # pidfd_getfd")
        client.do("c.close()")
        server.do("s.close()")
        other.do("os.close(fd)")
        assert seen.ended(role=SERVER).pid == server.pid


def test_a_port_that_is_shared_with_others_does_not_show_theirs() -> None:
    shared = "l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)"
    take = "l.setblocking(False)\nwhile True:\n  try: s, _ = l.accept()\n  except OSError: break\n"
    take += "  mine.append(s); s.recv(1)\n"
    with puppets(3) as (client, server, other), following(server) as seen:
        server.do(f"{socket_of('127.0.0.1', 'l')}; {shared}; l.bind(('127.0.0.1', 0)); l.listen()")
        port = number(server, "l.getsockname()[1]")
        at = f"('127.0.0.1', {port})"
        other.do(f"{socket_of('127.0.0.1', 'l')}; {shared}; l.bind({at}); l.listen()")
        client.do(f"import socket; cs = [socket.create_connection({at}) for _ in range(32)]")
        client.do("[c.sendall(b'x') for c in cs]")
        mine = []
        for puppet in (server, other):
            puppet.do(f"mine = []; exec({take!r})")
            mine.append(number(puppet, "len(mine)"))
        assert sum(mine) == 32
        assert min(mine) > 0
        connections = seen.collector.bpf_object.map("connections")

        def followed() -> Counter[int]:
            seen.walk()
            seen.drain()
            return Counter(connections.read()[1]["role"].tolist())

        wait_until(lambda: followed()[SERVER] == mine[0])
        client.do("[c.close() for c in cs]")
        for puppet in (server, other):
            puppet.do("[s.close() for s in mine]")
        seen.until(lambda: sum(row.end != 0 for row in seen.rows) >= mine[0])
        assert sum(row.end != 0 for row in seen.rows) == mine[0]
        assert {row.pid for row in seen.rows if row.end} == {server.pid}


def test_a_connection_that_was_there_before_has_its_totals() -> None:
    with puppets(2) as (client, server):
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 70_000)
        with following(client, server) as seen:
            seen.drain()
            for role, puppet in ((CLIENT, client), (SERVER, server)):
                row = seen.last(role=role)
                assert row
                assert row.preexisting
                assert not row.start_ns
                assert row.pid == puppet.pid
                assert row.total.bytes_sent == (70_000 if role == CLIENT else 0)
                assert row.total.bytes_acked == row.total.bytes_sent
                assert row.total.bytes_received == (70_000 if role == SERVER else 0)
                # What it carried before counts in no interval.
                assert not row.delta.ByteSize()
                assert not row.opened
            # An earlier listener is known, too: connections that it accepts have a beginning.
            client.do("d = socket.socket(); d.connect(c.getpeername())")
            seen.until(lambda: seen.last(role=SERVER, opened=1))
            assert seen.last(role=SERVER, opened=1).pid == server.pid  # type: ignore[union-attr]
            close_first(client, server)
            assert seen.ended(role=CLIENT).total.bytes_sent == 70_000


def test_what_outlives_the_collector_is_reported_open() -> None:
    with puppets(2) as (client, server), following(client) as seen:
        connected(client, server, "127.0.0.1")
        assert len(seen.drain()) == 1
        assert seen.drain() == []
        seen.collector.bpf_object.detach()
        (row,) = seen.drain()
        assert (row.end, row.state) == (pb.TCP_END_OPEN, pb.TCP_STATE_ESTABLISHED)
        assert row.duration_ns > 0


def test_what_ends_while_the_collector_ends_is_reported_as_it_was() -> None:
    """No program runs for it any more, and the walk to its socket finds another state."""
    with puppets(2) as (client, server), following(client) as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 5_000)
        seen.collector.bpf_object.detach()
        server.do("s.close()")
        client.do("c.close()")
        (row,) = seen.drain()
        assert (row.end, row.state) == (pb.TCP_END_OPEN, pb.TCP_STATE_ESTABLISHED)
        assert row.opened == 1
        assert row.pid == client.pid


def test_a_port_that_is_used_again_at_once_is_another_connection() -> None:
    with puppets(2) as (client, server), following(client) as seen:
        port = listen(server, "127.0.0.1")
        client.do("import socket, struct; linger = struct.pack('ii', 1, 0)")
        client.do("c = socket.socket(); c.bind(('127.0.0.1', 0)); mine = c.getsockname()")
        for round_ in range(5):
            client.do(f"c.connect(('127.0.0.1', {port})); c.sendall(bytes({round_ + 1}))")
            client.do("c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close()")
            client.do("c = socket.socket(); c.bind(mine)")
        client.do("c.close()")
        seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 5)
        ended = sorted((row for row in seen.rows if row.end), key=lambda row: row.start_ns)
        assert [row.total.bytes_sent for row in ended] == [1, 2, 3, 4, 5]
        assert len({(row.local_port, row.remote_port) for row in ended}) == 1
        assert len({identity(row) for row in ended}) == 5
        assert len({row.connection_id for row in ended}) == 5


def test_every_connection_of_a_burst_is_accounted() -> None:
    count = int(20_000 / PATIENCE)
    burst = (
        "import socket, struct; linger = struct.pack('ii', 1, 0)\n"
        "l = socket.create_server(('127.0.0.1', 0)); at = l.getsockname()\n"
        f"for _ in range({count}):\n"
        "  c = socket.socket(); c.connect(at); s, _ = l.accept()\n"
        "  c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close(); s.close()\n"
    )
    # Whoever looks at an open file has it for a moment, and may be the one that closes it.
    look = (
        "while True:\n"
        "  for n in 3, 4, 5, 6:\n"
        "    try: os.readlink(f'/proc/{pid}/fd/{n}')\n"
        "    except OSError: pass\n"
    )
    with puppets(2) as (puppet, looker), following(puppet, ring="16MiB") as seen:
        if looks_up_owners():
            looker.begin(f"pid = {puppet.pid}; exec({look!r})")
        puppet.begin(f"exec({burst!r})")
        ended: set[tuple[int, ...]] = set()  # an end may be told again, if its figures have moved
        opened = 0

        def all_ended() -> bool:
            nonlocal opened
            for row in seen.drain():
                if row.end:
                    ended.add(identity(row))
                opened += row.opened
            seen.rows.clear()
            return len(ended) + seen.lost + seen.missed >= 2 * count

        try:
            wait_until(all_ended, 60)
        except AssertionError as error:
            lost = f"{seen.lost} lost, {seen.missed} missed"
            roles = Counter(role for _, role, *_ in ended)
            raise AssertionError(f"{roles}, {opened} opened, {lost} of {count}") from error
        puppet.done()
        all_ended()
        assert 2 * count - seen.missed <= opened == len(ended) <= 2 * count
        assert not seen.lost


def events_of(collector: TcpMetricsCollector) -> tuple[list[dict[str, int]], list[str]]:
    """The records in the ring, as rows with names."""
    batch = collector.drain()
    assert isinstance(batch.rows, EventRows)
    assert not batch.losses
    names = batch.rows.records.dtype.names or ()
    rows = [dict(zip(names, row, strict=True)) for row in batch.rows.records.tolist()]
    return rows, list(batch.rows.strings)


def test_every_change_of_state_is_an_event(
    sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    before = sum(side.counter("TcpRetransSegs") for side in sides)
    with following(client, server, mode="events") as seen:
        port = connected(client, server, sides[1].v4)
        close_first(client, server)
        events: list[dict[str, int]] = []
        strings: list[str] = []

        def closed() -> bool:
            nonlocal strings
            rows, strings = events_of(seen.collector)
            events.extend(rows)
            return sum(row["new_state"] == pb.TCP_STATE_CLOSE for row in events) == 2

        wait_until(closed)
        steps: dict[int, list[str]] = {CLIENT: [], SERVER: []}
        # A slow machine probes for segments that are merely late: the kernel counts those, too.
        retransmits = sum(side.counter("TcpRetransSegs") for side in sides) - before
        others = [row for row in events if row["what"] != pb.TcpStateChange.WHAT_STATE]
        assert all("RETRANSMIT" in pb.TcpStateChange.What.Name(row["what"]) for row in others)
        assert sum(row["count"] for row in others) == retransmits
        for row in sorted(events, key=lambda row: row["time_ns"]):
            if row["what"] == pb.TcpStateChange.WHAT_STATE and row["role"] in steps:
                assert port in (row["local_port"], row["remote_port"])
                assert strings[row["comm"]] == comm_of(row["pid"])
                assert row["pid"] == (client if row["role"] == CLIENT else server).pid
                steps[row["role"]].append(pb.TcpState.Name(row["new_state"])[len("TCP_STATE_") :])
        assert steps == {
            CLIENT: ["SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"],
            SERVER: ["SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"],
        }
        last = events[-1]
        address = last["local_high"] << 64 | last["local_low"]
        assert str(ip_address(address).ipv4_mapped) in (sides[0].v4, sides[1].v4)  # type: ignore[union-attr]


def test_every_retransmit_and_reset_is_an_event(
    sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    left, right = sides
    before = left.counter("TcpRetransSegs")
    with following(client, server, mode="events") as seen:
        connected(client, server, right.v4)
        with right.dropping("tcp flags psh numgen inc mod 4 < 2 drop"):
            for _ in range(5):
                send(client, "c", server, "s", 10_000)
        reset(client, server)
        counted = Counter[str]()
        reasons = set()

        def reset_received() -> bool:
            rows, strings = events_of(seen.collector)
            for row in rows:
                counted[pb.TcpStateChange.What.Name(row["what"])] += row["count"]
                if row["what"] == pb.TcpStateChange.WHAT_RESET_SENT:
                    reasons.add(strings[row["reason"]])
            return counted["WHAT_RESET_RECEIVED"] > 0

        wait_until(reset_received)
        sent_again = sum(n for what, n in counted.items() if "RETRANSMIT" in what)
        assert sent_again == left.counter("TcpRetransSegs") - before > 0
        assert counted["WHAT_RESET_SENT"] == 1
        assert reasons <= {"", "TCP_STATE"}


def test_peers_add_up_their_connections() -> None:
    with puppets(2) as (client, server), following(client, server, by="peer") as seen:
        port = connected(client, server, "127.0.0.1")
        client.do("e = socket.socket(); e.connect(c.getpeername())")
        server.do("t, _ = l.accept()")
        send(client, "c", server, "s", 1000)
        send(client, "e", server, "t", 200)
        client.do("c.close()")
        server.do("s.recv(1); s.close(); l.close()")
        client.do("f = socket.socket(); f.connect_ex(e.getpeername()); f.close()")
        peers: dict[int, pb.TcpPeerMetrics] = {}

        def all_seen() -> bool:
            batch = seen.collector.drain()
            assert isinstance(batch.rows, Summaries)
            for row in batch.rows.as_messages():
                assert isinstance(row, pb.TcpPeerMetrics)
                assert (row.remote_address, row.port) == ("127.0.0.1", port)
                known = peers.setdefault(row.role, pb.TcpPeerMetrics())
                known.MergeFrom(pb.TcpPeerMetrics(connections_open=row.connections_open))
                for field, value in row.delta.ListFields():
                    setattr(known.delta, field.name, getattr(known.delta, field.name) + value)
                for name in ("opened", "closed", "failed", "established"):
                    name = f"connections_{name}"  # noqa: PLW2901
                    setattr(known, name, getattr(known, name) + getattr(row, name))
                for name, count in row.ends.items():
                    known.ends[name] += count
                for name, count in row.failures.items():
                    known.failures[name] += count
            done = peers.get(CLIENT), peers.get(SERVER)
            return all(done) and [peer.connections_closed for peer in done if peer] == [2, 1]

        wait_until(all_seen)
        ours, theirs = peers[CLIENT], peers[SERVER]
        assert (ours.connections_opened, ours.connections_established) == (3, 2)
        assert (ours.connections_failed, ours.connections_open) == (1, 1)
        assert ours.ends == {"fin_local": 1, "refused": 1}
        assert ours.failures == {"ECONNREFUSED": 1}
        assert theirs.ends == {"fin_remote": 1}
        # One is still open.
        assert ours.delta.bytes_sent == theirs.delta.bytes_received == 1200


def test_rows_beyond_top_are_added_up() -> None:
    with puppets(2) as (client, server), following(client, top="2") as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 1000)
        for index in range(3):
            client.do(f"c{index} = socket.socket(); c{index}.connect(c.getpeername())")
            client.do(f"c{index}.sendall(bytes(10))")
        first, second, other = seen.drain()
        assert (first.total.bytes_sent, second.total.bytes_sent) == (1000, 10)
        assert (other.remote_address, other.connections) == ("other", 2)
        assert (other.opened, other.established) == (2, 2)
        assert other.delta.bytes_sent == 20


def test_others_are_not_seen() -> None:
    with puppets(2) as (client, server), following(client) as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 10)
        seen.drain()
        assert {(row.role, row.pid) for row in seen.rows} == {(CLIENT, client.pid)}
        client.do("c.close()")
        server.do("s.recv(1); s.close(); l.close()")
        seen.ended()
        assert len(seen.collector.bpf_object.map("connections").read()[0]) == 0


def exposed(measures: Measures) -> str:
    """The text of a scrape of MEASURES."""
    registry = CollectorRegistry()
    registry.register(measures)
    return generate_latest(registry).decode()


def test_prometheus_is_told_what_the_rows_say() -> None:
    measures = TcpMetricsCollector.measures(10)
    with puppets(2) as (client, server), following(client, server) as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 5000)
        client.do("d = socket.socket(); d.connect_ex(('127.0.0.1', 9)); d.close()")
        reset(client, server)
        while sum(row.end != 0 for row in seen.rows) < 3:
            batch = seen.collector.drain()
            measures.observe("shop", batch)
            seen.add(batch)
    text = exposed(measures)

    def value(name: str, **labels: str) -> float:
        (found,) = samples(text, f"system_network_tcp_{name}", **labels).values()
        return found

    of = {"service": "shop", "role": "client"}
    assert value("io_bytes_total", **of, direction="transmit") == 5000
    assert value("connections_total", **of, error_type="") == 1
    assert value("connections_total", **of, error_type="refused") == 1
    assert value("resets_total", **of, direction="transmit") == 1
    assert value("resets_total", service="shop", role="server", direction="receive") == 1
    assert value("handshake_duration_seconds_count", **of) == 1
    assert value("connection_duration_seconds_count", **of) == 1
    assert value("rtt_duration_seconds_count", **of) == sum(
        sum(row.rtt_us_delta.counts) for row in seen.rows if row.role == CLIENT
    )
    assert value("rtt_duration_seconds_bucket", **of, le="1.0") >= 1


def test_prometheus_is_told_peers_where_that_is_asked_for() -> None:
    measures = TcpMetricsCollector.measures(4)
    with puppets(2) as (client, server), following(client, server, prometheus="peer") as seen:
        port = connected(client, server, "127.0.0.1")
        client.do(f"d = socket.socket(); d.connect(('127.0.0.1', {port}))")
        send(client, "c", server, "s", 5000)
        measures.observe("shop", seen.collector.drain())
        client.do("f = socket.socket(); f.connect_ex(('127.0.0.2', 9)); f.close()")
        measures.observe("shop", seen.collector.drain())
    text = exposed(measures)

    def sent(**labels: str) -> dict[frozenset[tuple[str, str]], float]:
        return samples(
            text,
            "system_network_tcp_io_bytes_total",
            direction="transmit",
            service="shop",
            **labels,
        )

    peer = {"network_peer_address": "127.0.0.1", "server_port": str(port)}
    assert list(sent(**peer, role="client").values()) == [5000]
    assert list(sent(**peer, role="server").values()) == [0]
    # Peers have half of the room.
    assert len(sent(network_peer_address="other", server_port="", role="client")) == 1
    assert len(sent()) == 3


def test_an_end_is_told_once_however_long_the_process_keeps_the_socket() -> None:
    with puppets(2) as (client, server), following(server) as seen:
        connected(client, server, "127.0.0.1")
        reset(client, server)
        row = seen.ended()  # the server has not read yet
        assert (row.end, row.error) == (pb.TCP_END_RESET_REMOTE, "ECONNRESET")
        server.do("s.close()")
        port = listen(server, "127.0.0.1")
        client.do(f"c = socket.create_connection(('127.0.0.1', {port}))")
        seen.until(lambda: seen.last(local_port=port))
        assert sum(row.end != 0 for row in seen.rows) == 1


def test_a_socket_that_connects_again_is_two_connections() -> None:
    dissolve = "import ctypes; libc = ctypes.CDLL(None); libc.connect(c.fileno(), bytes(16), 16)"
    with puppets(2) as (client, server), following(client) as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 10)
        client.do("at = c.getpeername()")
        client.do(f"{dissolve}; c.connect(at)")
        server.do("s, _ = l.accept()")
        send(client, "c", server, "s", 7)
        client.do("c.close()")
        seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 2)
        first, second = sorted((row for row in seen.rows if row.end), key=lambda row: row.start_ns)
        assert (first.connection_id == second.connection_id) == has_cookies()
        assert (first.total.bytes_sent, second.total.bytes_sent) == (10, 7)
        assert (first.end, second.end) == (pb.TCP_END_RESET_LOCAL, pb.TCP_END_FIN_LOCAL)


def test_a_socket_that_connected_and_then_listens_is_two() -> None:
    dissolve = "import ctypes; ctypes.CDLL(None).connect(c.fileno(), bytes(16), 16)"
    with puppets(2) as (client, server), following(client) as seen:
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 10)
        client.do(f"{dissolve}; c.bind(('127.0.0.1', 0)); c.listen()")
        row = seen.ended()
        assert (row.role, row.pid) == (pb.TCP_ROLE_CLIENT, client.pid)
        assert (row.end, row.total.bytes_sent) == (pb.TCP_END_RESET_LOCAL, 10)
        server.do(f"t = socket.create_connection({client.ask('c.getsockname()')})")
        server.do("t.close()")
        client.do("u, _ = c.accept(); u.recv(1); u.close()")
        assert seen.ended(role=pb.TCP_ROLE_SERVER).end == pb.TCP_END_FIN_REMOTE
        assert not seen.lost


def test_what_the_ring_refuses_is_a_loss() -> None:
    burst = (
        "import socket, struct; linger = struct.pack('ii', 1, 0)\n"
        "l = socket.create_server(('127.0.0.1', 0)); at = l.getsockname()\n"
        "for _ in range(1000):\n"
        "  c = socket.socket(); c.connect(at); s, _ = l.accept()\n"
        "  c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close(); s.close()\n"
    )
    with puppets(1) as (puppet,), following(puppet, ring="64KiB") as seen:
        puppet.do(f"exec({burst!r})")
        ended = 0
        while ended + seen.lost < 2000:
            ended += sum(row.end != 0 for row in seen.drain())
        assert ended + seen.lost == 2000
        assert ended > 100
        assert seen.lost > 1000


def test_connections_beyond_the_map_are_losses() -> None:
    with puppets(2) as (client, server), following(client, entries="8") as seen:
        connected(client, server, "127.0.0.1")
        client.do("at = c.getpeername()")
        client.do("cs = [socket.create_connection(at) for _ in range(20)]")
        assert len(seen.drain()) + seen.lost == 21
        assert 0 < len(seen.rows) <= 8


@pytest.mark.parametrize("by", ["host", "comm", "cgroup"])
def test_whom_it_watches(by: str) -> None:
    """On a machine with other traffic, only rows of our own processes are checked."""
    with puppets(2) as (client, server):
        config = {"host": {"scope": "host"}, "comm": {"comm": "puppeteer"}}.get(by, {})
        client.do("open('/proc/self/comm', 'w').write('puppeteer')")
        if by == "cgroup":
            mount = cgroup2_mount()
            if mount is None:
                pytest.skip("no cgroup2 hierarchy is mounted")
            group = mount / f"coral-test-{os.getpid()}"
            group.mkdir()
            (group / "cgroup.procs").write_text(str(client.pid))
            config = {"cgroup": str(group)}
        connected(client, server, "127.0.0.1")
        try:
            with at_work(TcpMetricsCollector.create(config, None, bpf.probe())) as collector:
                seen = Seen(collector)
                send(client, "c", server, "s", 1234)
                client.do("d = socket.create_connection(c.getpeername())")
                seen.drain()
                ours = [row for row in seen.rows if row.pid == client.pid]
                assert sorted(row.preexisting for row in ours) == ([False, True])
                assert sum(row.total.bytes_sent for row in ours) == 1234
                theirs = [row for row in seen.rows if row.pid == server.pid]
                assert len(theirs) == (2 if by == "host" else 0)
        finally:
            client.kill()
            if by == "cgroup":
                wait_until(lambda: not (group / "cgroup.procs").read_text())
                group.rmdir()


async def test_sessions_stream_rows_and_events() -> None:
    with puppets(2) as (client, server):
        pids = f"{client.pid},{server.pid}"
        async with Supervisor() as supervisor:
            rows, events = [
                await supervisor.start(
                    StartRequest("tcp_metrics", config={"pid": pids, "mode": mode}, duration_s=30)
                )
                for mode in ("summaries", "events")
            ]
            await asyncio.to_thread(connected, client, server, "127.0.0.1")
            await asyncio.to_thread(close_first, client, server)
            only_client = Terms(wanted=Filter(pids=frozenset((client.pid,))))
            states: list[str] = []
            async for frame in events.subscribe(only_client):
                batch = Received.parse(frame.wire())
                assert set(batch.events["pid"].tolist()) <= {client.pid}
                states += [pb.TcpState.Name(n) for n in batch.events["new_state"].tolist()]
                if "TCP_STATE_CLOSE" in states:
                    break
            assert states[:2] == ["TCP_STATE_SYN_SENT", "TCP_STATE_ESTABLISHED"]
            ended: set[int] = set()
            async for frame in rows.subscribe(only_client):
                for row in pb.EbpfEventBatch.FromString(frame.wire()).tcp_metrics:
                    assert row.pid == client.pid
                    ended.add(row.end)
                if pb.TCP_END_FIN_LOCAL in ended:
                    break


def test_syn_acks_that_go_again_are_the_listeners(
    sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    left, right = sides
    before = right.counter("TcpExtTCPSynRetrans")
    with following(server) as seen:
        port = listen(server, right.v4)
        with left.dropping("tcp flags & (syn | ack) == syn | ack numgen inc mod 18 < 4 drop"):
            connect = "import socket; cs = [socket.socket() for _ in range(9)]"
            client.do(f"{connect}; [c.setblocking(False) for c in cs]")
            client.do(f"[c.connect_ex(({right.v4!r}, {port})) for c in cs]")
            server.do("ss = [l.accept()[0] for _ in range(9)]")
        measures = TcpMetricsCollector.measures(10)
        batch = seen.collector.drain()
        measures.observe("shop", batch)
        seen.add(batch)
        made = right.counter("TcpExtTCPSynRetrans") - before
        listener = sum(row.delta.syn_ack_retransmits for row in seen.rows)
        children = [row for row in seen.rows if row.role == SERVER]
        assert len(children) == 9
        assert listener == sum(row.total.retransmits_handshake for row in children) == made > 0
        name = "system_network_tcp_retransmits_total"
        text = exposed(measures)
        assert list(samples(text, name, type="handshake").values()) == [made]


def test_from_exec_follows_the_command_alone() -> None:
    command = (
        "import socket; l = socket.create_server(('127.0.0.1', 0)); "
        "c = socket.create_connection(l.getsockname()); c.sendall(bytes(9))"
    )
    with puppets(1) as (puppet,), following(puppet, from_exec="true") as seen:
        puppet.do("import socket; l = socket.create_server(('127.0.0.1', 0))")
        puppet.do("c = socket.create_connection(l.getsockname()); c.sendall(bytes(5))")
        assert seen.drain() == []
        puppet.begin(f"os.execv(sys.executable, [sys.executable, '-I', '-c', {command!r}])")
        assert seen.ended(role=CLIENT, preexisting=False).total.bytes_sent == 9
