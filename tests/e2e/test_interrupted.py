"""Our programs, ended by a signal in the middle of anything: no traceback, and nothing left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.support import (
    ROOT,
    Puppet,
    RunningAgent,
    collectors_at_work,
    coral,
    running_agent,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

# By command: when each signal comes, in seconds after Python has handed over to our first line.
MOMENTS_S: Final = (0.02, 0.3, 0.8, 2.0)
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("interrupted") / "agent") as running:
        yield running


def handles_sigint(pid: int) -> bool:
    """Whether the process catches SIGINT, as Python does until our first line."""
    match = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return bool(int(match[1], 16) >> (signal.SIGINT - 1) & 1)


def of_session(session_id: int) -> list[int]:
    """The processes of a session, those that are to be waited for left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def kill_session(leader: subprocess.Popen[str]) -> None:
    for left in of_session(leader.pid):
        os.kill(left, signal.SIGKILL)
    leader.wait()


def end_after(
    command: Sequence[str], after_s: float, number: signal.Signals, directory: Path
) -> str:
    """Runs COMMAND and ends it by a signal, which reaches its whole process group where it is a
    Ctrl-C; what it has printed to standard error. Its temporary files are in DIRECTORY. One that is
    done before, or just then, on a fast machine, is run again and ended in half the time."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True, env={**os.environ, "TMPDIR": str(directory)},
    )  # fmt: skip
    try:
        wait_until(lambda: handles_sigint(process.pid))
        # Soon it may catch it again, for itself: between two looks, on a busy machine.
        latest_s = time.monotonic() + 2
        wait_until(lambda: not handles_sigint(process.pid) or time.monotonic() > latest_s)
        time.sleep(after_s)  # the moment itself is what is tested
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        wait_until(lambda: not of_session(process.pid))
    finally:
        kill_session(process)
    if process.returncode == 0:
        return end_after(command, after_s / 2, number, directory)
    # 128 + N by a shell's rule, or ended by the signal itself, which shells show as the same.
    assert process.returncode in (128 + number, -number), errors
    return errors


@pytest.mark.parametrize(("after_s", "number"), [*zip(MOMENTS_S, SIGNALS, strict=True)])
@pytest.mark.parametrize("name", ["tap", "tap of a command", "doctor", "demo", "bench"])
def test_a_command_that_is_ended_leaves_nothing(
    name: str, after_s: float, number: signal.Signals, agent: RunningAgent, tmp_path: Path
) -> None:
    with Puppet() as puppet:
        commands = {
            "tap": coral("tap", f"pid:{puppet.pid}", "--syscall-stats", "--agent", agent.address),
            "tap of a command": coral(
                *("tap", "--syscall-stats", "--agent", agent.address, "--", "sleep", "1000")
            ),
            "doctor": coral("doctor"),
            "demo": coral("demo"),
            "bench": [sys.executable, "-P", "-m", "benchmarks.run", "drain"],
        }
        assert "Traceback" not in end_after(commands[name], after_s, number, tmp_path)
    wait_until(lambda: not collectors_at_work(agent))
    assert not list(tmp_path.iterdir())


@pytest.mark.timed
@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_agent_that_is_ended_while_it_starts_leaves_nothing(
    after_s: float, number: signal.Signals, tmp_path: Path
) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text("continuous:\n- kind: syscall_stats\n  config: {scope: host}\n")
    command = coral(
        *("agent", "--listen", f"unix:{tmp_path}/agent.sock", "--metrics", "127.0.0.1:0"),
        *("--config", config),
    )
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        wait_until(lambda: handles_sigint(process.pid))
        # Soon it may catch it again, for itself: between two looks, on a busy machine.
        latest_s = time.monotonic() + 2
        wait_until(lambda: not handles_sigint(process.pid) or time.monotonic() > latest_s)
        time.sleep(after_s)  # the moment itself is what is tested
        signalled_at = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - signalled_at < 2
        assert not of_session(process.pid)
    finally:
        kill_session(process)
    # Until it serves, the signal itself ends it.
    assert process.returncode in (0, -number), errors
    assert "Traceback" not in errors
    if process.returncode == 0:
        assert not (tmp_path / "agent.sock").exists()
