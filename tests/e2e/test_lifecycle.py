"""From start to end: leases, stops, signals, subscribers that come and go. Nothing is left."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2

from coral.client import AgentClient
from coral.collectors.hubs import has_cgroups
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import (
    Puppet,
    RunningAgent,
    Vitals,
    collectors_at_work,
    coral,
    held_by,
    loaded,
    nothing_new_since,
    resident_kib,
    running_agent,
    start_collector,
    streaming,
    wait_until,
    watching,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

SLACK_S: Final = 0.1
# sys_enter, sys_exit; fork, rename, exec, exit of processes; and attach, mkdir of cgroups.
HOOKS: Final = 2 + 4 + 3 * has_cgroups()
STREAMS: Final = ("StreamEvents", "StreamEventBatches")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("lifecycle") / "agent") as running:
        yield running


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


def renew(agent: RunningAgent, collector_id: str, duration_s: float) -> float:
    """RenewCollector; the new deadline in Unix seconds."""
    request = pb.RenewCollectorRequest(collector_id=collector_id)
    request.duration.FromNanoseconds(int(duration_s * 1e9))
    answer = agent.call("RenewCollector", request)
    assert isinstance(answer, pb.RenewCollectorResponse)
    return answer.expires_at.ToNanoseconds() / 1e9


@pytest.mark.timed
def test_a_collector_of_2_s_ends_within_100_ms_of_its_deadline(
    agent: RunningAgent, puppet: Puppet
) -> None:
    before, asked_at = loaded(), time.time()
    with watching(agent, 2.0, pid=str(puppet.pid)) as watch:
        assert asked_at + 2 < watch.expires_at_s < time.time() + 2
        assert len(held_by(agent.process.pid)["link"]) == HOOKS
        end = watch.read_to_end()
        assert 0 <= time.time() - watch.expires_at_s < SLACK_S
    assert end.reason == pb.SessionEnd.REASON_EXPIRED
    assert collectors_at_work(agent) == {}
    assert not any(held_by(agent.process.pid).values())
    wait_until(lambda: nothing_new_since(before))


def test_a_stopped_collector_is_detached_when_the_answer_arrives(
    agent: RunningAgent, puppet: Puppet
) -> None:
    before = loaded()
    with watching(agent, pid=str(puppet.pid)) as watch:
        assert len(held_by(agent.process.pid)["link"]) == HOOKS
        watch.stop()
        assert not any(held_by(agent.process.pid).values())
    assert collectors_at_work(agent) == {}
    wait_until(lambda: nothing_new_since(before))


@pytest.mark.timed
def test_a_renewed_collector_lives_to_its_new_deadline(agent: RunningAgent, puppet: Puppet) -> None:
    with watching(agent, 1.0, pid=str(puppet.pid)) as watch:
        later = renew(agent, watch.collector_id, 60)
        assert later == pytest.approx(time.time() + 60, abs=SLACK_S)
        listed = collectors_at_work(agent)[watch.collector_id]
        assert listed.expires_at.ToNanoseconds() / 1e9 == pytest.approx(later)
        wait_until(lambda: time.time() > watch.expires_at_s + 2 * SLACK_S)
        assert watch.collector_id in collectors_at_work(agent)
        sooner = renew(agent, watch.collector_id, 0.3)
        assert watch.read_to_end().reason == pb.SessionEnd.REASON_EXPIRED
        assert 0 <= time.time() - sooner < SLACK_S


@pytest.mark.timed
def test_sigterm_tells_every_subscriber_and_ends_the_agent_within_2_s(
    tmp_path: Path, puppet: Puppet
) -> None:
    with running_agent(tmp_path / "agent") as agent, ExitStack() as stack:
        streams: list[Any] = []
        for _ in range(2):
            request = pb.EbpfEventStreamRequest(
                collector_id=start_collector(agent, pid=str(puppet.pid)).collector_id
            )
            streams += [
                stack.enter_context(streaming(agent, method, request))
                for method in STREAMS
                for _ in range(2)
            ]
        signalled_at = time.monotonic()
        agent.process.send_signal(signal.SIGTERM)
        for stream in streams:
            *_, last = stream
            assert last.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN
            assert stream.code() is grpc.StatusCode.OK
        assert agent.process.wait(10) == 0
        assert time.monotonic() - signalled_at < 2
        assert agent.log()[-1]["event"] == "stopped"
        assert len(streams) == 8


@contextmanager
def watching_health(agent: RunningAgent) -> Iterator[None]:
    """A health watch: a stream that does not end by itself, for which a shutdown waits."""
    with grpc.insecure_channel(agent.address) as channel:
        call: Any = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest())
        assert next(call).status == health_pb2.HealthCheckResponse.SERVING
        yield
        call.cancel()


@pytest.mark.timed
def test_a_stream_that_never_ends_does_not_hold_up_the_shutdown(
    tmp_path: Path, puppet: Puppet
) -> None:
    with running_agent(tmp_path / "agent") as agent, watching_health(agent):
        start_collector(agent, pid=str(puppet.pid))
        signalled_at = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - signalled_at < 2


@pytest.mark.timed
def test_the_process_is_gone_once_the_agent_has_stopped(tmp_path: Path) -> None:
    """The interpreter's own end takes half a second, and is left out."""
    waits_s = []
    for attempt in range(3):
        with running_agent(tmp_path / str(attempt)) as agent:
            assert agent.stop() == 0
            ended_s = time.time()
            last = agent.log()[-1]
            assert last["event"] == "stopped"
            waits_s.append(ended_s - datetime.fromisoformat(str(last["timestamp"])).timestamp())
    assert min(waits_s) < 0.15


@pytest.mark.timed
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_agent_at_once(
    second: signal.Signals, tmp_path: Path, puppet: Puppet
) -> None:
    with running_agent(tmp_path / "agent") as agent, watching_health(agent):
        start_collector(agent, pid=str(puppet.pid))
        agent.process.send_signal(signal.SIGTERM)
        wait_until(lambda: agent.log()[-1]["event"] == "session ended")
        signalled_at = time.monotonic()
        agent.process.send_signal(second)
        assert agent.process.wait(10) == 128 + second
        assert time.monotonic() - signalled_at < 0.3


def test_an_agent_that_is_killed_leaves_nothing_attached(tmp_path: Path, puppet: Puppet) -> None:
    before = loaded()
    with running_agent(tmp_path / "agent") as agent:
        for _ in range(3):
            start_collector(agent, pid=str(puppet.pid))
        assert len(held_by(agent.process.pid)["link"]) == HOOKS  # they share them
        agent.process.kill()
        agent.process.wait()
        wait_until(lambda: nothing_new_since(before))


def rows_and_end(batches: Iterable[pb.EbpfEventBatch]) -> list[pb.EbpfEventBatch]:
    """Batches as every subscriber gets them: without those that only say where a stream stands, and
    without the account, which is each stream's own."""
    shared = []
    for batch in batches:
        if batch.count or batch.HasField("end"):
            shared.append(pb.EbpfEventBatch.FromString(batch.SerializeToString()))
            shared[-1].ClearField("account")
    return shared


def test_subscribers_get_the_same_numbered_events_whenever_they_come(
    agent: RunningAgent, puppet: Puppet
) -> None:
    with ExitStack() as stack, watching(agent, pid=str(puppet.pid)) as watch:
        request = pb.EbpfEventStreamRequest(collector_id=watch.collector_id)
        early = [stack.enter_context(streaming(agent, method, request)) for method in STREAMS]
        for calls in (10, 30, 60):
            puppet.getppid(calls - watch.calls_of("getppid"))
            watch.read_until_calls("getppid", calls)
        late = [stack.enter_context(streaming(agent, method, request)) for method in STREAMS]
        (listed,) = collectors_at_work(agent).values()
        assert len(listed.subscribers) == 5
        watch.stop()
        events, batches = ([list(pair[kind]) for pair in (early, late)] for kind in (0, 1))

    numbered_batches = rows_and_end(watch.batches)
    assert [rows_and_end(each) for each in batches] == [numbered_batches] * 2
    events = [[event for event in each if event.seq or event.HasField("end")] for each in events]
    assert events[0] == events[1]
    *told, end = events[0]
    produced = len(watch.rows)
    assert [event.seq for event in told] == list(range(1, produced + 1))
    assert [event.syscall_stats for event in told] == watch.rows
    assert {event.collector_id for event in told} == {watch.collector_id}
    assert (end.seq, end.end.produced) == (0, produced)
    numbered = [seq for b in numbered_batches for seq in range(b.first_seq, b.first_seq + b.count)]
    assert numbered == list(range(1, produced + 1))


def test_a_late_subscriber_is_told_what_is_no_longer_kept(tmp_path: Path, puppet: Puppet) -> None:
    limits = {"limits": {"replay_bytes": 1500}}
    with (
        running_agent(tmp_path / "agent", limits) as agent,
        watching(agent, pid=str(puppet.pid)) as watch,
    ):
        for calls in range(1, 11):
            puppet.getppid(1)
            watch.read_until_calls("getppid", calls)
        request = pb.EbpfEventStreamRequest(collector_id=watch.collector_id)
        with streaming(agent, "StreamEventBatches", request) as late:
            watch.stop()
            told, *rest = list(late)
    (loss,) = told.losses
    assert loss.stage == pb.Loss.STAGE_REPLAY_EVICTED
    assert (told.count, rest[0].first_seq) == (0, loss.count + 1)
    assert 0 < loss.count < len(watch.rows)
    assert loss.count + sum(batch.count for batch in rest) == len(watch.rows)
    rest = rows_and_end(rest)
    assert rest == rows_and_end(watch.batches)[-len(rest) :]


def test_a_subscriber_that_is_killed_leaves_no_subscription(
    agent: RunningAgent, puppet: Puppet
) -> None:
    tap = subprocess.Popen(
        coral("tap", f"pid:{puppet.pid}", "--syscall-stats", "--agent", agent.address),
        stdout=subprocess.DEVNULL,
    )

    def subscribers() -> list[int]:
        return [len(info.subscribers) for info in collectors_at_work(agent).values()]

    wait_until(lambda: subscribers() == [1])
    tap.kill()
    tap.wait()
    wait_until(lambda: subscribers() == [0])
    (collector_id,) = collectors_at_work(agent)
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))


def every_sort(pid: int) -> list[tuple[str, dict[str, str]]]:
    """Sessions of each kind, mode and sort of target."""
    targets = (
        {"pid": str(pid)},
        {"comm": "no-such-name"},
        {"pid": str(pid), "follow_children": "false"},
    )
    return [
        (kind, {**target, "mode": mode})
        for target in targets
        for kind in ("syscall_stats", "tcp_metrics")
        for mode in ("summaries", "events")
    ]


async def start_and_stop(agent: RunningAgent, pid: int, *, at_once: int, times: int) -> None:
    """So many collectors of all sorts at one time, each with a subscriber, started and stopped so
    often."""
    sorts = every_sort(pid)

    async def one_after_another(client: AgentClient, first: int) -> None:
        for turn in range(times):
            # No two take turns in step, so that they begin and end in many orders.
            kind, config = sorts[(first + turn * (1 + first % 3)) % len(sorts)]
            started = await client.start(kind, config=config)
            async with client.subscribe(started.collector_id) as stream:
                await client.stop(started.collector_id)
                batches = [batch async for batch in stream]
            assert batches[-1].message.end.reason == pb.SessionEnd.REASON_STOPPED

    async with AgentClient(agent.address) as client, asyncio.TaskGroup() as tasks:
        for first in range(at_once):
            tasks.create_task(one_after_another(client, first))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_thousand_collectors_ten_at_a_time_leave_nothing(tmp_path: Path, puppet: Puppet) -> None:
    before = loaded()
    limits = {"limits": {"concurrent_collectors": 10, "cpu_percent": 1000}}
    with running_agent(tmp_path / "agent", limits) as agent:
        asyncio.run(start_and_stop(agent, puppet.pid, at_once=10, times=10))
        warm, warm_kib = Vitals.of(agent.process.pid), resident_kib(agent.process.pid)
        started_at = time.monotonic()
        asyncio.run(start_and_stop(agent, puppet.pid, at_once=10, times=100))
        took_s = time.monotonic() - started_at
        wait_until(lambda: Vitals.of(agent.process.pid).at_most(warm))
        grown_kib = resident_kib(agent.process.pid) - warm_kib
        wait_until(lambda: nothing_new_since(before))
        assert collectors_at_work(agent) == {}
    print(f"RSS {warm_kib} KiB, {grown_kib:+} KiB after 1,000 cycles in {took_s:.1f} s")
    assert grown_kib < 16 << 10
