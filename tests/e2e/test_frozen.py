"""Readers that are frozen: what they hold comes back, and none holds up the agent's end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import (
    SERVICE,
    Puppet,
    RunningAgent,
    collectors_at_work,
    resident_kib,
    running_agent,
    start_collector,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

READERS: Final = 12  # of a session that ends, and as many of one at work
CALLS: Final = 150_000  # about 7 MB for each reader
QUEUE_BYTES: Final = 4 << 20
CONFIG: Final = {
    "limits": {
        "stalled_subscriber": "6s",
        "keepalive": "10m",  # it is not to end the connection first
        "cpu_percent": 1000,
        "memory": "2GiB",
        "replay_bytes": "64KiB",
        "ended_sessions": "1s",
        "subscriber_bytes_per_second": "1GiB",
    }
}
# Reads the first message of each stream, each on a connection of its own, and then waits. The
# filters pass everything, but each differs, so that no two streams share their frames.
READER: Final = f"""
import sys, time
import grpc
from coral.mesh.v1 import ebpf_pb2 as pb
address, pid, *ids = sys.argv[1:]
calls = []
for number, collector_id in enumerate(ids):
    channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
    stream = channel.unary_stream(
        "/coral.mesh.v1.EbpfService/StreamEventBatches",
        pb.EbpfEventStreamRequest.SerializeToString, pb.EbpfEventBatch.FromString,
    )
    request = pb.EbpfEventStreamRequest(collector_id=collector_id, queue_bytes={QUEUE_BYTES})
    request.filter.pids.extend([int(pid), 1 << 30 | number])
    calls.append(stream(request))
for call in calls:
    next(call)
print("reading", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


def events(agent: RunningAgent, puppet: Puppet) -> str:
    """A collector of single events of PUPPET; its id."""
    config = {"pid": str(puppet.pid), "mode": "events", "ring": "16MiB", "include": "getppid"}
    return start_collector(agent, 120.0, **config).collector_id


@contextmanager
def readers(agent: RunningAgent, puppet: Puppet, *ids: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a stream of each collector of IDS, and has kept up until now."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", READER, agent.address, str(puppet.pid), *ids],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            assert process.stdout.readline() == "reading\n"
            yield process
        finally:
            process.kill()


def let_go(agent: RunningAgent) -> int:
    """How many readers the agent has let go of."""
    return [line["event"] for line in agent.log()].count("subscriber let go")


@pytest.mark.timed
def test_frozen_readers_are_let_go_and_do_not_hold_up_the_end(
    tmp_path: Path, puppet: Puppet
) -> None:
    with running_agent(tmp_path / "agent", CONFIG) as agent:
        pid = agent.process.pid
        ended, at_work = events(agent, puppet), events(agent, puppet)
        before_kib = resident_kib(pid)
        with readers(agent, puppet, *[ended, at_work] * READERS) as frozen:
            frozen.send_signal(signal.SIGSTOP)
            puppet.getppid(CALLS)
            agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=ended))
            # They share what waits for them, with a filter each.
            assert resident_kib(pid) - before_kib < READERS * QUEUE_BYTES >> 10
            wait_until(lambda: let_go(agent) == 2 * READERS, timeout_s=20)
            assert resident_kib(pid) - before_kib < READERS * QUEUE_BYTES >> 10
            assert not collectors_at_work(agent)[at_work].subscribers
            signalled_at = time.monotonic()
            assert agent.stop() == 0
            assert time.monotonic() - signalled_at < 2
            assert agent.log()[-1]["event"] == "stopped"
            assert not Path(agent.address.removeprefix("unix:")).exists()


@pytest.mark.timed
def test_a_reader_that_froze_just_now_does_not_hold_up_the_end(
    tmp_path: Path, puppet: Puppet
) -> None:
    with running_agent(tmp_path / "agent", CONFIG) as agent:
        collector_id = events(agent, puppet)
        with readers(agent, puppet, collector_id) as frozen:
            frozen.send_signal(signal.SIGSTOP)
            puppet.getppid(CALLS)
            signalled_at = time.monotonic()
            assert agent.stop() == 0
            assert time.monotonic() - signalled_at < 2
            ends = [line["end"] for line in agent.log() if line["event"] == "session ended"]
            assert ends == ["AGENT_SHUTDOWN: the agent is shutting down"]


def test_a_reader_that_stalls_loses_its_connection_and_the_other_streams_of_it(
    tmp_path: Path, puppet: Puppet
) -> None:
    with (
        running_agent(tmp_path / "agent", CONFIG) as agent,
        grpc.insecure_channel(agent.address) as channel,
    ):
        streams: Any = channel.unary_stream
        stalled = streams(f"/{SERVICE}/StreamEventBatches")(
            pb.EbpfEventStreamRequest(collector_id=events(agent, puppet)).SerializeToString()
        )
        standing = streams(f"/{SERVICE}/WatchCollectors")(b"")
        next(standing)
        next(stalled)
        puppet.getppid(CALLS)
        wait_until(lambda: let_go(agent) == 1, timeout_s=20)
        for stream in (standing, stalled):
            with pytest.raises(grpc.RpcError) as ended:
                deque(stream, maxlen=0)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
