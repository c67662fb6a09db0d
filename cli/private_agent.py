"""An agent of one's own: on a socket that nobody else knows, for as long as a block lasts."""

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

_START_TIMEOUT_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.02


class AgentDidNotStartError(Exception):
    """An agent that ended, or said nothing; the message is what it logged."""


@dataclass(frozen=True)
class PrivateAgent:
    """One that listens."""

    process: subprocess.Popen[bytes]
    address: str
    metrics: str

    def stop(self) -> int:
        """Tells it to stop; its exit status."""
        self.process.terminate()
        return self.process.wait()


@contextmanager
def private_agent(directory: Path, *arguments: str) -> Iterator[PrivateAgent]:
    """`coral agent` with its socket and its log in DIRECTORY; ended with the block. Raises
    `AgentDidNotStartError`."""
    address, log_path = f"unix:{directory}/agent.sock", directory / "agent.log"
    command = coral(
        *("agent", "--listen", address, "--metrics", "127.0.0.1:0", "--log-format", "json"),
        *arguments,
    )
    with log_path.open("w") as log, process(command, stderr=log) as agent:
        yield PrivateAgent(agent, address, _metrics_address(agent, log_path))


def _metrics_address(agent: subprocess.Popen[bytes], log_path: Path) -> str:
    """Where it serves its metrics, once it says that it listens."""
    end = time.monotonic() + _START_TIMEOUT_S
    while True:
        ended = agent.poll() is not None
        for line in log_path.read_text().splitlines(keepends=True):
            told = _event(line)
            if told.get("event") == "listening":
                return str(told["metrics"])
        if ended or time.monotonic() > end:
            raise AgentDidNotStartError(log_path.read_text().strip())
        time.sleep(_LOOK_EVERY_S)


def _event(line: str) -> dict[str, Any]:
    """A whole line of the log; nothing where it is not one."""
    if not line.startswith("{") or not line.endswith("\n"):
        return {}
    told: dict[str, Any] = json.loads(line)
    return told


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
    """A process that is ended when the block is left, if it has not ended by itself."""
    started = subprocess.Popen(command, stdout=stdout, stderr=stderr)  # type: ignore[call-overload]
    try:
        yield started
    finally:
        started.terminate()
        started.wait()
        if started.stdout:
            started.stdout.close()
