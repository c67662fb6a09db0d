"""The account, on the real kernel, with readers in processes of their own: whatever happens to a
reader, its rows and its reported losses add up to the calls that the program made."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import ROOT, Calls, RunningAgent, running_agent, wait_until

CALLS = 1_500_000
POLICIES = ("OVERFLOW_DROP_OLDEST", "OVERFLOW_DROP_NEWEST")
# High enough not to interfere; these limits have tests of their own.
CONFIG = {
    "limits": {
        "subscriber_bytes_per_second": "1GiB",
        "cpu_percent": 1000,
        "subscriber_queue_bytes": "64MiB",
        "replay_bytes": "128MiB",
    }
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    with running_agent(tmp_path / "agent", CONFIG) as running:
        yield running


class Reader:
    """A running tests/reader.py."""

    def __init__(self, agent: RunningAgent, collector_id: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.reader", agent.address, collector_id, *options],
            stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout
        assert self.process.stdout.readline() == b"subscribed\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def result(self) -> Any:
        out, _ = self.process.communicate(timeout=60)
        return json.loads(out)


def start(agent: RunningAgent, running: Calls, **config: str) -> str:
    """Starts a session of single events that watches only getppid of RUNNING, and ends with it."""
    answer = agent.call(
        "StartCollector",
        pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
            config={
                "pid": str(running.pid), "mode": "events", "include": "getppid",
                "until_exit": "true", "ring": "16MiB", **config,
            },
        ),
    )  # fmt: skip
    assert answer.supported, answer.error
    return str(answer.collector_id)


def produced(agent: RunningAgent) -> int:
    (collector,) = agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    return int(collector.produced)


def assert_even(told: Any, made: int, after: int = 0) -> None:
    """Asserts that every call is a row or a loss, and every gap is explained."""
    assert told["untold"] == 0
    assert told["rows"] + sum(told["lost"].values()) == made - after


def test_frozen_killed_and_slow_readers_each_have_an_exact_account(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", CALLS)
    session = start(agent, running)
    with ExitStack() as stack:

        def reader(*options: str) -> Reader:
            return stack.enter_context(Reader(agent, session, *options))

        fast = reader()
        frozen = [reader("--overflow", p, "--queue-bytes", "500000") for p in POLICIES]
        leaving, killed = reader("--until", "100000"), reader()
        for each in frozen:
            each.process.send_signal(signal.SIGSTOP)
        running.go()
        wait_until(lambda: produced(agent) > CALLS // 3, 30)
        killed.process.kill()
        first = leaving.result()
        resumed = reader("--after", str(first["last"]))
        assert running.finish().calls == {"getppid": CALLS}
        for each in frozen:
            each.process.send_signal(signal.SIGCONT)

        told = fast.result()
        assert told["lost"] == {}
        assert told["rows"] == CALLS
        assert told["end"] == "REASON_TARGET_EXITED"
        assert_even(told, CALLS)
        for each in frozen:
            told = each.result()
            assert told["lost"]["subscriber_queue"] > 0
            assert told["end"] == "REASON_TARGET_EXITED"
            assert_even(told, CALLS)
        assert first["untold"] == 0
        assert first["rows"] == first["last"]
        rest = resumed.result()
        assert_even(rest, CALLS, after=first["last"])
        assert first["rows"] + rest["rows"] + sum(rest["lost"].values()) == CALLS


def test_a_reader_that_wants_no_gap_is_ended_with_the_reason(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", CALLS)
    session = start(agent, running)
    options = ("--overflow", "OVERFLOW_END", "--queue-bytes", "200000")
    with Reader(agent, session, *options) as reader:
        reader.process.send_signal(signal.SIGSTOP)
        running.go()
        running.finish()
        reader.process.send_signal(signal.SIGCONT)
        told = reader.result()
    assert told["lost"] == {}
    assert told["rows"] == told["last"] < CALLS
    assert told["error"].startswith("the queue of 200000 bytes was full")


def test_a_ring_that_is_far_too_small_loses_much_and_says_how_much(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    made = 4 * 400_000
    running = calls("getppid", made // 4, threads=4)
    session = start(agent, running, ring="64KiB")
    with Reader(agent, session) as reader:
        running.go()
        assert running.finish().calls == {"getppid": made}
        told = reader.result()
    assert told["lost"]["kernel_buffer"] > made // 10
    assert set(told["lost"]) == {"kernel_buffer"}
    assert_even(told, made)


def test_what_the_replay_has_evicted_is_a_loss_of_a_late_reader(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    limits = {**CONFIG["limits"], "replay_bytes": "1MiB"}
    with running_agent(tmp_path / "small", {"limits": limits}) as agent:
        running, other = calls("getppid", 300_000), calls("getppid", 1)
        session = start(agent, running, pid=f"{running.pid},{other.pid}")
        running.go()
        running.finish()
        wait_until(lambda: produced(agent) == 300_000)
        with Reader(agent, session) as late:
            other.go()
            other.finish()
            told = late.result()
    assert set(told["lost"]) == {"replay_evicted"}
    assert 0 < told["rows"] < 50_000
    assert_even(told, 300_001)
