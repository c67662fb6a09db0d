"""How long the agent's event loop is held by what callers may ask of it: starts, the full rate of
events, many readers, many filters, scrapes, the largest request; each alone, and all together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import loads
from benchmarks.bench import ENDLESS_CALLS, Bench
from benchmarks.lag import lateness_ms, probed_agent
from benchmarks.lagging_agent import read_lags
from benchmarks.report import Aim, Report, Samples
from coral.client import AgentClient
from tests.support import RunningAgent

ROUNDS: Final = 3
_SECONDS: Final = 4.0
_MOST_P99_MS: Final = 20.0
_EVENTS_PER_SECOND: Final = 5_000
_MANY: Final = 64  # readers, and distinct filters
_CONFIG: Final = {
    "limits": {
        "concurrent_collectors": 10,
        "cpu_percent": 1000,
        "subscriber_bytes_per_second": "1GiB",
        "memory": "1GiB",
    }
}


@dataclass(frozen=True)
class Place:
    """Where a load is put."""

    bench: Bench
    agent: RunningAgent
    client: AgentClient


Load = Callable[[Place], AbstractAsyncContextManager[None]]


@dataclass
class Lags:
    """How late the loop was, in each round."""

    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    max_ms: list[float] = field(default_factory=list)


@asynccontextmanager
async def _nothing(_place: Place) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def _starts(place: Place) -> AsyncIterator[None]:
    with loads.paced(place.bench, 100) as calls:
        async with loads.starts(place.client, calls.pid, per_second=5):
            yield


@asynccontextmanager
async def _full_rate(place: Place) -> AsyncIterator[None]:
    with place.bench.calls(ENDLESS_CALLS) as calls:
        async with (
            loads.events(place.client, calls.pid) as session,
            loads.readers(place.agent, session, 1),
        ):
            calls.go()
            yield


@asynccontextmanager
async def _readers(place: Place, form: str = "rows") -> AsyncIterator[None]:
    with loads.paced(place.bench, _EVENTS_PER_SECOND) as calls:
        async with (
            loads.events(place.client, calls.pid) as session,
            loads.readers(place.agent, session, _MANY, form),
        ):
            yield


def _filters(place: Place) -> AbstractAsyncContextManager[None]:
    return _readers(place, "filters")


def _scrapes(place: Place) -> AbstractAsyncContextManager[None]:
    return loads.scrapes(place.agent, 8, per_second=10)


def _largest(place: Place) -> AbstractAsyncContextManager[None]:
    return loads.largest_requests(place.client, per_second=5)


_ALONE: Final[dict[str, Load]] = {
    "5 starts a second": _starts,
    f"{_MANY} readers of {_EVENTS_PER_SECOND:,} events/s": _readers,
    f"{_MANY} distinct filters on {_EVENTS_PER_SECOND:,} events/s": _filters,
    "8 scrapers": _scrapes,
    "the largest request": _largest,
    # Last, for it leaves little for those that begin after it.
    "full rate of events, one reader": _full_rate,
}


@asynccontextmanager
async def _together(place: Place) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for load in _ALONE.values():
            await stack.enter_async_context(load(place))
        yield


_LOADS: Final[dict[str, Load]] = {"nothing": _nothing, **_ALONE, "all of these": _together}


async def measure(bench: Bench) -> Report:
    """The section."""
    found = {name: Lags() for name in _LOADS}
    with probed_agent(bench, _CONFIG) as (agent, probe):
        async with AgentClient(agent.address) as client:
            place = Place(bench, agent, client)
            for turn in range(ROUNDS):
                for name, load in _LOADS.items():
                    async with load(place):
                        await _measure(probe, found[name])
                    bench.say(f"{name}: round {turn + 1} of {ROUNDS}")
        agent.stop()
    return _report(found)


async def _measure(probe: Path, lags: Lags) -> None:
    await asyncio.sleep(1)  # the load's beginning is not its steady state
    before = len(read_lags(probe))
    await asyncio.sleep(_SECONDS)
    late_ms = lateness_ms(read_lags(probe)[before:, 0])
    p50_ms, p99_ms = np.percentile(late_ms, (50, 99))
    lags.p50_ms.append(float(p50_ms))
    lags.p99_ms.append(float(p99_ms))
    lags.max_ms.append(float(late_ms.max()))


def _report(found: dict[str, Lags]) -> Report:
    return Report(
        title="Lag of the agent's event loop under the loads of callers",
        how=f"Median (middle half) of {ROUNDS} runs of {_SECONDS:g} s. How late callbacks are that "
        "are due at every full millisecond. The loads run on the same machine.",
        columns=("", "p50 ms", "p99 ms", "max ms"),
        rows=[
            (
                name,
                Samples(lags.p50_ms).show(2),
                Samples(lags.p99_ms).show(1),
                Samples(lags.max_ms).show(1),
            )
            for name, lags in found.items()
        ],
        aims=[
            Aim(f"{name}, p99", Samples(lags.p99_ms).median, _MOST_P99_MS, " ms")
            for name, lags in found.items()
        ],
        samples={
            f"{name}, {what}": values
            for name, lags in found.items()
            for what, values in (
                ("p50 ms", lags.p50_ms),
                ("p99 ms", lags.p99_ms),
                ("max ms", lags.max_ms),
            )
        },
    )
