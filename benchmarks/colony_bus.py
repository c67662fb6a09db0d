"""What batches cost on their way through NATS JetStream, on either side and in the server.

    python -P -m benchmarks.colony_bus publish|read URL BATCHES_FILE

does one side in a process of its own, and prints its figures as JSON. BATCHES_FILE has batches as
agents send them, pickled.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import uvloop

from benchmarks import many
from benchmarks.bench import ROOT, Bench
from benchmarks.colony_intake import AGENTS, ROWS, as_sent
from benchmarks.report import Report
from coral.client import Batch, Kind
from coral.colony.bus.consumer import Consumer
from coral.colony.bus.publisher import Publisher
from coral.colony.bus.settings import BusSettings
from coral.colony.delivery import AgentSeen, Delivery, Gap, Session, Standing
from tests.bus import NatsServer, nats_server

_INTERVALS: Final = 5
_BATCHES: Final = AGENTS * _INTERVALS
_MOST_BYTES: Final = 900 << 20

Figures = dict[str, float]


async def measure(bench: Bench) -> Report:
    """The section: for each type of row, a server of its own."""
    rows: list[tuple[str, ...]] = []
    samples: dict[str, list[float]] = {}
    for name, workload in many.WORKLOADS.items():
        with workload(bench) as program:
            drained = program.fill(2)
        wires = [it.wire for each in drained for it in as_sent(each)]
        path = bench.directory / "batches"
        path.write_bytes(pickle.dumps(wires))
        size_bytes = sum(map(len, wires)) / len(wires)
        directory = bench.directory / f"nats-{name}"
        with nats_server(directory) as server:
            for side in _SIDES:
                found = await asyncio.to_thread(_run, side, server, path)
                rows.append(
                    (
                        f"{name}, {size_bytes / ROWS:,.0f} bytes a row: {side}",
                        f"{found['per_s']:,.0f}",
                        f"{found['per_s'] * ROWS:,.0f}",
                        f"{found['per_s'] * size_bytes / 1e6:.1f}",
                        f"{found['cpu_us']:,.0f}",
                        f"{found['server_us']:,.0f}",
                    )
                )
                samples |= {f"{name}, {side}, {what}": [value] for what, value in found.items()}
        bench.say(f"{name}: {_BATCHES:,} batches")
    return Report(
        title="Batches through NATS JetStream",
        how=f"{_INTERVALS} batches of {ROWS} rows of each of {AGENTS:,} agents, each acknowledged; "
        "CPU is that of the process, and of the server, in µs a batch.",
        columns=("", "batches/s", "rows/s", "MB/s", "CPU", "server"),
        rows=rows,
        samples=samples,
    )


def _run(side: str, server: NatsServer, path: Path) -> Figures:
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.colony_bus", side, server.url, str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    after = process.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    # Logs of the program precede its figures.
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "server_us": used_s / _BATCHES * 1e6}


class _Nowhere:
    """A store that is always done."""

    def put(self, delivery: Delivery) -> None:
        """Forgets it."""

    async def room(self) -> None:
        """There is."""

    async def stored(self) -> None:
        """As a store, it commits once a second."""
        await asyncio.sleep(1)

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:  # noqa: ARG002
        """It has nothing."""
        return None

    def agent_seen(self, agent: AgentSeen) -> None:
        """Forgets it."""

    def gap(self, gap: Gap) -> None:
        """Forgets it."""


async def _publish(settings: BusSettings, wires: Sequence[bytes]) -> Figures:
    batches = [Batch.parse(it) for it in wires]
    kind = Kind(batches[0].message.kind)
    sessions = [Session(f"node-{n}", "0123456789abcdef", kind, "shop", 1) for n in range(AGENTS)]
    async with Publisher(settings) as publisher:
        began_s, used_s = time.perf_counter(), time.process_time()
        for interval in range(_INTERVALS):
            after = interval * ROWS
            for number, session in enumerate(sessions):
                batch = batches[(number * _INTERVALS + interval) % len(batches)]
                size, last = len(batch.wire), after + ROWS
                publisher.put(Delivery(session, batch, after, last, last, time.time_ns(), size))
                await publisher.room()
        await publisher.stored()
        return _figures(began_s, used_s)


async def _read(settings: BusSettings, _wires: Sequence[bytes]) -> Figures:
    consumer = Consumer(settings, _Nowhere())
    began_s, used_s = time.perf_counter(), time.process_time()
    reading = asyncio.create_task(consumer.run())
    while consumer.counts.read < _BATCHES and not reading.done():  # noqa: ASYNC110  nothing says when
        await asyncio.sleep(0.01)
    figures = _figures(began_s, used_s)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return figures


def _figures(began_s: float, used_s: float) -> Figures:
    took_s = time.perf_counter() - began_s
    return {
        "per_s": _BATCHES / took_s,
        "cpu_us": (time.process_time() - used_s) / _BATCHES * 1e6,
    }


_SIDES: Final[dict[str, Callable[[BusSettings, Sequence[bytes]], Coroutine[Any, Any, Figures]]]] = {
    "publish": _publish,
    "read": _read,
}


def _main(side: str, url: str, path: Path) -> None:
    settings = replace(BusSettings((url,)), max_bytes=_MOST_BYTES)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(_SIDES[side](settings, pickle.loads(path.read_bytes())))
    print(json.dumps(figures))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
