"""A private agent on a temporary socket, for the duration of a block."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coral.cli.signals import deferring

_START_TIMEOUT_S: Final = 30.0  # a busy machine that has read none of its files yet
_POLL_INTERVAL_S: Final = 0.02


class AgentDidNotStartError(Exception):
    """The agent exited or did not listen in time; the message is its log."""


@dataclass(frozen=True)
class PrivateAgent:
    """A running agent that listens at `address` and serves metrics at `metrics`."""

    process: subprocess.Popen[bytes]
    address: str
    metrics: str

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.process.terminate()
        return self.process.wait()


@contextmanager
def private_agent(
    directory: Path, *arguments: str, name: str = "agent", inside: Sequence[str] = ()
) -> Iterator[PrivateAgent]:
    """`coral agent` with its socket and its log in DIRECTORY, NAME.sock and NAME.log, stopped at
    the end of the block; started by the command INSIDE, such as `nsenter`, if there is one. Raises
    `AgentDidNotStartError`."""
    address, log_path = f"unix:{directory}/{name}.sock", directory / f"{name}.log"
    command = coral(
        *("agent", "--listen", address, "--metrics", "127.0.0.1:0", "--log-format", "json"),
        *arguments,
    )
    with log_path.open("w") as log, process([*inside, *command], stderr=log) as agent:
        yield PrivateAgent(agent, address, _metrics_address(agent, log_path))


def _metrics_address(agent: subprocess.Popen[bytes], log_path: Path) -> str:
    """Waits until the log says that the agent listens; returns where it serves its metrics."""
    end = time.monotonic() + _START_TIMEOUT_S
    while True:
        ended = agent.poll() is not None
        for line in log_path.read_text().splitlines(keepends=True):
            entry = _event(line)
            if entry.get("event") == "listening":
                return str(entry["metrics"])
        if ended or time.monotonic() > end:
            said = log_path.read_text().strip()
            if not ended:
                said = f"it did not listen within {_START_TIMEOUT_S:.0f} s\n{said}".strip()
            raise AgentDidNotStartError(said or f"it ended with status {agent.poll()}")
        time.sleep(_POLL_INTERVAL_S)


def _event(line: str) -> dict[str, Any]:
    """A complete JSON line of the log as a dict; an empty one for anything else."""
    if not line.startswith("{") or not line.endswith("\n"):
        return {}
    entry: dict[str, Any] = json.loads(line)
    return entry


def coral(*arguments: str) -> list[str]:
    """The command line of `coral`."""
    return module("coral.cli.main", *arguments)


def module(name: str, *arguments: str) -> list[str]:
    """The command line of a Python module."""
    return [sys.executable, "-P", "-m", name, *arguments]


@contextmanager
def process(
    command: Sequence[str], stdout: int | None = None, stderr: object = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the duration of the block; SIGTERM ends it if it still runs then."""
    started = None
    try:
        with deferring():
            started = subprocess.Popen(  # type: ignore[call-overload]
                command,
                stdout=stdout,
                stderr=stderr,
                process_group=0,  # Ctrl-C is for the command that started it
            )
        yield started
    finally:
        if started:
            _end(started)


def _end(started: subprocess.Popen[bytes]) -> None:
    started.terminate()
    started.wait()
    if started.stdout:
        started.stdout.close()
