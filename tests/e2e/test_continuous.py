"""Collectors of the agent's configuration: at work without a reader and without a lease, again
after a failure, until somebody or the agent's end stops them."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import pytest

from coral.client import AgentClient, AgentError, CollectorInfo, EndReason
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.events import connected, eventually, metric, receive
from tests.support import Calls, RunningAgent, running_agent, totals, wait_until

STATS = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS


@pytest.fixture
def program(programs: Path, tmp_path: Path) -> Path:
    """`calls` by a name that nothing else on this machine has."""
    return Path(shutil.copy(programs / "calls", tmp_path / f"calls{uuid.uuid4().hex[:8]}"))


def collector(program: Path, **config: str) -> dict[str, object]:
    """The configuration of a collector of everything that goes by the program's name."""
    return {
        "kind": "syscall_stats",
        "service": "calls",
        "config": {"comm": program.name, **config},
    }


def run(program: Path, *jobs: object, threads: int = 1) -> Mapping[str, int]:
    """Runs the program to its end; the calls that it made, by name."""
    running = Calls(program, *jobs, threads=threads)
    running.go()
    return running.finish().calls


def calls_counted(agent: RunningAgent, syscall: str) -> float:
    """How many calls of that name Prometheus is told of."""
    series = f'coral_syscall_calls_total{{service="calls",syscall="{syscall}"}}'
    return metric(agent, series)


async def at_work(client: AgentClient) -> list[CollectorInfo]:
    """The collectors at work."""
    return list((await client.collectors()).collectors)


async def the_only_one(client: AgentClient) -> CollectorInfo:
    """The continuous collector, once it is at work."""

    async def started() -> list[CollectorInfo]:
        return await at_work(client)

    (info,) = await eventually(started)
    assert info.continuous
    return info


async def test_it_runs_without_a_reader_and_feeds_prometheus_exactly(
    tmp_path: Path, program: Path, calls: Callable[..., Calls]
) -> None:
    config = {"continuous": [collector(program)], "limits": {"concurrent_collectors": 1}}
    with running_agent(tmp_path / "agent", config) as agent:
        async with connected(agent) as client:
            info = await the_only_one(client)
            assert info.kind.name == "syscall_stats"
            assert info.service_name == "calls"
            assert info.config == {"comm": program.name}
            assert info.expires_at_ns is None
            assert not info.subscribers

            made = run(program, "getppid", 250_000, "nanosleep", 300, threads=2)
            wait_until(lambda: calls_counted(agent, "nanosleep") == made["nanosleep"] == 600)
            assert calls_counted(agent, "getppid") == made["getppid"] == 500_000

            # It is not one of the collectors on demand: there is room for one, and no more.
            waiting = calls("getppid", 1)
            target = {"pid": str(waiting.pid)}
            assert (await client.start(STATS, config=target)).supported
            with pytest.raises(AgentError, match=r"limits\.concurrent_collectors is 1, and 1 are"):
                await client.start(STATS, config=target)

            with pytest.raises(AgentError, match="is continuous, by the agent's config") as refused:
                await client.renew(info.collector_id)
            assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert agent.stop() == 0
    # The one on demand beside it: nothing was started over.
    starts = [line for line in agent.log() if line["event"] == "session started"]
    assert len(starts) == 2


async def test_it_waits_for_its_service_and_comes_to_work_when_that_appears(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    pid_file = tmp_path / "calls.pid"
    config = {
        "continuous": [{"kind": "syscall_stats", "service": "calls"}],
        "services": {"calls": {"pid_file": str(pid_file)}},
    }
    running = calls("getppid", 20_000)
    with running_agent(tmp_path / "agent", config) as agent:

        def failures() -> list[dict[str, object]]:
            lines = agent.log()
            return [one for one in lines if one["event"] == "continuous collector is not at work"]

        wait_until(lambda: len(failures()) == 2)
        first, second = failures()
        assert (first["kind"], first["service"]) == ("syscall_stats", "calls")
        assert "services.calls.pid_file" in str(first["reason"])
        pauses_s = [float(str(one["again_in"]).removesuffix("s")) for one in (first, second)]
        assert 0.7 <= pauses_s[0] <= 1.3
        assert 1.5 <= pauses_s[1] <= 2.5

        pid_file.write_text(f"{running.pid}\n")
        async with connected(agent) as client:
            info = await the_only_one(client)
            assert info.service_name == "calls"
            running.go()
            assert running.finish().calls == {"getppid": 20_000}
            wait_until(lambda: calls_counted(agent, "getppid") == 20_000)


async def test_stopping_it_ends_it_for_good(tmp_path: Path, program: Path) -> None:
    with running_agent(tmp_path / "agent", {"continuous": [collector(program)]}) as agent:
        async with connected(agent) as client:
            info = await the_only_one(client)
            await client.stop(info.collector_id)
            assert not await at_work(client)
            # Longer than the first pause can be: it is not tried again.
            await asyncio.sleep(2)
            assert not await at_work(client)
            with pytest.raises(AgentError, match="has ended: STOPPED"):
                await client.stop(info.collector_id)
        assert not [line for line in agent.log() if "not at work" in str(line["event"])]
        assert agent.stop() == 0


async def test_the_agents_end_ends_it_and_its_reader_gets_what_it_had(
    tmp_path: Path, program: Path
) -> None:
    config = {"continuous": [collector(program, interval="60s")]}
    with running_agent(tmp_path / "agent", config) as agent:
        async with connected(agent) as client:
            info = await the_only_one(client)
            reader = asyncio.create_task(receive(client, info.collector_id))
            for count in (1_234, 1_000):
                run(program, "getppid", count)
            assert await asyncio.to_thread(agent.stop) == 0
            got = await reader
    assert got.end.reason == EndReason.AGENT_SHUTDOWN
    assert got.end.detail == "the agent is shutting down"
    rows = [row for batch in got.batches for row in batch.message.syscall_stats]
    assert totals(rows)["getppid"] == 2_234
    ended = [line for line in agent.log() if line["event"] == "session ended"]
    assert [line["end"] for line in ended] == ["AGENT_SHUTDOWN: the agent is shutting down"]


async def test_a_continuous_profile_takes_fewer_samples_unless_it_is_told_how_many(
    tmp_path: Path, program: Path
) -> None:
    for config, frequency in (({}, "19"), ({"frequency": "49"}, "49")):
        profile = {**collector(program, **config), "kind": "cpu_profile"}
        with running_agent(tmp_path / frequency, {"continuous": [profile]}) as agent:
            async with connected(agent) as client:
                info = await the_only_one(client)
                assert info.config["frequency"] == frequency
