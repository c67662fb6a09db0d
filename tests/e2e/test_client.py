"""The client against a real agent, and the programs in docs/client.md: they run, they are typed,
and what they print is true."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coral.client import AgentClient, EndReason, NotFoundError, OutOfRangeError
from tests.events import connected, eventually, info_of, receive, start_events
from tests.network import connected as connect
from tests.network import puppets, send, socket_of
from tests.shop import WAIT_S, shop, visit, visitor
from tests.support import INSECURE, ROOT, Calls, RunningAgent, running_agent, totals

PAGE = (ROOT / "docs/client.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("client") / "agent") as running:
        yield running


@pytest.fixture
def functions() -> dict[str, Any]:
    """What the examples define, in one module as a reader would have them."""
    namespace: dict[str, Any] = {"__name__": "examples"}
    exec("\n".join(EXAMPLES), namespace)
    return namespace


def test_the_examples_are_typed(tmp_path: Path) -> None:
    program = tmp_path / "examples.py"
    program.write_text("\n".join(EXAMPLES))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--strict", program],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_first_example_prints_the_slow_calls_and_an_exact_account(
    agent: RunningAgent, calls: Callable[..., Calls], tmp_path: Path
) -> None:
    running = calls("getppid", 500, "nanosleep", 300)
    program = tmp_path / "example.py"
    program.write_text(EXAMPLES[0].replace("1234", str(running.pid)))
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-P", program],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "CORAL_AGENT": agent.address, "PYTHONUNBUFFERED": "1"},
    ) as example:  # fmt: skip
        assert example.stdout
        first = example.stdout.readline()  # a second later: where the stream stands
        running.go()
        running.finish()
        out = first + example.stdout.read()
    assert example.returncode == 0
    accounts = re.findall(r"Account\(after_seq=0, last_seq=(\d+), produced=(\d+), .*?\)", out)
    assert accounts
    assert len(set(accounts[-1])) == 1
    assert int(accounts[-1][0]) >= 800
    assert out.count("'nanosleep'") >= 300


async def test_columns_say_what_the_program_made(
    agent: RunningAgent, calls: Callable[..., Calls], functions: dict[str, Any]
) -> None:
    running = calls("getppid", 4_000, "openat", 250)
    async with connected(agent) as client:
        started = await client.start(
            "syscall_stats",
            config={
                "pid": str(running.pid), "include": "getppid,openat", "until_exit": "true",
                "interval": "100ms",
            },
        )  # fmt: skip
        running.go()
        made = running.finish().calls
        counted, latency = await functions["summary"](client, started.collector_id)
        rows = await receive(client, started.collector_id)
    assert counted == made
    assert latency.count == 4_250
    assert 0 < latency.quantile_ns(0.5) <= latency.max_ns
    assert rows.end.reason is EndReason.TARGET_EXITED
    assert totals(row for b in rows.batches for row in b.message.syscall_stats) == Counter(made)


async def test_a_stream_can_be_followed_to_its_end_and_read_again_after_it(
    agent: RunningAgent, calls: Callable[..., Calls], functions: dict[str, Any]
) -> None:
    running = calls("getppid", 700, "openat", 40)
    async with connected(agent) as client:
        session = await start_events(
            client, running.pid, include="getppid,openat", until_exit="true"
        )
        running.go()
        running.finish()
        assert await functions["follow"](client, session, 0) == 740
        assert await functions["follow"](client, session, 500) == 740
        assert await functions["failures"](client, session) == 0
        async with client.subscribe(session, after_seq=700, errors_only=True) as stream:
            rows = sum([len(batch.events) async for batch in stream])
        account = stream.account
        assert (account.after_seq, account.last_seq, account.delivered) == (700, 740, rows)
        assert account.filtered == 40 - rows
        (info,) = [
            it for it in await client.collectors(include_ended=True) if it.collector_id == session
        ]
        assert info.end
        assert (info.end.reason, info.end.produced) == (EndReason.TARGET_EXITED, 740)
        assert info.ended_at_ns
        assert session not in [it.collector_id for it in await client.collectors()]


async def test_answers_are_typed_and_in_named_units(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    async with connected(agent) as client:
        can = await client.capabilities()
        assert can.supported
        assert "syscall_stats" in map(str, can.available_collectors)
        (stats,) = [it for it in can.collectors if it.kind.name == "syscall_stats"]
        assert stats.supported
        assert {"mode", "interval"} <= {option.name for option in stats.options}

        started = await client.start(
            "syscall_stats", config={"pid": str(running.pid)}, duration_s=20
        )
        assert started.expires_at_ns
        assert abs(started.expires_at_ns - time.time_ns() - 20e9) < 5e9
        later_ns = await client.renew(started.collector_id, 40)
        (info,) = [
            it for it in await client.collectors() if it.collector_id == started.collector_id
        ]
        assert (int(info.kind), info.kind.name) == (1, "syscall_stats")
        assert info.expires_at_ns == later_ns
        assert info.config == {"pid": str(running.pid)}
        assert info.end is None
        await client.stop(started.collector_id)
        with pytest.raises(NotFoundError):
            await client.stop("no-such-collector")


async def test_a_collector_is_stopped_when_its_block_is_left(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    async with connected(agent) as client:
        async with client.collector("syscall_stats", config={"pid": running.pid}) as started:
            assert started.collector_id in [it.collector_id for it in await client.collectors()]
        assert started.collector_id not in [it.collector_id for it in await client.collectors()]
        async with client.collector("syscall_stats", config={"pid": running.pid}) as started:
            await client.stop(started.collector_id)
        with pytest.raises(NotFoundError, match=r"(?i)stopped"):
            await client.stop(started.collector_id)
        with pytest.raises(OutOfRangeError):
            await client.subscribe(started.collector_id, after_seq=1 << 40).__aenter__()


async def test_names_are_looked_up_before_batches_are_joined(
    agent: RunningAgent, calls: Callable[..., Calls], functions: dict[str, Any]
) -> None:
    running = calls("getppid", 300, "openat", 20)
    async with connected(agent) as client:
        session = await start_events(
            client, running.pid, include="getppid,openat", until_exit="true"
        )
        running.go()
        made = running.finish().calls
        got = await receive(client, session)
    assert Counter(functions["call_names"](got.batches)) == made


async def has_a_reader(client: AgentClient, collector_id: str) -> None:
    """Waits until somebody reads the collector: what it sends before is lost to who comes later."""

    async def subscribed() -> bool:
        return bool((await info_of(client, collector_id)).subscribers)

    await eventually(subscribed)


async def test_tcp_columns_say_what_was_carried_and_refused(
    agent: RunningAgent, functions: dict[str, Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused_port = closed.getsockname()[1]
    async with connected(agent) as client:
        with puppets(1) as (server,):
            with puppets(1) as (puppet,):
                started = await client.start(
                    "tcp_metrics", config={"pid": puppet.pid, "until_exit": True}
                )
                assert started.supported, started.error
                reading = asyncio.create_task(functions["traffic"](client, started.collector_id))
                await has_a_reader(client, started.collector_id)
                connect(puppet, server, "127.0.0.1")
                send(puppet, "c", server, "s", 70_000)
                send(server, "s", puppet, "c", 3_000)
                puppet.do(socket_of("127.0.0.1", "r"))
                puppet.do(f"r.connect_ex(('127.0.0.1', {refused_port}))")
            carried, refused = await reading
            assert (carried, refused) == ({"127.0.0.1": 73_000}, 1)
            busiest = asyncio.create_task(functions["busiest_peers"](client, server.pid))
            while not len(await client.collectors()):
                assert not busiest.done()
        assert re.fullmatch(r"\[\('127\.0\.0\.1', \d+\)\], 0 refused", await busiest)


async def test_http_columns_have_quantiles_by_route(
    agent: RunningAgent, functions: dict[str, Any]
) -> None:
    async with connected(agent) as client:
        with shop() as server, visitor() as puppet:
            started = await client.start(
                "http_latency", config={"pid": server.pid, "until_exit": True}
            )
            assert started.supported, started.error
            reading = asyncio.create_task(functions["slowest"](client, started.collector_id))
            await has_a_reader(client, started.collector_id)
            visit(puppet, server, *(("GET", f"/slow/{number}", 0) for number in range(3)))
            visit(puppet, server, ("GET", "/", 0))
        slowest = await reading
    assert set(slowest) == {"/slow/{id}", "/"}
    assert slowest["/slow/{id}"] >= WAIT_S * 1000 > slowest["/"]


async def test_profile_columns_have_the_cpu_time_of_functions(
    agent: RunningAgent, functions: dict[str, Any], programs: Path
) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        programs / "profiled", "shares", "600", stdin=pipe, stdout=pipe
    )
    async with connected(agent) as client:
        config = {"pid": process.pid, "until_exit": True, "frequency": 499}
        started = await client.start("cpu_profile", config=config)
        assert started.supported, started.error
        out, _ = await process.communicate(b"x")
        seconds = await functions["busiest"](client, started.collector_id)
    truth = {name: int(ns) / 1e9 for name, ns in map(str.split, out.decode().splitlines())}
    assert next(iter(truth)) == "spend_most" == seconds.most_common(1)[0][0]
    assert sum(seconds.values()) == pytest.approx(sum(truth.values()), rel=0.25)


async def test_a_proxy_in_the_environment_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with running_agent(
        tmp_path / "agent", {"auth": INSECURE}, "--listen", "127.0.0.1:0"
    ) as running:
        async with AgentClient(running.address) as client:
            assert (await client.capabilities()).supported
