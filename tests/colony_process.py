"""`coral colony` in a process of its own, and what it has stored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from coral.colony.delivery import Standing
from coral.colony.store import Settings, Store
from coral.colony.tables import ContractRows
from tests.support import ROOT, coral, samples, wait_until


@dataclass
class RunningColony:
    """A colony, and where it serves its metrics."""

    process: subprocess.Popen[bytes]
    directory: Path
    metrics: str

    def page(self, path: str) -> tuple[int, str]:
        """The status and the text of a page."""
        try:
            with urlopen(f"http://{self.metrics}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of one metric."""
        return sum(samples(self.page("/metrics")[1], name, **labels).values())

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def log(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return _log(self.directory)


def _log(directory: Path) -> list[dict[str, Any]]:
    whole, _, _ = (directory / "colony.log").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


@contextmanager
def running_colony(
    directory: Path, config: Mapping[str, object], *arguments: str
) -> Iterator[RunningColony]:
    """`coral colony` as users start it, which stores below DIRECTORY and listens on loopback."""
    directory.mkdir(exist_ok=True)
    path = directory / "colony.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    with (directory / "colony.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *coral("colony"), "--config", str(path), "--data", str(directory / "data"),
                "--listen", f"unix:{directory}/colony.sock", "--metrics", "127.0.0.1:0",
                "--log-format", "json", *arguments,
            ],
            stderr=log, cwd=ROOT, env=os.environ,
        )  # fmt: skip

    def listening() -> dict[str, Any] | None:
        assert process.poll() is None, (directory / "colony.log").read_text()
        return next((line for line in _log(directory) if line["event"] == "listening"), None)

    try:
        told = wait_until(listening, timeout_s=60)
        assert told
        yield RunningColony(process, directory, told["metrics"])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@dataclass(frozen=True)
class Stored:
    """What a colony left behind."""

    standings: tuple[Standing, ...]
    rows: Mapping[tuple[str, str], tuple[int, int]]
    """Of single system calls, by agent and session: how many there are, and how many different."""


async def stored_in(directory: Path) -> Stored:
    """What is in the store of the colony of DIRECTORY, which has ended."""
    store = Store(directory / "data", Settings(), ContractRows())
    await store.start()
    try:
        table = await store.read(
            lambda sources: (
                f"""
                SELECT agent, session, count(*) AS rows, count(DISTINCT (tid, time_ns)) AS distinct_
                FROM ({sources.rows("syscall_calls", 0, 1 << 62)}) GROUP BY ALL"""
            ),
            deadline_s=60,
        )
        rows = {
            (row["agent"], row["session"]): (row["rows"], row["distinct_"])
            for row in table.to_pylist()
        }
        return Stored(tuple(store.standings()), rows)
    finally:
        await store.close()
