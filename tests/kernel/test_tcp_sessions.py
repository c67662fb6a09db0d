"""TCP sessions share one set of programs: each one's figures are what they would be alone."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from operator import le
from pathlib import Path

import numpy as np
import pytest

from coral import bpf
from coral.collectors.cgroups import cgroup2_mount
from coral.collectors.contract import Batch, EventRows, Summaries
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.collectors.tcp_metrics.socket_hints import HINTS, SocketHints, hash_of
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.network import connected, identity, looks_up_owners, puppets, send
from tests.support import Puppet, at_work, loaded, nothing_new_since, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER
CLOSED = 7  # enum TcpState
RUNGS = {
    "best": (),
    "raw_tp": ("tp_btf",),
    "perf_buffer": ("ring_buffer",),
    "no walks": ("iterator",),
}
SHORT, BYTES = 3, 12_345  # in a round: connections, and the bytes on each
LONG_BYTES = 70_001  # and on the one that stays open
_NAME = "import ctypes; ctypes.CDLL(None).prctl(15, {name!r}.encode(), 0, 0, 0)"
_ACCEPT = (
    "for _ in range({count}):\n t, _ = l.accept()\n while t.recv(65536): pass\n"
    " t.sendall(b'x')\n t.close()"
)
_CONNECT = (
    "for _ in range({count}):\n d = socket.create_connection(c.getpeername())\n"
    " d.sendall(bytes({bytes}))\n d.shutdown(1)\n assert d.recv(9) == b'x'\n"
    " assert not d.recv(9)\n d.close()"
)


@dataclass
class Pair:
    """A client and a server that talk in rounds."""

    client: Puppet
    server: Puppet
    rounds: int = 0

    def __post_init__(self) -> None:
        connected(self.client, self.server, "127.0.0.1")

    def begin(self) -> None:
        """Begins one round."""
        self.server.begin(f"exec({_ACCEPT.format(count=SHORT)!r})")
        self.client.begin(f"exec({_CONNECT.format(count=SHORT, bytes=BYTES)!r})")

    def finish(self) -> None:
        """Waits until the round is over."""
        self.client.done()
        self.server.done()
        send(self.client, "c", self.server, "s", LONG_BYTES)
        self.rounds += 1


@dataclass
class Session:
    """A session that is at work, and all that it has shown of each of PIDS."""

    collector: TcpMetricsCollector
    pairs: Mapping[int, tuple[Pair, int]]  # by process: its pair, and its role
    began: dict[int, int] = field(default_factory=dict)  # rounds so far, by process
    ended: Counter[int] = field(default_factory=Counter)
    ends: set[tuple[int, ...]] = field(default_factory=set)  # of these, by the connection
    sent: Counter[int] = field(default_factory=Counter)  # bytes
    received: Counter[int] = field(default_factory=Counter)
    lost: Counter[int] = field(default_factory=Counter)  # by stage

    def __post_init__(self) -> None:
        self.began = {pid: pair.rounds for pid, (pair, _) in self.pairs.items()}

    def drain(self) -> None:
        self.add(self.collector.drain())

    def add(self, batch: Batch) -> None:
        self.lost.update(batch.losses)
        if isinstance(batch.rows, EventRows):
            for pid, *step in batch.rows.records[["pid", "what", "new_state"]].tolist():
                self.ended[pid] += step == [pb.TcpStateChange.WHAT_STATE, CLOSED]
            return
        assert isinstance(batch.rows, Summaries)
        for row in batch.rows.as_messages():
            if isinstance(row, pb.TcpPeerMetrics):
                at = next((p for p, (_, role) in self.pairs.items() if role == row.role), 0)
                self.ended[at] += row.connections_closed
            else:
                assert isinstance(row, pb.TcpMetrics)
                at = row.pid
                if row.end and identity(row) not in self.ends:  # told again if a figure has moved
                    self.ends.add(identity(row))
                    self.ended[at] += 1
            self.sent[at] += row.delta.bytes_sent
            self.received[at] += row.delta.bytes_received

    def truth(self, pid: int) -> tuple[int, int, int]:
        """Connections that have ended, and the bytes on all: sent, and received."""
        pair, role = self.pairs[pid]
        rounds = pair.rounds - self.began[pid]
        up, down = rounds * (SHORT * BYTES + LONG_BYTES), rounds * SHORT
        return rounds * SHORT, *((up, down) if role == CLIENT else (down, up))

    def check(self) -> None:
        """Waits until all is drained, and compares it with the truth."""
        events = self.collector.coverage == 0

        def figures(pid: int) -> tuple[int, int, int]:
            truth = self.truth(pid)
            carried = truth[1:] if events else (self.sent[pid], self.received[pid])
            return self.ended[pid], *carried

        def is_true() -> bool:
            self.drain()
            return all(figures(pid) == self.truth(pid) for pid in self.pairs)

        with suppress(AssertionError):
            wait_until(is_true, 5)
        self.collector.bpf_object.detach()
        self.drain()
        # Programs are skipped for any socket of the machine, which tests beside this one use, too.
        missed = self.lost[pb.Loss.STAGE_PROGRAM_MISSED]
        for pid in self.pairs:
            got, truth = figures(pid), self.truth(pid)
            if missed:
                assert all(map(le, got, truth)), (self.collector.label, missed)
            else:
                assert got == truth, self.collector.label
        if "host" not in self.collector.label:
            others = [
                {pid: count for pid, count in figures.items() if pid not in self.pairs and count}
                for figures in (self.ended, self.sent, self.received)
            ]
            assert others == [{}, {}, {}], self.collector.label
        assert self.lost.keys() <= {pb.Loss.STAGE_PROGRAM_MISSED}


@contextmanager
def cgroup_of(puppet: Puppet) -> Iterator[Path | None]:
    mount = cgroup2_mount()
    if mount is None:
        yield None
        return
    group = mount / f"coral-sessions-{os.getpid()}"
    group.mkdir()
    home = Path(f"/proc/{puppet.pid}/cgroup").read_text().splitlines()
    back = next(line[3:] for line in home if line.startswith("0::"))
    (group / "cgroup.procs").write_text(str(puppet.pid))
    try:
        yield group
    finally:
        (mount / back.lstrip("/") / "cgroup.procs").write_text(str(puppet.pid))
        group.rmdir()


Spec = tuple[dict[str, str], tuple[int, ...]]  # the config, and the processes that it watches


def specs_of(a: Pair, b: Pair, c: Pair, group: Path | None) -> list[Spec]:
    """Ten sessions; the server of B has a name, the client of C is in GROUP."""

    def pids(*puppets: Puppet, **more: str) -> Spec:
        watched = tuple(puppet.pid for puppet in puppets)
        return {"pid": ",".join(map(str, watched)), **more}, watched

    everyone = [each for pair in (a, b, c) for each in (pair.client, pair.server)]
    of_group = {"cgroup": str(group)} if group else {"pid": str(c.client.pid)}
    return [
        pids(a.client),
        pids(a.server),
        pids(a.client, a.server),
        pids(a.client, a.server, by="peer"),
        pids(*everyone, mode="events"),
        pids(b.client, b.server, mode="events"),
        pids(a.client, b.server, c.client, entries="64"),
        ({"comm": "coral-named"}, (b.server.pid,)),
        # Its ring is also for the connections of tests beside this one.
        ({"scope": "host", "ring": "64MiB"}, tuple(each.pid for each in everyone)),
        (of_group, (c.client.pid,)),
    ]


@dataclass
class Sessions:
    """Those of SPECS that are at work."""

    features: bpf.Features
    specs: list[Spec]
    sides: Mapping[int, tuple[Pair, int]]
    stack: ExitStack
    running: dict[int, tuple[Session, ExitStack]] = field(default_factory=dict)
    most: int = 0

    def start(self, at: int) -> None:
        config, watched = self.specs[at]
        closing = self.stack.enter_context(ExitStack())
        collector = TcpMetricsCollector.create(config, None, self.features)
        closing.enter_context(at_work(collector))
        session = Session(collector, {pid: self.sides[pid] for pid in watched})
        self.running[at] = session, closing
        self.most = max(self.most, len(self.running))

    def stop(self, at: int) -> None:
        session, closing = self.running.pop(at)
        session.check()
        closing.close()

    def start_or_stop(self, chance: random.Random) -> None:
        """Starts more than it stops."""
        idle = [at for at in range(len(self.specs)) if at not in self.running]
        if idle and (self.most < len(self.specs) or chance.random() < 0.5):
            self.start(chance.choice(idle))
        else:
            self.stop(chance.choice(list(self.running)))

    def drain_some(self, chance: random.Random) -> None:
        for session, _ in self.running.values():
            if chance.random() < 0.5:
                session.drain()


@pytest.mark.parametrize(
    "without",
    [
        pytest.param(without, id=name, marks=[] if name == "best" else [pytest.mark.long])
        for name, without in RUNGS.items()
    ],
)
def test_ten_sessions_show_what_each_would_alone(without: tuple[str, ...]) -> None:
    """Overlapping and not, of all modes and targets, started and stopped in any order while
    connections open, carry data and end."""
    features, chance = bpf.probe().without(*without), random.Random(7)
    with puppets(6) as six, ExitStack() as stack:
        a, b, c = pairs = [Pair(six[at], six[at + 1]) for at in (0, 2, 4)]
        sides = {pair.client.pid: (pair, CLIENT) for pair in pairs}
        sides |= {pair.server.pid: (pair, SERVER) for pair in pairs}
        b.server.do(_NAME.format(name="coral-named"))
        group = stack.enter_context(cgroup_of(c.client))
        sessions = Sessions(features, specs_of(a, b, c, group), sides, stack)
        for _ in range(40):
            sessions.start_or_stop(chance)
            for pair in pairs:
                pair.begin()
            for pair in pairs:
                pair.finish()
            sessions.drain_some(chance)
        for at in list(sessions.running):
            sessions.stop(at)
        assert sessions.most == len(sessions.specs) == 10


def test_hints_are_of_the_sockets_that_are_followed() -> None:
    if not looks_up_owners():
        pytest.skip("without walks, programs look each socket up: any may be one that was found")
    with puppets(2) as (client, server):
        pair = Pair(client, server)
        config = {"pid": f"{client.pid},{server.pid}"}
        with (
            at_work(TcpMetricsCollector.create(config, None, bpf.probe())) as collector,
            at_work(TcpMetricsCollector.create(config, None, bpf.probe())),
        ):
            its = collector.bpf_object
            followed = np.zeros(HINTS, bool)
            followed[hash_of(its.map("connections").read_keys())] = True
            assert np.count_nonzero(followed) == 3  # the listener, and both ends
            session = Session(collector, {client.pid: (pair, CLIENT), server.pid: (pair, SERVER)})
            for _ in range(10):
                pair.begin()
                pair.finish()
            hints = its.object.map("socket_hints").read()[1].reshape(2, HINTS)
            assert (np.count_nonzero(hints, axis=1) > 3).all()
            # The one that is in use changes each time.
            for in_use in (1, 0, 1):
                its.common(SocketHints).rebuild(its)
                assert its.object.read_variable("socket_hints_in_use") == in_use
                hints = its.object.map("socket_hints").read()[1].reshape(2, HINTS)
                assert (hints[in_use] == followed).all()
            pair.begin()
            pair.finish()
            session.check()


def test_enough_ends_build_the_hints_again() -> None:
    with puppets(1) as (client,):
        config = {"pid": str(client.pid)}
        with at_work(TcpMetricsCollector.create(config, None, bpf.probe())) as collector:
            slot = collector.bpf_object
            hints = slot.common(SocketHints)
            hints.note_ended(HINTS // 4 - 1, slot)
            hints.note_ended(1, slot)
            wait_until(lambda: slot.object.read_variable("socket_hints_in_use") == 1)


@pytest.mark.long
def test_sessions_that_come_and_go_leave_nothing() -> None:
    with puppets(2) as (client, server):
        pair = Pair(client, server)
        before = loaded()
        with at_work(
            TcpMetricsCollector.create({"pid": str(client.pid)}, None, bpf.probe())
        ) as stays:
            session = Session(stays, {client.pid: (pair, CLIENT)})
            for turn in range(200):
                config = {"pid": str(server.pid), "mode": ("summaries", "events")[turn % 2]}
                with at_work(TcpMetricsCollector.create(config, None, bpf.probe())) as other:
                    if turn % 20 == 0:
                        begun = Session(other, {server.pid: (pair, SERVER)})
                        pair.begin()
                        pair.finish()
                        begun.check()
            session.check()
        wait_until(lambda: nothing_new_since(before))
