"""What watching its requests costs a server at full speed, in the clear and over TLS.

Each variant is measured right after a bare run of the same server, and both are one pair.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass, field
from typing import Final

from benchmarks import kernel, nginx, peers
from benchmarks.bench import Bench, BenchError, watching
from benchmarks.empty import Empty, attached
from benchmarks.nginx import Load, Nginx
from benchmarks.peers import Peer
from benchmarks.report import NOT_HERE, Aim, Report, Samples
from benchmarks.turns import measure_in_turns
from coral import bpf
from coral.client import AgentClient, Batch
from coral.collectors.contract import Summaries
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import Puppet, RunningAgent, at_work, held_by

_ROUNDS: Final = 5
_TLS_ROUNDS: Final = 4
_LOAD_S: Final = 1
_MOST_LOST_WATCHED: Final = 7.0  # percent
_MOST_LOST_ELSEWHERE: Final = 3.0
_ELSEWHERE: Final = "coral: not a target"
_WATCHED: Final = "coral: watched"
_OLD_RUNG: Final = "socket_hooks"  # what a kernel before 6.3 lacks
_DRAIN_S: Final = 0.05
_DETACH_TIMEOUT_S: Final = 30.0
_BY_SYS_EXIT: Final = (
    "by sys_exit: as on a kernel without the tracepoints sock_send_length and sock_recv_length; "
    "the collector is in the bench's own process"
)
_OWN_LIBSSL: Final = (
    "nginx has a copy of libssl, which wrk does not enter; the target in its place maps it, too"
)


@dataclass
class Seen:
    """What a tool saw, and the CPU time it took itself, in user space: good after its block."""

    requests: int | None = None  # None: nothing counts them
    cpu_s: float = 0.0


Watching = Callable[[Nginx], AbstractAsyncContextManager[Seen]]


@dataclass
class Variant:
    """One way to watch, and what it was measured to cost."""

    name: str
    server: Nginx
    watching: Watching
    bare: list[Load] = field(default_factory=list)
    watched: list[Load] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    failure: str = ""

    async def measure(self, bench: Bench) -> None:  # noqa: ARG002  turns.Variant has it
        """One pair: bare, then watched."""
        bare = await self.server.load(_LOAD_S)
        async with self.watching(self.server) as seen:
            watched = await self.server.load(_LOAD_S)
        self.bare.append(bare)
        self.watched.append(watched)
        self.seen.append(seen)

    @property
    def by_rate(self) -> Samples:
        """Requests a second, of those of the bare run: by round."""
        return Samples([w.per_second / b.per_second for b, w in self._pairs])

    @property
    def by_cpu(self) -> Samples:
        """Requests for each second of the server's CPU time, of those of the bare run: by round."""
        return Samples([b.cpu_us / w.cpu_us for b, w in self._pairs])

    @property
    def added_ns(self) -> Samples:
        """CPU time of the server, added to each request: by round."""
        return Samples([1e3 * (w.cpu_us - b.cpu_us) for b, w in self._pairs])

    @property
    def seen_of_made(self) -> Sequence[float]:
        """Requests that were seen, of one made: by round."""
        return [
            seen.requests / load.requests
            for seen, load in zip(self.seen, self.watched, strict=True)
            if seen.requests is not None
        ]

    @property
    def own_us(self) -> Samples:
        """The tool's own CPU time for each request: by round."""
        pairs = zip(self.seen, self.watched, strict=True)
        return Samples([1e6 * seen.cpu_s / load.requests for seen, load in pairs])

    @property
    def _pairs(self) -> list[tuple[Load, Load]]:
        return list(zip(self.bare, self.watched, strict=True))


@dataclass(frozen=True)
class _Ours:
    """An agent of ours, watching nginx or something else for the time of a load."""

    agent: RunningAgent
    client: AgentClient
    tls: bool

    def watching(self, **config: str) -> Watching:
        return lambda server: self._session(str(server.pid), **config)

    @asynccontextmanager
    async def elsewhere(self, server: Nginx) -> AsyncIterator[Seen]:
        """Another process is watched, which waits; with the server's libssl if that has one."""
        with Puppet() as other:
            if server.libssl:
                other.do(f"import ctypes; ctypes.CDLL({str(server.libssl)!r})")
            async with self._session(str(other.pid)) as seen:
                yield seen

    @asynccontextmanager
    async def _session(self, pid: str, **config: str) -> AsyncIterator[Seen]:
        agent_pid, kind = self.agent.process.pid, pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
        seen, idle = Seen(0), _attached(agent_pid)

        def take(batch: Batch) -> None:
            requests = batch.count if len(batch.events) else _counted(batch)
            seen.requests = (seen.requests or 0) + requests + sum(batch.lost.values())

        # What is not encrypted is the same with and without it; detaching takes a second.
        config = {"pid": pid, "tls": str(self.tls).lower(), **config}
        async with watching(self.client, kind, take, **config):
            before_ns = kernel.cpu_ns(agent_pid)
            yield seen
        seen.cpu_s = (kernel.cpu_ns(agent_pid) - before_ns) / 1e9
        end = time.monotonic() + _DETACH_TIMEOUT_S
        while _attached(agent_pid) > idle:
            if time.monotonic() > end:
                raise BenchError(f"programs are still attached after {_DETACH_TIMEOUT_S:g} s")
            await asyncio.sleep(_DRAIN_S)


def _attached(pid: int) -> int:
    """How much a process has attached: to tracepoints and functions, and by links."""
    return kernel.attachments(pid) + len(held_by(pid)["link"])


def _counted(batch: Batch) -> int:
    return sum(row.count for row in batch.message.http_latency)


async def measure(bench: Bench) -> Report:
    """The section in the clear."""
    sockets, calls = _empty(bench, Empty.AT_SOCKETS), _empty(bench, Empty.AT_CALLS)

    def variants(server: Nginx, ours: _Ours) -> list[Variant]:
        return [
            Variant("empty pair: sock_send, recv", server, sockets),
            Variant(_ELSEWHERE, server, ours.elsewhere),
            Variant(_WATCHED, server, ours.watching()),
            Variant(f"{_WATCHED}, mode=events", server, ours.watching(mode="events")),
            Variant("empty pair: sys_enter, exit", server, calls),
            Variant("coral by sys_exit: not a target", server, _old_rung_elsewhere),
            Variant("coral by sys_exit: watched", server, _old_rung),
            *(Variant(peer.name, server, _peer(bench, peer)) for peer in peers.HTTP),
        ]

    measured, remarks = await _measure(bench, variants, _ROUNDS, tls=False)
    found = {variant.name: variant for variant in measured}
    aims = [
        *_aims(found[_ELSEWHERE], _MOST_LOST_ELSEWHERE),
        *_aims(found[_WATCHED], _MOST_LOST_WATCHED),
    ]
    title = "Cost of watching a server's requests"
    return _report(title, measured, _ROUNDS, [_BY_SYS_EXIT, *remarks], aims)


async def measure_tls(bench: Bench) -> Report:
    """The section over TLS."""

    def variants(server: Nginx, ours: _Ours) -> list[Variant]:
        return [
            Variant(f"{_ELSEWHERE}, of the same libssl", server, ours.elsewhere),
            Variant(_WATCHED, server, ours.watching()),
            Variant(f"{_WATCHED}, mode=events", server, ours.watching(mode="events")),
            *(Variant(peer.name, server, _peer(bench, peer)) for peer in peers.HTTPS),
        ]

    measured, remarks = await _measure(bench, variants, _TLS_ROUNDS, tls=True)
    title = "Cost of watching a server's requests over TLS"
    return _report(title, measured, _TLS_ROUNDS, [_OWN_LIBSSL, *remarks])


async def _measure(
    bench: Bench,
    variants_of: Callable[[Nginx, _Ours], list[Variant]],
    rounds: int,
    *,
    tls: bool,
) -> tuple[list[Variant], list[str]]:
    """What was measured, with remarks."""
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(bench.agent(cpu_percent=1000))
        client = await stack.enter_async_context(AgentClient(agent.address))
        server = stack.enter_context(nginx.serving(bench, tls=tls))
        variants = variants_of(server, _Ours(agent, client, tls))
        await server.load(_LOAD_S)  # warm
        ours = next(variant for variant in variants if variant.name == _WATCHED)

        def progress() -> str:
            by_rate, by_cpu = ours.by_rate.values[-1], ours.by_cpu.values[-1]
            return f"{_WATCHED}, {by_rate:.3f} of bare, {by_cpu:.3f} by CPU time"

        return variants, await measure_in_turns(bench, variants, rounds, progress)


def _empty(bench: Bench, empty: Empty) -> Watching:
    @asynccontextmanager
    async def floor(_: Nginx) -> AsyncIterator[Seen]:
        with attached(bench, empty):
            yield Seen()

    return floor


@asynccontextmanager
async def _old_rung_elsewhere(_: Nginx) -> AsyncIterator[Seen]:
    with Puppet() as other:
        async with _by_old_rung(other.pid) as seen:
            yield seen


def _old_rung(server: Nginx) -> AbstractAsyncContextManager[Seen]:
    return _by_old_rung(server.pid)


@asynccontextmanager
async def _by_old_rung(pid: int) -> AsyncIterator[Seen]:
    """The collector in this process, as it would be on a kernel before 6.3."""
    config = {"pid": str(pid), "tls": "false"}
    features = bpf.probe().without(_OLD_RUNG)
    seen, ended = Seen(0), asyncio.Event()

    def drain() -> None:
        before_ns = time.thread_time_ns()
        batch = collector.drain()
        assert isinstance(batch.rows, Summaries)
        counted = int(batch.rows.columns["count"].sum()) + sum(batch.losses.values())
        seen.requests = (seen.requests or 0) + counted
        seen.cpu_s += (time.thread_time_ns() - before_ns) / 1e9

    async def keep_draining() -> None:
        while not ended.is_set():
            await asyncio.to_thread(drain)
            await asyncio.sleep(_DRAIN_S)
        await asyncio.to_thread(drain)

    with at_work(HttpLatencyCollector.create(config, None, features)) as collector:
        draining = asyncio.create_task(keep_draining())
        try:
            yield seen
        finally:
            ended.set()
            await draining


def _peer(bench: Bench, peer: Peer) -> Watching:
    @asynccontextmanager
    async def at_its_work(server: Nginx) -> AsyncIterator[Seen]:
        seen = Seen()
        with peers.running(bench, peer, server.pid) as one:
            before_ns = kernel.cpu_ns(one.pid)
            yield seen
            seen.cpu_s = (kernel.cpu_ns(one.pid) - before_ns) / 1e9
        seen.requests = one.calls_counted()

    return at_its_work


def _aims(variant: Variant, most_lost: float) -> list[Aim]:
    return [
        Aim(f"{variant.name}, lost by {how}", 100 * (1 - ratios.median), most_lost, " %")
        for how, ratios in (("requests/s", variant.by_rate), ("CPU time", variant.by_cpu))
    ]


def _report(
    title: str,
    variants: Sequence[Variant],
    rounds: int,
    remarks: Sequence[str],
    aims: Sequence[Aim] = (),
) -> Report:
    bare = [load for variant in variants for load in variant.bare]
    return Report(
        title=title,
        how=f"nginx with one worker that has a CPU for itself, 20 bytes a response, at full speed "
        f"for {_LOAD_S} s; wrk with 8 kept connections on the other CPUs. Medians of {rounds} "
        "rounds, and where their middle half lies, each variant right after a bare run. CPU us: "
        "nginx's own CPU time a request, user and system. Of bare: requests a second, and "
        "requests for each second of that CPU time; of those of the bare run. Seen: of the "
        "requests that wrk counts; what coral counts as lost is in it. Own CPU: of the tool "
        "itself, a request. bpftrace knows nothing of HTTP: it has a histogram of the times from a "
        "receive to the next send.",
        columns=(
            *("", "requests/s", "of bare", "CPU us", "of bare by CPU", "added ns", "seen"),
            "own CPU us",
        ),
        rows=[("bare", *_figures(bare, ("", "", "")), "", ""), *map(_row, variants)],
        aims=aims,
        remarks=remarks,
        samples={
            f"{variant.name}, {what}": values
            for variant in variants
            for what, values in (
                ("bare, requests/s", [load.per_second for load in variant.bare]),
                ("bare, CPU us", [load.cpu_us for load in variant.bare]),
                ("requests/s", [load.per_second for load in variant.watched]),
                ("CPU us", [load.cpu_us for load in variant.watched]),
            )
        },
    )


def _figures(loads: Sequence[Load], of_bare: tuple[str, str, str]) -> tuple[str, ...]:
    """What LOADS were, and OF_BARE: by requests a second, by CPU time, and what is added."""
    by_rate, by_cpu, added_ns = of_bare
    per_second = Samples([load.per_second for load in loads]).median
    cpu_us = Samples([load.cpu_us for load in loads]).median
    return (f"{per_second:,.0f}", by_rate, f"{cpu_us:.2f}", by_cpu, added_ns)


def _row(variant: Variant) -> tuple[str, ...]:
    if not variant.watched:
        return (variant.name, *[NOT_HERE] * 7)
    seen = variant.seen_of_made
    of_bare = (variant.by_rate.show(2), variant.by_cpu.show(3), variant.added_ns.show())
    return (
        variant.name,
        *_figures(variant.watched, of_bare),
        f"{Samples(seen).median:.2%}" if seen else "",
        f"{variant.own_us.median:.2f}" if seen else "",
    )
