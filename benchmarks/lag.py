"""How long the agent's event loop is held by an interval of 10,240 summaries.

Whatever the agent has to do meanwhile waits that long: other sessions' drains, other subscribers'
writes, the answer to a health check.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import kernel, loads, many
from benchmarks.bench import Bench, start
from benchmarks.lagging_agent import TICK_S, read_lags
from benchmarks.report import Aim, Report, Samples
from coral.client import AgentClient
from tests.support import RunningAgent, running_agent, wait_until

ROUNDS: Final = 3
_SECONDS: Final = 4.0
_LONGEST_MS: Final = 50.0
_CONFIG: Final = {
    "limits": {
        "cpu_percent": 1000,
        "subscriber_bytes_per_second": "1GiB",
        "memory": "1GiB",
        "replay_bytes": "64MiB",
    }
}


@dataclass(frozen=True)
class Readers:
    """Who reads: how many, and in which form."""

    name: str
    count: int
    form: str = "rows"


_READERS: Final = (
    Readers("nobody", 0),
    Readers("1 subscriber, rows", 1),
    Readers("8 subscribers, rows", 8),
    Readers("1 subscriber, columns", 1, "columns"),
    Readers("8 subscribers, columns", 8, "columns"),
)


@dataclass
class Runs:
    """What was measured with some readers."""

    max_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    busy_ms: list[float] = field(default_factory=list)  # CPU time of the longest turn
    cpu_percent: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # over all readers
    rows: list[float] = field(default_factory=list)  # of each reader, in a second


async def measure(bench: Bench) -> Report:
    """The section."""
    runs = {(name, readers): Runs() for name in many.WORKLOADS for readers in _READERS}
    idle = Runs()
    for name, workload in many.WORKLOADS.items():
        with workload(bench) as program, probed_agent(bench, _CONFIG) as (agent, lags):
            async with AgentClient(agent.address) as client:
                await _watch_loop(agent, lags, idle)
                for turn in range(ROUNDS):
                    for readers in _READERS:
                        await _measure(program, agent, client, lags, (readers, runs[name, readers]))
                    bench.say(f"{name}: round {turn + 1} of {ROUNDS}")
            agent.stop()
    return _report(idle, runs)


@contextmanager
def probed_agent(bench: Bench, config: Mapping[str, object]) -> Iterator[tuple[RunningAgent, Path]]:
    """An agent with a probe, and the probe's file."""
    path = bench.directory / "lags"
    prefix = (sys.executable, "-P", "-m", "benchmarks.lagging_agent", str(path))
    with running_agent(bench.directory / "lagging", config, prefix=prefix) as agent:
        wait_until(lambda: b"collector available" in agent.log_path.read_bytes())
        yield agent, path


async def _measure(
    program: many.Workload,
    agent: RunningAgent,
    client: AgentClient,
    lags: Path,
    measured: tuple[Readers, Runs],
) -> None:
    readers, runs = measured
    started = await start(client, program.kind, **program.config)
    async with AsyncExitStack() as stack:
        process = None
        if readers.count:
            reading = loads.readers(agent, started.collector_id, readers.count, readers.form)
            process = await stack.enter_async_context(reading)
        await _until_produced(client, started.collector_id, 2 * many.ROWS)
        await _watch_loop(agent, lags, runs)
        await client.stop(started.collector_id)
        if process:
            out, _ = await asyncio.to_thread(process.communicate, timeout=60)
            told = json.loads(out)
            # Eight readers of rows take more than one CPU: they may lose what does not fit a queue.
            runs.lost.append(sum(told["lost"].values()))
            runs.rows.append(told["rows"] / readers.count)


async def _until_produced(client: AgentClient, collector_id: str, count: int) -> None:
    """Waits until a session has produced COUNT rows: the first intervals are not full ones."""
    async with asyncio.timeout(30):
        while True:
            for info in await client.collectors():
                if info.collector_id == collector_id and info.produced >= count:
                    return
            await asyncio.sleep(0.1)


async def _watch_loop(agent: RunningAgent, lags: Path, runs: Runs) -> None:
    before, cpu_before_ns = len(read_lags(lags)), kernel.cpu_ns(agent.process.pid)
    await asyncio.sleep(_SECONDS)
    late_s, busy_s = read_lags(lags)[before:].T
    late_ms = lateness_ms(late_s)
    runs.busy_ms.append(float(busy_s.max() * 1e3))
    runs.max_ms.append(float(late_ms.max()))
    runs.p99_ms.append(float(np.percentile(late_ms, 99)))
    used_ns = kernel.cpu_ns(agent.process.pid) - cpu_before_ns
    runs.cpu_percent.append(used_ns / 1e7 / _SECONDS)


def lateness_ms(lags_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """How late callbacks would be that are due at every full millisecond: those that a held loop
    did not even plan are counted too."""
    ticks = (lags_s / TICK_S).astype(int) + 1
    late_s = np.repeat(lags_s, ticks)
    nth = np.arange(len(late_s)) - np.repeat(np.cumsum(ticks) - ticks, ticks)
    result: NDArray[np.float64] = (late_s - nth * TICK_S) * 1e3
    return result


def _report(idle: Runs, runs: dict[tuple[str, Readers], Runs]) -> Report:
    rows = [("an idle agent", *_cells(idle))]
    rows += [(f"{name}, {readers.name}", *_cells(one)) for (name, readers), one in runs.items()]
    return Report(
        title=f"Lag of the agent's event loop, at {many.ROWS:,} summaries a second",
        how=f"Median (middle half) of {ROUNDS} runs of {_SECONDS:g} s, interval 1 s. How late "
        "callbacks are that are due at every full millisecond. The longest turn is the CPU time of "
        "the loop's thread between two callbacks: what others do on the machine is not in it.",
        columns=("", "longest turn, CPU ms", "max lag ms", "p99 lag ms", "agent's CPU %", "lost"),
        rows=rows,
        aims=[
            Aim(
                f"{name}, {readers.name}, longest turn",
                Samples(one.busy_ms).median,
                _LONGEST_MS,
                " ms",
            )
            for (name, readers), one in runs.items()
        ],
        samples={
            f"{name}, {readers.name}, {what}": values
            for (name, readers), one in runs.items()
            for what, values in (
                ("busy ms", one.busy_ms),
                ("max ms", one.max_ms),
                ("p99 ms", one.p99_ms),
            )
        },
    )


def _cells(runs: Runs) -> tuple[str, ...]:
    return (
        Samples(runs.busy_ms).show(1),
        Samples(runs.max_ms).show(1),
        Samples(runs.p99_ms).show(2),
        Samples(runs.cpu_percent).show(1),
        f"{sum(runs.lost):,}",
    )
