"""Exactness over broken connections, on the real kernel: a hundred streams through a proxy that
cuts their connections at random, and for each of them every call that the program made is delivered
once, left out by its own filter, or counted as lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from coral.client import (
    Account,
    AgentClient,
    Batch,
    EndReason,
    Retry,
    SessionEnd,
    StreamLostError,
    Terms,
    Watch,
    What,
)
from tests.events import connected, eventually, start_events
from tests.peer import cutting_proxy
from tests.support import INSECURE, Calls, RunningAgent, running_agent

STREAMS: Final = 100
CALLS: Final = 400_000
THREADS: Final = 2
SEED: Final = 20
# Wide enough for a hundred streams, but for the replay: late ones must have something to lose.
LIMITS: Final = {
    "subscriber_bytes_per_second": "1GiB",
    "cpu_percent": 1000,
    "subscriber_queue_bytes": "8MiB",
    "replay_bytes": "2MiB",
    "ended_sessions": "120s",
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    config = {"limits": LIMITS, "auth": INSECURE}
    with running_agent(tmp_path / "agent", config, "--listen", "127.0.0.1:0") as running:
        yield running


@dataclass(eq=False)
class Got:
    """What one stream got."""

    terms: Terms
    times_ns: list[np.ndarray[Any, Any]] = field(default_factory=list)
    tids: list[np.ndarray[Any, Any]] = field(default_factory=list)
    rows: int = 0
    end: SessionEnd | None = None
    account: Account | None = None
    reconnects: int = 0

    def take(self, batch: Batch) -> None:
        self.rows += len(batch.events)
        self.times_ns.append(batch.events["ended_ns"].copy())
        self.tids.append(batch.events["tid"].copy())
        self.end = batch.end


def terms_of(number: int, running: Calls) -> Terms:
    """Filters and policies in turn."""
    terms: Terms = [
        Terms(),
        Terms(tids=[running.pid]),
        Terms(syscalls=["openat"]),
        Terms(errors_only=True),
        Terms(comms=["nobody"]),
        Terms(queue_bytes=200_000),
        Terms(queue_bytes=200_000, overflow="drop_newest"),
        Terms(after_seq=1_000),
    ][number % 8]
    return terms


async def read(proxy: str, session: str, got: Got, subscribed: Awaitable[object]) -> None:
    """Reads a session to its end through the proxy."""
    async with (
        AgentClient(proxy, retry=Retry(patience_s=60, max_delay_s=0.5)) as client,
        client.subscribe(session, **got.terms) as stream,
    ):
        await subscribed
        async for batch in stream:
            got.take(batch)
            account = stream.account
            explained = account.delivered + account.filtered + sum(account.lost.values())
            assert account.last_seq - account.after_seq == explained
        got.account, got.reconnects = stream.account, stream.reconnects


@pytest.mark.timeout(400)
async def test_a_hundred_streams_over_connections_that_break_account_for_every_call(
    agent: RunningAgent, calls: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    running = calls("getppid", CALLS, "openat", 1_000, threads=THREADS)
    made = THREADS * (CALLS + 1_000)
    async with connected(agent) as client, cutting_proxy(agent.address, SEED, (0.05, 0.7)) as proxy:
        # A ring of 256 KiB has room for a few thousand records: many are lost in the kernel.
        session = await start_events(
            client, running.pid, ring="256KiB", include="getppid,openat", until_exit="true"
        )
        streams = [Got(terms_of(number, running)) for number in range(STREAMS)]
        early = [got for got in streams if "after_seq" not in got.terms]
        ready = asyncio.Barrier(len(early) + 1)
        async with asyncio.TaskGroup() as group:
            for got in early:
                group.create_task(read(proxy, session, got, ready.wait()))
            await ready.wait()
            running.go()
            await eventually(lambda: has_ended(client), 100)
            for got in streams:
                if got not in early:
                    group.create_task(read(proxy, session, got, asyncio.sleep(0)))
        (info,) = await client.collectors(include_ended=True)

    lost_in_kernel = made - info.produced
    assert lost_in_kernel > made // 100
    assert info.lost == {"kernel_buffer": lost_in_kernel}
    assert info.end
    assert info.end.reason == EndReason.TARGET_EXITED
    for number, got in enumerate(streams):
        account = got.account
        assert account, number
        assert account.last_seq == account.produced == info.produced
        assert account.lost_in_kernel == {"kernel_buffer": lost_in_kernel}
        assert got.rows == account.delivered
        assert account.produced - account.after_seq == got.rows + account.filtered + sum(
            account.lost.values()
        ), number
        assert got.end == info.end
        assert_each_once(got)
        if got.terms.get("comms"):
            assert (got.rows, account.lost.get("subscriber_queue", 0)) == (0, 0)
    reconnects = sum(got.reconnects for got in streams)
    lost: Counter[str] = Counter()
    for got in streams:
        lost.update(got.account.lost if got.account else {})
    with capsys.disabled():
        print(
            f"\n{STREAMS} streams, {STREAMS - len(early)} after the end, {reconnects} reconnects; "
            f"{made:,} calls, {lost_in_kernel:,} lost in the kernel, "
            f"{sum(got.rows for got in streams):,} rows delivered, lost by stream: {dict(lost)}"
        )
    assert sum(got.reconnects > 0 for got in streams) > STREAMS // 4
    # Late streams always lose; whether a reader falls behind depends on the machine.
    assert {"replay_evicted"} <= set(lost) <= {"replay_evicted", "subscriber_queue"}


async def has_ended(client: AgentClient) -> bool:
    """Whether the only session is over."""
    (info,) = await client.collectors(include_ended=True)
    return info.end is not None


def assert_each_once(got: Got) -> None:
    """No thread ends two calls in the same nanosecond, so the same pair again is the same event."""
    times_ns, tids = np.concatenate(got.times_ns), np.concatenate(got.tids)
    pairs = np.stack([times_ns, tids.astype(np.int64)])
    assert np.unique(pairs, axis=1).shape[1] == got.rows


async def test_a_restarted_agent_is_told_apart(tmp_path: Path, calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 1_000)
    with running_agent(tmp_path / "agent") as first:
        async with AgentClient(first.address, retry=Retry(patience_s=20)) as client:
            session = await start_events(client, running.pid, include="getppid")
            async with client.subscribe(session) as stream:
                running.go()
                while stream.account.delivered < 1_000:
                    await anext(stream)
                first.process.kill()
                first.process.wait()
                with running_agent(tmp_path / "agent"), pytest.raises(StreamLostError) as lost:
                    await _skip(stream)
    account = lost.value.account
    assert (account.last_seq, account.delivered, account.lost) == (1_000, 1_000, {})


async def _skip(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_watch_sees_collectors_start_and_end_over_a_broken_connection(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    seen: list[tuple[What, str]] = []

    async def until(changes: Watch, what: What) -> None:
        while not seen or seen[-1][0] is not what:
            change = await anext(changes)
            name = change.collector.collector_id if change.collector else ""
            seen.append((change.what, name))

    async with connected(agent) as client:
        before = await start_events(client, running.pid)
        async with (
            cutting_proxy(agent.address, SEED, (0.5, 1.0)) as proxy,
            AgentClient(proxy) as over,
            over.watch() as changes,
        ):
            await until(changes, What.SYNCED)
            assert seen[-2:] == [(What.PRESENT, before), (What.SYNCED, "")]
            await until(changes, What.RECONNECTED)
            await until(changes, What.SYNCED)
        assert seen[-3:] == [(What.RECONNECTED, ""), (What.PRESENT, before), (What.SYNCED, "")]
        seen.clear()
        async with client.watch() as changes:
            await until(changes, What.SYNCED)
            after = await start_events(client, running.pid)
            await client.stop(before)
            await until(changes, What.ENDED)
        await client.stop(after)
    assert seen == [
        (What.PRESENT, before), (What.SYNCED, ""), (What.STARTED, after), (What.ENDED, before)
    ]  # fmt: skip
