"""What the agent itself takes for requests that come at a steady rate: CPU time and memory.

From one batch at the subscriber to a later one: the start of a session is not in it, and what the
programs take in the kernel is the server's, which `http` measures.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from benchmarks import kernel, nginx
from benchmarks.bench import Bench, BenchError, watching
from benchmarks.memory import rss_mb
from benchmarks.nginx import Nginx
from benchmarks.report import Aim, Report, Samples
from coral.client import AgentClient, Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import RunningAgent

_ROUNDS: Final = 3
_LOAD_S: Final = 3
_MODES: Final = {"summaries": 5.0, "events": 20.0}  # us of CPU time a request that are the aim


@dataclass
class _Taken:
    """What the agent took in one mode, by round."""

    us: list[float] = field(default_factory=list)  # of CPU time a request
    per_second: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    made: int = 0
    seen: int = 0


async def measure(bench: Bench) -> Report:
    """The section: each mode in turn."""
    taken = {mode: _Taken() for mode in _MODES}
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(bench.agent(cpu_percent=1000))
        idle_mb = rss_mb(agent.process.pid)
        client = await stack.enter_async_context(AgentClient(agent.address))
        server = stack.enter_context(nginx.serving(bench))
        for turn in range(_ROUNDS):
            for mode, of_mode in taken.items():
                await _measure(agent, client, server, mode, of_mode)
            shown = ", ".join(f"{mode} {it.us[-1]:.2f} us" for mode, it in taken.items())
            bench.say(f"round {turn + 1} of {_ROUNDS}: {shown}")
    return _report(taken, idle_mb)


async def _measure(
    agent: RunningAgent, client: AgentClient, server: Nginx, mode: str, taken: _Taken
) -> None:
    marks: list[tuple[int, int]] = []  # requests so far, and CPU time of the agent, in ns
    seen = 0

    def take(batch: Batch) -> None:
        nonlocal seen
        seen += sum(batch.lost.values())
        if not batch.count:
            return
        rows = batch.message.http_latency
        seen += sum(row.count for row in rows) if rows else batch.count
        marks.append((seen, kernel.cpu_ns(agent.process.pid)))

    config = {"pid": str(server.pid), "mode": mode}
    async with watching(client, pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY, take, **config):
        load = await server.paced(_LOAD_S)
        during = list(marks)
        taken.resident_mb.append(rss_mb(agent.process.pid))
    if len(during) < 2:
        raise BenchError("the agent sent nothing while requests came")
    (first, first_ns), (last, last_ns) = during[0], during[-1]
    taken.us.append((last_ns - first_ns) / (last - first) / 1e3)
    taken.per_second.append(load.per_second)
    taken.made += load.requests
    taken.seen += seen


def _report(taken: dict[str, _Taken], idle_mb: float) -> Report:
    rows = [("idle", "", "", "", f"{idle_mb:.1f}")]
    rows += [
        (
            mode,
            f"{Samples(it.per_second).median:,.0f}",
            Samples(it.us).show(2),
            f"{it.seen / it.made:.2%}",
            f"{max(it.resident_mb):.1f}",
        )
        for mode, it in taken.items()
    ]
    return Report(
        title="The agent's own cost of requests",
        how=f"nginx answers about 20,000 requests a second for {_LOAD_S} s, one subscriber reads "
        f"what the agent sends. CPU ms: user and system of the agent for 1,000 requests, which is "
        f"us for one; median (middle half) of {_ROUNDS} rounds. RSS: VmRSS in MB of 10^6 bytes, "
        "the most of them.",
        columns=("", "requests/s", "CPU ms of 1,000", "seen", "RSS MB"),
        rows=rows,
        aims=[
            Aim(f"agent's CPU a request, {mode}", Samples(it.us).median, _MODES[mode], " us")
            for mode, it in taken.items()
        ],
        samples={f"{mode}, CPU us a request": it.us for mode, it in taken.items()},
    )
