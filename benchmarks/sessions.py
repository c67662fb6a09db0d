"""What many sessions at once cost: a process that none of them watches, one that all watch, and the
start of one more.

Two kinds take turns while they watch another process: every second session is of `tcp_metrics`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.bench import Bench
from benchmarks.empty import Empty, attached
from benchmarks.report import Aim, Report, Samples
from coral import bpf
from coral.collectors.contract import Collector
from coral.collectors.registry import COLLECTORS
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from tests.support import at_work

_ROUNDS: Final = 5
_RUNS, _CALLS = 500, 2_000
_UNWATCHED: Final = (1, 8, 32)
_WATCHED: Final = (1, 2, 4, 8)
_STARTS: Final = 20
_EMPTY: Final = "two empty programs"
_MOST_UNWATCHED_NS: Final = 150.0
_MOST_BY_EIGHT_NS: Final = 600.0
_MOST_START_MS: Final = 5.0


async def measure(bench: Bench) -> Report:
    """The section."""
    program = bench.program("sessions", "benchmarks")
    added: dict[str, list[float]] = {}
    bare: list[float] = []
    with _waiting(program) as other:
        for turn in range(_ROUNDS):
            bare.append(_call_ns(program, (), watched=False))
            variants = [(f"unwatched, {n} sessions", n, False) for n in _UNWATCHED]
            variants += [(f"watched by {n}", n, True) for n in _WATCHED]
            with attached(bench, Empty.AT_CALLS):
                added.setdefault(_EMPTY, []).append(_call_ns(program, (), watched=False) - bare[-1])
            for name, count, watched in variants:
                pids = [other.pid] * count
                cost_ns = _call_ns(program, pids, watched=watched) - bare[-1]
                added.setdefault(name, []).append(cost_ns)
            bench.say(f"round {turn + 1} of {_ROUNDS}")
        starts = _starts_ms(other.pid)
    best = {name: min(values) for name, values in added.items()}
    return Report(
        title="Many sessions at once, in ns added to a getppid",
        how=f"The least of {_ROUNDS} rounds, each the fastest of {_RUNS} runs of {_CALLS:,} calls; "
        f"bare: {min(bare):.0f} ns. Every second unwatching session is of tcp_metrics.",
        columns=("", "added, least", "of empty", "median (middle half)"),
        rows=[
            (name, f"{ns:.0f}", f"{ns / best[_EMPTY]:.2f} x", Samples(added[name]).show())
            for name, ns in best.items()
        ],
        aims=(
            *(
                Aim(f"unwatched, {n} sessions", best[f"unwatched, {n} sessions"],
                    _MOST_UNWATCHED_NS, " ns")
                for n in _UNWATCHED
            ),
            Aim("watched by 8", best["watched by 8"], _MOST_BY_EIGHT_NS, " ns"),
            Aim("the start of one more, median", Samples(starts).median, _MOST_START_MS, " ms"),
        ),
        remarks=(f"the start of one more, in ms: {Samples(starts).show(1)}",),
        samples={**{f"{name}, ns": v for name, v in added.items()}, "start, ms": starts},
    )  # fmt: skip


@contextmanager
def _waiting(program: Path) -> Iterator[subprocess.Popen[str]]:
    process: subprocess.Popen[str] = subprocess.Popen(
        [program, str(_RUNS), str(_CALLS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _call_ns(program: Path, pids: Sequence[int], *, watched: bool) -> float:
    """A call of a process that is WATCHED by as many sessions as there are PIDS, or while these
    watch PIDS."""
    with _waiting(program) as process, ExitStack() as sessions:
        for number, pid in enumerate(pids):
            sessions.enter_context(
                at_work(_session(process.pid, 0) if watched else _session(pid, number))
            )
        out, _ = process.communicate("x")
    return float(out)


def _session(pid: int, number: int) -> Collector:
    kinds = list(COLLECTORS.values())
    return kinds[number % len(kinds)].create({"pid": str(pid)}, None, bpf.probe())


def _starts_ms(pid: int) -> list[float]:
    """Starts of a session while there is another one of its kind."""
    taken: list[float] = []

    def start() -> Any:
        return at_work(SyscallStatsCollector.create({"pid": str(pid)}, None, bpf.probe()))

    with start() as other:
        other.drain()  # from then on, maps wait for the next
        for _ in range(_STARTS):
            time.sleep(0.1)  # they do not come all at once
            collector = SyscallStatsCollector.create({"pid": str(pid)}, None, bpf.probe())
            began_s = time.perf_counter()
            collector.open()
            taken.append((time.perf_counter() - began_s) * 1e3)
            collector.drain()
            collector.close()
    return taken
