"""What a profile at 99 Hz costs the process and the machine, and how soon it has names.

The profiled program works all the time and tells how long its units of work took. What a variant
adds to them is measured against a bare run right before it.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Final, NamedTuple

from benchmarks import kernel, profilers
from benchmarks.bench import ROOT, Bench, BenchError, start
from benchmarks.lag import lateness_ms, probed_agent
from benchmarks.lagging_agent import read_lags
from benchmarks.memory import peak_rss_mb, rss_mb
from benchmarks.peers import PeerError
from benchmarks.profilers import FREQUENCY_HZ, Profiler
from benchmarks.report import NOT_HERE, Aim, Report, Samples, not_measured
from benchmarks.unwinding import NODE, PYTHON
from coral.client import AgentClient
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import RunningAgent

_ROUNDS: Final = 3
_WATCHED_S: Final = 10.0  # two intervals
_BARE_S: Final = 1.5
_NAMES_ROUNDS: Final = 3
_BATCHES: Final = 3  # until memory is read
_ARRIVAL_TIMEOUT_S: Final = 30.0
_MOST_COPIED: Final = 0.5  # percent of one CPU, in all, of a target without frame pointers
_MOST_BY_FRAME_POINTERS: Final = 0.3
_MOST_NODE_MB: Final = 120.0
_NO_LIMIT: Final = {"limits": {"cpu_percent": 1000}}
_KIND: Final = pb.EBPF_COLLECTOR_KIND_CPU_PROFILE


class Work(NamedTuple):
    """What the program did since it was asked before, as benchmarks/busy.c tells it: CPU time of
    all units; of the undisturbed, and what of that exceeds the time that they take."""

    total_ns: int
    good_ns: int
    excess_ns: int

    @property
    def excess(self) -> float:
        """The part of its CPU time that is not its own work."""
        return self.excess_ns / self.good_ns


@dataclass(frozen=True)
class Target:
    """How the program is built, and how many CPUs it keeps busy."""

    name: str
    threads: int
    option: str


_ONE: Final = Target("1 CPU, without frame pointers", 1, "-fomit-frame-pointer")
_TWO: Final = Target("2 CPUs, without frame pointers", 2, "-fomit-frame-pointer")
_WITH: Final = Target("2 CPUs, with frame pointers", 2, "-fno-omit-frame-pointer")


class Busy:
    """benchmarks/busy.c, at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def work(self) -> Work:
        """What it did since this was called before."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Work(*map(int, self._process.stdout.readline().split()))

    def enter_kernel(self) -> None:
        """Has it spend 0.3 s of CPU time in the kernel, soon."""
        assert self._process.stdin
        self._process.stdin.write("kernel\n")
        self._process.stdin.flush()

    async def work_for(self, seconds: float) -> Work:
        """What it does in the next SECONDS."""
        self.work()
        await asyncio.sleep(seconds)
        return self.work()


@contextmanager
def _busy(bench: Bench, target: Target) -> Iterator[Busy]:
    program = bench.directory / f"busy{target.option}"
    if not program.exists():
        source = ROOT / "benchmarks/busy.c"
        command: list[str | Path] = ["cc", "-O2", target.option, "-pthread", source, "-o", program]
        subprocess.run(command, check=True)
    process = subprocess.Popen(
        [program, str(target.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise BenchError("the program to profile does not start")
        yield Busy(process)
    finally:
        process.kill()
        process.communicate()


@dataclass
class Seen:
    """The process of a profiler, and what it took besides its work: good after its block."""

    pid: int
    rss_mb: float = 0.0
    shown_s: float | None = None  # CPU time after its stop


Watching = Callable[[Busy], AbstractAsyncContextManager[Seen]]


@dataclass
class Variant:
    """One way to profile one target, and what it was measured to cost, by round."""

    target: Target
    tool: str
    watching: Watching
    slowdown: list[float] = field(default_factory=list)  # percent of one CPU
    own: list[float] = field(default_factory=list)  # percent of one CPU
    shown_ms: list[float] = field(default_factory=list)  # for each second profiled
    rss_mb: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # CPUs that the target ran on
    failure: str = ""

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.target.name}: {self.tool}"

    @property
    def in_all(self) -> Samples:
        """Percent of one CPU that the profile takes while it runs, by round."""
        return Samples([a + b for a, b in zip(self.slowdown, self.own, strict=True)])

    async def measure(self, bench: Bench) -> None:
        """One pair, of one process: bare, then watched."""
        with _busy(bench, self.target) as busy:
            bare = await busy.work_for(_BARE_S)
            async with self.watching(busy) as seen:
                before_ns, began_s = kernel.cpu_ns(seen.pid), time.monotonic()
                work = await busy.work_for(_WATCHED_S)
                own_ns = kernel.cpu_ns(seen.pid) - before_ns
                took_s = time.monotonic() - began_s
        self.slowdown.append(100 * self.target.threads * (work.excess - bare.excess))
        self.own.append(100 * own_ns / took_s / 1e9)
        self.busy.append(work.total_ns / took_s / 1e9)
        self.rss_mb.append(seen.rss_mb)
        if seen.shown_s is not None:
            self.shown_ms.append(1e3 * seen.shown_s / _WATCHED_S)


async def measure(bench: Bench) -> Report:
    """The section on cost: everything in turn."""
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(bench.agent(cpu_percent=1000))
        client = await stack.enter_async_context(AgentClient(agent.address))
        variants = _variants(bench, agent, client)
        for turn in range(_ROUNDS):
            # A different one is first each time, so that no variant always follows the same other.
            first = turn % len(variants)
            for variant in variants[first:] + variants[:first]:
                if not variant.failure:
                    await _try(bench, variant)
            shown = ", ".join(
                f"{v.in_all.values[-1]:.2f}" for v in variants if v.tool.startswith("coral")
            )
            bench.say(f"round {turn + 1} of {_ROUNDS}: coral in all, % of a CPU: {shown}")
    return _report(variants)


def _variants(bench: Bench, agent: RunningAgent, client: AgentClient) -> list[Variant]:
    def ours(target: Target, tool: str, **config: str) -> Variant:
        return Variant(target, tool, lambda busy: _ours(agent, client, busy, **config))

    def other(target: Target, profiler: Profiler) -> Variant:
        return Variant(target, profiler.name, lambda busy: _other(bench, profiler, busy))

    return [
        ours(_ONE, "coral"),
        other(_ONE, profilers.PERF_DWARF),
        ours(_TWO, "coral"),
        other(_TWO, profilers.PERF_DWARF),
        ours(_WITH, "coral"),
        ours(_WITH, "coral, stack_bytes=0", stack_bytes="0"),
        other(_WITH, profilers.PERF),
        other(_WITH, profilers.BCC),
        other(_WITH, profilers.BPFTRACE),
    ]


async def _try(bench: Bench, variant: Variant) -> None:
    try:
        await variant.measure(bench)
    except PeerError as error:
        variant.failure = str(error)
        bench.say(f"{variant.name} cannot be measured here: {error}")


@asynccontextmanager
async def _ours(
    agent: RunningAgent, client: AgentClient, busy: Busy, **config: str
) -> AsyncIterator[Seen]:
    """A session whose first samples of the kernel have arrived: what comes once for each, such as
    reading symbols, is over."""
    seen, arrived = Seen(agent.process.pid), asyncio.Event()
    started = await start(client, _KIND, pid=str(busy.pid), **config)
    async with client.subscribe(started.collector_id) as stream:

        async def read() -> None:
            async for batch in stream:
                if any(row.in_kernel for row in batch.message.cpu_profile):
                    arrived.set()

        reading = asyncio.create_task(read())
        busy.enter_kernel()
        try:
            async with asyncio.timeout(_ARRIVAL_TIMEOUT_S):
                await arrived.wait()
            yield seen
            seen.rss_mb = rss_mb(seen.pid)
        finally:
            await client.stop(started.collector_id)
            await reading


@asynccontextmanager
async def _other(bench: Bench, profiler: Profiler, busy: Busy) -> AsyncIterator[Seen]:
    with profilers.running(bench, profiler, busy.pid) as cost:
        seen = Seen(cost.pid)
        yield seen
    seen.rss_mb, seen.shown_s = cost.rss_mb, cost.shown_s


def _report(variants: Sequence[Variant]) -> Report:
    by_name = {variant.name: variant for variant in variants}
    copied = by_name[f"{_TWO.name}: coral"]
    chained = by_name[f"{_WITH.name}: coral, stack_bytes=0"]
    aims = [
        Aim(f"{copied.name}, in all", copied.in_all.median, _MOST_COPIED, " %"),
        Aim(f"{chained.name}, in all", chained.in_all.median, _MOST_BY_FRAME_POINTERS, " %"),
    ]
    return Report(
        title=f"Cost of a profile at {FREQUENCY_HZ} Hz, in percent of one CPU",
        how=f"Median (middle half) of {_ROUNDS} rounds, {_WATCHED_S:g} s each, right after a bare "
        "run of the same process. Slowdown: the part of the program's CPU time that is not its own "
        "work, less that of the bare run, times its CPUs. Own: the profiler's process; coral "
        "unwinds, names and sends each second. Shown: CPU time after the stop until stacks with "
        "names are there, for each second profiled. CPUs: those that the program had.",
        columns=("", "CPUs", "slowdown %", "own %", "in all %", "shown ms", "RSS MB"),
        rows=[_row(variant) for variant in variants],
        aims=aims,
        remarks=not_measured({v.name: v.failure for v in variants if v.failure}),
        samples={
            f"{variant.name}, {what} %": values
            for variant in variants
            for what, values in (("slowdown", variant.slowdown), ("own", variant.own))
        },
    )


def _row(variant: Variant) -> tuple[str, ...]:
    if not variant.own:
        return (variant.name, *[NOT_HERE] * 6)
    return (
        variant.name,
        f"{Samples(variant.busy).median:.2f}",
        Samples(variant.slowdown).show(2),
        Samples(variant.own).show(2),
        variant.in_all.show(2),
        Samples(variant.shown_ms).show(0) if variant.shown_ms else "0",
        f"{Samples(variant.rss_mb).median:.0f}",
    )


async def measure_names(bench: Bench) -> Report:
    """The section on names: each time an agent that has never profiled, and no cache."""
    programs: dict[str, tuple[Sequence[str], str]] = {
        "CPython": (["/usr/bin/python3", "-P", "-c", PYTHON], "_PyEval_EvalFrameDefault")
    }
    if node := which("node"):
        programs["Node"] = ([node, "-e", NODE], "v8::internal::")
    names_ms: dict[str, list[float]] = {name: [] for name in programs}
    cpu_ms: dict[str, list[float]] = {name: [] for name in programs}
    mb: dict[str, list[float]] = {name: [] for name in programs}
    peak_mb: dict[str, list[float]] = {name: [] for name in programs}
    turn_ms: dict[str, list[float]] = {name: [] for name in programs}
    late_ms: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(_NAMES_ROUNDS):
        for name, (command, function) in programs.items():
            with _ready(command) as pid, bench.agent(cpu_percent=1000) as agent:
                figures = await _first_names(agent, pid, function)
                peak_mb[name].append(peak_rss_mb(agent.process.pid))
            for of, value in zip((names_ms, cpu_ms, mb), figures, strict=True):
                of[name].append(value)
            # Another agent, because the probe itself takes CPU time.
            with _ready(command) as pid, probed_agent(bench, _NO_LIMIT) as (agent, lags):
                before = len(read_lags(lags))
                await _first_names(agent, pid, function)
                late_s, busy_s = read_lags(lags)[before:].T
                turn_ms[name].append(float(busy_s.max() * 1e3))
                late_ms[name].append(float(lateness_ms(late_s).max()))
                agent.stop()
        bench.say(f"round {turn + 1} of {_NAMES_ROUNDS}")
    aims = []
    if "Node" in programs:
        node_mb = Samples(mb["Node"]).median
        aims.append(Aim("agent with Node's symbols", node_mb, _MOST_NODE_MB, " MB"))
    return Report(
        title="From the request to the first names",
        how=f"Median (middle half) of {_NAMES_ROUNDS} rounds; interval=100ms, an agent that has "
        "profiled nothing before, no cache on disk. CPU: of the agent until then. RSS: after "
        f"{_BATCHES} more batches, in MB of 10^6 bytes; peak: the most there was until then. "
        "Longest turn: the most CPU time of the event loop's thread between two callbacks, due "
        "each millisecond; worst delay: of such a callback, other processes' work included.",
        columns=(
            "",
            "ms",
            "agent's CPU ms",
            "RSS MB",
            "peak MB",
            "longest turn, CPU ms",
            "worst delay ms",
        ),
        rows=[
            (
                name,
                Samples(names_ms[name]).show(),
                Samples(cpu_ms[name]).show(),
                Samples(mb[name]).show(1),
                Samples(peak_mb[name]).show(1),
                Samples(turn_ms[name]).show(1),
                Samples(late_ms[name]).show(1),
            )
            for name in programs
        ],
        aims=aims,
        samples={f"{name}, ms": values for name, values in names_ms.items()},
    )


@contextmanager
def _ready(command: Sequence[str | Path]) -> Iterator[int]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or process.stdout.readline() != b"ready\n":
                raise BenchError(f"{command[0]} does not start")
            yield process.pid
        finally:
            process.kill()


async def _first_names(agent: RunningAgent, pid: int, function: str) -> tuple[float, float, float]:
    """Milliseconds until a function that begins with FUNCTION arrives, CPU milliseconds of the
    agent until then, and its memory in MB some batches later."""
    async with AgentClient(agent.address) as client, asyncio.timeout(_ARRIVAL_TIMEOUT_S):
        began, before_ns = time.monotonic(), kernel.cpu_ns(agent.process.pid)
        started = await start(client, _KIND, pid=str(pid), interval="100ms")
        names: tuple[float, float] | None = None
        later = 0
        async with client.subscribe(started.collector_id) as stream:
            async for batch in stream:
                later += names is not None
                if later > _BATCHES:
                    break
                if names is None and any(
                    frame.startswith(function)
                    for row in batch.message.cpu_profile
                    for frame in row.stack
                ):
                    used_ns = kernel.cpu_ns(agent.process.pid) - before_ns
                    names = (time.monotonic() - began) * 1e3, used_ns / 1e6
        memory = rss_mb(agent.process.pid)
        await client.stop(started.collector_id)
    if names is None:
        raise BenchError("the session ended before there were names")
    return (*names, memory)
