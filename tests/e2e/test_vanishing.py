"""Subscribers that vanish, freeze or stall, sessions that come and go, connections that grow old:
nothing of them stays in the agent, and nobody beside them loses anything."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from coral.client import AgentClient, EndReason, Stream
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.events import connected, eventually, have_subscribed, info_of, receive, start_events
from tests.support import ROOT, Calls, RunningAgent, Vitals, running_agent

CYCLES, AT_ONCE, WARM_UP = 1_000, 8, 100
SESSIONS = 300  # a thousand, of all kinds, are in test_lifecycle.py
RSS_GROWTH_BYTES = 16 << 20
# What the machine of a test can bear: these limits have tests of their own.
LIMITS: dict[str, object] = {
    "subscriber_bytes_per_second": "1GiB",
    "cpu_percent": 1000,
    "concurrent_collectors": AT_ONCE + 1,
    "replay_bytes": "1MiB",
    "ended_bytes": "1MiB",  # what is kept of ended streams is no leak
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    with running_agent(tmp_path / "agent", {"limits": LIMITS}) as running:
        yield running


@pytest.fixture
def load(calls: Callable[..., Calls]) -> Calls:
    """A program that makes some thousand calls a second, for as long as a test lasts."""
    running = calls("nanosleep", 10_000_000, threads=4)
    running.go()
    return running


@dataclass(frozen=True)
class Held:
    """What the agent holds of the machine."""

    rss_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def by(cls, agent: RunningAgent) -> Held:
        process = psutil.Process(agent.process.pid)
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_fds(), process.num_threads())

    def is_within(self, before: Held) -> bool:
        """Whether it is no more than BEFORE, but for some memory that the allocator keeps."""
        return self.rss_bytes <= before.rss_bytes + RSS_GROWTH_BYTES and Vitals(
            self.descriptors, self.threads
        ).at_most(Vitals(before.descriptors, before.threads))


async def read_rows(stream: Stream) -> None:
    """Reads until rows come: what is no longer kept may be told before."""
    while not (await anext(stream)).count:
        pass


async def repeat(count: int, cycle: Callable[[int], Awaitable[None]]) -> None:
    """Runs a cycle so many times, several at once."""
    numbers = iter(range(count))
    done: list[int] = []

    async def work() -> None:
        for number in numbers:
            await cycle(number)
            done.append(number)

    async with asyncio.TaskGroup() as workers:
        for _ in range(AT_ONCE):
            workers.create_task(work())
    assert len(done) == count  # a task that is cancelled ends without a word


async def assert_settles(agent: RunningAgent, before: Held, report: str) -> None:
    """Fails unless the agent comes to hold no more than BEFORE."""

    async def settled() -> bool:
        return Held.by(agent).is_within(before)

    try:
        await eventually(settled)
    finally:
        print(f"{report}: {before} before, {Held.by(agent)} after")


@dataclass(frozen=True)
class Reader:
    """tests/reader.py, subscribed."""

    process: asyncio.subprocess.Process

    async def thaw(self) -> Any:
        """Lets it go on; what it says that it got."""
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdout
        return json.loads(await self.process.stdout.read())


@asynccontextmanager
async def reader_process(agent: RunningAgent, collector_id: str) -> AsyncIterator[Reader]:
    """A subscriber in a process of its own. Killed when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.reader", agent.address, collector_id),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout
        assert await process.stdout.readline() == b"subscribed\n"
        yield Reader(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def frozen_reader(agent: RunningAgent, collector_id: str) -> AsyncIterator[Reader]:
    """A subscriber that is stopped as soon as it has subscribed."""
    async with reader_process(agent, collector_id) as reader:
        reader.process.send_signal(signal.SIGSTOP)
        yield reader


@pytest.mark.soak
@pytest.mark.timeout(400)
async def test_a_thousand_subscribers_that_vanish_leave_nothing(
    agent: RunningAgent, load: Calls
) -> None:
    async with connected(agent) as client:
        session = await start_events(client, load.pid)

        async def cancel_the_call(on: AgentClient) -> None:
            async with on.subscribe(session) as stream:
                await read_rows(stream)

        async def close_the_channel() -> None:
            async with connected(agent) as own:
                subscription = own.subscribe(session)
                stream = await subscription.__aenter__()
                await read_rows(stream)

        async def vanish(number: int) -> None:
            if number % 200 == 199:
                async with reader_process(agent, session):
                    pass
            elif number % 4 == 3:
                await close_the_channel()
            else:
                await cancel_the_call(client)

        async def alone() -> bool:
            return not (await info_of(client, session)).subscribers

        await repeat(WARM_UP, vanish)
        await eventually(alone)
        before = Held.by(agent)
        await repeat(CYCLES, vanish)
        await eventually(alone)
        await assert_settles(agent, before, f"{CYCLES} subscribers")
        await client.stop(session)


@pytest.mark.soak
async def test_sessions_whose_readers_stay_to_the_end_leave_nothing(
    agent: RunningAgent, load: Calls
) -> None:
    async with connected(agent) as client:

        async def come_and_go(_number: int) -> None:
            session = await start_events(client, load.pid, ring="64KiB")
            async with client.subscribe(session) as stream:
                await read_rows(stream)
                await client.stop(session)

        await repeat(WARM_UP // 2, come_and_go)
        before = Held.by(agent)
        await repeat(SESSIONS, come_and_go)
        assert not (await client.collectors()).collectors
        await assert_settles(agent, before, f"{SESSIONS} sessions")


async def test_a_reader_that_stalls_is_let_go_and_one_beside_it_loses_nothing(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    made = 400_000
    running = calls("getppid", made)
    limits = {**LIMITS, "stalled_subscriber": "2s", "subscriber_queue_bytes": "64MiB"}
    with running_agent(tmp_path / "agent", {"limits": limits}) as agent:
        async with connected(agent) as client, connected(agent) as idle:
            session = await start_events(client, running.pid, include="getppid", ring="16MiB")
            fast = asyncio.create_task(receive(client, session))
            never_read = pb.EbpfEventStreamRequest(collector_id=session)
            async with frozen_reader(agent, session) as frozen, idle.subscribe(session, never_read):
                await have_subscribed(client, session, 3)
                running.go()

                async def both_are_logged() -> bool:
                    return [ln["event"] for ln in agent.log()].count("subscriber let go") == 2

                async def one_is_left_and_has_all() -> bool:
                    readers = (await info_of(client, session)).subscribers
                    return [each.delivered for each in readers] == [made]

                await eventually(one_is_left_and_has_all)
                await eventually(both_are_logged)
                # Its connection is closed: it connects again, and goes on where it was.
                frozen.process.send_signal(signal.SIGCONT)
                await have_subscribed(client, session, 2)
                await client.stop(session)
                told = await frozen.thaw()
            got = await fast
    assert got.seqs.tolist() == list(range(1, made + 1))
    assert not got.lost
    assert (told["error"], told["end"], told["last"]) == (None, "REASON_STOPPED", made)
    assert told["untold"] == 0
    assert told["rows"] + sum(told["lost"].values()) == made


async def test_a_frozen_client_is_found_though_nothing_is_sent_to_it(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    with running_agent(tmp_path / "agent", {"limits": {**LIMITS, "keepalive": "1s"}}) as agent:
        async with connected(agent) as client:
            session = await start_events(client, running.pid)
            async with frozen_reader(agent, session):
                await have_subscribed(client, session, 1)
                began = time.monotonic()
                await have_subscribed(client, session, 0)
                print(f"a frozen client was found after {time.monotonic() - began:.1f} s")


class CountingClient(AgentClient):
    """Counts the calls that its streams take."""

    stream_calls = 0

    def stream_call(self, wanted: pb.EbpfEventStreamRequest) -> Any:
        self.stream_calls += 1
        return super().stream_call(wanted)


async def test_a_stream_outlives_its_connections_and_has_every_event_once(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    made = 5_000
    running = calls("nanosleep", made)
    # A slow machine makes many small batches, and each takes room of its own.
    limits = {**LIMITS, "connection_age": "1s", "replay_bytes": "8MiB", "ended_bytes": "16MiB"}
    with running_agent(tmp_path / "agent", {"limits": limits}) as agent:
        async with CountingClient(agent.address) as client:
            session = await start_events(
                client, running.pid, include="nanosleep", until_exit="true"
            )
            got = await receive(client, session, None, running.go)
            assert client.stream_calls >= 3
    assert got.seqs.tolist() == list(range(1, made + 1))
    assert not got.lost
    assert got.end.reason == EndReason.TARGET_EXITED
