"""From the request to start a collector to its first event at a subscriber, beside tools that are
started for each look: from the start of their process to their first event."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from benchmarks import peers
from benchmarks.bench import ENDLESS_CALLS, ROOT, Bench, start_syscall_stats
from benchmarks.peers import PeerError
from benchmarks.report import NOT_HERE, Aim, Report, Samples, not_measured, times
from coral.client import AgentClient, Batch

TIMES: Final = 20
PEER_TIMES: Final = 5
FRESH_AGENTS: Final = 3
_MOST_MS: Final = 50.0
_OURS: Final = "coral: request to first event at the subscriber"
_SYSTEM_PYTHON: Final = "/usr/bin/python3"  # Debian's bcc is there, and nowhere else
_FIRST_CALL: Final = (
    'tracepoint:raw_syscalls:sys_enter /pid == {pid}/ {{ printf("first\\n"); exit(); }}'
)


@dataclass(frozen=True)
class Start:
    """One start of ours, in milliseconds from the request."""

    attached_ms: float
    first_event_ms: float


async def measure(bench: Bench) -> Report:
    """The section."""
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    with bench.calls(ENDLESS_CALLS) as target:
        target.go()
        await _measure_ours(bench, target.pid, samples)
        for name, measure_once in _PEERS.items():
            try:
                for _ in range(PEER_TIMES):
                    for what, ms in measure_once(bench, target.pid).items():
                        samples.setdefault(what, []).append(ms)
            except PeerError as error:
                reasons[name] = str(error)
            bench.say(f"{name}: {reasons.get(name) or 'done'}")
    ours = Samples(samples[_OURS])
    rows: list[tuple[str, ...]] = [
        (name, Samples(values).show(), str(len(values)), times(Samples(values).median, ours.median))
        for name, values in samples.items()
    ]
    rows += [(name, *[NOT_HERE] * 3) for name in reasons]
    return Report(
        title="From a request to the first event, in ms",
        how="Median (middle half). The target runs getppid all the time. Coral's client and agent "
        "are two processes; a peer is started anew each time.",
        columns=("", "ms", "times", "of coral's"),
        rows=rows,
        aims=(Aim(f"{_OURS}, median of {TIMES}", ours.median, _MOST_MS, " ms"),),
        remarks=not_measured(reasons),
        samples={f"{name}, ms": values for name, values in samples.items()},
    )


async def _measure_ours(bench: Bench, pid: int, samples: dict[str, list[float]]) -> None:
    fresh, process = [], []
    for _ in range(FRESH_AGENTS):
        began_at = time.perf_counter()
        with bench.agent() as agent:
            process.append(_ms_since(began_at))
            async with AgentClient(agent.address) as client:
                fresh.append(await _start(client, pid))
    with bench.agent() as agent:
        async with AgentClient(agent.address) as client:
            starts = [await _start(client, pid) for _ in range(TIMES)]
    bench.say(f"coral: {TIMES} starts, the longest {max(s.first_event_ms for s in starts):.0f} ms")
    samples[_OURS] = [start.first_event_ms for start in starts]
    samples["coral: request to answer, attached"] = [start.attached_ms for start in starts]
    samples["coral: the same, an agent's first request"] = [s.first_event_ms for s in fresh]
    samples["coral: start of the agent's process to ready"] = process


async def _start(client: AgentClient, pid: int) -> Start:
    began_at = time.perf_counter()
    started = await start_syscall_stats(client, pid)
    attached_ms = _ms_since(began_at)
    async with client.subscribe(started.collector_id) as stream:
        await _first_rows(stream)
        first_event_ms = _ms_since(began_at)
    await client.stop(started.collector_id)
    return Start(attached_ms, first_event_ms)


async def _first_rows(stream: AsyncIterator[Batch]) -> None:
    async for batch in stream:
        if batch.message.syscall_stats:
            return
    raise AssertionError("the stream ended without an event")


def _bcc(bench: Bench, pid: int) -> dict[str, float]:
    began_at = time.perf_counter()
    with bcc_program(bench, pid) as (_, told):
        return {
            "bcc: compile, load and attach, Python up": told.attached_after_s * 1000,
            "bcc: start of its process to first event": (told.at - began_at) * 1000,
        }


def _bpftrace(bench: Bench, pid: int) -> dict[str, float]:
    command = ["bpftrace", "-e", _FIRST_CALL.format(pid=pid)]
    began_at = time.perf_counter()
    with _speaking(bench, command, "first") as (_, _, at):
        return {"bpftrace: start of its process to first event": (at - began_at) * 1000}


def _syscount(bench: Bench, pid: int) -> dict[str, float]:
    began_at = time.perf_counter()
    with peers.running(bench, peers.LIBBPF_SYSCOUNT, pid):
        return {"libbpf-tools syscount: start of its process to attached": _ms_since(began_at)}


_PEERS: Final[dict[str, Callable[[Bench, int], dict[str, float]]]] = {
    "bcc": _bcc,
    "bpftrace": _bpftrace,
    "libbpf-tools syscount": _syscount,
}


@dataclass(frozen=True)
class Told:
    """What bcc_program.py says once it has seen a call, and when it said it."""

    attached_after_s: float
    at: float


@contextmanager
def bcc_program(bench: Bench, pid: int) -> Iterator[tuple[int, Told]]:
    """bcc at the same job, in a process of its own: its id and what it told. Raises `PeerError`."""
    command = [_SYSTEM_PYTHON, str(ROOT / "benchmarks/bcc_program.py"), str(pid)]
    with _speaking(bench, command, '{"attached') as (process_id, line, at):
        yield process_id, Told(json.loads(line)["attached_after_s"], at)


@contextmanager
def _speaking(bench: Bench, command: list[str], word: str) -> Iterator[tuple[int, str, float]]:
    """A process until it prints a line that begins with WORD: its id, the line, and when. It is
    ended with the block."""
    peers.require(command[0])
    errors = bench.directory / "peer.err"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=bench.environment(),
        )
    try:
        assert process.stdout
        line = _line_that_begins(process.stdout, word, errors)
        yield process.pid, line, time.perf_counter()
    finally:
        process.kill()
        process.communicate()


def _line_that_begins(stdout: IO[str], word: str, errors: Path) -> str:
    for line in stdout:
        if line.startswith(word):
            return line
    raise PeerError(peers.complaint(errors) or "it ended without a word")


def _ms_since(began_at: float) -> float:
    return (time.perf_counter() - began_at) * 1000
