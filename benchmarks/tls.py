"""What TLS costs: a call, a new connection, and the bytes of a stream; over a unix socket, over TCP
without it, with it, and with a client's certificate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.bench import Bench, BenchError
from benchmarks.report import NOT_HERE, Report, Samples, times
from coral.client import AgentClient, Tls
from tests.certificates import Authority
from tests.support import INSECURE, Calls, RunningAgent, running_agent, wait_until

_ROUNDS: Final = 7
_CALLS: Final = 300
_CONNECTIONS: Final = 15  # fewer than the gate lets begin at once
_EVENTS: Final = 600_000
_LIMITS: Final = {
    "subscriber_bytes_per_second": "1GiB",
    "subscriber_queue_bytes": "128MiB",
    "replay_bytes": "128MiB",
    "ended_bytes": "128MiB",
    "ended_sessions": "10m",
    "memory": "1GiB",
    "cpu_percent": 1000,
    "peer_calls_per_second": 1_000_000,
}
_UNIX: Final = "unix socket"


@dataclass
class _Way:
    """A way to an agent, and what was measured of it, a value a round."""

    agent: RunningAgent
    address: str
    tls: Tls | None
    collector_id: str = ""
    call_us: list[float] = field(default_factory=list)
    call_cpu_us: list[float] = field(default_factory=list)
    connection_ms: list[float] = field(default_factory=list)
    connection_cpu_ms: list[float] = field(default_factory=list)
    stream_mb_per_s: list[float] = field(default_factory=list)
    stream_cpu_ms_per_mb: list[float] = field(default_factory=list)

    def client(self) -> AgentClient:
        """On a connection of its own."""
        return AgentClient(self.address, tls=self.tls)


async def measure(bench: Bench) -> Report:
    """The section: rounds, each with all ways in turn."""
    with ExitStack() as stack:
        ways = {name: stack.enter_context(way) for name, way in _ways(bench).items()}
        for way in ways.values():
            with bench.calls(_EVENTS) as running:
                await _fill(way, running)
        for number in range(_ROUNDS):
            for way in ways.values():
                await _calls(way)
                await _connections(way)
                await _stream(way)
            bench.say(f"round {number + 1} of {_ROUNDS}")
    return _report(ways)


def _ways(bench: Bench) -> dict[str, AbstractContextManager[_Way]]:
    authority = Authority()
    ca = str(authority.write(bench.directory / "ca.crt"))
    certificate, key = authority.sign("127.0.0.1").write(bench.directory, "server")
    long_key = authority.sign("127.0.0.1", key=rsa.generate_private_key(65537, 2048))
    rsa_certificate, rsa_key = long_key.write(bench.directory, "rsa")
    shown, shown_key = authority.sign("spiffe://td/bench").write(bench.directory, "client")
    server = {"certificate": str(certificate), "key": str(key)}
    rsa_server = {"certificate": str(rsa_certificate), "key": str(rsa_key)}
    verifies, trusts = {"client_ca": ca}, {"client_certificates": "none"}
    mutual = Tls(ca, str(shown), str(shown_key))
    return {
        _UNIX: _opened(bench, "unix", {}, None, tcp=False),
        "TCP": _opened(bench, "tcp", {}, None),
        "TCP, TLS 1.3": _opened(bench, "tls", {**server, **trusts}, Tls(ca)),
        "TCP, TLS 1.3, client's certificate": _opened(
            bench, "mtls", {**server, **verifies}, mutual
        ),
        "the same, agent's key of RSA": _opened(bench, "rsa", {**rsa_server, **verifies}, mutual),
    }


@contextmanager
def _opened(
    bench: Bench, name: str, tls: dict[str, str], client: Tls | None, *, tcp: bool = True
) -> Iterator[_Way]:
    directory: Path = bench.directory / name
    listen = "127.0.0.1:0" if tcp else f"unix:{directory}/agent.sock"
    config = {"limits": _LIMITS, "auth": INSECURE, "tls": tls, "listen": [listen]}
    with running_agent(directory, config) as agent:
        wait_until(lambda: b"collector available" in agent.log_path.read_bytes())
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        yield _Way(agent, line["grpc"][0], client)  # type: ignore[index]
        agent.stop()


async def _fill(way: _Way, running: Calls) -> None:
    """A session that has ended, all of which is kept."""
    async with way.client() as client:
        config: dict[str, str | int] = {"mode": "events", "pid": running.pid, "until_exit": True}
        config |= {"include": "getppid", "ring": "64MiB"}
        started = await client.start("syscall_stats", config=config)
        if not started.supported:
            raise BenchError(started.error)
        way.collector_id = started.collector_id
        running.go()
        running.finish()
        async with client.subscribe(way.collector_id) as stream:
            async for _ in stream:
                pass


def _cpu_s(way: _Way) -> float:
    spent = psutil.Process(way.agent.process.pid).cpu_times()
    return spent.user + spent.system


async def _calls(way: _Way) -> None:
    async with way.client() as client:
        await client.collectors()
        began_s, cpu_s = time.perf_counter(), _cpu_s(way)
        for _ in range(_CALLS):
            await client.collectors()
        way.call_us.append((time.perf_counter() - began_s) / _CALLS * 1e6)
        way.call_cpu_us.append((_cpu_s(way) - cpu_s) / _CALLS * 1e6)


async def _connections(way: _Way) -> None:
    began_s, cpu_s = time.perf_counter(), _cpu_s(way)
    for _ in range(_CONNECTIONS):
        async with way.client() as client:
            await client.collectors()
    way.connection_ms.append((time.perf_counter() - began_s) / _CONNECTIONS * 1e3)
    way.connection_cpu_ms.append((_cpu_s(way) - cpu_s) / _CONNECTIONS * 1e3)


async def _stream(way: _Way) -> None:
    async with way.client() as client:
        began_s, cpu_s = time.perf_counter(), _cpu_s(way)
        async with client.subscribe(way.collector_id) as stream:
            async for _ in stream:
                pass
            took_s, mb = time.perf_counter() - began_s, stream.received_bytes / 1e6
        way.stream_mb_per_s.append(mb / took_s)
        way.stream_cpu_ms_per_mb.append((_cpu_s(way) - cpu_s) * 1e3 / mb)


def _report(ways: dict[str, _Way]) -> Report:
    plain = ways["TCP"]
    rows, samples = [], {}
    for name, way in ways.items():
        call, stream = Samples(way.call_us), Samples(way.stream_mb_per_s)
        is_plain = way is plain
        rows.append(
            (
                name,
                call.show(),
                NOT_HERE if is_plain else times(call.median, Samples(plain.call_us).median),
                Samples(way.call_cpu_us).show(),
                Samples(way.connection_ms).show(1),
                Samples(way.connection_cpu_ms).show(1),
                stream.show(),
                NOT_HERE
                if is_plain
                else times(stream.median, Samples(plain.stream_mb_per_s).median),
                Samples(way.stream_cpu_ms_per_mb).show(1),
            )
        )
        samples[f"{name}, a call, us"] = way.call_us
        samples[f"{name}, a call, us of the agent's CPU"] = way.call_cpu_us
        samples[f"{name}, a connection with a call, ms"] = way.connection_ms
        samples[f"{name}, a connection with a call, ms of the agent's CPU"] = way.connection_cpu_ms
        samples[f"{name}, a stream, MB/s"] = way.stream_mb_per_s
        samples[f"{name}, a stream, ms of the agent's CPU a MB"] = way.stream_cpu_ms_per_mb
    return Report(
        title="Calls and streams with TLS and without",
        how=f"ListCollectors {_CALLS} times on one connection; {_CONNECTIONS} connections, each "
        f"with one call; and the replay of {_EVENTS:,} events by one subscriber in Python, on the "
        f"same machine. {_ROUNDS} rounds, each with all ways in turn. CPU is the agent's. Keys are "
        "of P-256, but for RSA's 2048 bits in the last line.",
        columns=(
            "", "a call, µs", "of TCP's", "CPU, µs", "a connection and a call, ms", "CPU, ms",
            "a stream, MB/s", "of TCP's", "CPU, ms a MB",
        ),
        rows=rows,
        samples=samples,
    )  # fmt: skip
