"""Limits: what is refused, who has to go, what a reader is not sent; each time with the limit's
name, its value and the use."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import psutil
import pytest

from coral.agent.sessions.costs import CPU_WINDOW_S
from coral.client import AgentClient, AgentError, EndReason, SubscriberInfo
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import has_tried_the_kernel
from tests.events import (
    Received,
    connected,
    eventually,
    have_subscribed,
    info_of,
    metric,
    receive,
    start_events,
)
from tests.support import Calls, RunningAgent, running_agent, wait_until

PREEMPTED = 'coral_agent_sessions_ended_total{kind="syscall_stats",reason="preempted"}'
CPU_BY_PROGRAMS = 'coral_agent_cpu_seconds_total{kind="syscall_stats",cause="programs"}'
STATS = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS


def in_the_kernel(agent: RunningAgent) -> list[str]:
    """The agent's programs, maps and links: they live as long as its descriptors of them."""
    descriptors = Path(f"/proc/{agent.process.pid}/fd").iterdir()
    links = [str(descriptor.readlink()) for descriptor in descriptors]
    return sorted(link for link in links if "bpf" in link)


async def test_a_collector_larger_than_the_memory_limit_is_refused_and_leaves_nothing(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1_000)
    with running_agent(tmp_path / "agent", {"limits": {"memory": "1MiB"}}) as agent:
        async with connected(agent) as client:
            has_tried_the_kernel(agent)
            before = in_the_kernel(agent)
            with pytest.raises(AgentError) as refused:
                await start_events(client, running.pid, ring="4MiB")
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            found = re.fullmatch(
                r"limits\.memory is 1048576 bytes; this syscall_stats takes (\d+), which makes "
                r"(\d+) in all: ask for smaller buffers, or stop another collector",
                str(refused.value),
            )
            assert found, refused.value
            assert 4 << 20 < int(found[1]) == int(found[2]) < 8 << 20
            assert not (await client.collectors()).collectors
            assert in_the_kernel(agent) == before
            # There is room for one that is small enough.
            session = await start_events(
                client, running.pid, ring="64KiB", include="getppid", until_exit="true"
            )
            got = await receive(client, session, None, running.go)
            assert len(got.events) == 1_000
        wait_until(lambda: in_the_kernel(agent) == before)


async def test_as_many_collectors_as_the_limit_says_start_at_one_time(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    with running_agent(tmp_path / "agent", {"limits": {"concurrent_collectors": 6}}) as agent:
        async with connected(agent) as client:
            starts = (start_events(client, running.pid, ring="64KiB") for _ in range(8))
            answers = await asyncio.gather(*starts, return_exceptions=True)
            assert len((await client.collectors()).collectors) == 6
    refusals = [answer for answer in answers if isinstance(answer, AgentError)]
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limits.concurrent_collectors is 6, and 6 are at work" in str(refusal)


async def test_over_the_processor_limit_the_expensive_session_goes_and_the_cheap_one_stays(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1_000_000_000_000, threads=2)
    nobody = {"comm": "coral-nobody", "interval": "500ms"}
    config = {
        "limits": {"cpu_percent": 10},
        "continuous": [{"kind": "tcp_metrics", "service": "cheap", "config": nobody}],
    }
    with running_agent(tmp_path / "agent", config) as agent:
        async with connected(agent) as client:
            cheap = await continuous(client)
            running.go()
            for turn in (1, 2):  # it is the expensive one each time
                expensive = await client.start(STATS, config={"pid": str(running.pid)})
                got = await receive(client, expensive.collector_id)
                assert_preempted_for_processor_time(got, 10)
                assert metric(agent, PREEMPTED) == turn
                with pytest.raises(
                    AgentError, match=r"has ended: PREEMPTED: limits\.cpu_percent is 10 of one CPU"
                ):
                    await client.stop(expensive.collector_id)
            (left,) = (await client.collectors()).collectors
            assert left.collector_id == cheap
            assert metric(agent, CPU_BY_PROGRAMS) > 2 * 0.5 * 0.08 * CPU_WINDOW_S
        assert agent.stop() == 0
    started = [line["session"] for line in agent.log() if line["event"] == "session started"]
    assert len(started) == len(set(started)) == 3


@pytest.mark.soak
async def test_scrapes_refused_callers_and_starts_are_charged_to_no_session(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    limit_percent, at_least_s = 10, 11.0  # more than what the limit is a mean of
    idle = calls("getppid", 1)
    nobody = {"kind": "tcp_metrics", "service": "cheap", "config": {"comm": "coral-nobody"}}
    config = {
        "limits": {"cpu_percent": limit_percent, "continuous_cpu_percent": limit_percent},
        "continuous": [nobody],
    }
    with running_agent(tmp_path / "agent", config) as agent:
        async with connected(agent) as client:
            staying = {
                await continuous(client),
                *[await start_events(client, idle.pid) for _ in "ab"],
            }
            readers = [asyncio.create_task(receive(client, one)) for one in staying]
            began, cpu_before_s = time.monotonic(), cpu_s(agent)
            scrapes = [asyncio.create_task(scrape_until(agent, began + at_least_s)) for _ in "abcd"]
            short = 0
            while short < 10 or time.monotonic() < began + at_least_s:
                with pytest.raises(AgentError, match="pid"):
                    await client.start(STATS, config={"pid": "0"})
                short_one = await client.start(STATS, config={"pid": str(idle.pid)})
                await client.stop(short_one.collector_id)
                short += 1
            await asyncio.gather(*scrapes)
            used_percent = 100 * (cpu_s(agent) - cpu_before_s) / (time.monotonic() - began)
            assert used_percent > limit_percent  # so whoever were charged would have to end
            listed = {one.collector_id for one in (await client.collectors()).collectors}
            assert listed == staying
            assert metric(agent, PREEMPTED) == 0
            for one in staying:
                await client.stop(one)
            for got in await asyncio.gather(*readers):
                assert got.end.reason == EndReason.STOPPED


def cpu_s(agent: RunningAgent) -> float:
    """CPU time that the agent's process has used."""
    times = psutil.Process(agent.process.pid).cpu_times()
    return times.user + times.system


async def scrape_until(agent: RunningAgent, end: float) -> None:
    """Scrapes without a pause."""
    while time.monotonic() < end:
        await asyncio.to_thread(metric, agent, PREEMPTED)


async def continuous(client: AgentClient) -> str:
    """The id of the continuous collector, once it is at work."""

    async def at_work() -> str | None:
        listed = (await client.collectors()).collectors
        return next((one.collector_id for one in listed if one.continuous), None)

    return await eventually(at_work) or ""


def assert_preempted_for_processor_time(got: Received, limit: float) -> None:
    """Fails unless the end names the limit, the use, its causes and a remedy."""
    assert got.end.reason == EndReason.PREEMPTED
    told = re.fullmatch(
        rf"limits\.cpu_percent is {limit} of one CPU; collectors used ([\d.]+) over 10s, this one "
        r"([\d.]+) \(([\d.]+) by its programs, ([\d.]+) by reading, ([\d.]+) by its subscribers\): "
        "watch fewer processes or fewer calls, or raise the limit",
        got.end.detail,
    )
    assert told, got.end.detail
    every, own, programs, reading, subscribers = map(float, told.groups())
    assert limit <= every < 200  # it is rounded
    assert every / 2 < own <= every  # the cheap one's programs see all connections of the machine
    assert own == pytest.approx(programs + reading + subscribers, abs=0.2)
    assert programs > own / 2


async def test_what_is_over_a_subscribers_rate_is_a_loss_and_its_account_is_exact(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    rate_bytes_s, row_bytes = 64 << 10, 55
    running = calls("nanosleep", 2_000, "openat", 20, threads=4)
    config = {"limits": {"subscriber_bytes_per_second": rate_bytes_s}}
    with running_agent(tmp_path / "agent", config) as agent:
        async with connected(agent) as client:
            session = await start_events(client, running.pid, include="nanosleep,openat")
            openat = pb.EbpfEventStreamRequest(filter=pb.EventFilter(syscalls=["openat"]))
            every = asyncio.create_task(receive(client, session))
            few = asyncio.create_task(receive(client, session, openat))
            await have_subscribed(client, session, 2)
            began = time.monotonic()
            running.go()

            async def explained() -> Sequence[SubscriberInfo]:
                readers = (await info_of(client, session)).subscribers
                rows = {it.delivered + it.filtered + sum(it.losses.values()) for it in readers}
                return readers if rows == {8_080} else ()

            accounts = await eventually(explained)
            elapsed_s = time.monotonic() - began
            await client.stop(session)
            got, of_few = await every, await few
        assert set(got.lost) == {"rate_limit"}
        assert len(got.events) + got.lost["rate_limit"] == 8_080
        assert len(got.seqs) == len(got.events) == len(set(got.seqs.tolist()))
        # A second's worth is saved up, at most.
        assert row_bytes * len(got.events) <= rate_bytes_s * (elapsed_s + 1)
        assert row_bytes * len(got.events) > rate_bytes_s * elapsed_s / 2

        assert Counter(of_few.calls.tolist()) == {"openat": 80}
        assert not of_few.lost
        told = {(one.delivered, one.filtered, sum(one.losses.values())) for one in accounts}
        assert told == {(len(got.events), 0, got.lost["rate_limit"]), (80, 8_000, 0)}
        lost = 'coral_agent_events_lost_total{kind="syscall_stats",stage="rate_limit"}'
        assert metric(agent, lost) == got.lost["rate_limit"]
