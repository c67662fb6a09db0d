"""Readiness, the watchdog, and leases while the agent is frozen: a real agent, as systemd, a
kubelet or an operator meets it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http2 import Http2
from tests.support import (
    PATIENCE,
    SERVICE,
    Calls,
    RunningAgent,
    Vitals,
    collectors_at_work,
    held_by,
    running_agent,
    samples,
    scrape,
    start_collector,
    streaming,
    wait_until,
)

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
SILENT: Final = 1_100

pytestmark = pytest.mark.usefixtures("nothing_left")


def page(agent: RunningAgent, path: str) -> tuple[int, str]:
    """The status and the text of a page."""
    try:
        with urlopen(f"http://{agent.metrics}{path}", timeout=30) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def health_of(agent: RunningAgent, service: str) -> int:
    """What grpc.health.v1 answers for SERVICE."""
    with grpc.insecure_channel(agent.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(request, timeout=30).status)


def test_an_agent_without_continuous_collectors_is_ready_once_it_has_probed_the_kernel(
    agent: RunningAgent,
) -> None:
    assert page(agent, "/readyz") in ((200, "ready\n"), (503, "the kernel is being probed\n"))
    wait_until(lambda: page(agent, "/readyz") == (200, "ready\n"))
    assert page(agent, "/healthz") == (200, "ok\n")
    assert [health_of(agent, name) for name in ("", SERVICE)] == [SERVING, SERVING]


def test_it_is_ready_when_every_continuous_collector_is_at_work_and_says_which_is_not(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    rule = {"kind": "syscall_stats", "service": "late", "config": {"interval": "100ms"}}
    host = {"kind": "tcp_metrics", "service": "all", "config": {"scope": "host"}}
    pid_file = tmp_path / "late.pid"
    config = {"continuous": [rule, host], "services": {"late": {"pid_file": str(pid_file)}}}
    with running_agent(tmp_path / "agent", config) as agent:

        def only_the_late_one_is_missing() -> bool:
            status, text = page(agent, "/readyz")
            is_late = text.startswith("syscall_stats late: services.late.pid_file: ")
            return status == 503 and is_late and text.count("\n") == 1

        wait_until(only_the_late_one_is_missing)
        assert [health_of(agent, name) for name in ("", SERVICE)] == [SERVING, NOT_SERVING]
        assert page(agent, "/healthz") == (200, "ok\n")
        metrics = scrape(agent)
        up = samples(metrics, "coral_agent_continuous_up")
        assert {dict(labels)["service"]: value for labels, value in up.items()} == {
            "late": 0,
            "all": 1,
        }
        (reason,) = samples(metrics, "coral_agent_continuous_waiting")
        assert dict(reason)["service"] == "late"
        assert dict(reason)["reason"] == "not_found"
        failures = samples(metrics, "coral_agent_continuous_failures_total", service="late")
        assert sum(failures.values()) >= 1

        running = calls()
        pid_file.write_text(str(running.pid))
        wait_until(lambda: page(agent, "/readyz") == (200, "ready\n"), timeout_s=20)
        wait_until(lambda: health_of(agent, SERVICE) == SERVING)
        metrics = scrape(agent)
        assert set(samples(metrics, "coral_agent_continuous_up").values()) == {1}
        assert not samples(metrics, "coral_agent_continuous_waiting")

        (late,) = (
            info.collector_id
            for info in collectors_at_work(agent).values()
            if info.service_name == "late"
        )
        agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=late))
        wait_until(
            lambda: page(agent, "/readyz") == (503, "syscall_stats late: a caller stopped it\n")
        )
        running.kill()


@pytest.mark.timed
def test_watchers_that_take_nothing_delay_neither_readiness_nor_the_end(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    pid_file = tmp_path / "late.pid"
    config = {
        "continuous": [{"kind": "syscall_stats", "service": "late"}],
        "services": {"late": {"pid_file": str(pid_file)}},
    }
    running = calls()
    with (
        running_agent(tmp_path / "agent", config) as agent,
        Http2(agent.address) as frozen,
    ):
        request = pb.EbpfEventStreamRequest(
            collector_id=start_collector(agent, pid=str(running.pid)).collector_id
        )
        frozen.greet(window_bytes=0).acknowledge()
        for service in ("", SERVICE):
            asked = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            frozen.socket.sendall(frozen.begin("/grpc.health.v1.Health/Watch", asked))
        wait_until(lambda: frozen.answers == 2)
        pid_file.write_text(str(running.pid))
        wait_until(lambda: health_of(agent, SERVICE) == SERVING, timeout_s=5)
        wait_until(lambda: page(agent, "/readyz") == (200, "ready\n"), timeout_s=5)
        with streaming(agent, "StreamEventBatches", request) as batches:
            began = time.monotonic()
            agent.process.send_signal(signal.SIGTERM)
            *_, last = batches
            assert last.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN
            assert time.monotonic() - began < PATIENCE
        assert agent.process.wait(10) == 0
        assert time.monotonic() - began < 2 * PATIENCE
    running.kill()


@contextmanager
def service_manager(address: str) -> Iterator[Callable[..., str]]:
    """A datagram socket as systemd has it; yields a function that waits for a message which begins
    with a text."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)

        def receive(beginning: str, within_s: float = 20) -> str:
            receiver.settimeout(within_s)
            while not (message := receiver.recv(4096).decode()).startswith(beginning):
                pass
            return message

        yield receive


@pytest.mark.timed
@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_when_it_is_ready_and_alive_and_when_it_stops(
    tmp_path: Path, *, abstract: bool
) -> None:
    name = f"{tmp_path}/notify"
    config = {"continuous": [{"kind": "syscall_stats", "service": "none-such"}]}
    environment = {"NOTIFY_SOCKET": f"@{name}" if abstract else name, "WATCHDOG_USEC": "400000"}
    with (
        service_manager(f"\0{name}" if abstract else name) as receive,
        running_agent(tmp_path / "agent", config, environment=environment) as agent,
    ):
        assert receive("READY") == "READY=1"
        assert receive("STATUS=syscall_stats none-such: service_name: ")
        receive("WATCHDOG=1")
        began = time.monotonic()
        for _ in range(5):  # twice in each period of 400 ms
            receive("WATCHDOG=1")
        assert time.monotonic() - began < 3
        agent.process.send_signal(signal.SIGTERM)
        assert receive("STOPPING").startswith("STOPPING=1\n")
        assert agent.process.wait(10) == 0


def heard_until_silence(receive: Callable[..., str]) -> int:
    """How many signs of life come until there is none for two seconds, five times as long as the
    watchdog waits."""
    heard = 0
    try:
        while True:
            receive("WATCHDOG=1", within_s=2)
            heard += 1
    except TimeoutError:
        return heard


def test_a_loop_that_is_stuck_sends_no_sign_of_life(tmp_path: Path) -> None:
    name = f"{tmp_path}/notify"
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000"}
    with (
        service_manager(name) as receive,
        running_agent(tmp_path / "agent", environment=environment) as agent,
    ):
        receive("WATCHDOG=1")
        agent.process.send_signal(signal.SIGSTOP)
        assert heard_until_silence(receive) < 10
        agent.process.send_signal(signal.SIGCONT)
        receive("WATCHDOG=1")


@pytest.mark.timed
def test_a_frozen_agents_lease_ends_when_it_goes_on_and_until_then_its_programs_stay(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    """The kernel knows no leases: programs stay attached for as long as the process exists."""
    running = calls()
    started = start_collector(agent, 1.0, pid=str(running.pid))
    programs = held_by(agent.process.pid)["prog"]
    assert programs
    agent.process.send_signal(signal.SIGSTOP)
    time.sleep(max(0.0, started.expires_at.ToNanoseconds() / 1e9 - time.time()) + 0.5)
    assert held_by(agent.process.pid)["prog"] == programs
    agent.process.send_signal(signal.SIGCONT)
    gone_at = time.monotonic()
    wait_until(lambda: not held_by(agent.process.pid)["prog"] & programs)
    assert time.monotonic() - gone_at < 1
    wait_until(lambda: not collectors_at_work(agent))
    request = pb.ListCollectorsRequest(include_ended=True)
    (info,) = agent.call("ListCollectors", request).collectors
    assert info.end.reason == pb.SessionEnd.REASON_EXPIRED
    running.kill()


@pytest.mark.timed
def test_silent_connections_of_a_local_user_stop_neither_scrapes_nor_sessions(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, SILENT + 200)), hard))
    host, _, port = agent.metrics.rpartition(":")
    running = calls()
    with ExitStack() as stack:
        for _ in range(SILENT):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        for _ in range(2):
            assert "coral_agent_build_info{" in scrape(agent)
        started = start_collector(agent, pid=str(running.pid))
        assert list(collectors_at_work(agent)) == [started.collector_id]
        descriptors = Vitals.of(agent.process.pid).descriptors
        assert descriptors < 150
        cpu_s = _cpu_s(agent)
        began = time.monotonic()
        time.sleep(2)
        assert (_cpu_s(agent) - cpu_s) / (time.monotonic() - began) < 0.2
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    running.kill()


def _cpu_s(agent: RunningAgent) -> float:
    """CPU time that the agent has used, in seconds."""
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
