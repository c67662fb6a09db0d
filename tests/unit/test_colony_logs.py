"""The colony's log says how many of its lines were lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support import ROOT

# More than the queue and the pipe hold, which nobody reads before the script says so.
SCRIPT = r"""
import sys, threading
from coral.colony import logs
import structlog

logs.configure("json", "info")
log = structlog.get_logger("test")
for _ in range(1_000):
    log.info("long", text="x" * 4_000)
def fail():
    raise ValueError("in a thread")
print(logs.lines_dropped(), flush=True)
sys.stdin.readline()
log.info("read")
thread = threading.Thread(target=fail, name="worker")
thread.start(); thread.join()
logs.close()
"""


def told(line: dict[str, Any]) -> int:
    """How many lines LINE says were lost."""
    return line["count"] if line["event"] == "lines of this log were dropped" else 0


def test_lines_that_nobody_read_in_time_are_counted_and_told_of() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        dropped = int(process.stdout.readline())
        lines: list[dict[str, Any]] = []
        while sum(map(told, lines)) < dropped:
            lines.append(json.loads(process.stderr.readline()))
        assert 600 < dropped < 1_000
        process.stdin.write("\n")
        process.stdin.close()
        lines += map(json.loads, process.stderr)
    assert process.returncode == 0
    assert sum(line["event"] == "long" for line in lines) == 1_000 - dropped
    assert sum(map(told, lines)) == dropped
    assert {line["level"] for line in lines if told(line)} == {"warning"}
    assert [line["event"] for line in lines[-2:]] == ["read", "thread failed"]
