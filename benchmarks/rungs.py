"""What each rung of the ladder costs: the traced program, the start, and memory.

Each rung is this kernel's best without some of what it has, as an older kernel would be.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from benchmarks.bench import Bench, per_call_ns
from benchmarks.report import NOT_HERE, Report, Samples, times
from coral import bpf
from coral.bpf.loading.object import enable_run_time_stats
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from tests.support import RUNGS, Calls, at_work

_ROUNDS: Final = 7
_CALLS: Final = 500_000
_MODES: Final = ("summaries", "events")


@dataclass
class _Rung:
    """One rung, and what was measured on it."""

    features: bpf.Features
    added_ns: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in _MODES})
    start_ms: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    @contextmanager
    def watching(self, calls: Calls, mode: str) -> Iterator[None]:
        config = {"pid": str(calls.pid), "mode": mode}
        collector = SyscallStatsCollector.create(config, None, self.features)
        began_at = time.monotonic()
        with at_work(collector):
            self.start_ms.append((time.monotonic() - began_at) * 1e3)
            yield
            if mode == "summaries":
                self.memory_bytes = collector.bpf_object.map_memory_bytes


async def measure(bench: Bench) -> Report:
    """The section: every rung in turn, in both modes, each right after a bare run."""
    bpf.probe()
    rungs = {name: _Rung(bpf.probe().without(*lacks)) for name, lacks in RUNGS.items()}
    can = {
        name: rung
        for name, rung in rungs.items()
        if SyscallStatsCollector.support(rung.features).supported
    }
    for turn in range(_ROUNDS):
        for rung in can.values():
            for mode in _MODES:
                with bench.calls(_CALLS) as calls:
                    bare_ns = await per_call_ns(calls, _CALLS)
                with bench.calls(_CALLS) as calls, rung.watching(calls, mode):
                    rung.added_ns[mode].append(await per_call_ns(calls, _CALLS) - bare_ns)
        bench.say(f"round {turn + 1} of {_ROUNDS}")
    return _report(rungs)


async def measure_programs(bench: Bench) -> Report:
    """The section of each program: what the verifier went through, and how long a run takes."""
    rows: dict[tuple[str, ...], tuple[str, ...]] = {}
    statistics = enable_run_time_stats()
    try:
        for lacks in RUNGS.values():
            features = bpf.probe().without(*lacks)
            if not SyscallStatsCollector.support(features).supported:
                continue
            hook = SyscallStatsCollector.climb(features).hook.taken
            for mode in _MODES:
                with bench.calls(_CALLS) as calls:
                    config = {"pid": str(calls.pid), "mode": mode}
                    collector = SyscallStatsCollector.create(config, None, features)
                    with at_work(collector):
                        await per_call_ns(calls, _CALLS)
                        stats = collector.bpf_object.program_stats()
                for name, program in stats.items():
                    key = (name, hook, mode)
                    rows.setdefault(key, (*key, *_figures(program)))
    finally:
        os.close(statistics)
    return Report(
        title="The programs of syscall_stats",
        how=f"Instructions as the kernel's verifier counts them, of {bpf.VERIFIER_LIMIT:,} that it "
        f"goes through at most; ns by the kernel's run-time statistics, over {_CALLS:,} calls.",
        columns=("program", "hook", "mode", "instructions", "of the limit", "ns a run"),
        rows=sorted(rows.values()),
    )


def _figures(program: bpf.ProgramStats) -> tuple[str, str, str]:
    often = program.run_count >= _CALLS
    return (
        f"{program.verified_instructions:,}",
        f"{program.verified_instructions / bpf.VERIFIER_LIMIT:.2%}",
        f"{program.run_time_ns / program.run_count:.0f}" if often else NOT_HERE,
    )


def _report(rungs: Mapping[str, _Rung]) -> Report:
    best = Samples(rungs["best"].added_ns["summaries"])
    rows = []
    for name, rung in rungs.items():
        if not rung.start_ms:
            rows.append((name, ", ".join(RUNGS[name]), *[NOT_HERE] * 5))
            continue
        summaries, events = (Samples(rung.added_ns[mode]) for mode in _MODES)
        rows.append(
            (
                name,
                ", ".join(RUNGS[name]),
                summaries.show(),
                times(summaries.median, best.median),
                events.show(),
                f"{Samples(rung.start_ms).median:.0f}",
                f"{rung.memory_bytes / 1024:,.0f}",
            )
        )
    return Report(
        title="What a rung of the ladder costs",
        how=f"Median (middle half) of {_ROUNDS} rounds of {_CALLS:,} getppid calls, each right "
        "after a bare run of the same program; nothing drains meanwhile.",
        columns=("rung", "without", "added ns", "of best", "events: added ns", "start ms", "KiB"),
        rows=rows,
        samples={
            f"{name}, {mode}, added ns": rung.added_ns[mode]
            for name, rung in rungs.items()
            for mode in _MODES
        },
    )
