"""From the kernel to numpy, in one process and without gRPC: a record for each system call.

Ours is the collector itself, drained by a thread as the agent drains it; then our two readers with
nothing behind them, at the same job. Beside them bcc's two buffers, each with a callback that does
nothing but count.
"""

from __future__ import annotations

import json
import select
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from benchmarks import peers
from benchmarks.bench import ROOT, Bench
from benchmarks.peers import PeerError
from benchmarks.report import NOT_HERE, Aim, Report, Samples, times
from build_hook import clang_command
from coral import bpf
from coral.bpf.buffers.account import Account
from coral.bpf.buffers.records import MOST_BYTES, drain_whole
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from tests.support import Calls

ROUNDS: Final = 3
_CALLS: Final = 2_000_000
_RING_BYTES: Final = 4 << 20  # the option's default; the peers get as much
_INTERVAL_S: Final = 0.018  # as the longest of `collectors.pacing`
_MOST_CPU_US: Final = 0.15
_LEAST_RATE: Final = 1_000_000
_SYSTEM_PYTHON: Final = "/usr/bin/python3"  # Debian's bcc is there, and nowhere else
_GETPPID: Final = syscall_table.numbers()["getppid"]


@dataclass(frozen=True)
class Drained:
    """One run: what came of one program's calls."""

    produced: int  # as the kernel counts
    received: int
    lost_told: int  # what the reader was told that it lost
    cpu_s: float  # of the thread that reads
    seconds: float  # from the program's first call to its last
    call_ns: float

    @property
    def cpu_us(self) -> float:
        """CPU of the reading thread for each event that it got."""
        return self.cpu_s * 1e6 / max(self.received, 1)

    @property
    def rate(self) -> float:
        """Events received a second."""
        return self.received / self.seconds


@dataclass
class Way:
    """One way from the kernel to Python."""

    name: str
    run: Callable[[Bench, int], Drained]
    calls: int
    runs: list[Drained] = field(default_factory=list)
    failure: str = ""

    def samples(self, figure: Callable[[Drained], float]) -> Samples:
        """One figure of every run."""
        return Samples([figure(run) for run in self.runs])


async def measure(bench: Bench) -> Report:
    """The section: every way in turn, ROUNDS times."""
    ways = [
        Way("coral: ring, in bulk to numpy", _ours, _CALLS),
        Way("ring buffer, ours, the drain alone", _alone(perf=False), _CALLS),
        Way("perf buffer, ours, the drain alone", _alone(perf=True), _CALLS),
        Way("bcc: ring buffer, a callback an event", _bcc("ring"), _CALLS // 2),
        Way("bcc: perf buffer, a callback an event", _bcc("perf"), _CALLS // 8),
    ]
    for turn in range(ROUNDS):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            if way.failure:
                continue
            try:
                way.runs.append(way.run(bench, way.calls))
            except PeerError as error:
                way.failure = str(error)
        bench.say(f"round {turn + 1} of {ROUNDS}: {_progress(ways)}")
    return _report(ways)


def _ours(bench: Bench, count: int) -> Drained:
    with bench.calls(count) as calls:
        collector = SyscallStatsCollector.create(
            {
                "pid": str(calls.pid),
                "mode": "events",
                "include": "getppid",
                "ring": str(_RING_BYTES),
            },
            None,
            bpf.probe(),
        )
        try:
            collector.open()
            ring = collector.records
            assert ring

            def drain() -> tuple[int, int]:
                rows = lost = 0
                while True:  # in parts, as the agent does
                    batch = collector.drain()
                    rows, lost = rows + len(batch.rows), lost + sum(batch.losses.values())
                    if ring.pending_bytes < MOST_BYTES:
                        return rows, lost

            with _Draining(drain, ring.wakeup, _INTERVAL_S) as draining:
                seconds, call_ns = _run(calls, count)
        finally:
            collector.close()
    return Drained(count, draining.rows, draining.lost, draining.cpu_s, seconds, call_ns)


def _alone(*, perf: bool) -> Callable[[Bench, int], Drained]:
    def run(bench: Bench, count: int) -> Drained:
        compiled = bench.directory / "drain.bpf.o"
        if not compiled.exists():
            source = ROOT / "benchmarks/drain.bpf.c"
            subprocess.run(clang_command(source, compiled), check=True)
        with (
            bench.calls(count) as calls,
            bpf.BpfObject(
                compiled,
                programs=("drain_enter", "drain_exit"),
                options={
                    "wanted_tgid": calls.pid,
                    "wanted_nr": _GETPPID,
                    "records_in_ring": not perf,
                },
                map_entries={} if perf else {"rings": _RING_BYTES},
                without_maps=("rings",) if perf else ("perfs", "record_drafts"),
            ) as it,
            _reader(it, perf=perf) as reader,
        ):
            account = Account(it.map("accounts"), 0, it.btf.enum("loss"))
            it.attach()
            with _Draining(
                lambda: (len(drain_whole(reader)["call"]), 0), reader.wakeup, _INTERVAL_S
            ) as draining:
                seconds, call_ns = _run(calls, count)
            refused = account.read().lost.get("BUFFER_FULL", 0)
            lost = reader.lost if isinstance(reader, bpf.PerfReader) else refused
        return Drained(count, draining.rows, lost, draining.cpu_s, seconds, call_ns)

    return run


def _reader(it: bpf.BpfObject, *, perf: bool) -> bpf.PerfReader | bpf.RingReader:
    kinds = it.record_kinds({"call": "ended_ns"})
    if perf:
        return it.perf("perfs", kinds, bytes_per_cpu=_RING_BYTES)
    return it.ring("rings", kinds, ring_bytes=_RING_BYTES)


class _Draining(threading.Thread):
    """Drains as a collector's `run` does: at its interval, or when a program asks for it. DRAIN
    returns how many rows came, and how many it was told were lost. The thread ends with the block,
    however that is left, after a last drain: the buffer is closed then."""

    def __init__(
        self, drain: Callable[[], tuple[int, int]], wakeup: select.epoll, interval_s: float
    ) -> None:
        super().__init__()
        self._drain = drain
        self._wakeup = wakeup
        self._interval_s = interval_s
        self._finishing = threading.Event()
        self.rows = self.lost = 0
        self.cpu_s = 0.0

    def run(self) -> None:
        began_s = time.thread_time()
        finishing = False
        while not finishing:
            finishing = self._finishing.is_set()  # before the drain, which is then the last
            rows, lost = self._drain()
            self.rows += rows
            self.lost += lost
            if not finishing:
                self._wakeup.poll(self._interval_s)
        self.cpu_s = time.thread_time() - began_s

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finishing.set()
        self.join()


def _bcc(way: str) -> Callable[[Bench, int], Drained]:
    def run(bench: Bench, count: int) -> Drained:
        peers.require(_SYSTEM_PYTHON)
        errors = bench.directory / "peer.err"
        with bench.calls(count) as calls, errors.open("wb") as stderr:
            process = subprocess.Popen(
                [
                    _SYSTEM_PYTHON, ROOT / "benchmarks/bcc_events.py", str(calls.pid), way,
                    str(_GETPPID), str(_RING_BYTES),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                text=True, env=bench.environment(),
            )  # fmt: skip
            try:
                assert process.stdout
                if process.stdout.readline() != "attached\n":
                    process.wait()
                    raise PeerError(peers.complaint(errors))
                seconds, call_ns = _run(calls, count)
                out, _ = process.communicate("\n", timeout=60)
            finally:
                process.kill()
                process.communicate()
        told = json.loads(out)
        return Drained(
            told["produced"], told["received"], told["told_lost"], told["cpu_s"], seconds, call_ns
        )

    return run


def _run(calls: Calls, count: int) -> tuple[float, float]:
    began_at = time.monotonic()
    calls.go()
    call_ns = calls.finish().ns["getppid"] / count
    return time.monotonic() - began_at, call_ns


def _progress(ways: list[Way]) -> str:
    return ", ".join(
        f"{way.name.split(',')[0]} {way.runs[-1].cpu_us:.2f} us" for way in ways if way.runs
    )


def _report(ways: list[Way]) -> Report:
    ours = ways[0]
    cpu_us = ours.samples(lambda run: run.cpu_us)
    lossless = [run.rate for run in ours.runs if run.received == run.produced]
    aims = [Aim("coral, CPU an event", cpu_us.median, _MOST_CPU_US, " us")]
    if lossless:
        # The greatest: the rate is the traced program's own, and others slow that down.
        rate = max(lossless)
        what = f"coral, time an event at the highest rate without loss ({rate:,.0f} events/s)"
        aims.append(Aim(what, 1e9 / rate, 1e9 / _LEAST_RATE, " ns"))
    unexplained = sum(run.produced - run.received - run.lost_told for run in ours.runs)
    remarks = [f"{way.name}: cannot be measured here: {way.failure}" for way in ways if way.failure]
    if unexplained:
        remarks.append(f"coral: {unexplained} events are neither rows nor losses")
    return Report(
        title="From the kernel to Python: a record for each getppid",
        how=f"Median (middle half) of {ROUNDS} runs at the program's full speed, buffers of "
        f"{_RING_BYTES >> 20} MiB. CPU is the reading thread's; produced is counted in the kernel.",
        columns=(
            "",
            "us of CPU an event",
            "of coral's",
            "events/s got",
            "lost",
            "told",
            "ns a call",
        ),
        rows=[_row(way, cpu_us) for way in ways],
        aims=aims,
        remarks=remarks,
        samples={
            f"{way.name}, {what}": way.samples(figure).values
            for way in ways
            for what, figure in _FIGURES.items()
        },
    )


_FIGURES: Final[dict[str, Callable[[Drained], float]]] = {
    "us of CPU an event": lambda run: run.cpu_us,
    "events/s": lambda run: run.rate,
    "produced": lambda run: run.produced,
    "received": lambda run: run.received,
    "ns a call": lambda run: run.call_ns,
}


def _row(way: Way, reference: Samples) -> tuple[str, ...]:
    if not way.runs:
        return (way.name, *[NOT_HERE] * 6)
    cpu_us = way.samples(lambda run: run.cpu_us)
    return (
        way.name,
        cpu_us.show(3),
        times(cpu_us.median, reference.median),
        way.samples(lambda run: run.rate).show(),
        f"{way.samples(lambda run: 1 - run.received / run.produced).median:.1%}",
        f"{way.samples(lambda run: run.lost_told / run.produced).median:.1%}",
        way.samples(lambda run: run.call_ns).show(),
    )
