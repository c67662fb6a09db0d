"""Unkind callers of the gRPC ports: they are held off at limits that the refusals name, and the
calls of others succeed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http2 import PING, PREFACE, SETTINGS, Http2, frame
from tests.support import (
    INSECURE,
    PATIENCE,
    ROOT,
    SERVICE,
    RunningAgent,
    code_and_text,
    running_agent,
    samples,
    scrape,
    wait_until,
)

NOBODY: Final = 65534
LIST: Final = f"/{SERVICE}/ListCollectors"
CALLS: Final = 34
MOST_PER_PEER: Final = 40
LIMITS: Final = {
    "connections": 60,
    "connections_per_peer": MOST_PER_PEER,
    "connection_handshake": "2s",
    "connection_idle": "2s",
    "cpu_percent": 1000,
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent on a unix socket, which is its address, and on TCP."""
    directory = tmp_path_factory.mktemp("gate")
    unix = f"unix:{directory}/agent.sock"
    listen = ("--listen", unix, "--listen", "127.0.0.1:0")
    with running_agent(directory / "agent", {"auth": INSECURE, "limits": LIMITS}, *listen) as one:
        one.address = unix
        yield one


def tcp(agent: RunningAgent) -> str:
    (line,) = [line for line in agent.log() if line["event"] == "listening"]
    address: str = line["grpc"][1]  # type: ignore[index]
    return address


def calls_succeed(address: str, count: int = CALLS) -> float:
    """Makes calls on one connection; the longest, in seconds."""
    longest_s = 0.0
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(address, options) as channel:
        call: Any = channel.unary_unary(LIST)
        for _ in range(count):
            began_s = time.monotonic()
            call(b"", timeout=60 * PATIENCE)
            longest_s = max(longest_s, time.monotonic() - began_s)
    return longest_s


def held(agent: RunningAgent, address: str) -> int:
    """How many connections to ADDRESS the agent has accepted."""
    port = int(address.rpartition(":")[2])
    found = psutil.Process(agent.process.pid).net_connections("tcp")
    return sum(one.laddr.port == port and one.status == "ESTABLISHED" for one in found)


def counted(agent: RunningAgent, name: str, **labels: str) -> float:
    """The one sample of NAME with LABELS."""
    (value,) = samples(scrape(agent), name, **labels).values()
    return value


def connect(address: str, first: bytes = b"") -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(first)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed it; reads what is there."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@contextmanager
def as_nobody(address: str, count: int) -> Iterator[None]:
    """A process of another user, with COUNT idle connections."""
    host, _, port = address.rpartition(":")
    code = (
        "import socket, sys\n"
        f"held = [socket.create_connection(({host!r}, {port})) for _ in range({count})]\n"
        "print(flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", code],
        user=NOBODY, group=NOBODY, extra_groups=(), cwd="/", env={},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout
        assert process.stdout.readline()
        yield
        process.kill()


@pytest.mark.timed
@pytest.mark.parametrize("first", [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS)])
def test_a_thousand_idle_connections_are_held_to_the_limit_and_then_closed(
    first: bytes, agent: RunningAgent
) -> None:
    address = tcp(agent)
    with ExitStack() as stack:
        idle = []
        for _ in range(300 if first else 1007):
            with suppress(ConnectionError):
                idle.append(stack.enter_context(connect(address, first)))
        assert held(agent, address) <= MOST_PER_PEER
        assert calls_succeed(agent.address) < 2 * PATIENCE
        wait_until(lambda: all(map(is_closed, idle)), 60)
    wait_until(lambda: held(agent, address) == 0)


@pytest.mark.timed
def test_another_users_connections_leave_room_for_ours(agent: RunningAgent) -> None:
    address = tcp(agent)
    with as_nobody(address, 100):
        wait_until(lambda: held(agent, address) == MOST_PER_PEER)
        assert calls_succeed(address) < 2 * PATIENCE
        assert calls_succeed(agent.address) < 2 * PATIENCE


def test_a_refused_connection_is_told_the_limit(agent: RunningAgent) -> None:
    address = tcp(agent)
    with ExitStack() as stack:
        for _ in range(MOST_PER_PEER):
            stack.enter_context(Http2(address)).greet()
        wait_until(lambda: held(agent, address) == MOST_PER_PEER)
        refused = stack.enter_context(Http2(address))
        told = refused.received()
        assert f"limits.connections_per_peer is {MOST_PER_PEER}, and uid 0 has".encode() in told
        assert counted(agent, "coral_agent_connections", listener="tcp") == MOST_PER_PEER
    wait_until(lambda: counted(agent, "coral_agent_connections", listener="tcp") == 0)
    times = counted(
        agent, "coral_agent_connections_refused_total",
        listener="tcp", limit="connections_per_peer",
    )  # fmt: skip
    reports = [line for line in agent.log() if line["event"] == "connection refused"]
    assert 0 < len(reports) <= times


def reset_streams(connection: Http2) -> bytes:
    return connection.begin_and_reset(LIST)


def open_streams(connection: Http2) -> bytes:
    return connection.begin(LIST)


@pytest.mark.timed
@pytest.mark.parametrize("attack", [reset_streams, open_streams])
@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_floods_on_two_connections_leave_others_their_calls(
    attack: Callable[[Http2], bytes], over: str, agent: RunningAgent
) -> None:
    address = tcp(agent) if over == "tcp" else agent.address
    over_now, sent = threading.Event(), [0, 0]

    def flood(number: int) -> None:
        while not over_now.is_set():
            with suppress(OSError), Http2(address) as connection:
                connection.greet()
                connection.socket.settimeout(0.2)
                while not over_now.is_set():
                    connection.socket.sendall(b"".join(attack(connection) for _ in range(100)))
                    sent[number] += 100
                    with suppress(TimeoutError):
                        connection.socket.recv(1 << 20)

    floods = [threading.Thread(target=flood, args=(number,)) for number in range(2)]
    for thread in floods:
        thread.start()
    try:
        wait_until(lambda: min(sent) >= 1000)
        before = sum(sent)
        longest_s = calls_succeed(agent.address)
        wait_until(lambda: sum(sent) > before)
    finally:
        over_now.set()
        for thread in floods:
            thread.join()
    assert longest_s < 5 * PATIENCE


def test_a_peer_sends_no_faster_than_its_rate(tmp_path: Path) -> None:
    limits = {"peer_bytes_per_second": "256KiB", "peer_calls_per_second": 100}
    with running_agent(tmp_path / "agent", {"limits": limits}) as slow:
        began_s = time.monotonic()
        calls_succeed(slow.address, 120)
        took_s = time.monotonic() - began_s
        # 20 at once, one for the connection; then a hundred in a second.
        assert took_s > 1.0
        for first in (b"", frame(PING, 0, 0, b"too short")):
            with Http2(slow.address) as connection:
                connection.greet().socket.sendall(first)
                if first:  # gRPC leaves, and the gate waits for the client to read that
                    connection.received()
                connection.socket.settimeout(1.0)
                began_s, sent = time.monotonic(), 0
                ping = frame(PING, 0, 0, bytes(8)) * 1000
                with suppress(OSError):
                    while time.monotonic() < began_s + 2:
                        sent += connection.socket.send(ping)
            # A second's worth at once, then the rate; and what the kernel's buffers took.
            assert 0 < sent < (256 << 10) * 3 + (1 << 20)


@pytest.mark.timed
def test_a_request_over_the_limit_is_refused(agent: RunningAgent) -> None:
    pids = ",".join(map(str, range(1, 300_001)))
    request = pb.StartEbpfCollectorRequest(
        kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": pids}
    )
    code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text == (
        f"request: {request.ByteSize():,} bytes are more than 65,536, this agent's limit for a "
        "request"
    )
    assert calls_succeed(agent.address) < 2 * PATIENCE


def test_requests_that_never_end_take_a_bounded_part_of_memory(agent: RunningAgent) -> None:
    process = psutil.Process(agent.process.pid)
    before = process.memory_info().rss
    sent = 0
    with Http2(agent.address) as connection:
        connection.greet()
        connection.socket.settimeout(2.0)
        with suppress(OSError):
            for _ in range(90):  # each of 300 kB of which the last byte is missing
                begun = connection.begin(LIST, None, end=False)
                body = b"\0" + (300_000).to_bytes(4, "big") + bytes(299_999)
                parts = [body[at : at + 16_384] for at in range(0, len(body), 16_384)]
                begun += b"".join(frame(0, 0, connection.stream, part) for part in parts)
                connection.socket.sendall(begun)
                sent += len(begun)
        grown = process.memory_info().rss - before
    assert sent > 1 << 20
    assert grown < 64 << 20


@pytest.mark.parametrize("unread", [False, True])
def test_streams_that_no_quota_sees_are_limited_for_each_peer(unread: bool, tmp_path: Path) -> None:
    def begin(connection: Http2, count: int) -> None:
        method, payload = (f"/{SERVICE}/GetCapabilities", b"") if unread else (LIST, None)
        calls = [connection.begin(method, payload, end=unread) for _ in range(count)]
        connection.socket.sendall(b"".join(calls))

    config = {"auth": INSECURE, "limits": {"http2_streams_per_peer": 50}}
    with running_agent(tmp_path / "agent", config, "--listen", "127.0.0.1:0") as agent:
        address = agent.address
        for turn in range(2):  # those of a connection that has left count no more
            with Http2(address) as one, Http2(address) as other:
                begin(one.greet(window_bytes=0), 45)
                one.acknowledge()
                if unread:
                    wait_until(lambda one=one: one.answers == 45)  # type: ignore[misc]
                begin(other.greet(window_bytes=0), 45)
                told = other.received()
                assert b"limits.http2_streams_per_peer is 50, and uid 0 has as many" in told
                assert held(agent, address) == 1
                one.socket.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: held(agent, address) == 0)
            assert turn + 1 == counted(
                agent, "coral_agent_connections_closed_total",
                listener="tcp", reason="http2_streams_per_peer",
            )  # fmt: skip
        calls_succeed(address, 120)  # one after the other


@pytest.mark.timed
def test_answers_that_are_not_read_keep_their_callers_places(tmp_path: Path) -> None:
    config = {"auth": INSECURE, "limits": {"calls_per_peer": 5}}
    with running_agent(tmp_path / "agent", config, "--listen", "127.0.0.1:0") as agent:
        with Http2(agent.address) as connection:
            connection.greet(window_bytes=0)
            connection.acknowledge()
            calls = [connection.begin(f"/{SERVICE}/GetCapabilities") for _ in range(5)]
            connection.socket.sendall(b"".join(calls))
            wait_until(lambda: connection.answers == 5)
            code, text = code_and_text(agent, "ListCollectors", pb.ListCollectorsRequest())
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text.startswith("limits.calls_per_peer is 5, and 5 calls of uid 0 ")
            connection.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: held(agent, agent.address) <= 1)
        assert calls_succeed(agent.address, 20) < 2 * PATIENCE


def test_calls_and_streams_of_one_peer_are_limited_by_name(tmp_path: Path) -> None:
    limits = {"streams": 3, "streams_per_peer": 2}
    config = {"auth": INSECURE, "limits": limits}
    with (
        running_agent(tmp_path / "agent", config, "--listen", "127.0.0.1:0") as few,
        ExitStack() as stack,
    ):
        channel = stack.enter_context(grpc.insecure_channel(few.address))
        watch: Any = channel.unary_stream(f"/{SERVICE}/WatchCollectors")
        for _ in range(2):
            standing = watch(b"")
            stack.callback(standing.cancel)
            standing.initial_metadata()
        code, text = code_and_text(few, "WatchCollectors", pb.WatchCollectorsRequest())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text.startswith("limits.streams_per_peer is 2, and 2 streams of uid 0 ")
        reflect: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        with pytest.raises(grpc.RpcError, match=r"limits\.streams_per_peer is 2, and 2 streams"):
            next(reflect(iter([b""])))
        # Health checks have as many places of their own.
        health: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        for _ in range(2):
            standing = health(b"")
            stack.callback(standing.cancel)
            next(standing)
        with pytest.raises(grpc.RpcError, match=r"limits\.streams_per_peer is 2, and 2 streams"):
            next(health(b""))
        assert counted(few, "coral_agent_calls_refused_total", limit="streams_per_peer") == 3


def test_a_watcher_that_reads_nothing_is_let_go_and_counted(tmp_path: Path) -> None:
    with (
        running_agent(tmp_path / "agent", {"limits": {"stalled_subscriber": "1s"}}) as agent,
        Http2(agent.address) as connection,
    ):
        connection.greet(window_bytes=0)
        connection.socket.sendall(connection.begin("/grpc.health.v1.Health/Watch"))
        connection.received()  # until the agent has closed it
        assert (
            counted(
                agent, "coral_agent_connections_closed_total", listener="unix", reason="stalled"
            )
            == 1
        )


@pytest.mark.timed
def test_frozen_readers_do_not_keep_the_agent_from_stopping(tmp_path: Path) -> None:
    with (
        running_agent(tmp_path / "agent", {"auth": INSECURE}, "--listen", "127.0.0.1:0") as one,
        ExitStack() as stack,
    ):
        for _ in range(20):
            connection = stack.enter_context(Http2(one.address)).greet()
            connection.socket.sendall(connection.begin(f"/{SERVICE}/WatchCollectors"))
        wait_until(lambda: held(one, one.address) == 20)
        began_s = time.monotonic()
        assert one.stop() == 0
        assert time.monotonic() - began_s < 2 * PATIENCE


@pytest.mark.parametrize("descriptors", [128, 200])
def test_connections_leave_descriptors_for_sessions(descriptors: int, tmp_path: Path) -> None:
    socket_path = tmp_path / "agent.sock"
    request = pb.StartEbpfCollectorRequest(
        kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": str(os.getpid())}
    )
    with (
        running_agent(
            tmp_path / "agent", {"auth": INSECURE},
            *("--listen", f"unix:{socket_path}", "--listen", "127.0.0.1:0"),
            prefix=["prlimit", f"--nofile={descriptors}:{descriptors}"],
        ) as agent,
        ExitStack() as stack,
    ):  # fmt: skip
        for address, count in ((tcp(agent), 60), (agent.metrics, 40)):
            for _ in range(count):
                with suppress(ConnectionError):
                    stack.enter_context(connect(address, PREFACE + frame(SETTINGS)))
        agent.address = f"unix:{socket_path}"
        for _ in range(3):
            started = agent.call("StartCollector", request)
            stop = pb.StopEbpfCollectorRequest(collector_id=started.collector_id)
            agent.call("StopCollector", stop)


def test_tcp_without_a_token_is_refused_unless_it_is_wanted_and_then_warned_of(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-W", "error", "-P", "-m", "coral.cli.main", "agent"]
    refused = subprocess.run(
        [*command, "--listen", "127.0.0.1:0", "--metrics", ""],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert line.startswith("coral agent: listen: 127.0.0.1:0: without a token, every local user ")
    assert line.endswith("auth.insecure_loopback: true")
    environment = {"CORAL__AUTH__INSECURE_LOOPBACK": "true"}
    for turn in range(2):
        with running_agent(
            tmp_path / str(turn), None, "--listen", "127.0.0.1:0", environment=environment
        ) as agent:
            (warning,) = [line for line in agent.log() if line["level"] == "warning"]
            assert str(warning["event"]).startswith("every local user may trace as root")
            assert warning["address"] == agent.address


def test_subscribers_are_listed_by_where_they_come_from(agent: RunningAgent) -> None:
    started = agent.call(
        "StartCollector",
        pb.StartEbpfCollectorRequest(
            kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": str(os.getpid())}
        ),
    )
    request = pb.EbpfEventStreamRequest(collector_id=started.collector_id)
    with ExitStack() as stack:
        for address in (agent.address, tcp(agent)):
            channel = stack.enter_context(grpc.insecure_channel(address))
            stream: Any = channel.unary_stream(f"/{SERVICE}/StreamEventBatches")
            stream = stream(request.SerializeToString())
            stack.callback(stream.cancel)
            stream.initial_metadata()
        listed = agent.call("ListCollectors", pb.ListCollectorsRequest())
        ((unix, ip),) = [sorted(s.peer for s in one.subscribers)[::-1] for one in listed.collectors]
        assert unix == f"unix: uid {os.geteuid()}, pid {os.getpid()}"
        assert ip.startswith("ipv4:127.0.0.1:")
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=started.collector_id))
