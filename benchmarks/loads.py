"""Loads that callers put on an agent, each for the duration of a block. Shared by `loop_lag` and
`soak`; what they cost the agent is measured elsewhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

from benchmarks.bench import ENDLESS_CALLS, ROOT, Bench, BenchError, start, start_syscall_stats
from coral.client import AgentClient, AgentError
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import Calls, RunningAgent

# A request may have 64 KiB; its frame and its other fields need a few of them.
_LARGEST_BYTES: Final = (64 << 10) - 128
_PID: Final = "4000000"  # above the kernel's greatest


@asynccontextmanager
async def repeating(
    action: Callable[[], Awaitable[object]], per_second: float
) -> AsyncIterator[None]:
    """Does ACTION at most PER_SECOND times a second, one after another, in the background. What it
    raises is raised at the end of the block."""

    async def repeat() -> None:
        while True:
            await asyncio.gather(action(), asyncio.sleep(1 / per_second))

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


@asynccontextmanager
async def starts(client: AgentClient, pid: int, per_second: float) -> AsyncIterator[None]:
    """Starts and stops a session, again and again."""

    async def start_and_stop() -> None:
        started = await start_syscall_stats(client, pid)
        await client.stop(started.collector_id)

    async with repeating(start_and_stop, per_second):
        yield


@asynccontextmanager
async def scrapes(agent: RunningAgent, count: int, per_second: float) -> AsyncIterator[None]:
    """COUNT scrapers at a time, each on a new connection every time."""
    host, _, port = agent.metrics.rpartition(":")

    async def scrape() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            await reader.read()
        finally:
            writer.close()
        if b" 200 " not in status:
            raise BenchError(f"a scrape was answered with {status!r}")

    async def scrape_all() -> None:
        await asyncio.gather(*(scrape() for _ in range(count)))

    async with repeating(scrape_all, per_second):
        yield


@asynccontextmanager
async def largest_requests(client: AgentClient, per_second: float) -> AsyncIterator[None]:
    """Requests as large as the agent accepts, which it then refuses: no process has these ids."""
    pids = ",".join([_PID] * (_LARGEST_BYTES // (len(_PID) + 1)))

    async def request() -> None:
        with suppress(AgentError):
            started = await client.start("syscall_stats", config={"pid": pids})
            await client.stop(started.collector_id)
            raise BenchError("a process has the id that none should have")

    async with repeating(request, per_second):
        yield


@asynccontextmanager
async def events(client: AgentClient, pid: int) -> AsyncIterator[str]:
    """A session of single events; its id."""
    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
    started = await start(client, kind, pid=str(pid), mode="events", include="getppid")
    try:
        yield started.collector_id
    finally:
        with suppress(AgentError):
            await client.stop(started.collector_id)


@asynccontextmanager
async def readers(
    agent: RunningAgent, collector_id: str, count: int, form: str = "rows"
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Subscribers in a process of their own, ended with the block."""
    process = subprocess.Popen(  # noqa: ASYNC220  it takes a millisecond
        [
            *(sys.executable, "-P", "-m", "benchmarks.subscriber"),
            *(agent.address, collector_id, str(count), form),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout
        if await asyncio.to_thread(process.stdout.readline) != b"subscribed\n":
            raise BenchError("a subscriber ended before it was subscribed")
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def paced(bench: Bench, per_second: int) -> Iterator[Calls]:
    """A program that makes PER_SECOND calls of getppid a second, started."""
    running = Calls(bench.program("paced"), per_second, ENDLESS_CALLS)
    try:
        running.go()
        yield running
    finally:
        running.kill()
