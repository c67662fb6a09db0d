"""A real agent's batches in the colony's tables: what programs did, to the last call, in raw rows
and in rollups."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest

from coral.client import AgentClient, Kind
from coral.colony.delivery import Session
from coral.colony.tables import MINUTE, STACKS, Intake, Rollup, schema_of
from tests.deliveries import delivered
from tests.events import connected
from tests.network import connected as connect
from tests.network import number, puppets, send
from tests.shop import BODY_BYTES, port_of, shop, visit, visitor
from tests.support import Calls, RunningAgent, running_agent

ALWAYS: Final = 2**62

Row = dict[str, Any]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("tables") / "agent") as running:
        yield running


async def started(client: AgentClient, kind: str, **config: str | int | bool) -> str:
    """A session that ends with the process that it watches."""
    config = {"until_exit": True, "interval": "100ms", **config}
    answer = await client.start(kind, config=config)
    assert answer.supported, answer.error
    return answer.collector_id


async def tables_of(client: AgentClient, collector_id: str) -> Mapping[str, pa.Table]:
    """All rows of a session that has ended or will."""
    gathered, count = Intake(), 0
    async with client.subscribe(collector_id, columns=True) as stream:
        async for batch in stream:
            kind = Kind(batch.message.kind)
            gathered.add(delivered(batch, Session("node-1", collector_id, kind, "shop", 0)))
            count += batch.count
    assert gathered.rows == count
    taken = gathered.take()
    for name, table in taken.items():
        assert table.column_names == schema_of(name).names
    return taken


def rolled_up(taken: Mapping[str, pa.Table], table: str) -> list[Row]:
    rollup = Rollup(MINUTE)
    rollup.add(table, taken[table])
    found: list[Row] = rollup.take(ALWAYS)[MINUTE.name(table)].to_pylist()
    return found


def summed(rows: list[Row], key: str, figure: str) -> dict[Any, int]:
    sums: Counter[Any] = Counter()
    for row in rows:
        sums[row[key]] += row[figure]
    return dict(sums)


async def test_calls_are_all_there(agent: RunningAgent, calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 4_000, "openat", 250)
    async with connected(agent) as client:
        session = await started(client, "syscall_stats", pid=running.pid, include="getppid,openat")
        running.go()
        made = dict(running.finish().calls)
        taken = await tables_of(client, session)
    for rows in (taken["syscall_stats"].to_pylist(), rolled_up(taken, "syscall_stats")):
        assert summed(rows, "syscall", "call_count") == made
        assert {(row["service"], row["session"], row["comm"]) for row in rows} == {
            ("shop", session, "calls")
        }
        for row in rows:
            slots = sum(n for name, n in row.items() if name.startswith("latency_e"))
            errors = sum(n for name, n in row.items() if name.startswith("errors_"))
            assert (slots, errors) == (row["call_count"], row["error_count"])


async def test_requests_are_all_there_as_summaries_and_as_single_events(
    agent: RunningAgent,
) -> None:
    async with connected(agent) as client:
        with shop() as server, visitor() as puppet:
            whole = await started(client, "http_latency", pid=server.pid)
            single = await started(client, "http_latency", pid=server.pid, mode="events")
            visit(
                puppet, server, *(("GET", f"/users/{n}", 0) for n in range(20)), ("GET", "/bad", 0)
            )
            visit(puppet, server, ("POST", "/orders", 300))
            port = port_of(server)
        summaries, events = await asyncio.gather(
            tables_of(client, whole), tables_of(client, single)
        )
    wanted = {"/users/{id}": 20, "/bad": 1, "/orders": 1}
    for rows in (summaries["http_latency"].to_pylist(), rolled_up(summaries, "http_latency")):
        assert summed(rows, "route", "count") == wanted
        assert summed(rows, "route", "errors") == {"/users/{id}": 0, "/bad": 1, "/orders": 0}
        assert summed(rows, "method", "request_body_bytes") == {"GET": 0, "POST": 300}
        for row in rows:
            slots = sum(n for name, n in row.items() if name.startswith("duration_le_"))
            assert slots == row["count"] == row["outcomes_complete"]
            assert 0 < row["min_ns"] <= row["max_ns"] <= row["sum_ns"]
            assert (row["role"], row["version"], row["tls"]) == ("server", 1, False)
    found = events["http_requests"].to_pylist()
    assert Counter(row["route"] for row in found) == wanted
    assert {row["path"] for row in found} == {
        *(f"/users/{n}" for n in range(20)), "/bad", "/orders",
    }  # fmt: skip
    for row in found:
        assert (row["local_address"], row["local_port"]) == ("127.0.0.1", port)
        assert (row["remote_address"], row["outcome"]) == ("127.0.0.1", "complete")
        assert row["response_body_bytes"] == (2 if row["path"] == "/orders" else BODY_BYTES)
        assert row["duration_ns"] >= row["first_byte_ns"] > 0


async def test_bytes_of_connections_are_all_there(agent: RunningAgent) -> None:
    async with connected(agent) as client:
        with puppets(1) as (server,):
            with puppets(1) as (puppet,):
                each = await started(client, "tcp_metrics", pid=puppet.pid)
                by_peer = await started(client, "tcp_metrics", pid=puppet.pid, by="peer")
                changes = await started(client, "tcp_metrics", pid=puppet.pid, mode="events")
                connect(puppet, server, "127.0.0.1")
                port = number(puppet, "c.getpeername()[1]")
                send(puppet, "c", server, "s", 70_000)
                send(server, "s", puppet, "c", 3_000)
                puppet.do("c.close()")
                server.do("s.close()")
            taken = [await tables_of(client, it) for it in (each, by_peer, changes)]
    for rows in (taken[0]["tcp_metrics"].to_pylist(), rolled_up(taken[0], "tcp_metrics")):
        assert summed(rows, "role", "bytes_sent") == {"client": 70_000}
        assert summed(rows, "role", "bytes_received") == {"client": 3_000}
        assert [sum(row[it] for row in rows) for it in ("opened", "closed", "failed")] == [1, 1, 0]
        assert {(row["remote_address"], row["remote_port"]) for row in rows} == {
            ("127.0.0.1", port)
        }
    (rolled,) = {row["local_port"] for row in rolled_up(taken[0], "tcp_metrics")}
    assert rolled == 0
    for rows in (taken[1]["tcp_peers"].to_pylist(), rolled_up(taken[1], "tcp_peers")):
        assert summed(rows, "remote_address", "bytes_sent") == {"127.0.0.1": 70_000}
        assert summed(rows, "port", "connections_opened") == {port: 1}
    found = taken[2]["tcp_state_changes"].to_pylist()
    states = [(row["old_state"], row["new_state"]) for row in found if row["what"] == "state"]
    assert states[:2] == [("close", "syn_sent"), ("syn_sent", "established")]
    assert {(row["remote_address"], row["remote_port"], row["role"]) for row in found} == {
        ("127.0.0.1", port, "client")
    }


async def test_samples_have_their_stacks(agent: RunningAgent, programs: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        programs / "profiled", "shares", "400", stdin=pipe, stdout=pipe
    )
    async with connected(agent) as client:
        session = await started(client, "cpu_profile", pid=process.pid, frequency=499)
        out, _ = await process.communicate(b"x")
        taken = await tables_of(client, session)
    truth = {name: int(ns) for name, ns in map(str.split, out.decode().splitlines())}
    frames = {row["stack_id"]: row for row in taken[STACKS].to_pylist()}
    for rows in (taken["cpu_profile"].to_pylist(), rolled_up(taken, "cpu_profile")):
        spent: Counter[str] = Counter()
        for row in rows:
            for name in set(frames[row["stack_id"]]["functions"]):
                spent[name] += row["cpu_ns"]
        assert max(truth, key=lambda name: spent[name]) == "spend_most"
        assert sum(row["cpu_ns"] for row in rows) == pytest.approx(sum(truth.values()), rel=0.25)
        assert {row["process"] for row in rows} == {"profiled"}
    for row in frames.values():
        sizes = {len(row[name]) for name in ("functions", "modules", "build_ids", "flags")}
        assert sizes == {len(row["addresses"])}
