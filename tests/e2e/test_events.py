"""Single events, from the system call to the subscriber: every row exact, nothing missing."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coral.client import EndReason, SessionEnd
from coral.collectors.syscall_stats import table as syscall_table
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.events import Received, connected, have_subscribed, receive, start_events
from tests.support import ROOT, SERVICE, Calls, RunningAgent, running_agent

MILLISECOND_NS = 1_000_000
AT_EASE_NS = 20 * MILLISECOND_NS
# Makes one call every 50 ms, so many times, once it is let go.
AT_EASE = "import os, sys, time; input(); [(time.sleep(0.05), os.getppid()) for _ in range(60)]"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("events") / "agent") as running:
        yield running


async def events_of(
    agent: RunningAgent,
    *running: Calls,
    terms: pb.EbpfEventStreamRequest | None = None,
    **config: str,
) -> Received:
    """All events of programs that are let go, until they have ended."""
    async with connected(agent) as client:
        pids = [one.pid for one in running]
        collector_id = await start_events(client, *pids, until_exit="true", **config)
        received = await receive(client, collector_id, terms, *(one.go for one in running))
    assert received.end.reason == EndReason.TARGET_EXITED
    return received


async def test_every_call_is_a_row_with_its_name_outcome_thread_and_time(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 2_000, "openat", 300, threads=3)
    began_ns = time.time_ns()
    got = await events_of(agent, running, include="getppid,openat")
    ended_ns = time.time_ns()
    events, names = got.events, got.calls
    assert Counter(names.tolist()) == {"getppid": 6_000, "openat": 900}
    assert not got.lost
    assert got.seqs.tolist() == list(range(1, 6_901))
    assert got.end.produced == 6_900

    assert set(events["return_value"][names == "openat"].tolist()) == {-errno.ENOENT}
    assert set(events["return_value"][names == "getppid"].tolist()) == {os.getpid()}
    for name in ("getppid", "openat"):
        (number,) = set(events["syscall_number"][names == name].tolist())
        assert number == syscall_table.numbers()[name]
    assert set(events["pid"].tolist()) == {running.pid}
    assert set(got.comms.tolist()) == {"calls"}

    of_tid = Counter(events["tid"].tolist())
    assert running.pid in of_tid
    assert list(of_tid.values()) == [2_300] * 3
    assert began_ns < events["ended_ns"].min()
    assert events["ended_ns"].max() < ended_ns
    assert (events["duration_ns"] > 0).all()
    for tid in of_tid:
        # A thread makes one call after the other; a batch's clock is right to microseconds.
        own = events[events["tid"] == tid]
        assert (np.diff(own["ended_ns"]) > -MILLISECOND_NS).all()


@pytest.mark.timed
async def test_a_duration_is_what_the_program_measured(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("nanosleep", 200)
    got = await events_of(agent, running, include="nanosleep")
    durations = got.events["duration_ns"]
    assert len(durations) == 200
    assert durations.min() >= MILLISECOND_NS
    assert int(durations.sum()) == pytest.approx(running.finish().ns["nanosleep"], rel=0.02)


async def test_errors_only_leaves_the_calls_that_failed(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 5_000, "openat", 70, "futile", 30)
    got = await events_of(agent, running, errors_only="true", exclude="exit_group")
    outcomes = Counter(got.events["return_value"].tolist())
    assert outcomes == {-errno.ENOENT: 70, -errno.ENOSYS: 30}
    assert got.end.produced == 100


async def test_min_duration_leaves_the_slow_calls(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 5_000, "nanosleep", 40)
    got = await events_of(agent, running, min_duration="1ms", include="getppid,nanosleep")
    # On a busy machine a process can lose the processor inside a call, however short.
    assert Counter(got.calls.tolist())["nanosleep"] == 40
    assert (got.events["duration_ns"] >= MILLISECOND_NS).all()
    assert got.end.produced < 100


async def test_a_sample_is_one_in_so_many_by_chance_and_says_so(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    made, sample_every = 40_000, 10
    running = calls("getppid", made // 2, threads=2)
    got = await events_of(agent, running, sample=str(sample_every), include="getppid")
    # More than six standard deviations are less likely than one in 500 million.
    deviation = math.sqrt(made * (1 - 1 / sample_every) / sample_every)
    assert len(got.events) == pytest.approx(made / sample_every, abs=6 * deviation)
    assert {batch.message.sample_every for batch in got.batches if batch.count} == {10}


async def test_a_filter_leaves_exactly_what_it_takes_of_the_whole_stream(
    agent: RunningAgent, programs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other_program = Path(shutil.copy(programs / "calls", tmp_path / "other"))
    jobs = ("getppid", 300, "openat", 40, "nanosleep", 10)
    one, other = Calls(programs / "calls", *jobs, threads=2), Calls(other_program, *jobs)
    for running in (one, other):
        request.addfinalizer(running.kill)

    async with connected(agent) as client:
        collector_id = await start_events(
            client, one.pid, other.pid, until_exit="true", include="getppid,openat,nanosleep"
        )
        filters = {
            "all": pb.EventFilter(),
            "pid": pb.EventFilter(pids=[one.pid]),
            "tid": pb.EventFilter(tids=[one.pid, other.pid]),
            "comm": pb.EventFilter(comms=["other"]),
            "syscall": pb.EventFilter(syscalls=["openat", "nanosleep"]),
            "errors": pb.EventFilter(errors_only=True),
            "slow": pb.EventFilter(min_duration_ns=MILLISECOND_NS),
            "several": pb.EventFilter(pids=[one.pid], syscalls=["openat"], errors_only=True),
            "none": pb.EventFilter(comms=["nobody"]),
        }
        readers = {
            name: asyncio.create_task(
                receive(client, collector_id, pb.EbpfEventStreamRequest(filter=wanted))
            )
            for name, wanted in filters.items()
        }
        await have_subscribed(client, collector_id, len(filters))
        for running in (one, other):
            running.go()
        got = {name: await reader for name, reader in readers.items()}

    events, names, comms = got["all"].events, got["all"].calls, got["all"].comms
    assert Counter(zip(comms.tolist(), names.tolist(), strict=True)) == {
        ("calls", "getppid"): 600, ("calls", "openat"): 80, ("calls", "nanosleep"): 20,
        ("other", "getppid"): 300, ("other", "openat"): 40, ("other", "nanosleep"): 10,
    }  # fmt: skip
    expected = {
        "pid": events["pid"] == one.pid,
        "tid": np.isin(events["tid"], [one.pid, other.pid]),
        "comm": comms == "other",
        "syscall": np.isin(names, ["openat", "nanosleep"]),
        "errors": events["return_value"] == -errno.ENOENT,
        "slow": events["duration_ns"] >= MILLISECOND_NS,
        "several": (events["pid"] == one.pid) & (names == "openat"),
        "none": np.zeros(len(events), bool),
    }
    # What points into strings is compared by name: each stream has its own.
    columns = [each for each in events.dtype.names or () if each not in ("syscall", "comm")]
    for name, keep in expected.items():
        assert got[name].events[columns].tolist() == events[keep][columns].tolist(), name
        if keep.any():
            assert got[name].calls.tolist() == names[keep].tolist()
            assert got[name].comms.tolist() == comms[keep].tolist()
        assert not got[name].lost
        assert got[name].end.produced == len(events) == 1_050
    assert keeps(expected) == {
        "pid": 700, "tid": 700, "comm": 350, "syscall": 150, "errors": 120, "several": 80, "none": 0
    }  # fmt: skip


def keeps(expected: dict[str, Any]) -> dict[str, int]:
    """How many rows each filter takes; not of the slow ones, which the machine adds to."""
    return {name: int(keep.sum()) for name, keep in expected.items() if name != "slow"}


async def one_by_one(agent: RunningAgent, collector_id: str) -> list[pb.EbpfEvent]:
    """All messages of StreamEvents."""
    async with grpc.aio.insecure_channel(agent.address) as channel:
        method: Any = channel.unary_stream(
            f"/{SERVICE}/StreamEvents",
            request_serializer=pb.EbpfEventStreamRequest.SerializeToString,
            response_deserializer=pb.EbpfEvent.FromString,
        )
        return [
            event async for event in method(pb.EbpfEventStreamRequest(collector_id=collector_id))
        ]


async def test_events_one_a_message_and_events_in_batches_are_the_same(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 400, "openat", 100)
    async with connected(agent) as client:
        collector_id = await start_events(
            client, running.pid, until_exit="true", include="getppid,openat"
        )
        single = asyncio.create_task(one_by_one(agent, collector_id))
        await have_subscribed(client, collector_id, 1)
        got = await receive(client, collector_id, None, running.go)
        messages = await single
    rows, last = [each for each in messages if each.WhichOneof("payload")], messages[-1]
    assert len(rows) == 500
    # A message of one event has the strings of that event alone.
    names = [name for name in got.events.dtype.names or () if name not in ("syscall", "comm")]
    assert [(row.seq, *(getattr(row.syscall_call, name) for name in names)) for row in rows] == [
        (seq, *event)
        for seq, event in zip(got.seqs.tolist(), got.events[names].tolist(), strict=True)
    ]
    assert [row.strings[row.syscall_call.syscall] for row in rows] == got.calls.tolist()
    assert [row.strings[row.syscall_call.comm] for row in rows] == got.comms.tolist()
    assert last.WhichOneof("payload") is None
    assert SessionEnd.of(last.end) == got.end


@pytest.fixture
def at_ease() -> Iterator[subprocess.Popen[bytes]]:
    """A program that makes one call every 50 ms; it waits to be let go."""
    with subprocess.Popen([sys.executable, "-I", "-c", AT_EASE], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.timed
async def test_at_ease_an_event_arrives_within_twenty_milliseconds(
    agent: RunningAgent, at_ease: subprocess.Popen[bytes]
) -> None:
    delays_ns: list[int] = []
    async with connected(agent) as client:
        collector_id = await start_events(client, at_ease.pid, until_exit="true", include="getppid")
        async with client.subscribe(collector_id) as stream:
            assert at_ease.stdin
            at_ease.stdin.write(b"\n")
            at_ease.stdin.close()
            async for batch in stream:
                delays_ns += (time.time_ns() - batch.events["ended_ns"]).tolist()
    assert len(delays_ns) == 60
    assert min(delays_ns) > 0
    assert statistics.median(delays_ns) <= AT_EASE_NS, f"{sorted(delays_ns)}"


def tap(agent: RunningAgent, program: Path, *arguments: str) -> list[str]:
    """`coral tap --events` on a program that makes a few calls; the lines that it prints."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-P", "-m", "coral.cli.main"),
            *("tap", "--agent", agent.address),
            *("--syscall-stats", "--events", "--include", "getppid,nanosleep", *arguments),
            *("--", program, "getppid", "25", "nanosleep", "5"),
        ],
        capture_output=True, text=True, cwd=ROOT, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_tap_prints_a_line_for_each_call_and_then_totals(
    agent: RunningAgent, programs: Path
) -> None:
    lines = tap(agent, programs / "calls")
    at = next(index for index, line in enumerate(lines) if line.startswith("totals of "))
    rows = [line.split() for line in lines[:at] if " = " in line]
    assert Counter(row[2] for row in rows) == {"getppid": 25, "nanosleep": 5}
    assert all(row[1].startswith("calls/") and row[3] == "=" for row in rows)
    assert {row[4] for row in rows if row[2] == "nanosleep"} == {"0"}
    assert lines[at].endswith("target exited")
    counts = {line.split()[0]: line.split()[1] for line in lines[at + 2 :]}
    assert counts["getppid"] == "25"
    assert counts["nanosleep"] == "5"


def test_tap_prints_an_object_for_each_call_to_programs(
    agent: RunningAgent, programs: Path
) -> None:
    lines = tap(agent, programs / "calls", "-o", "json")
    # The program's own lines go the same way.
    *rows, end = (json.loads(line) for line in lines if line.startswith("{"))
    assert Counter(row["syscall"] for row in rows) == {"getppid": 25, "nanosleep": 5}
    assert {row["comm"] for row in rows} == {"calls"}
    assert {row["collector"] for row in rows} == {"syscall_stats"}
    assert {row["pid"] for row in rows} == {row["tid"] for row in rows}
    slow = [row for row in rows if row["syscall"] == "nanosleep"]
    assert all(row["duration_ns"] >= MILLISECOND_NS and row["return_value"] == 0 for row in slow)
    assert end == {"end": "target_exited", "detail": ""}
