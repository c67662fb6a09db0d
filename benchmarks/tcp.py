"""What following TCP connections costs a server and its client, and how many of the connections
each tool tells.

Both ends are on one CPU, which is busy all the time, so that a figure is the CPU time of both: what
others do on the machine hardly moves it. Each variant is measured right after a bare run.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from benchmarks import kernel, peers
from benchmarks.bench import Bench, watching
from benchmarks.empty import Empty, attached
from benchmarks.peers import Peer
from benchmarks.report import NOT_HERE, Aim, Report, Samples
from benchmarks.turns import measure_in_turns
from coral.client import AgentClient, Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import RunningAgent

ROUNDS: Final = 7
_REPEATS: Final = 3  # of each exchange in a round; the best counts
_MOST_THROUGHPUT_LOST: Final = 0.02
_MOST_CONNECTIONS_LOST: Final = 0.05
_OURS: Final = "coral: watched"
_CLOSE: Final = 7  # TCP_CLOSE
_IDLE_S: Final = 0.2
_IDLE_NS: Final = 2_000_000  # of CPU time in it
_IDLE_TIMEOUT_S: Final = 15.0


class Exchange(NamedTuple):
    """What the client does, as tests/programs/echo.c takes it."""

    name: str
    connections: int
    messages: int  # on each
    bytes: int  # of each

    @property
    def total(self) -> int:
        """Messages in all."""
        return self.connections * self.messages


EXCHANGES: Final = (
    Exchange("messages of 64 B", 1, 6000, 64),
    Exchange("messages of 64 KiB", 1, 1500, 64 << 10),
    Exchange("connections", 1000, 1, 64),
)
_CONNECTIONS: Final = EXCHANGES[-1]
MADE: Final = _REPEATS * sum(exchange.connections for exchange in EXCHANGES)


@dataclass(frozen=True)
class Server:
    """An echo server of ours, at work."""

    pid: int
    port: int


@dataclass
class Seen:
    """What a tool told of a server's connections, and what it took: good after its block."""

    connections: int | None = None  # those that it told the end of; None: it tells none
    lost: int = 0  # counted as lost
    cpu_s: float = 0.0  # of its own, in user space


Watching = Callable[[Server], AbstractAsyncContextManager[Seen]]


@dataclass
class Variant:
    """One way to watch, and what it was measured to cost: by exchange, microseconds of a message
    of both ends."""

    name: str
    watching: Watching
    bare_us: list[dict[str, float]] = field(default_factory=list)
    watched_us: list[dict[str, float]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    failure: str = ""

    def lost(self, exchange: str) -> Samples:
        """By round, the part that is lost of what a second had room for."""
        pairs = zip(self.bare_us, self.watched_us, strict=True)
        return Samples([1 - bare[exchange] / watched[exchange] for bare, watched in pairs])

    def lost_at_best(self, exchange: str) -> float:
        """The same of the fastest runs: what else runs on the machine only ever adds."""
        bare = min(us[exchange] for us in self.bare_us)
        return 1 - bare / min(us[exchange] for us in self.watched_us)

    async def measure(self, bench: Bench) -> None:
        """One pair, of one server: bare, then watched."""
        with _serving(bench) as server:
            bare_us = await _exchange(bench, server)
            async with self.watching(server) as seen:
                watched_us = await _exchange(bench, server)
        self.bare_us.append(bare_us)
        self.watched_us.append(watched_us)
        self.seen.append(seen)


async def measure(bench: Bench) -> Report:
    """The section: everything in turn, ROUNDS times."""
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(bench.agent(cpu_percent=1000))
        client = await stack.enter_async_context(AgentClient(agent.address))
        variants = _variants(bench, agent, client)
        ours = next(variant for variant in variants if variant.name == _OURS)

        def progress() -> str:
            shown = ", ".join(f"{x.name} {ours.lost(x.name).values[-1]:+.1%}" for x in EXCHANGES)
            return f"{_OURS}, lost: {shown}"

        remarks = await measure_in_turns(bench, variants, ROUNDS, progress)
    return _report(variants, remarks)


def _variants(bench: Bench, agent: RunningAgent, client: AgentClient) -> list[Variant]:
    def ours(**config: str) -> Watching:
        return lambda server: _ours(agent, client, server, **{"pid": str(server.pid), **config})

    return [
        Variant("three empty programs", _empty(bench)),
        Variant(_OURS, ours()),
        Variant("coral: watched, by=peer", ours(by="peer")),
        Variant("coral: watched, mode=events", ours(mode="events")),
        Variant("coral: scope=host", ours(pid="", scope="host")),
        Variant("coral: not a target", _ours_elsewhere(bench, agent, client)),
        *(Variant(peer.name, _peer(bench, peer)) for peer in peers.TCP),
    ]


@contextmanager
def _serving(bench: Bench) -> Iterator[Server]:
    process = subprocess.Popen(_echo(bench, "serve"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Server(process.pid, int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def _echo(bench: Bench, *arguments: object) -> list[str]:
    """tests/programs/echo.c, on the one CPU for both ends."""
    cpu = max(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cpu), str(bench.program("echo")), *map(str, arguments)]


async def _exchange(bench: Bench, server: Server) -> dict[str, float]:
    """By exchange, the CPU time of both ends, in microseconds a message: the best of the runs."""
    best: dict[str, float] = {}
    for _ in range(_REPEATS):
        for exchange in EXCHANGES:
            us = await _ask(bench, server, exchange)
            best[exchange.name] = min(us, best.get(exchange.name, us))
    return best


async def _ask(bench: Bench, server: Server, exchange: Exchange) -> float:
    before_ns = kernel.cpu_ns(server.pid)
    process = await asyncio.create_subprocess_exec(
        *_echo(bench, "ask", server.port, *exchange[1:]),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    client_ns = int(out.split()[1])
    return (client_ns + kernel.cpu_ns(server.pid) - before_ns) / exchange.total / 1e3


def _empty(bench: Bench) -> Watching:
    @asynccontextmanager
    async def floor(_server: Server) -> AsyncIterator[Seen]:
        with attached(bench, Empty.AT_CONNECTIONS):
            yield Seen()

    return floor


@asynccontextmanager
async def _ours(
    agent: RunningAgent, client: AgentClient, server: Server, **config: str
) -> AsyncIterator[Seen]:
    seen = Seen(connections=0)
    before_ns = kernel.cpu_ns(agent.process.pid)
    count = partial(_count, server, seen)
    async with watching(client, pb.EBPF_COLLECTOR_KIND_TCP_METRICS, count, **config):
        yield seen
    seen.cpu_s = (kernel.cpu_ns(agent.process.pid) - before_ns) / 1e9


def _ours_elsewhere(bench: Bench, agent: RunningAgent, client: AgentClient) -> Watching:
    @asynccontextmanager
    async def elsewhere(server: Server) -> AsyncIterator[Seen]:
        with bench.calls(1) as other:
            async with _ours(agent, client, server, pid=str(other.pid)) as seen:
                yield seen

    return elsewhere


def _count(server: Server, seen: Seen, batch: Batch) -> None:
    """Counts the ends of the server's connections; of others nothing is looked at."""
    seen.lost += sum(batch.lost.values())
    ends = sum(
        row.end != pb.TCP_END_OPEN
        for row in batch.message.tcp_metrics
        if row.local_port == server.port and row.role == pb.TCP_ROLE_SERVER
    )
    ends += sum(
        row.connections_closed
        for row in batch.message.tcp_peers
        if row.port == server.port and row.role == pb.TCP_ROLE_SERVER
    )
    if len(batch.events):
        closes = batch.events["new_state"] == _CLOSE
        closes &= batch.events["local_port"] == server.port
        ends += int((closes & (batch.events["role"] == pb.TCP_ROLE_SERVER)).sum())
    seen.connections = (seen.connections or 0) + ends


def _peer(bench: Bench, peer: Peer) -> Watching:
    @asynccontextmanager
    async def at_work(server: Server) -> AsyncIterator[Seen]:
        seen = Seen()
        with peers.running(bench, peer, server.pid, server.port) as one:
            before_ns = kernel.cpu_ns(one.pid)
            yield seen
            await _until_idle(one.pid)
            seen.cpu_s = (kernel.cpu_ns(one.pid) - before_ns) / 1e9
        if peer.counted is not peers.NONE:
            seen.connections = one.lines_counted()

    return at_work


async def _until_idle(pid: int) -> None:
    """Waits until a peer has no more to print: what it has not read when it is stopped is lost."""
    end = time.monotonic() + _IDLE_TIMEOUT_S
    before_ns = 0
    while kernel.cpu_ns(pid) - before_ns > _IDLE_NS and time.monotonic() < end:
        before_ns = kernel.cpu_ns(pid)
        await asyncio.sleep(_IDLE_S)


def _report(variants: Sequence[Variant], remarks: Sequence[str]) -> Report:
    by_name = {variant.name: variant for variant in variants}
    ours = by_name[_OURS]
    bare = {
        x.name: Samples([us[x.name] for variant in variants for us in variant.bare_us])
        for x in EXCHANGES
    }
    rows: list[tuple[str, ...]] = []
    rows.append(("bare", *(cell for x in EXCHANGES for cell in (_rate(bare[x.name]), "")), "", ""))
    rows += [_row(variant) for variant in variants]
    aims = [
        Aim(
            f"{_OURS}, {exchange.name} lost",
            ours.lost_at_best(exchange.name) * 100,
            100 * (_MOST_CONNECTIONS_LOST if exchange is _CONNECTIONS else _MOST_THROUGHPUT_LOST),
            " %",
        )
        for exchange in EXCHANGES
    ]
    return Report(
        title="Cost of following a server's TCP connections",
        how=f"Messages echoed, or connections made and closed, for each second of CPU time of both "
        f"ends together; what is lost of it by the fastest runs, and the median (middle half) of "
        f"{ROUNDS} rounds, each variant right after a bare run. Told: the ends that a tool tells, "
        f"of {MADE:,} connections; "
        "with ours, what it counted as lost is in it. Own CPU: of the tool itself, in a session.",
        columns=(
            "",
            *(cell for x in EXCHANGES for cell in (f"{x.name}/s", "lost")),
            "told",
            "own CPU ms",
        ),
        rows=rows,
        aims=aims,
        remarks=remarks,
        samples={
            f"{variant.name}, {x.name}, {what} us": [us[x.name] for us in taken]
            for variant in variants
            for x in EXCHANGES
            for what, taken in (("bare", variant.bare_us), ("watched", variant.watched_us))
        },
    )


def _rate(us: Samples) -> str:
    return f"{1e6 / us.median:,.0f}"


def _row(variant: Variant) -> tuple[str, ...]:
    if not variant.watched_us:
        return (variant.name, *[NOT_HERE] * (2 * len(EXCHANGES) + 2))
    cells = []
    for x in EXCHANGES:
        cells.append(_rate(Samples([us[x.name] for us in variant.watched_us])))
        lost = Samples([100 * lost for lost in variant.lost(x.name).values])
        cells.append(f"{100 * variant.lost_at_best(x.name):.1f} %; {lost.show(1)} %")
    told = [
        (seen.connections + seen.lost) / MADE
        for seen in variant.seen
        if seen.connections is not None
    ]
    return (
        variant.name,
        *cells,
        f"{min(told):.2%}" if told else NOT_HERE,
        f"{Samples([seen.cpu_s * 1e3 for seen in variant.seen]).median:,.0f}",
    )
