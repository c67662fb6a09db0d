"""A log that is full, broken or slow holds up nothing; one record is one line."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coral.agent.repeats import OTHERS, RepeatLimit
from coral.wire.log_writer import LogWriter
from tests.support import wait_until

# F_SETPIPE_SZ rounds up to a page.
PAGE_BYTES = 4096


def notice(count: int) -> str:
    return f"{count} lines were dropped"


@pytest.fixture
def pipe() -> tuple[int, int]:
    """A pipe of one page: its ends to read and to write."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PAGE_BYTES)
    return read_end, write_end


def read_all(fd: int) -> list[str]:
    """What comes until the writers have closed their ends."""
    with os.fdopen(fd) as file:
        return file.read().splitlines()


def test_lines_arrive_in_order_and_close_waits_for_them(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    writer = LogWriter(write_end, notice)
    for number in range(100):
        writer.put(str(number))
    writer.close(5)
    writer.put("after the end")
    os.close(write_end)
    os.set_blocking(read_end, False)
    assert os.read(read_end, PAGE_BYTES).decode().splitlines() == list(map(str, range(100)))
    assert writer.dropped == 0


@pytest.mark.timed
def test_a_full_pipe_blocks_nobody_and_what_was_dropped_is_told_once_it_is_read(
    pipe: tuple[int, int],
) -> None:
    read_end, write_end = pipe
    line = "x" * 99  # and the end of the line
    writer = LogWriter(write_end, notice, most_waiting_bytes=50 * 100)
    writer.start()
    began = time.monotonic()
    for _ in range(1000):
        writer.put(line)
    closing = time.monotonic()
    assert closing - began < 1
    # A page is in the pipe, 50 lines wait; the writer may have taken one more before it was stuck.
    dropped = writer.dropped
    assert 1000 - 50 - PAGE_BYTES // 100 - 1 <= dropped <= 1000 - 50
    writer.close(0.2)
    assert 0.2 <= time.monotonic() - closing < 0.5
    os.close(write_end)
    got: list[str] = []
    with os.fdopen(read_end) as file:
        while len(got) < 1001 - dropped:
            got.append(file.readline().rstrip("\n"))
    assert got.count(line) == 1000 - dropped
    assert [other for other in got if other != line] == [f"{dropped} lines were dropped"]


def test_a_pipe_that_nobody_reads_any_more_drops_and_counts_each_line(
    pipe: tuple[int, int],
) -> None:
    read_end, write_end = pipe
    os.close(read_end)
    writer = LogWriter(write_end, notice)
    writer.start()
    for _ in range(7):
        writer.put("nobody")
    wait_until(lambda: writer.dropped == 7)
    writer.close(1)
    assert writer.dropped == 7
    os.close(write_end)


def test_a_closed_descriptor_is_like_a_broken_one(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    os.close(pipe[1])
    writer = LogWriter(pipe[1], notice)
    writer.put("nowhere")
    writer.close(1)
    assert writer.dropped == 1


def test_the_flags_of_a_shared_descriptor_stay_and_a_non_blocking_one_loses_nothing(
    pipe: tuple[int, int],
) -> None:
    read_end, write_end = pipe
    before = fcntl.fcntl(write_end, fcntl.F_GETFL)
    writer = LogWriter(write_end, notice)
    writer.start()
    assert fcntl.fcntl(write_end, fcntl.F_GETFL) == before
    os.set_blocking(write_end, False)
    for number in range(2000):
        writer.put(f"{number:04}")
    os.close(write_end)
    with os.fdopen(read_end) as file:
        assert [file.readline() for _ in range(2000)] == [f"{n:04}\n" for n in range(2000)]
    writer.close(1)
    assert writer.dropped == 0


def test_refusals_of_a_kind_are_logged_in_a_burst_then_once_a_second() -> None:
    now = 0.0
    limit = RepeatLimit(burst=10, per_s=1, clock=lambda: now)
    at_once = [limit.admit("denied") for _ in range(1000)]
    assert at_once == [0] * 10 + [None] * 990
    assert limit.admit("unauthenticated") == 0
    assert limit.overdue() == []
    now = 1.0
    assert limit.admit("denied") == 990
    assert limit.admit("denied") is None
    now = 2.5
    assert limit.overdue() == [("denied", 1)]
    assert limit.overdue() == []
    now = 100.0
    assert [limit.admit("denied") for _ in range(12)] == [0] * 10 + [None] * 2


def test_kinds_of_refusals_are_bounded() -> None:
    limit = RepeatLimit(clock=lambda: 0.0)
    for number in range(5000):
        limit.admit(number)
    assert len(limit._kinds) == 256


def test_too_many_kinds_of_refusals_share_a_limit_until_others_are_forgotten() -> None:
    now = 0.0
    limit = RepeatLimit(burst=2, per_s=1, clock=lambda: now)
    admitted = [limit.admit(number) for number in range(1000)]
    assert admitted.count(0) == 255 + 2
    now = 1.0
    assert limit.overdue() == [(OTHERS, 1000 - 255 - 2)]
    now = 10.0
    assert limit.admit("new") == 0
    assert "new" in limit._kinds


SCRIPT = r"""
import asyncio, gc, logging, os, sys, threading, warnings
from coral.agent import logs
import structlog

logs.configure(sys.argv[1], "info")
logs.start()
log = structlog.get_logger("test")
log.info("hostile", name="a\nb\x1b[2J\u202e\udcff", items=["c\nd"], count=3)
log.info("long", text="x" * 100_000)
for _ in range(1000):
    log.warning("refused", code="PERMISSION_DENIED", peer="unix:", principal="uid 1")
    log.warning("connection closed", code="idle", peer="unix:", principal="uid 1")
log.warning("refused", code="PERMISSION_DENIED", peer="unix:", principal="uid 2")
log.info("session started")
for _ in range(100):
    log.info("session stopped")
logging.getLogger("grpc._cython.cygrpc").error("a library's %s", "line\nand another")
warnings.warn("a warning", stacklevel=1)
os.write(2, b"a line of C\nand one without an end")
def fail(text):
    raise ValueError(text)
thread = threading.Thread(target=fail, args=("in a\nthread",), name="worker")
thread.start(); thread.join()
class Finalized:
    def __del__(self):
        fail("in a finalizer")
Finalized()
async def main():
    task = asyncio.create_task(asyncio.sleep(0))
    lost = asyncio.get_running_loop().create_task(asyncio.to_thread(fail, "in a task"))
    await asyncio.wait([lost])
    del lost
    gc.collect()
asyncio.run(main())
logs.close()
print("the descriptor is back", file=sys.stderr)
"""


def logged(log_format: str) -> list[str]:
    """What SCRIPT writes to its standard error."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, log_format],
        stderr=subprocess.PIPE,
        check=True,
        text=True,
        errors="surrogateescape",
    )
    lines = done.stderr.splitlines()
    assert lines.pop() == "the descriptor is back"
    return lines


def test_each_record_is_one_line_of_json_and_everything_is_a_record() -> None:
    records = [json.loads(line) for line in logged("json")]
    by_event: dict[str, list[dict[str, object]]] = {}
    for record in records:
        by_event.setdefault(str(record["event"]), []).append(record)
    (hostile,) = by_event.pop("hostile")
    assert hostile["name"] == "a\nb?[2J??"
    assert len(str(by_event["long"][0]["text"])) == (64 << 10) + len(" [...] ")
    # Ten of the first caller, which do not hide that of the second.
    assert len(by_event["refused"]) == 11
    assert len(by_event["connection closed"]) == 10
    left_out = by_event["refusals were left out of the log"]
    assert [(line["like"], line["code"], line["caller"], line["count"]) for line in left_out] == [
        ("refused", "PERMISSION_DENIED", "uid 1", 990),
        ("connection closed", "idle", "uid 1", 990),
    ]
    assert len(by_event["session stopped"]) == 100
    assert by_event["a library's line\nand another"][0]["logger"] == "grpc._cython.cygrpc"
    assert any("a warning" in event for event in by_event)
    assert [record["text"] for record in by_event["standard error"]] == [
        "a line of C",
        "and one without an end",
    ]
    (thread,) = by_event["thread failed"]
    assert thread["thread"] == "worker"
    assert "ValueError: in a\nthread" in str(thread["exception"])
    (finalized,) = by_event["exception ignored"]
    assert "in a finalizer" in str(finalized["exception"])
    (task,) = (r for e, r in by_event.items() if "exception was never retrieved" in e)
    assert "in a task" in str(task[0]["exception"])


def test_on_a_console_values_stay_in_their_line_and_only_tracebacks_have_more() -> None:
    lines = logged("console")
    (hostile,) = (line for line in lines if "hostile" in line)
    assert r"name=a\nb?[2J??" in hostile
    assert all(line.isprintable() for line in lines)
    tracebacks = [line for line in lines if line.startswith("    | ")]
    assert r"    | ValueError: in a" in tracebacks
    assert "    | thread" in tracebacks
    assert all(line[:2] == "20" for line in lines if line not in tracebacks)


@pytest.mark.timed
def test_what_the_agent_says_to_a_full_pipe_ends_with_it(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    while True:
        try:
            os.write(write_end, b"x" * PAGE_BYTES)
        except BlockingIOError:
            break
    os.set_blocking(write_end, True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "coral.cli.main", "agent", "--config", str(tmp_path / "none")],
        stderr=write_end,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert time.monotonic() - began < 10
    os.close(write_end)
    os.close(read_end)
