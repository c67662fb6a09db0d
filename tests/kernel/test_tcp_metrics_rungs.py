"""The same traffic gives the same figures on every rung: what a kernel lacks costs speed or time,
and never makes a figure wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from coral import bpf
from coral.collectors.contract import EventRows
from coral.collectors.hubs import SlotReader
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.hidden import AGAIN_IF_HIDDEN
from tests.network import Seen, Side, connected, number, puppets, send
from tests.support import RUNGS, Puppet, at_work, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), *AGAIN_IF_HIDDEN]

# `tcp_metrics` has no thread state, and several ways to read open connections.
TCP_RUNGS = {
    **{name: RUNGS[name] for name in ("best", "raw_tp", "perf_buffer")},
    "run": ("map_iterator",),
    "no walks": ("iterator",),
    "oldest": (*RUNGS["oldest"], "iterator"),
}
every_rung = pytest.mark.parametrize("without", TCP_RUNGS.values(), ids=TCP_RUNGS.keys())
CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER
RESET = (
    "import struct; c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); "
    "c.close()"
)


@contextmanager
def following_without(
    without: tuple[str, ...], *puppets: Puppet, **config: str
) -> Iterator[TcpMetricsCollector]:
    features = bpf.probe().without(*without)
    support = TcpMetricsCollector.support(features)
    if not support.supported:
        pytest.skip(support.reason)
    config = {"pid": ",".join(str(puppet.pid) for puppet in puppets), **config}
    with at_work(TcpMetricsCollector.create(config, None, features)) as collector:
        yield collector


@every_rung
def test_bytes_and_ends_are_exact(without: tuple[str, ...]) -> None:
    with puppets(2) as (client, server):
        connected(client, server, "127.0.0.1")
        send(client, "c", server, "s", 100)
        with following_without(without, client, server) as collector:
            seen = Seen(collector)
            send(client, "c", server, "s", 50)  # an earlier connection
            # An earlier listener is not known on every rung.
            server.do("m = socket.create_server(('127.0.0.1', 0))")
            port = number(server, "m.getsockname()[1]")
            client.do(f"d = socket.create_connection(('127.0.0.1', {port}))")
            server.do("t, _ = m.accept()")
            send(client, "d", server, "t", 77_777)
            send(server, "t", client, "d", 333)
            client.do("d.close(); c.close()")
            server.do("t.recv(1); t.close(); s.recv(1); s.close()")
            seen.until(lambda: sum(row.end != 0 for row in seen.rows) == 4)
            ended = {(row.role, row.preexisting): row for row in seen.rows if row.end}
            for before, sent, received in ((True, 150, 0), (False, 77_777, 333)):
                ours, theirs = ended[CLIENT, before], ended[SERVER, before]
                assert (ours.total.bytes_sent, ours.total.bytes_received) == (sent, received)
                assert (theirs.total.bytes_received, theirs.total.bytes_sent) == (sent, received)
                assert (ours.pid, theirs.pid) == (client.pid, server.pid)
                assert (ours.end, theirs.end) == (pb.TCP_END_FIN_LOCAL, pb.TCP_END_FIN_REMOTE)
            assert sum(row.opened for row in seen.rows) == 2
            assert not seen.lost


CONNECTIONS, SENDS = 1000, 4
COUNTED = (
    "bytes_sent", "bytes_acked", "bytes_received", "segments_sent", "segments_received",
    "retransmits",
)  # fmt: skip


@pytest.mark.parametrize("without", [(), ("map_iterator",)], ids=["best", "run"])
def test_an_open_connection_is_never_read_ahead_of_its_end(without: tuple[str, ...]) -> None:
    """Readings as frequent as possible, while connections open, change state and end, and while
    other sockets reuse their memory."""
    loop = f"for _ in range({CONNECTIONS}):\n "
    accept = loop + "s, _ = l.accept()\n while s.recv(65536): pass\n s.close()"
    connect = loop + "c = socket.create_connection(a)\n " + "c.send(b'x' * 250)\n " * SENDS
    connect += "c.close()"
    with (
        puppets(4) as four,
        following_without(without, *four, ring="16MiB") as collector,
    ):
        if not (live := live_reader(collector, without)):
            pytest.skip("no program reads open connections here")
        for client, server in (four[:2], four[2:]):
            server.do("import socket; l = socket.create_server(('127.0.0.1', 0))")
            client.do(f"import socket; a = ('127.0.0.1', {number(server, 'l.getsockname()[1]')})")
            server.begin(f"exec({accept!r})")
            client.begin(f"exec({connect!r})")
        records = collector.records
        assert records
        read, ended = [live.read()], [records.drain()["tcp_ended"]["connection"]]

        def all_ended() -> bool:
            read.extend(live.read() for _ in range(50))
            ended.append(records.drain()["tcp_ended"]["connection"])
            return sum(map(len, ended)) >= 4 * CONNECTIONS

        wait_until(all_ended, 30)
        last = {(it["sk"], it["found_ns"]): it for it in np.concatenate(ended)}
        assert len(last) == 4 * CONNECTIONS
        payload = 250 * SENDS
        assert {(it["bytes_sent"], it["bytes_received"]) for it in last.values()} == {
            (payload, 0),
            (0, payload),
        }
        seen = [it for it in np.concatenate(read) if it["role"] in (CLIENT, SERVER)]
        assert len(seen) > CONNECTIONS // 10
        for it in seen:
            end = last[it["sk"], it["found_ns"]]
            ahead = [name for name in COUNTED if it[name] > end[name]]
            assert not ahead, (ahead, it, end)


def live_reader(
    collector: TcpMetricsCollector, without: tuple[str, ...]
) -> bpf.Walk | SlotReader | None:
    """The reader of the open connections of COLLECTOR, if a program reads them."""
    steps = TcpMetricsCollector.support(bpf.probe().without(*without)).steps
    (taken,) = (step.taken for step in steps if step.what == "connections")
    its, record, keys = collector.bpf_object, "tcp_connection", "connections"
    if taken == "map_iterator":
        return its.walk("coral_live_iter", record, map_name=keys)
    if taken == "syscall_program":
        return its.element_reader("coral_live_run", record, keys=keys, records="live")
    return None


@every_rung
def test_retransmits_and_resets_are_exact(
    without: tuple[str, ...], sides: tuple[Side, Side], pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    left, right = sides
    before = left.counter("TcpRetransSegs")
    with following_without(without, client, server) as collector:
        seen = Seen(collector)
        connected(client, server, right.v4)
        with right.dropping("tcp flags psh numgen inc mod 4 < 1 drop"):
            for _ in range(6):
                send(client, "c", server, "s", 10_000)
        client.do(RESET)
        ours, theirs = seen.ended(role=CLIENT), seen.ended(role=SERVER)
        assert ours.total.retransmits == left.counter("TcpRetransSegs") - before > 0
        assert ours.total.bytes_sent == theirs.total.bytes_received == 60_000
        assert ours.total.bytes_retransmitted >= ours.total.retransmits
        assert (ours.end, theirs.end) == (pb.TCP_END_RESET_LOCAL, pb.TCP_END_RESET_REMOTE)
        assert ours.total.resets_sent == theirs.total.resets_received == 1
        assert theirs.error == "ECONNRESET"
        assert not seen.lost


@every_rung
def test_every_change_of_state_is_an_event(without: tuple[str, ...]) -> None:
    with (
        puppets(2) as (client, server),
        following_without(without, client, server, mode="events") as collector,
    ):
        connected(client, server, "127.0.0.1")
        client.do("c.close()")
        server.do("s.recv(1); s.close()")
        steps: dict[int, list[str]] = {CLIENT: [], SERVER: []}

        def closed() -> bool:
            batch = collector.drain()
            assert isinstance(batch.rows, EventRows)
            assert not batch.losses
            records = batch.rows.records
            for role, pid, state in records[["role", "pid", "new_state"]].tolist():
                if role in steps:
                    assert pid == (client if role == CLIENT else server).pid
                    steps[role].append(pb.TcpState.Name(state).removeprefix("TCP_STATE_"))
            return all("CLOSE" in told for told in steps.values())

        wait_until(closed)
        assert steps == {
            CLIENT: ["SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"],
            SERVER: ["SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"],
        }
