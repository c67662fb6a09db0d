"""The log of a real agent whose standard error nobody reads, or which many callers provoke."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import (
    ROOT,
    RunningAgent,
    coral,
    running_agent,
    samples,
    scrape,
    start_collector,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

FULL = b"x" * 4096


@contextmanager
def agent_that_logs_to(stderr: int, directory: Path) -> Iterator[RunningAgent]:
    """An agent with STDERR, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    address = f"unix:{directory}/agent.sock"
    process = subprocess.Popen(
        coral("agent", "--listen", address, "--metrics", metrics), stderr=stderr, cwd=ROOT
    )
    agent = RunningAgent(process, address, metrics, Path(os.devnull))

    def answers() -> bool:
        assert process.poll() is None
        try:
            agent.call("ListCollectors", pb.ListCollectorsRequest())
        except grpc.RpcError:
            return False
        return True

    try:
        wait_until(answers, timeout_s=30)
        yield agent
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def dropped(agent: RunningAgent) -> float:
    """How many lines the agent says that it dropped."""
    (count,) = samples(scrape(agent), "coral_agent_log_lines_dropped_total").values()
    return count


def stops_in_time(agent: RunningAgent) -> None:
    """Within two seconds, and one more for what the interpreter takes on a busy machine."""
    began = time.monotonic()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(10) == 0
    assert time.monotonic() - began < 3


@pytest.mark.timed
def test_an_agent_whose_log_is_a_full_pipe_starts_serves_and_stops(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, len(FULL))
    os.write(write_end, FULL)
    with agent_that_logs_to(write_end, tmp_path) as agent:
        os.close(write_end)
        for _ in range(3):
            started = start_collector(agent, pid=str(os.getpid()))
            stop = pb.StopEbpfCollectorRequest(collector_id=started.collector_id)
            assert agent.call("StopCollector", stop).success
        stops_in_time(agent)
    os.close(read_end)


@pytest.mark.timed
def test_an_agent_whose_log_nobody_reads_any_more_goes_on_and_counts_its_lines(
    tmp_path: Path,
) -> None:
    read_end, write_end = os.pipe()
    with agent_that_logs_to(write_end, tmp_path) as agent:
        os.close(write_end)
        os.close(read_end)
        start_collector(agent, pid=str(os.getpid()))
        before = wait_until(lambda: dropped(agent))
        start_collector(agent, pid=str(os.getpid()))
        wait_until(lambda: dropped(agent) > before)
        stops_in_time(agent)


def test_failed_tokens_are_logged_once_a_second_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret of this test")
    config = {"auth": {"token_file": str(tmp_path / "token")}}
    attempts = 300
    with running_agent(tmp_path / "agent", config) as agent:
        began = time.monotonic()
        for _ in range(attempts):
            with pytest.raises(grpc.RpcError):
                agent.call("ListCollectors", pb.ListCollectorsRequest())
        took_s = time.monotonic() - began
        agent.stop()
        refusals = [line for line in agent.log() if str(line["event"]).startswith("refus")]
    assert 10 <= len(refusals) <= 10 + took_s + 2
    refused = [line for line in refusals if line["event"] == "refused"]
    left_out = sum(int(str(line.get("left_out", 0))) for line in refused)
    left_out += sum(int(str(line["count"])) for line in refusals if line not in refused)
    assert len(refused) + left_out == attempts


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_metrics_beyond_loopback_are_a_warning_at_each_start(address: str, tmp_path: Path) -> None:
    prefix = ("unshare", "--net")  # the address is beyond loopback, and leads nowhere
    with running_agent(tmp_path / "agent", {}, "--metrics", address, prefix=prefix) as agent:
        warned = [
            line["metrics"] for line in agent.log() if "beyond this mach" in str(line["event"])
        ]
    assert warned == [address]


def test_loopback_is_no_warning_and_a_cgroup_that_is_not_there_is_one(tmp_path: Path) -> None:
    with running_agent(tmp_path / "agent", {"policy": {"cgroups": ["/", "/not/there"]}}) as agent:

        def warned() -> list[str]:
            lines = agent.log()
            return [str(line["reason"]) for line in lines if "policy.cgr" in str(line["event"])]

        (reason,) = wait_until(warned)
        assert "'/not/there' is not accepted" in reason
        assert not [line for line in agent.log() if "beyond this machine" in str(line["event"])]
