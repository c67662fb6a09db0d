"""What comes with a role: redacted addresses in real streams, quotas of each caller; rotation."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from coral.client import Batch as Received
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.callers import OK, Who
from tests.e2e.test_refusals import NO_ONE, start_request
from tests.support import RunningAgent, running_agent, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

TCP: Final = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
PEER: Final = "127.0.0.77"
COLUMNS: Final = pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS
# Connects and closes, once for each line that it reads.
CLIENT: Final = """
import socket, sys
for _ in sys.stdin:
    socket.create_connection((sys.argv[1], int(sys.argv[2]))).close()
    print(flush=True)
"""


def written(directory: Path, name: str, token: str) -> str:
    fresh = directory / "fresh"
    fresh.write_text(token)
    fresh.chmod(0o600)
    fresh.rename(directory / name)
    return str(directory / name)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[RunningAgent]:
    config = {
        "listen": ["127.0.0.1:0"],
        "audit": {"file": str(tmp_path / "audit.jsonl")},
        "auth": {
            "tokens": [
                {"name": name, "file": written(tmp_path, name, f"the-token-of-the-{name}")}
                for name in ("boss", "team", "ci")
            ]
        },
        "roles": [
            {"role": "admin", "to": ["token:boss"]},
            {"role": "operate", "to": ["token:team"], "redact_addresses": True},
            {"role": "operate", "to": ["token:ci"], "quotas": {"sessions": 1, "streams": 1}},
        ],
    }  # fmt: skip
    with running_agent(tmp_path / "agent", config) as agent:
        line = next(line for line in agent.log() if line["event"] == "listening")
        addresses: Any = line["grpc"]
        agent.address = addresses[0]
        yield agent


def who(agent: RunningAgent, name: str) -> Who:
    return Who(agent.address, f"the-token-of-the-{name}")


@contextmanager
def client() -> Iterator[subprocess.Popen[str]]:
    """A process that connects to PEER when it is told to."""
    with socket.create_server((PEER, 0)) as server:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", CLIENT, PEER, str(server.getsockname()[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            yield process
            process.kill()


def connect(process: subprocess.Popen[str], times: int) -> None:
    assert process.stdin
    assert process.stdout
    for _ in range(times):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline()


def started(caller: Who, pid: int, **options: str) -> str:
    request = start_request({"pid": pid, **options}, kind=TCP)
    return str(caller.call("StartCollector", request).collector_id)


def connect_until_seen(
    process: subprocess.Popen[str], caller: Who, session: str, field: str
) -> None:
    """Connects again and again until the session has rows of it: a busy kernel may skip some."""
    request = pb.EbpfEventStreamRequest(collector_id=session)
    with caller.streaming("StreamEventBatches", request) as batches:
        while True:
            connect(process, 1)
            if len(getattr(next(batches), field)):
                return


def read(caller: Who, session: str, **terms: Any) -> list[pb.EbpfEventBatch]:
    """All batches of a session that has ended or does so."""
    request = pb.EbpfEventStreamRequest(collector_id=session, **terms)
    with caller.streaming("StreamEventBatches", request) as batches:
        return list(batches)


def test_a_team_sees_its_connections_without_their_other_ends(house: RunningAgent) -> None:
    boss, team = who(house, "boss"), who(house, "team")
    with client() as process:
        sessions = {mode: started(team, process.pid, mode=mode) for mode in ("summaries", "events")}
        for mode, field in (("summaries", "tcp_metrics"), ("events", "tcp_state_changes")):
            connect_until_seen(process, boss, sessions[mode], field)
        for session in sessions.values():
            team.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=session))
    # From the replay, in every form.
    seen = {}
    for caller, address in ((boss, PEER), (team, "redacted")):
        rows = [row for batch in read(caller, sessions["summaries"]) for row in batch.tcp_metrics]
        assert {row.remote_address for row in rows} == {address}
        assert {row.local_address for row in rows} == {"127.0.0.1"}
        seen[address] = rows
        ports = {row.remote_port for row in rows}
        assert ports == {0} if caller is team else 0 not in ports
        columns = read(caller, sessions["summaries"], summaries=COLUMNS)
        strings = {text for batch in columns for text in batch.strings}
        assert {PEER, "redacted"} & strings == {address}
        with caller.streaming(
            "StreamEvents", pb.EbpfEventStreamRequest(collector_id=sessions["summaries"])
        ) as events:
            singly = [event.tcp_metrics for event in events if event.HasField("tcp_metrics")]
        assert [row.SerializeToString(deterministic=True) for row in singly] == [
            row.SerializeToString(deterministic=True) for row in rows
        ]
        batches = read(caller, sessions["events"])
        changes = [row for batch in batches for row in batch.tcp_state_changes]
        assert changes
        assert {bool(row.remote_low) for row in changes} == {caller is boss}
        arrays = [
            Received.parse(batch.SerializeToString()).events for batch in batches if batch.count
        ]
        assert all(bool(rows["remote_port"].any()) is (caller is boss) for rows in arrays)
        assert all(rows["local_low"].any() for rows in arrays)
    assert sum(row.opened for row in seen[PEER]) > 0
    for row in seen[PEER]:
        row.remote_address, row.remote_port = "redacted", 0
    assert seen["redacted"] == seen[PEER]
    plain, hidden = (read(caller, sessions["events"])[-1] for caller in (boss, team))
    assert (plain.produced, plain.last_seq) == (hidden.produced, hidden.last_seq)


def test_a_live_stream_has_no_other_ends_either_while_another_has(house: RunningAgent) -> None:
    boss, team = who(house, "boss"), who(house, "team")
    with client() as process:
        session = started(team, process.pid, interval="100ms")
        request = pb.EbpfEventStreamRequest(collector_id=session)
        with (
            boss.streaming("StreamEventBatches", request) as plain,
            team.streaming("StreamEventBatches", request) as hidden,
        ):
            for batches, address in ((plain, PEER), (hidden, "redacted")):
                addresses: set[str] = set()
                while not addresses:
                    connect(process, 1)
                    addresses = {row.remote_address for row in next(batches).tcp_metrics}
                assert addresses == {address}
        team.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=session))


def test_each_caller_has_its_own_quotas_and_gives_them_back(
    house: RunningAgent, tmp_path: Path
) -> None:
    ci, team = who(house, "ci"), who(house, "team")
    request = start_request({"comm": NO_ONE})
    session = ci.call("StartCollector", request).collector_id
    assert ci.outcome("StartCollector", request) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        (
            "roles[2].quotas.sessions is 1, and token:ci has 1 collectors: end one, or wait for "
            "one to end"
        ),
    )
    assert team.outcome("StartCollector", request)[0] is OK
    stream = pb.EbpfEventStreamRequest(collector_id=session)
    with ci.streaming("StreamEventBatches", stream) as batches:
        next(batches)
        for method, other in (
            ("StreamEvents", stream),
            ("WatchCollectors", pb.WatchCollectorsRequest()),
        ):
            code, text = ci.outcome(method, other)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text.startswith("roles[2].quotas.streams is 1, and token:ci has 1 streams")
    wait_until(lambda: ci.outcome("WatchCollectors", pb.WatchCollectorsRequest())[0] is OK)
    ci.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=session))
    assert ci.outcome("StartCollector", request)[0] is OK
    lines = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    limited = [line for line in lines if "limit" in line]
    assert [(line["rpc"], line["limit"], line["who"]) for line in limited[:3]] == [
        ("StartCollector", "roles[2].quotas.sessions", "token:ci"),
        ("StreamEvents", "roles[2].quotas.streams", "token:ci"),
        ("WatchCollectors", "roles[2].quotas.streams", "token:ci"),
    ]
    assert {line["verdict"] for line in limited} == {"refused"}
    assert limited[0]["asked"] == {"kind": "syscall_stats", "config": {"comm": NO_ONE}}
    assert limited[0]["reason"].startswith("roles[2].quotas.sessions is 1, and token:ci has 1 ")


def test_a_token_is_rotated_without_a_restart(house: RunningAgent, tmp_path: Path) -> None:
    listing = pb.ListCollectorsRequest()
    old, new = who(house, "ci"), Who(house.address, "the-next-token-of-ci")
    assert old.outcome("ListCollectors", listing)[0] is OK
    assert new.outcome("ListCollectors", listing)[0] is grpc.StatusCode.UNAUTHENTICATED
    written(tmp_path, "ci", "the-next-token-of-ci")
    wait_until(lambda: new.outcome("ListCollectors", listing)[0] is OK)
    assert old.outcome("ListCollectors", listing)[0] is grpc.StatusCode.UNAUTHENTICATED
