"""The audit: its lines, and that no sink of it, however broken, holds up the agent."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from coral.agent.access.access import Verdict
from coral.agent.access.audit import Audit
from coral.agent.access.audit_file import AuditFile
from coral.agent.access.rpcs import START, Role
from coral.agent.access.sinks import audit_sinks
from coral.agent.caller import Caller, Identity
from coral.agent.config import ConfigError
from coral.agent.config_access import Audit as AuditConfig
from tests.support import wait_until

CALLER = Caller("unix: uid 7, pid 9", identity=Identity("unix", ("uid:7", "gid:8")))
REFUSED = Verdict(False, Role.VIEW, "it needs more")
STUCK_S = 0.01


def notice(count: int) -> str:
    return json.dumps({"event": "dropped", "lines": count})


@contextmanager
def writing(path: Path, **limits: int) -> Iterator[AuditFile]:
    sink = AuditFile(path, notice, **limits)
    sink.start()
    try:
        yield sink
    finally:
        sink.close(STUCK_S)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Kept:
    """A sink that keeps its lines."""

    dropped = 0

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def put(self, line: str) -> None:
        assert "\n" not in line
        assert line.isascii()
        self.lines.append(json.loads(line))

    def start(self) -> None:
        pass

    def close(self, patience_s: float) -> None:
        pass


# Lines


def test_a_line_says_who_asked_for_what_what_that_was_and_what_was_decided() -> None:
    kept = Kept()
    audit = Audit("node-7", [kept])
    audit.decided(
        CALLER, START, REFUSED, asked={"kind": "syscall_stats", "config": {"pid": "7"}},
        resolved={"pids": [7]}, session="s",
    )  # fmt: skip
    (line,) = kept.lines
    assert line.pop("time").endswith("Z")
    assert line == {
        "agent": "node-7", "event": "decision", "who": "uid:7", "how": "unix",
        "names": ["uid:7", "gid:8"], "peer": "unix: uid 7, pid 9", "rpc": "StartCollector",
        "verdict": "refused", "role": "view", "reason": "it needs more",
        "asked": {"kind": "syscall_stats", "config": {"pid": "7"}}, "resolved": {"pids": [7]},
        "session": "s",
    }  # fmt: skip
    assert audit.decisions == {"allowed": 0, "refused": 1}


def test_hostile_texts_stay_one_short_line() -> None:
    kept = Kept()
    config = {f"k{number}\n": "x\n\x1b[31m\udcff" * 10_000 for number in range(1000)}
    Audit("a", [kept]).decided(CALLER, START, REFUSED, asked={"config": config})
    asked = kept.lines[0]["asked"]["config"]
    assert len(asked) == 64
    assert all(len(text) == 1024 + len("[...]") for text in asked.values())


def test_decisions_are_counted_without_any_sink() -> None:
    audit = Audit("a")
    audit.decided(CALLER, START, REFUSED)
    assert (audit.decisions["refused"], audit.lines, audit.dropped) == (1, 0, 0)


def test_a_limit_has_its_name_and_pods_that_join_theirs() -> None:
    kept = Kept()
    audit = Audit("a", [kept])
    audit.decided(CALLER, START, REFUSED, limit="limits.memory")
    audit.joined("s", [f"shop/web-{number}" for number in range(100)], ["shop/db"])
    audit.joined("s", [], [])
    limited, joined, left_out = kept.lines
    assert limited["limit"] == "limits.memory"
    assert (joined["event"], len(joined["pods"]), joined["number"]) == ("joined", 64, 100)
    assert (left_out["event"], left_out["pods"], left_out["session"]) == (
        "left out", ["shop/db"], "s",
    )  # fmt: skip


# The file


def test_a_file_is_for_its_owner_alone_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    for number in range(2):
        with writing(path) as sink:
            sink.put(json.dumps({"number": number}))
            wait_until(lambda: {"number": number} in lines(path))  # noqa: B023  at once
    assert path.stat().st_mode & 0o777 == 0o600
    assert lines(path) == [{"number": 0}, {"number": 1}]


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_a_file_that_was_rotated_is_made_anew(how: str, tmp_path: Path) -> None:
    path, old = tmp_path / "audit", tmp_path / "audit.1"
    with writing(path) as sink:
        sink.put('{"number":0}')
        wait_until(lambda: lines(path))
        if how == "removed":
            path.unlink()
        else:
            path.rename(old)
        if how == "replaced":
            path.touch(0o640)
        sink.put('{"number":1}')
        wait_until(lambda: lines(path) == [{"number": 1}])
        assert how == "removed" or lines(old) == [{"number": 0}]
        assert sink.dropped == 0


def test_a_link_is_not_followed_and_what_was_dropped_is_told_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.symlink_to("/dev/full")
    with writing(path) as sink:
        sink.put("{}")
        wait_until(lambda: sink.dropped == 1)
        path.unlink()
        sink.put('{"number":1}')
        wait_until(lambda: lines(path) == [{"event": "dropped", "lines": 1}, {"number": 1}])


def test_a_full_disk_drops_and_counts(tmp_path: Path) -> None:
    sink = AuditFile(tmp_path / "audit", notice)
    sink.open()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sink._fd)
    os.close(full)
    sink.start()
    sink.put('{"number":0}')
    wait_until(lambda: sink.dropped == 1)
    sink.put('{"number":1}')  # the file was opened again
    wait_until(lambda: {"number": 1} in lines(tmp_path / "audit"))
    sink.close(STUCK_S)


def test_a_fifo_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    os.mkfifo(path)
    with writing(path) as sink:
        for _ in range(10):
            sink.put("{}")
        wait_until(lambda: sink.dropped == 10)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        sink.put('{"number":1}')
        got = bytearray()

        def read() -> bool:
            with suppress(BlockingIOError):
                got.extend(os.read(reader, 4096))
            return b'"number":1' in got

        wait_until(read)
        assert json.loads(got.splitlines()[0]) == {"event": "dropped", "lines": 10}
        os.close(reader)
        sink.put("{}")
        wait_until(lambda: sink.dropped == 11)


def test_a_slow_disk_holds_up_nobody_and_what_waits_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # and it never reads
    line = json.dumps({"x": "x" * 1000})
    with writing(path, most_waiting_bytes=100_000) as sink:
        audit = Audit("a", [sink])
        for _ in range(1000):
            audit.decided(CALLER, START, REFUSED, asked={"x": line})
        assert sink.dropped > 0
        taken = 1000 - sink.dropped
        assert taken * len(line) < 100_000 + (1 << 20)  # the queue and the pipe
        threads = {thread.name: thread.daemon for thread in threading.enumerate()}
        assert threads["coral-audit"]  # stuck in a write, it ends with the process
    os.close(reader)


@pytest.mark.parametrize("what", ["directory", "missing", "device"])
def test_a_file_that_cannot_be_written_ends_the_agent_at_its_start(
    what: str, tmp_path: Path
) -> None:
    path = {
        "directory": tmp_path,
        "missing": tmp_path / "no" / "audit",
        "device": Path("/dev/null"),
    }[what]
    with pytest.raises(ConfigError, match=r"^audit\.file: "):
        audit_sinks(AuditConfig(file=str(path)))


def test_there_is_a_sink_for_each_place_that_is_configured(tmp_path: Path) -> None:
    assert audit_sinks(AuditConfig()) == []
    os.mkfifo(tmp_path / "fifo")
    assert len(audit_sinks(AuditConfig(file=str(tmp_path / "fifo")))) == 1
    assert len(audit_sinks(AuditConfig(file=str(tmp_path / "a"), stdout=True))) == 2
