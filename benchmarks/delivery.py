"""From the kernel to subscribers in other processes, over gRPC: how many events a second, for how
much CPU, how late; and what it costs the agent that there are many subscribers.

The traced program sets the pace, so that a rate can be found at which nothing is lost.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

import psutil

from benchmarks import kernel, peers
from benchmarks.bench import ROOT, Bench, BenchError
from benchmarks.peers import PeerError
from benchmarks.report import NOT_HERE, Aim, Report, Samples, times
from coral.collectors.syscall_stats import table as syscall_table
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import Calls, RunningAgent, running_agent, wait_until

_SECONDS: Final = 2.0
_ROUNDS: Final = 3
_FULL: Final = 0  # as fast as the program can
_RATES: Final = (1_000, 100_000, 300_000, 500_000, 700_000, _FULL)
_FULL_CALLS: Final = 1_500_000
_FAN_OUT: Final = (1, 4, 16, 64)
_FAN_OUT_RATE: Final = 25_000
_SUBSCRIBER_PROCESSES: Final = 4
_LEAST_RATE: Final = 500_000
_MOST_FAN_OUT: Final = 2.0
_PEER_RATES: Final = ((100_000, 200_000), (_FULL, 300_000))
# How near to the asked rate a run has to come to count as one of that rate.
_RATE_HELD: Final = 0.97

# What a machine that has nothing else to do can bear.
_CONFIG: Final = {
    "limits": {
        "subscriber_bytes_per_second": "1GiB",
        "cpu_percent": 1000,
        "subscriber_queue_bytes": "64MiB",
        "replay_bytes": "1MiB",
    }
}
# What a row has, less the names.
_BPFTRACE: Final = """
tracepoint:raw_syscalls:sys_enter /pid == {pid} && args->id == {number}/ {{
    @start[tid] = nsecs;
}}
tracepoint:raw_syscalls:sys_exit /pid == {pid} && @start[tid]/ {{
    printf("%lld %lld %lld %d %d %d\\n", nsecs, nsecs - @start[tid], args->ret, pid, tid, args->id);
    @produced++;
    delete(@start[tid]);
}}
"""
_GETPPID: Final = syscall_table.numbers()["getppid"]
_QUIET_S: Final = 0.5
_BPFTRACE_PAGES: Final = 1024  # of its perf buffer, for each CPU
_LOST_BY_BPFTRACE: Final = re.compile(rb"Lost (\d+) events")
_LINE_OF_BPFTRACE: Final = re.compile(rb"^\d+ \d+ ", re.MULTILINE)
_PRODUCED_BY_BPFTRACE: Final = re.compile(rb"@produced: (\d+)")


@dataclass(frozen=True)
class Delivered:
    """One run: one traced program, and all its subscribers together."""

    made: int
    rows: int
    lost: int
    seconds: float  # from the program's first call to the last row's arrival
    made_seconds: float  # from its first call to its last
    agent_cpu_s: float
    reader_cpu_s: float
    wire_bytes: int
    p50_us: float = 0.0  # of the first process of subscribers
    p99_us: float = 0.0

    @property
    def rate(self) -> float:
        """Rows a second that arrived, over all subscribers."""
        return self.rows / self.seconds


@dataclass
class Runs:
    """What was measured at one rate, or with one number of subscribers."""

    rate: int
    subscribers: int = 1
    runs: list[Delivered] = field(default_factory=list)

    def samples(self, figure: Callable[[Delivered], float]) -> Samples:
        """One figure of every run."""
        return Samples([figure(run) for run in self.runs])

    @property
    def name(self) -> str:
        """As a person would say it."""
        return f"{self.rate:,}/s" if self.rate else "full speed"


async def measure(bench: Bench) -> Report:
    """The section."""
    rates = [Runs(rate) for rate in _RATES]
    fans = [Runs(_FAN_OUT_RATE, count) for count in _FAN_OUT]
    with running_agent(bench.directory / "delivery", _CONFIG) as agent:
        for turn in range(_ROUNDS):
            for one in rates:
                one.runs.append(_deliver(bench, agent, one.rate, 1))
            for one in fans:
                one.runs.append(_deliver(bench, agent, one.rate, one.subscribers))
            bench.say(f"round {turn + 1} of {_ROUNDS}: {rates[-1].runs[-1].rate:,.0f}/s")
        agent.stop()
    peer, remarks = _measure_peer(bench)
    return _report(rates, fans, peer, remarks)


def _deliver(bench: Bench, agent: RunningAgent, rate: int, subscribers: int) -> Delivered:
    count = int(rate * _SECONDS) or _FULL_CALLS
    server = psutil.Process(agent.process.pid)
    with ExitStack() as stack:
        program = stack.enter_context(paced(bench, rate, count))
        collector_id = _start(agent, program.pid)
        processes = min(subscribers, _SUBSCRIBER_PROCESSES)
        readers = [
            stack.enter_context(_reading(agent, collector_id, subscribers // processes))
            for _ in range(processes)
        ]
        before, began_at = _cpu_s(server), time.monotonic()
        program.go()
        made = program.finish()
        told = [json.loads(reader.communicate(timeout=60)[0]) for reader in readers]
        agent_cpu_s = _cpu_s(server) - before
    return Delivered(
        made=count,
        rows=sum(t["rows"] for t in told),
        lost=sum(sum(t["lost"].values()) for t in told),
        seconds=max(t["last_at_s"] for t in told) - began_at,
        made_seconds=made.ns["getppid"] / 1e9,
        agent_cpu_s=agent_cpu_s,
        reader_cpu_s=sum(t["cpu_s"] for t in told),
        wire_bytes=sum(t["wire_bytes"] for t in told),
        p50_us=told[0].get("p50_us", 0.0),
        p99_us=told[0].get("p99_us", 0.0),
    )


@contextmanager
def paced(bench: Bench, rate: int, count: int) -> Iterator[Calls]:
    """A program, waiting to make COUNT calls at RATE; ended with the block."""
    if not rate:
        with bench.calls(count) as calls:
            yield calls
        return
    calls = Calls(bench.program("paced"), rate, count)
    try:
        os.sched_setaffinity(calls.pid, {max(os.sched_getaffinity(0))})
        yield calls
    finally:
        calls.kill()


def _start(agent: RunningAgent, pid: int) -> str:
    """A session that sees getppid of one process, and ends with it."""
    answer = agent.call(
        "StartCollector",
        pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
            config={
                "pid": str(pid), "mode": "events", "include": "getppid", "until_exit": "true",
                "ring": "16MiB",
            },
        ),
    )  # fmt: skip
    if not answer.supported:
        raise BenchError(answer.error)
    return str(answer.collector_id)


@contextmanager
def _reading(
    agent: RunningAgent, collector_id: str, subscribers: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of so many subscribers, which are subscribed; ended with the block."""
    process = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "benchmarks.subscriber", agent.address, collector_id,
            str(subscribers),
        ],
        stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout
        if process.stdout.readline() != b"subscribed\n":
            raise BenchError("a subscriber ended before it was subscribed")
        yield process
    finally:
        process.kill()
        process.communicate()


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _measure_peer(bench: Bench) -> tuple[list[Delivered | None], list[str]]:
    """bpftrace at each of `_PEER_RATES`; None where it cannot be measured, and why."""
    delivered: list[Delivered | None] = []
    remarks = []
    for rate, count in _PEER_RATES:
        try:
            delivered.append(_bpftrace(bench, rate, count))
        except PeerError as error:
            delivered.append(None)
            remarks.append(f"bpftrace: cannot be measured here: {error}")
    return delivered, remarks


def _bpftrace(bench: Bench, rate: int, count: int) -> Delivered:
    """bpftrace prints each event into a pipe, which a thread of ours empties."""
    peers.require("bpftrace")
    with paced(bench, rate, count) as program:
        process = subprocess.Popen(
            ["bpftrace", "-e", _BPFTRACE.format(pid=program.pid, number=_GETPPID)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**bench.environment(), "BPFTRACE_PERF_RB_PAGES": str(_BPFTRACE_PAGES)},
        )  # fmt: skip
        pipe = _Pipe(process)
        pipe.start()
        try:
            _wait_attached(process, pipe)
            peer = psutil.Process(process.pid)
            before, began_at = _cpu_s(peer), time.monotonic()
            program.go()
            made = program.finish()
            wait_until(pipe.is_quiet, 60)
            cpu_s = _cpu_s(peer) - before
            process.send_signal(signal.SIGINT)
            process.wait(15)
        except subprocess.TimeoutExpired:
            raise PeerError("bpftrace did not end within 15 s of SIGINT") from None
        finally:
            process.kill()
            process.wait()
            pipe.join()
    produced = _PRODUCED_BY_BPFTRACE.search(pipe.text)
    return Delivered(
        made=int(produced[1]) if produced else 0,
        rows=len(_LINE_OF_BPFTRACE.findall(pipe.text)),
        lost=sum(map(int, _LOST_BY_BPFTRACE.findall(pipe.text))),
        seconds=pipe.last_at_s - began_at,
        made_seconds=made.ns["getppid"] / 1e9,
        agent_cpu_s=cpu_s,
        reader_cpu_s=pipe.cpu_s,
        wire_bytes=len(pipe.text),
    )


class _Pipe(threading.Thread):
    """Reads what a process prints, to its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__()
        assert process.stdout
        self._stdout = process.stdout
        self._chunks: list[bytes] = []
        self.last_at_s = time.monotonic()
        self.cpu_s = 0.0

    def run(self) -> None:
        began_s = time.thread_time()
        while chunk := os.read(self._stdout.fileno(), 1 << 16):
            self._chunks.append(chunk)
            if b" " in chunk and self._chunks:
                self.last_at_s = time.monotonic()
        self.cpu_s = time.thread_time() - began_s
        self._stdout.close()

    def is_quiet(self) -> bool:
        """Whether nothing has come for a while."""
        return time.monotonic() - self.last_at_s > _QUIET_S

    @property
    def text(self) -> bytes:
        """All of it so far."""
        return b"".join(self._chunks)


def _wait_attached(process: subprocess.Popen[bytes], pipe: _Pipe) -> None:
    end = time.monotonic() + 30
    while kernel.attachments(process.pid) < 2:
        if process.poll() is not None:
            raise PeerError(pipe.text.decode(errors="replace").strip() or "it ended at once")
        if time.monotonic() > end:
            raise PeerError("not attached after 30 s")


def _report(
    rates: Sequence[Runs],
    fans: Sequence[Runs],
    peer: Sequence[Delivered | None],
    remarks: Sequence[str],
) -> Report:
    one_reader = fans[0].samples(_agent_ns_a_byte).median
    rows = [_row(f"coral, 1 reader, {one.name}", one) for one in rates]
    rows += [
        _row(f"coral, {one.subscribers} reader{'s' * (one.subscribers > 1)}, {one.name}", one)
        for one in fans
    ]
    for (rate, _), run in zip(_PEER_RATES, peer, strict=True):
        name = f"bpftrace to a pipe, {Runs(rate).name}"
        rows.append(_row(name, Runs(rate, runs=[run])) if run else (name, *[NOT_HERE] * 8))
    aims = []
    if lossless := [run.rate for one in rates for run in one.runs if _is_lossless(one, run)]:
        highest = max(lossless)
        what = f"time an event at the highest rate without loss ({highest:,.0f} events/s)"
        aims.append(Aim(what, 1e9 / highest, 1e9 / _LEAST_RATE, " ns"))
    shares = [one.samples(_agent_ns_a_byte).median / one_reader for one in fans]
    of_full = fans[-1].samples(_agent_ns_a_byte).median / rates[-1].samples(_agent_ns_a_byte).median
    what = f"{fans[-1].subscribers} subscribers, agent's CPU a byte"
    aims += [
        Aim(f"{what}, of one's at the same rate of events", shares[-1], _MOST_FAN_OUT, " x"),
        Aim(f"{what}, of one's at full speed", of_full, _MOST_FAN_OUT, " x"),
    ]
    unexplained = sum(
        run.made * one.subscribers - run.rows - run.lost
        for one in (*rates, *fans)
        for run in one.runs
    )
    told = [f"coral: {unexplained} calls are neither rows nor losses"] if unexplained else []
    told.append(
        "agent's CPU for a byte delivered, of that with one subscriber: "
        + ", ".join(
            f"{one.subscribers}: {times(share, 1)}" for one, share in zip(fans, shares, strict=True)
        )
    )
    return Report(
        title="From the kernel to subscribers in other processes: each getppid, over gRPC",
        how=f"Median (middle half) of {_ROUNDS} runs of {_SECONDS:g} s or {_FULL_CALLS:,} calls, "
        "bpftrace: one. Latency is from a call's end to its row's arrival. Lost and CPU are over "
        "all subscribers; the right CPU column is the subscribers'.",
        columns=(
            "",
            "rows/s",
            "lost",
            "lossless runs",
            "CPU us a row",
            "CPU ns a byte",
            "reader us a row",
            "p50 ms",
            "p99 ms",
        ),
        rows=rows,
        aims=aims,
        remarks=[*told, *remarks],
        samples={
            f"{one.subscribers} subscribers, {one.name}, {what}": one.samples(figure).values
            for one in (*rates, *fans)
            for what, figure in _FIGURES.items()
        },
    )


def _is_lossless(one: Runs, run: Delivered) -> bool:
    """Whether nothing was lost, and the program came near to the rate that it was to make."""
    held = not one.rate or run.made / run.made_seconds >= one.rate * _RATE_HELD
    return held and run.rows == run.made * one.subscribers


def _agent_ns_a_byte(run: Delivered) -> float:
    return run.agent_cpu_s * 1e9 / max(run.wire_bytes, 1)


_FIGURES: Final[dict[str, Callable[[Delivered], float]]] = {
    "rows/s": lambda run: run.rate,
    "lost": lambda run: run.lost,
    "CPU us a row": lambda run: run.agent_cpu_s * 1e6 / max(run.rows, 1),
    "reader us a row": lambda run: run.reader_cpu_s * 1e6 / max(run.rows, 1),
    "p50 us": lambda run: run.p50_us,
    "p99 us": lambda run: run.p99_us,
}


def _row(name: str, one: Runs) -> tuple[str, ...]:
    lossless = sum(run.rows == run.made * one.subscribers for run in one.runs)
    p50_us = one.samples(lambda run: run.p50_us).median
    return (
        name,
        one.samples(lambda run: run.rate).show(),
        f"{one.samples(lambda run: 1 - run.rows / (run.made * one.subscribers)).median:.1%}",
        f"{lossless} of {len(one.runs)}",
        one.samples(_FIGURES["CPU us a row"]).show(2),
        f"{one.samples(_agent_ns_a_byte).median:.1f}",
        f"{one.samples(_FIGURES['reader us a row']).median:.2f}",
        f"{p50_us / 1e3:.1f}" if p50_us else NOT_HERE,
        f"{one.samples(lambda run: run.p99_us).median / 1e3:.1f}" if p50_us else NOT_HERE,
    )
