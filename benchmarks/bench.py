"""What every section gets: a directory, the traced program, an agent, a voice for progress."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from build_hook import clang_command
from coral.client import AgentClient, Batch, Started
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import Calls, RunningAgent, running_agent, wait_until

ROOT: Final = Path(__file__).resolve().parent.parent
ENDLESS_CALLS: Final = 1_000_000_000_000
_LEASE_S: Final = 120.0


class BenchError(Exception):
    """The bench cannot go on; the message says why."""


@dataclass(frozen=True)
class Bench:
    """One run. DIRECTORY is the run's own and goes with it."""

    directory: Path
    console: Console
    kernel_source: Path | None  # what bcc is told to compile against; None: it finds its own

    def say(self, text: str) -> None:
        """One line of progress."""
        self.console.print(Text(f"  {text}", "dim"))

    @contextmanager
    def calls(self, count: int, name: str = "getppid") -> Iterator[Calls]:
        """tests/programs/calls.c, waiting to make COUNT calls; ended with the block. It has one CPU
        for itself as far as the scheduler can help it: moving costs more than what is measured."""
        running = Calls(self.program("calls"), name, count)
        try:
            os.sched_setaffinity(running.pid, {max(os.sched_getaffinity(0))})
            yield running
        finally:
            running.kill()

    def program(self, name: str, sources: str = "tests/programs") -> Path:
        """SOURCES/NAME.c, compiled."""
        program = self.directory / name
        if not program.exists():
            source = ROOT / sources / f"{name}.c"
            command: list[str | Path] = ["cc", "-O2", "-pthread", source, "-o", program]
            with subprocess.Popen(command) as compiler:
                try:
                    compiler.wait()
                except BaseException:
                    compiler.terminate()  # killed, it would leave temporary files behind
                    raise
            if compiler.returncode:
                raise BenchError(f"{source.name} does not compile")
        return program

    @contextmanager
    def agent(self, **limits: object) -> Iterator[RunningAgent]:
        """A real agent on a socket of its own, that has looked at the kernel; stopped with the
        block. LIMITS are others than its own."""
        with running_agent(self.directory / "agent", {"limits": limits}) as agent:
            wait_until(lambda: b"collector available" in agent.log_path.read_bytes())
            yield agent
            agent.stop()

    def environment(self) -> dict[str, str]:
        """The environment that peers get."""
        lent = {"BCC_KERNEL_SOURCE": str(self.kernel_source)} if self.kernel_source else {}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **lent}


class Tap:
    """A collector at work on one process, and its subscriber."""

    def __init__(self) -> None:
        self.rows: list[pb.SyscallStats] = []
        self.batches = 0
        self.lost = 0
        self._arrived = asyncio.Event()

    async def until_batches(self, count: int) -> None:
        """Waits until so many batches with rows have come."""
        async with asyncio.timeout(20):
            while self.batches < count:
                self._arrived.clear()
                await self._arrived.wait()

    def _take(self, batch: Batch) -> None:
        self.rows.extend(batch.message.syscall_stats)
        self.batches += bool(batch.message.syscall_stats)
        self.lost += sum(batch.lost.values())
        self._arrived.set()

    @classmethod
    @asynccontextmanager
    async def on(cls, client: AgentClient, pid: int, **config: str) -> AsyncIterator[Tap]:
        """Watches a process. After the block the rows are all there are."""
        tap, kind = cls(), pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
        async with watching(client, kind, tap._take, pid=str(pid), **config):
            yield tap


async def start_syscall_stats(client: AgentClient, pid: int, **config: str) -> Started:
    """Starts our collector of system calls on a process."""
    return await start(client, pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, pid=str(pid), **config)


async def start(client: AgentClient, kind: pb.EbpfCollectorKind, **config: str) -> Started:
    """Starts one of our collectors. Raises `BenchError` where this kernel cannot."""
    started = await client.start(kind, config=config, duration_s=_LEASE_S)
    if not started.supported:
        raise BenchError(started.error)
    return started


@asynccontextmanager
async def watching(
    client: AgentClient,
    kind: pb.EbpfCollectorKind,
    take: Callable[[Batch], None],
    **config: str,
) -> AsyncIterator[None]:
    """One of our collectors at work, and its subscriber: TAKE is called with each batch, and after
    the block has had them all."""
    started = await start(client, kind, **config)
    async with client.subscribe(started.collector_id) as stream:

        async def read() -> None:
            async for batch in stream:
                take(batch)

        reading = asyncio.create_task(read())
        try:
            yield
        finally:
            await client.stop(started.collector_id)
            await reading


def compile_bpf(directory: Path, name: str) -> Path:
    """Compiles benchmarks/NAME.bpf.c."""
    output = directory / f"{name}.bpf.o"
    subprocess.run(clang_command(ROOT / f"benchmarks/{name}.bpf.c", output), check=True)
    return output


async def per_call_ns(calls: Calls, count: int) -> float:
    """Lets the traced program begin and waits for its end; its own figure, in ns per call, less
    what it waited for a CPU that others had: that is no cost of being traced."""
    ended = asyncio.Event()
    loop, pidfd = asyncio.get_running_loop(), os.pidfd_open(calls.pid)
    waited_before_ns = _waited_ns(calls.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        calls.go()
        await ended.wait()
        waited_ns = _waited_ns(calls.pid) - waited_before_ns
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return (calls.finish().ns["getppid"] - waited_ns) / count


def _waited_ns(pid: int) -> int:
    """How long a process has stood in a CPU's queue, that has ended and was not waited for too; 0
    where the kernel does not count it (CONFIG_SCHED_INFO)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    except FileNotFoundError:
        return 0
