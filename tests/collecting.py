"""What tests of `syscall_stats` on a rung share: a session that is drained by hand, and what it was
sent so far, the same for summaries and for single events."""

from __future__ import annotations

import select
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.contract import Batch, EventRows
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from tests.support import RUNGS, summaries, wait_until


def _marks(rung: str) -> list[pytest.MarkDecorator]:
    """On other kernels than this one, the best rung alone: what a rung changes is the same there.
    The oldest does without everything; those between are for the soak."""
    if rung == "best":
        return []
    return (
        [pytest.mark.long] if rung in ("hash", "oldest") else [pytest.mark.long, pytest.mark.soak]
    )


every_rung = pytest.mark.parametrize(
    "without",
    [pytest.param(without, id=name, marks=_marks(name)) for name, without in RUNGS.items()],
)
both_modes = pytest.mark.parametrize("mode", ["summaries", "events"])


class Collected:
    """A session at work, and its rows, added up: by process id, command name and name of the
    call."""

    def __init__(self, collector: SyscallStatsCollector) -> None:
        self.collector = collector
        self.calls: Counter[tuple[int, str, str]] = Counter()
        self.errors: Counter[str] = Counter()  # by the name of the call
        self.losses: Counter[int] = Counter()

    def drain(self) -> Batch:
        """Takes in what there is."""
        batch = self.collector.drain()
        self.losses.update(batch.losses)
        if isinstance(batch.rows, EventRows):
            self._add_events(batch.rows)
        else:
            for row in summaries(batch):
                self.calls[row.pid, row.labels["comm"], row.syscall_name] += row.call_count
                self.errors[row.syscall_name] += row.error_count
        return batch

    def _add_events(self, rows: EventRows) -> None:
        names = rows.strings
        fields = ("pid", "comm", "syscall", "return_value")
        for pid, comm, syscall, result in rows.records[list(fields)].tolist():
            self.calls[pid, names[comm], names[syscall]] += 1
            self.errors[names[syscall]] += -4096 < result < 0

    def of(self, name: str) -> int:
        """Calls of that name, of all processes."""
        return sum(count for (_, _, call), count in self.calls.items() if call == name)

    def by_pid(self, name: str) -> dict[int, int]:
        """Calls of that name by process."""
        counted: Counter[int] = Counter()
        for (pid, _, call), count in self.calls.items():
            if call == name:
                counted[pid] += count
        return dict(counted)

    def by_comm(self, name: str) -> dict[str, int]:
        """Calls of that name by command name."""
        counted: Counter[str] = Counter()
        for (_, comm, call), count in self.calls.items():
            if call == name:
                counted[comm] += count
        return dict(counted)

    def of_pid(self, pid: int) -> dict[str, int]:
        """Calls of that process by name."""
        return {call: count for (tgid, _, call), count in self.calls.items() if tgid == pid}


def session(without: tuple[str, ...] = (), **config: str) -> SyscallStatsCollector:
    """A session on the rung without these features, that is not at work yet; skips a test on a
    machine without that rung."""
    features = bpf.probe().without(*without)
    support = SyscallStatsCollector.support(features)
    if not support.supported:
        pytest.skip(support.reason)
    return SyscallStatsCollector.create(config, None, features)


@contextmanager
def collecting(without: tuple[str, ...] = (), **config: str) -> Iterator[Collected]:
    """A session at work; what is left is drained at the end of the block, once its programs no
    longer work for it."""
    with collected_of(session(without, **config)) as collected:
        yield collected


@contextmanager
def collected_of(collector: SyscallStatsCollector) -> Iterator[Collected]:
    """The same of a collector that is not open yet."""
    try:
        collector.open()
        collected = Collected(collector)
        yield collected
        collector.bpf_object.detach()
        collected.drain()
    finally:
        collector.close()


class Waiting:
    """A program that reads a byte from standard input first."""

    def __init__(self, *command: object) -> None:
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid
        wait_until(self._reads)

    def _reads(self) -> bool:
        call = Path(f"/proc/{self.pid}/syscall").read_text()
        return call.startswith(f"{number_of('read')} 0x0 ")

    def go(self) -> None:
        """Lets it begin."""
        assert self._process.stdin
        self._process.stdin.write(b"x")
        self._process.stdin.flush()

    def has_written(self, timeout_s: float) -> bool:
        """Whether it has written to standard output, or has ended; waits for that."""
        assert self._process.stdout
        return bool(select.select([self._process.stdout], [], [], timeout_s)[0])

    def finish(self) -> None:
        """Waits for its end."""
        assert self._process.wait(20) == 0

    def run(self) -> None:
        """Lets it begin, and waits for its end."""
        self.go()
        self.finish()

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        with self._process:
            pass


@contextmanager
def waiting(*command: object) -> Iterator[Waiting]:
    """A program that reads a byte from standard input first; it ends with the block."""
    program = Waiting(*command)
    try:
        yield program
    finally:
        program.kill()


def number_of(name: str) -> int:
    """The number of a call of 64-bit programs here."""
    return syscall_table.numbers()[name]
