"""Helpers for tests of connections: two network namespaces with a cable between them, the kernel's
own figures of sockets in them, and puppets that talk to each other."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

from coral import bpf
from coral.bpf import kernel_names
from coral.collectors.contract import Batch, Summaries
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.collectors.tcp_metrics.file_walk import FileWalk
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import Puppet, at_work, wait_until

_ENTER: Final = (
    "import ctypes, socket; fd = os.open({path!r}, os.O_RDONLY); "
    "ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000); os.close(fd)"
)
READ_ALL: Final = "n = 0\nwhile n < {n}: n += len({s}.recv(65536))"
_DROP: Final = "table inet drops {{ chain in {{ type filter hook input priority 0; {rule}; }}; }}"


def _taken(what: str) -> str:
    """The way that the collector takes on this machine for one step of its ladder."""
    steps = TcpMetricsCollector.support(bpf.probe()).steps
    return next((step.taken for step in steps if step.what == what), "")


@cache
def looks_up_owners() -> bool:
    """Whether the collector looks up which process has a socket open; otherwise a socket belongs to
    the process that receives on it."""
    return _taken("connections") in ("map_iterator", "syscall_program")


@cache
def has_cookies() -> bool:
    """Whether programs may ask for a socket's cookie here; otherwise the collector numbers
    connections by itself."""
    cookies = "bpf_get_socket_ptr_cookie"
    return _taken("hook") == "tp_btf" and bool(kernel_names([cookies]))


@dataclass(frozen=True)
class Side:
    """One of two namespaces: its name, and its addresses."""

    name: str
    v4: str
    v6: str

    def run(self, *command: str) -> str:
        """Runs a command in the namespace and returns its output."""
        ran = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def puppet(self) -> Puppet:
        """A process in the namespace, ready to use sockets."""
        puppet = Puppet()
        puppet.do(_ENTER.format(path=f"/run/netns/{self.name}"))
        return puppet

    @contextmanager
    def dropping(self, rule: str) -> Iterator[None]:
        """Drops incoming packets that match RULE, of nftables."""
        self.run("nft", _DROP.format(rule=rule))
        try:
            yield
        finally:
            self.run("nft", "delete table inet drops")

    def counter(self, name: str) -> int:
        """One of the kernel's counters in the namespace, such as TcpRetransSegs."""
        return int(re.search(rf"^{name}\s+(\d+)", self.run("nstat", "-asz", name), re.MULTILINE)[1])  # type: ignore[index]


@contextmanager
def two_sides() -> Iterator[tuple[Side, Side]]:
    """Two namespaces with a cable between them."""
    number = os.getpid()
    left = Side(f"coral-l{number}", "10.77.0.1", "fd77::1")
    right = Side(f"coral-r{number}", "10.77.0.2", "fd77::2")
    try:
        for side in (left, right):
            subprocess.run(["ip", "netns", "add", side.name], check=True)
        left.run(
            *("ip", "link", "add", "cable", "type", "veth"),
            *("peer", "name", "cable", "netns", right.name),
        )
        for side in (left, right):
            side.run("ip", "addr", "add", f"{side.v4}/24", "dev", "cable")
            side.run("ip", "addr", "add", f"{side.v6}/64", "dev", "cable", "nodad")
            side.run("ip", "link", "set", "cable", "up")
            side.run("ip", "link", "set", "lo", "up")
            # So that lost segments are sent again soon.
            side.run("ip", "route", "change", "10.77.0.0/24", "dev", "cable", "rto_min", "5ms")
        yield left, right
    finally:
        for side in (left, right):
            subprocess.run(["ip", "netns", "delete", side.name], check=False)


class Seen:
    """A running collector, and all rows from it so far. `missed` counts programs that were skipped
    for any socket of the machine, which tests beside this one use, too: an upper bound of what is
    missing here. `lost` is exact."""

    def __init__(self, collector: TcpMetricsCollector) -> None:
        self.collector = collector
        self.rows: list[pb.TcpMetrics] = []
        self.lost = self.missed = 0

    def drain(self) -> list[pb.TcpMetrics]:
        """The rows of one more drain."""
        return self.add(self.collector.drain())

    def add(self, batch: Batch) -> list[pb.TcpMetrics]:
        """Takes in a batch of connections; its rows."""
        assert isinstance(batch.rows, Summaries)
        rows = [row for row in batch.rows.as_messages() if isinstance(row, pb.TcpMetrics)]
        missed = batch.losses.get(pb.Loss.STAGE_PROGRAM_MISSED, 0)
        self.missed += missed
        self.lost += sum(batch.losses.values()) - missed
        self.rows += rows
        return rows

    def walk(self) -> None:
        """Walks through the open files, where a program does. The collector's own next walk may be
        minutes away, if a test beside this one has opened many."""
        slot = self.collector.bpf_object
        if FileWalk.PROGRAM in slot.object.loaded_programs:
            slot.common(FileWalk).run()

    def last(self, **wanted: object) -> pb.TcpMetrics | None:
        """The newest row whose fields have these values."""
        for row in reversed(self.rows):
            if all(getattr(row, name) == value for name, value in wanted.items()):
                return row
        return None

    def until(self, condition: Callable[[], object]) -> None:
        """Walks and drains until CONDITION is true."""

        def met() -> object:
            self.walk()
            self.drain()
            return condition()

        wait_until(met, 15)

    def ended(self, **wanted: object) -> pb.TcpMetrics:
        """Waits for the last row of a connection that has ended, and checks that the intervals of
        all its rows add up to the totals."""
        found: list[pb.TcpMetrics] = []

        def has_ended() -> bool:
            found[:] = [
                row
                for row in self.rows
                if row.end and all(getattr(row, name) == v for name, v in wanted.items())
            ]
            return bool(found)

        self.until(has_ended)
        (row,) = found
        assert_deltas_add_up(r for r in self.rows if identity(r) == identity(row))
        return row


def identity(row: pb.TcpMetrics) -> tuple[int, ...]:
    """A key that is unique even where a connection has no id. On some rungs a client that is still
    connecting has no local port."""
    ports = (row.local_port, row.remote_port) if row.preexisting else ()
    return row.connection_id, row.role, row.start_ns, *ports


def assert_deltas_add_up(rows: Iterable[pb.TcpMetrics]) -> None:
    """For the rows of one connection. What it carried before it was found is in no interval."""
    first, *more = rows
    added, before = _counters(first.delta), _counters(first.total)
    last, samples = first, sum(first.rtt_us_delta.counts)
    before.subtract(added)
    for last in more:
        samples += sum(last.rtt_us_delta.counts)
        added.update(_counters(last.delta))
    assert samples == sum(last.rtt_us_total.counts)
    if first.preexisting:
        added.update(before)
    assert +added == _counters(last.total)


def _counters(counters: pb.TcpCounters) -> Counter[str]:
    return Counter({field.name: value for field, value in counters.ListFields()})


@contextmanager
def following(*puppets: Puppet, **config: str) -> Iterator[Seen]:
    """`tcp_metrics` of these processes."""
    config = {"pid": ",".join(str(puppet.pid) for puppet in puppets), **config}
    with at_work(TcpMetricsCollector.create(config, None, bpf.probe())) as collector:
        yield Seen(collector)


@contextmanager
def puppets(count: int) -> Iterator[list[Puppet]]:
    """The given number of puppets, ended with the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(Puppet()) for _ in range(count)]


def send(sender: Puppet, sends: str, receiver: Puppet, receives: str, count: int) -> None:
    """Makes one puppet send COUNT bytes, and the other read them all."""
    receiver.begin(f"exec({READ_ALL.format(s=receives, n=count)!r})")
    sender.do(f"{sends}.sendall(bytes({count}))")
    receiver.done()


def connected(client: Puppet, server: Puppet, address: str) -> int:
    """Connects them, as `c` and `s`; the server also has its listener `l`. Returns the port."""
    port = listen(server, address)
    client.do(f"{socket_of(address)}; c.connect(({address!r}, {port}))")
    server.do("s, _ = l.accept()")
    return port


def listen(server: Puppet, address: str) -> int:
    """Makes it listen at a port that the kernel chooses; returns the port."""
    server.do(f"{socket_of(address, 'l')}; l.bind(({address!r}, 0)); l.listen()")
    return number(server, "l.getsockname()[1]")


def socket_of(address: str, name: str = "c") -> str:
    """Code that creates a socket."""
    family = "AF_INET6" if ":" in address else "AF_INET"
    return f"import socket; {name} = socket.socket(socket.{family})"


def number(puppet: Puppet, expression: str) -> int:
    """The value of a number in the puppet."""
    return int(puppet.ask(expression))


def ss(side: Side | None, port: int) -> dict[tuple[int, int], dict[str, str]]:
    """The fields that `ss -tieOn` prints of sockets with PORT, by local and remote port."""
    command = ["ss", "-tieOnH", f"( sport = :{port} or dport = :{port} )"]
    out = side.run(*command) if side else subprocess.check_output(command, text=True)
    found = {}
    for line in out.splitlines():
        ports = tuple(int(end.rpartition(":")[2]) for end in line.split()[3:5])
        fields = dict(word.split(":", 1) for word in line.split()[5:] if ":" in word)
        found[ports[0], ports[1]] = fields
    return found
