"""`tcp_metrics` without iterators: sock_diag finds the connections that were open before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from coral import bpf
from coral.bpf.probing import sock_diag
from coral.collectors.contract import Summaries
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.hidden import AGAIN_IF_HIDDEN
from tests.network import (
    Seen,
    Side,
    assert_deltas_add_up,
    connected,
    following,
    has_cookies,
    listen,
    looks_up_owners,
    number,
    send,
)
from tests.support import Puppet, at_work, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), *AGAIN_IF_HIDDEN]

CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER
RUNGS = {
    "best": ("iterator",),
    "raw_tp": ("iterator", "tp_btf"),
    "oldest": ("iterator", "tp_btf", "ring_buffer", "batch", "elements_on_demand"),
}
every_rung = pytest.mark.parametrize("without", RUNGS.values(), ids=RUNGS.keys())


@pytest.fixture
def pair() -> Iterator[tuple[Puppet, Puppet]]:
    with Puppet() as client, Puppet() as server:
        yield client, server


@contextmanager
def asking(
    *puppets: Puppet, without: tuple[str, ...] = RUNGS["best"], **config: str
) -> Iterator[Seen]:
    """`tcp_metrics` of these processes, without iterators."""
    features = bpf.probe().without(*without)
    steps = {step.what: step for step in TcpMetricsCollector.support(features).steps}
    assert steps["connections"].taken == "sock_diag"
    config = {"pid": ",".join(str(puppet.pid) for puppet in puppets), **config}
    with at_work(TcpMetricsCollector.create(config, None, features)) as collector:
        yield Seen(collector)


def untold(seen: Seen) -> int:
    """The number of sockets that the programs have not taken over."""
    return len(seen.collector.bpf_object.map("found").read()[0])


def all_acknowledged(puppet: Puppet, name: str) -> None:
    """Waits until the peer has received everything (SIOCOUTQ)."""
    puppet.do("import fcntl, struct")
    left = f"struct.unpack('i', fcntl.ioctl({name}.fileno(), 0x5411, bytes(4)))[0]"
    wait_until(lambda: number(puppet, left) == 0)


@every_rung
def test_an_idle_connection_has_its_totals(
    without: tuple[str, ...], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    send(client, "c", server, "s", 70_000)
    send(server, "s", client, "c", 123)
    with asking(client, server, without=without) as seen:
        seen.drain()
        for role, puppet, sent, received in (
            (CLIENT, client, 70_000, 123),
            (SERVER, server, 123, 70_000),
        ):
            row = seen.last(role=role)
            assert row
            assert (row.preexisting, row.start_ns, row.opened) == (True, 0, 0)
            assert row.pid == puppet.pid
            assert row.state == pb.TCP_STATE_ESTABLISHED
            assert (row.total.bytes_sent, row.total.bytes_received) == (sent, received)
            assert row.total.bytes_acked == sent
            assert row.connection_id
            assert not row.delta.ByteSize()
        assert len(seen.rows) == 2
        assert seen.drain() == []
        assert untold(seen) == 3  # the listener too
        seen.collector.bpf_object.detach()
        last = seen.drain()
        assert [row.end for row in last] == [pb.TCP_END_OPEN, pb.TCP_END_OPEN]
        assert not seen.lost


# What each side does before the collector starts; it leads to different states.
HISTORIES = {
    "nothing": ("", ""),
    "data": ("c.sendall(bytes(1000))", "s.recv(1000); s.sendall(bytes(7))"),
    "client closes": ("c.sendall(b'x'); c.shutdown(socket.SHUT_WR)", "s.recv(1); s.recv(1)"),
    "server closes": ("c.sendall(b'x')", "s.recv(1); s.shutdown(socket.SHUT_WR)"),
    "unread": ("c.sendall(bytes(500))", ""),
}


@pytest.mark.long
@pytest.mark.parametrize("way", ["v4", "v6", "mapped"])
@pytest.mark.parametrize("history", HISTORIES)
def test_figures_are_those_of_a_walk(history: str, way: str, sides: tuple[Side, Side]) -> None:
    right = sides[1]
    if not looks_up_owners():
        pytest.skip("no program can walk here")
    with sides[0].puppet() as client, right.puppet() as server:
        connected(
            client,
            server,
            {"v4": right.v4, "v6": right.v6, "mapped": f"::ffff:{right.v4}"}[way],
        )
        for puppet, code in zip((client, server), HISTORIES[history], strict=True):
            puppet.do(code or "pass")
        all_acknowledged(client, "c")
        all_acknowledged(server, "s")
        with following(client, server) as walked, asking(client, server) as seen:

            def agree() -> bool:
                walked.drain()
                seen.drain()
                return all(
                    _comparable(walked, role) == _comparable(seen, role)
                    for role in (CLIENT, SERVER)
                )

            wait_until(agree)
            assert untold(seen) == 3


def _comparable(seen: Seen, role: int) -> pb.TcpMetrics:
    row = seen.last(role=role)
    assert row
    assert not row.end  # half closed is open
    same = pb.TcpMetrics()
    same.CopyFrom(row)
    # sock_diag reports it rounded.
    same.ClearField("rtt_variation_us")
    if not has_cookies():
        same.ClearField("connection_id")
    return same


@every_rung
def test_a_pure_sender_is_exact(without: tuple[str, ...], pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    client.do("c.sendall(bytes(1000))")
    all_acknowledged(client, "c")
    with asking(client, without=without) as seen:
        client.do("c.sendall(bytes(50))")  # before the first drain
        all_acknowledged(client, "c")
        seen.until(lambda: seen.rows and seen.rows[-1].total.bytes_sent == 1050)
        assert sum(row.delta.bytes_sent for row in seen.rows) == 50
        client.do("c.sendall(bytes(7))")
        client.do("c.close()")
        server.do("exec('while s.recv(65536): pass'); s.close()")
        row = seen.ended()
        assert (row.end, row.pid) == (pb.TCP_END_FIN_LOCAL, client.pid)
        assert (row.total.bytes_sent, row.total.bytes_acked) == (1057, 1057)
        assert sum(row.delta.bytes_sent for row in seen.rows) == 57
        assert sum(row.end != 0 for row in seen.rows) == 1
        assert not any(row.opened for row in seen.rows)
        assert len({row.connection_id for row in seen.rows}) == 1
        assert untold(seen) == 0


@every_rung
def test_one_that_wakes_up_stays_the_same(
    without: tuple[str, ...], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    send(client, "c", server, "s", 1000)
    with asking(client, server, without=without) as seen:
        assert len(seen.drain()) == 2
        send(client, "c", server, "s", 30)
        send(server, "s", client, "c", 4)
        seen.until(lambda: (row := seen.last(role=CLIENT)) and row.total.bytes_received == 4)
        assert untold(seen) == 1
        client.do("c.close()")
        server.do("s.recv(1); s.close()")
        for role, before, sent, received in ((CLIENT, 1000, 1030, 4), (SERVER, 0, 4, 1030)):
            row = seen.ended(role=role)
            assert (row.total.bytes_sent, row.total.bytes_received) == (sent, received)
            rows = [row for row in seen.rows if row.role == role]
            assert sum(row.delta.bytes_sent for row in rows) == sent - before
            assert_deltas_add_up(rows)
        assert not seen.lost


@every_rung
def test_one_that_ends_idle_ends_once(
    without: tuple[str, ...], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    send(client, "c", server, "s", 12_345)
    with asking(client, server, without=without) as seen:
        seen.drain()
        client_pid = client.pid
        client.kill()
        server.do("s.recv(1); s.close()")
        at_client, at_server = seen.ended(role=CLIENT), seen.ended(role=SERVER)
        assert (at_client.end, at_server.end) == (pb.TCP_END_FIN_LOCAL, pb.TCP_END_FIN_REMOTE)
        assert (at_client.pid, at_server.pid) == (client_pid, server.pid)
        assert at_client.total.bytes_sent == at_server.total.bytes_received == 12_345
        assert at_client.delta.bytes_sent == at_server.delta.bytes_received == 0
        seen.collector.bpf_object.detach()
        seen.drain()
        assert sum(row.end != 0 for row in seen.rows) == 2
        assert len(seen.rows) == 4
        assert untold(seen) == 1
        assert not seen.lost


@every_rung
@pytest.mark.parametrize("listeners", [1, 2])
def test_a_listener_has_its_connections_at_once(
    listeners: int, without: tuple[str, ...], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    server.do("import socket; l = socket.create_server(('127.0.0.1', 0), reuse_port=True)")
    port = number(server, "l.getsockname()[1]")
    for _ in range(listeners - 1):
        server.do(f"m = socket.create_server(('127.0.0.1', {port}), reuse_port=True)")
    with asking(server, without=without) as seen:
        # Nothing accepts it: it belongs to the listener.
        client.do(f"import socket; c = socket.create_connection(('127.0.0.1', {port}))")
        seen.until(lambda: seen.last(role=SERVER))
        row = seen.last(role=SERVER)
        assert row
        assert (row.pid, row.opened, row.preexisting, row.local_port) == (
            server.pid,
            1,
            False,
            port,
        )
        assert row.start_ns
        if listeners > 1:
            server.do("m.close()")
        server.do("l.close()")
        assert untold(seen) == 0
        assert seen.ended(role=SERVER).pid == server.pid


def test_syn_acks_of_a_listener_that_was_there(sides: tuple[Side, Side]) -> None:
    left, right = sides
    with left.puppet() as client, right.puppet() as server:
        port = listen(server, right.v4)
        before = right.counter("TcpExtTCPSynRetrans")
        with asking(server) as seen:
            rule = "tcp flags & (syn | ack) == syn | ack numgen inc mod 18 < 4 drop"
            with left.dropping(rule):
                client.do("import socket; cs = [socket.socket() for _ in range(9)]")
                client.do("[c.setblocking(False) for c in cs]")
                client.do(f"[c.connect_ex(({right.v4!r}, {port})) for c in cs]")
                server.do("ss = [l.accept()[0] for _ in range(9)]")
            seen.drain()
            made = right.counter("TcpExtTCPSynRetrans") - before
            assert sum(row.delta.syn_ack_retransmits for row in seen.rows) == made > 0
            assert sum(row.role == SERVER for row in seen.rows) == 9


def test_in_other_namespaces(sides: tuple[Side, Side]) -> None:
    left, right = sides
    with left.puppet() as client, right.puppet() as server, ExitStack() as stack:
        here = [stack.enter_context(Puppet()) for _ in range(2)]
        for (ours, theirs), address, count in (
            ((client, server), right.v6, 11),
            ((here[0], here[1]), "127.0.0.1", 22),
        ):
            connected(ours, theirs, address)
            send(ours, "c", theirs, "s", count)
        with asking(client, server, *here) as seen:
            seen.drain()
            rows = {row.pid: row for row in seen.rows}
            assert len(seen.rows) == len(rows) == 4
            for puppet, sent in ((client, 11), (here[0], 22)):
                assert rows[puppet.pid].total.bytes_sent == sent
            for puppet in (client, server, *here):
                inode = number(puppet, "os.stat('/proc/thread-self/ns/net').st_ino")
                assert rows[puppet.pid].network_namespace == inode
            assert rows[client.pid].remote_address == right.v6
            # Nothing else keeps its namespace, which ends with its processes.
            send(client, "c", server, "s", 5)
            seen.until(lambda: (row := seen.last(pid=server.pid)) and row.delta.bytes_received)
            row = seen.last(pid=server.pid)
            assert row
            assert (row.delta.bytes_received, row.total.bytes_received) == (5, 16)


@pytest.mark.parametrize("way", [following, asking])
def test_a_connection_that_is_being_made(
    way: Callable[..., AbstractContextManager[Seen]], sides: tuple[Side, Side]
) -> None:
    left, right = sides
    with left.puppet() as client, right.dropping("tcp flags syn drop"):
        client.do("import socket; c = socket.socket(); c.setblocking(False)")
        client.do(f"c.connect_ex(({right.v4!r}, 9))")
        with way(client) as seen:
            (row,) = seen.drain()
            assert (row.role, row.state) == (CLIENT, pb.TCP_STATE_SYN_SENT)
            assert (row.total.bytes_sent, row.preexisting) == (0, True)
            client.do("c.close()")
            row = seen.ended()
            assert (row.role, row.end) == (CLIENT, pb.TCP_END_ABORTED)


@pytest.mark.long
@pytest.mark.parametrize("rung", RUNGS)
def test_many_that_wake_up_while_they_are_read_are_told_once(
    rung: str, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    count, rounds = 200, 5
    port = listen(server, "127.0.0.1")
    server.begin(f"ss = [l.accept()[0] for _ in range({count})]")
    client.do("import socket")
    client.do(f"cs = [socket.create_connection(('127.0.0.1', {port})) for _ in range({count})]")
    server.done()
    client.do("[c.sendall(bytes(100 + n)) for n, c in enumerate(cs)]")
    server.do("[s.recv(65536) for s in ss]")
    with asking(client, server, without=RUNGS[rung]) as seen:
        again = f"for _ in range({rounds}):\n for n, c in enumerate(cs): c.sendall(bytes(n + 1))"
        client.begin(f"exec({again!r})")
        for _ in range(20):
            seen.drain()
        client.done()
        client.do("[c.close() for c in cs]")
        server.do("exec('for s in ss:\\n while s.recv(65536): pass\\n s.close()')")
        seen.until(lambda: sum(row.end != 0 for row in seen.rows) >= 2 * count)
        assert sum(row.end != 0 for row in seen.rows) == 2 * count
        delta, total = Counter[tuple[int, int]](), {}
        for row in seen.rows:
            key = row.connection_id, row.role
            delta[key] += row.delta.bytes_sent + row.delta.bytes_received
            total[key] = row.total.bytes_sent + row.total.bytes_received
        assert len(total) == 2 * count
        for role in (CLIENT, SERVER):
            of = sorted((total[key], delta[key]) for key in total if key[1] == role)
            carried = [(100 + n, rounds * (n + 1)) for n in range(count)]
            assert of == sorted((before + since, since) for before, since in carried)
        assert not seen.lost


def test_peers_count_idle_connections_as_open(pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    client.do("more = [socket.create_connection(c.getpeername()) for _ in range(4)]")
    with asking(client, by="peer") as seen:
        batch = seen.collector.drain()
        assert isinstance(batch.rows, Summaries)
        (row,) = batch.rows.as_messages()
        assert isinstance(row, pb.TcpPeerMetrics)
        assert (row.connections_open, row.connections_opened) == (5, 0)


def test_those_beyond_the_map_are_losses(pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    client.do("more = [socket.create_connection(c.getpeername()) for _ in range(19)]")
    with asking(client, entries="8") as seen:
        rows = seen.drain()
        assert len(rows) + seen.lost == 20
        assert 0 < len(rows) <= 8


def test_others_are_not_found(pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    connected(client, server, "127.0.0.1")
    with asking(client) as seen:
        assert [(row.role, row.pid) for row in seen.drain()] == [(CLIENT, client.pid)]
        assert untold(seen) == 1
        send(client, "c", server, "s", 10)
        seen.until(lambda: seen.rows[-1].total.bytes_sent == 10)
        assert {row.pid for row in seen.rows} == {client.pid}


def test_what_the_kernel_refuses_is_told() -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        list(sock_diag._dump(0, ()))
    assert bpf.probe()["sock_diag"].available


def test_what_is_missing_is_told() -> None:
    def earlier(features: bpf.Features) -> bpf.Step:
        steps = TcpMetricsCollector.support(features).steps
        return next(step for step in steps if step.what == "connections")

    probed = bpf.probe().without("map_iterator")
    if probed["iterator"].available:
        step = earlier(probed.without("syscall_program"))
        assert step.taken == "sock_diag"
        assert {"map_iterator", "syscall_program"} <= {feature.name for feature in step.refused}
        if probed["syscall_program"].available:
            step = earlier(probed)
            assert step.taken == "syscall_program"
            assert [feature.name for feature in step.refused] == ["map_iterator"]
    probed = probed.without("iterator")
    step = earlier(probed)
    assert step.taken == "sock_diag"
    assert "iterator" in {feature.name for feature in step.refused}
    step = earlier(probed.without("sock_diag"))
    assert step.taken == "segments"
    assert "sock_diag" in step.why_not
