"""The programs of http_latency under load: how often each runs for a request, and how long."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from benchmarks import nginx
from benchmarks.bench import Bench
from benchmarks.nginx import Nginx
from benchmarks.report import Report
from coral import bpf
from coral.bpf.loading.object import enable_run_time_stats
from coral.collectors.http_latency.collector import HttpLatencyCollector
from tests.support import Puppet, at_work

_LOAD_S: Final = 2
_DRAIN_S: Final = 0.05
_LEAST_RUNS: Final = 0.01  # a request: what runs less often is no part of what one costs


async def measure(bench: Bench) -> Report:
    """The section: nginx is watched, then another process."""
    rows: list[tuple[str, ...]] = []
    statistics = enable_run_time_stats()
    try:
        with nginx.serving(bench) as server, Puppet() as other:
            for who, pid in (("watched", server.pid), ("not a target", other.pid)):
                rows += [(who, *row) for row in await _measure(server, pid)]
    finally:
        os.close(statistics)
    return Report(
        title="The programs of http_latency",
        how="By the kernel's run-time statistics, which take about 60 ns of each figure, while "
        f"nginx answers wrk at full speed for {_LOAD_S} s. Half of the runs are of wrk, which "
        f"is not watched. What runs for fewer than one request in {1 / _LEAST_RUNS:.0f} is left "
        "out. Instructions as the kernel's verifier counts them, of "
        f"{bpf.VERIFIER_LIMIT:,} that it goes through at most.",
        columns=("nginx is", "program", "runs a request", "ns a run", "instructions"),
        rows=rows,
    )


async def _measure(server: Nginx, pid: int) -> list[tuple[str, ...]]:
    config = {"pid": str(pid), "tls": "false"}
    with at_work(HttpLatencyCollector.create(config, None, bpf.probe())) as collector:
        before = collector.bpf_object.program_stats()
        loading = asyncio.create_task(server.load(_LOAD_S))
        while not loading.done():  # a full ring would cost less
            await asyncio.to_thread(collector.drain)
            await asyncio.wait([loading], timeout=_DRAIN_S)
        requests = (await loading).requests
        after = collector.bpf_object.program_stats()
    runs = {name: stats.run_count - before[name].run_count for name, stats in after.items()}
    return [
        (
            name,
            f"{runs[name] / requests:.2f}",
            f"{(stats.run_time_ns - before[name].run_time_ns) / runs[name]:.0f}",
            f"{stats.verified_instructions:,}",
        )
        for name, stats in sorted(after.items())
        if runs[name] >= _LEAST_RUNS * requests
    ]
