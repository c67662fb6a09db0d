"""For the tests of `cpu_profile`: a session around one run of tests/programs/profiled.c or another
program, and its samples, added up."""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from coral import bpf
from coral.collectors.contract import Batch, Summaries
from coral.collectors.cpu_profile.collector import CpuProfileCollector
from coral.mesh.v1 import ebpf_pb2 as pb

_DRAIN_EVERY_S: Final = 0.2
NS_PER_S: Final = 1e9


@dataclass
class Profile:
    """What a session has sent so far."""

    rows: list[pb.CpuProfileSample] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)
    account: Counter[str] = field(default_factory=Counter)
    truth: dict[str, float] = field(default_factory=dict)  # CPU seconds by name

    def add(self, batch: Batch) -> None:
        """Takes a batch in."""
        assert isinstance(batch.rows, Summaries)
        self.rows += batch.rows.as_messages()  # type: ignore[arg-type]
        self.losses.update(batch.losses)
        for name in ("samples", "samples_lost", "samples_truncated"):
            self.account[name] += int(batch.rows.columns[name][0])

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(row.count for row in self.rows)

    def among(self, name: str) -> int:
        """How many samples have the function NAME on their stack."""
        return sum(row.count for row in self.rows if name in row.stack)

    def shares(self, names: Sequence[str]) -> dict[str, float]:
        """The share of each of NAMES among the samples that have one of them."""
        counts = {name: self.among(name) for name in names}
        return {name: count / max(1, sum(counts.values())) for name, count in counts.items()}

    def edges(self) -> Counter[tuple[str, str]]:
        """Caller and callee, by samples."""
        found: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            for edge in set(zip(row.stack, row.stack[1:], strict=False)):
                found[edge] += row.count
        return found

    def by(self, attribute: str) -> Counter[int]:
        """Samples by `tid`, `end`, `tgid` and so on."""
        found: Counter[int] = Counter()
        for row in self.rows:
            found[getattr(row, attribute)] += row.count
        return found


def collector_of(config: Mapping[str, str]) -> CpuProfileCollector:
    """A session that is not at work yet; skips a test on a machine that cannot profile."""
    features = bpf.probe()
    support = CpuProfileCollector.support(features)
    if not support.supported:
        pytest.skip(support.reason)
    return CpuProfileCollector.create(config, None, features)


@contextmanager
def profiling(**config: object) -> Iterator[Profile]:
    """A session at work, drained by a thread; complete after the block."""
    collector = collector_of({name: str(value) for name, value in config.items()})
    profile, over, failed = Profile(), threading.Event(), list[BaseException]()

    def drain() -> None:
        try:
            while not over.wait(_DRAIN_EVERY_S):
                profile.add(collector.drain())
        except BaseException as error:  # noqa: BLE001  raised below
            failed.append(error)

    drainer = threading.Thread(target=drain)
    try:
        collector.open()
        drainer.start()
        try:
            yield profile
        finally:
            over.set()
            drainer.join()
        if failed:
            raise failed[0]
        collector.bpf_object.detach()
        profile.add(collector.drain())
    finally:
        collector.close()


def profiled(*command: object, **config: object) -> Profile:
    """The profile of one run of COMMAND, which waits for a byte, and prints its truth."""
    with waiting(*command) as process:
        return profiled_further(process, **config)


def waiting(*command: object) -> subprocess.Popen[str]:
    """COMMAND, started."""
    return subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def read_at_the_end(process: subprocess.Popen[str], **config: object) -> tuple[Profile, str]:
    """The profile of the rest of a process that waits for a byte, of which nothing is read before
    it has ended; and what it printed."""
    config["pid"] = process.pid
    collector = collector_of({name: str(value) for name, value in config.items()})
    profile = Profile()
    try:
        collector.open()
        out, _ = process.communicate("x")
        collector.bpf_object.detach()
        profile.add(collector.drain())
    finally:
        collector.close()
    return profile, out


def profiled_further(process: subprocess.Popen[str], **config: object) -> Profile:
    """The profile of the rest of a process that waits for a byte, and prints its truth."""
    with profiling(pid=process.pid, **config) as profile:
        out, _ = process.communicate("x")
    assert process.returncode == 0
    for line in out.splitlines():
        name, _, ns = line.partition(" ")
        profile.truth[name] = int(ns) / NS_PER_S
    return profile
