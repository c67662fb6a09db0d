"""Runs an agent under a steady mix of loads and tells by how much it grows.

    python -P -m benchmarks.soak [SECONDS]

600 seconds by default. Every second it notes the agent's resident memory and its open descriptors;
the slopes of straight lines through the last three quarters of them (least squares), each with its
standard error, are printed: an agent that leaks nothing has slopes of zero.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import loads
from benchmarks.bench import Bench, BenchError, start_syscall_stats
from benchmarks.memory import rss_mb
from benchmarks.report import Aim, Report, show
from coral.client import AgentClient
from tests.support import RunningAgent, Vitals

_DEFAULT_S: Final = 600.0
_EVENTS_PER_SECOND: Final = 2_000
_RENEW_S: Final = 60.0
_MOST_KB_PER_MINUTE: Final = 100.0
_MOST_DESCRIPTORS_PER_MINUTE: Final = 0.1
_LIMITS: Final = {"concurrent_collectors": 10, "cpu_percent": 1000}


def main(seconds: float = _DEFAULT_S) -> int:
    """Soaks an agent; returns the process's exit status."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="coral-soak-") as directory:
            bench = Bench(Path(directory), console, None)
            with bench.agent(**_LIMITS) as agent:
                show(asyncio.run(_soak(bench, agent, seconds)), console)
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _soak(bench: Bench, agent: RunningAgent, seconds: float) -> Report:
    async with AgentClient(agent.address) as client, AsyncExitStack() as stack:
        calls = stack.enter_context(loads.paced(bench, _EVENTS_PER_SECOND))
        session = await stack.enter_async_context(loads.events(client, calls.pid))
        await stack.enter_async_context(loads.readers(agent, session, 2))
        numbers = itertools.count(1)

        async def subscribe_and_leave() -> None:
            """With a filter that no subscriber had before."""
            wanted = {"min_duration_s": next(numbers) / 1e9}
            async with client.subscribe(session, **wanted) as stream:  # type: ignore[arg-type]
                await anext(stream)

        async def watch_a_while() -> None:
            """A session that is read to its end."""
            started = await start_syscall_stats(client, calls.pid, interval="100ms")
            async with client.subscribe(started.collector_id) as stream:
                await anext(stream)
                await client.stop(started.collector_id)
                async for _ in stream:
                    pass

        async def renew() -> None:
            await client.renew(session)

        for load in (
            loads.repeating(watch_a_while, 1),
            loads.repeating(subscribe_and_leave, 1),
            loads.repeating(renew, 1 / _RENEW_S),
            loads.scrapes(agent, 1, per_second=1),
            loads.largest_requests(client, per_second=1),
        ):
            await stack.enter_async_context(load)
        return _report(await _watch(bench, agent.process.pid, seconds))


async def _watch(bench: Bench, pid: int, seconds: float) -> NDArray[np.float64]:
    """Of shape (n, 3), one row a second: the time in s, memory in MB, descriptors."""
    began_s = told_s = time.monotonic()
    seen: list[tuple[float, float, int]] = []
    while (now_s := time.monotonic()) < began_s + seconds:
        descriptors = Vitals.of(pid).descriptors
        seen.append((now_s - began_s, rss_mb(pid), descriptors))
        if now_s >= told_s:
            bench.say(f"{seen[-1][0]:4.0f} s: {seen[-1][1]:.1f} MB, {descriptors} descriptors")
            told_s += seconds / 10
        await asyncio.sleep(1)
    return np.array(seen)


def _report(seen: NDArray[np.float64]) -> Report:
    settled = seen[len(seen) // 4 :]
    minutes = settled[:, 0] / 60
    memory = slope(minutes, settled[:, 1] * 1e3)
    descriptors = slope(minutes, settled[:, 2])
    return Report(
        title=f"Growth of an agent in {seen[-1, 0]:.0f} s",
        how=f"A session of {_EVENTS_PER_SECOND:,} events/s with two readers. Every second a "
        "session that starts, is read and stops, a subscriber with a new filter, a scrape, and the "
        "largest request. The slope, and its standard error.",
        columns=("", "begins at", "ends at", "a minute"),
        rows=[
            ("memory, kB", f"{settled[0, 1] * 1e3:,.0f}", f"{settled[-1, 1] * 1e3:,.0f}",
             f"{memory[0]:+,.1f} ± {memory[1]:.1f}"),
            ("descriptors", f"{settled[0, 2]:.0f}", f"{settled[-1, 2]:.0f}",
             f"{descriptors[0]:+.3f} ± {descriptors[1]:.3f}"),
        ],
        aims=[
            Aim("memory", memory[0], _MOST_KB_PER_MINUTE, " kB a minute"),
            Aim("descriptors", descriptors[0], _MOST_DESCRIPTORS_PER_MINUTE, " a minute"),
        ],
    )  # fmt: skip


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """The slope of the straight line through (x, y), of shape (n,) each and n of at least 3, by
    least squares, and its standard error."""
    if len(x) < 3:
        raise BenchError("soak for longer: a slope needs three points")
    x_off = x - x.mean()
    squares = float(x_off @ x_off)
    found = float(x_off @ y) / squares
    rest = y - y.mean() - found * x_off
    return found, float(np.sqrt(rest @ rest / (len(x) - 2) / squares))


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2])))
