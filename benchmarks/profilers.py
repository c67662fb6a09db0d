"""Other profilers, at work on one process of ours at 99 Hz, and what they take to show it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import kernel, peers
from benchmarks.bench import Bench
from benchmarks.memory import rss_mb
from benchmarks.peers import Peer

FREQUENCY_HZ: Final = 99
_EVENT: Final = "anon_inode:[perf_event]"
_BPFTRACE: Final = """
profile:hz:{hz} /pid == {pid}/ {{ @[kstack, ustack, comm] = count(); }}
"""


def _has_events(peer_pid: int, _target_pid: int) -> bool:
    """Whether it has opened a timer for each CPU, or for each thread."""
    found = 0
    for fd in Path(f"/proc/{peer_pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(fd.readlink()) == _EVENT
    return found >= len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Profiler:
    """One tool. COMMAND starts it, SHOW turns its file into text afterwards; both have `{pid}` and
    `{path}`. Without SHOW it prints when it is stopped."""

    name: str
    command: Sequence[str]
    show: Sequence[str] = ()


def _perf(name: str, *graph: str) -> Profiler:
    record = ("perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY_HZ), *graph)
    return Profiler(
        name,
        (*record, "-p", "{pid}", "-o", "{path}"),
        ("perf", "script", "--no-inline", "-i", "{path}"),
    )


PERF_DWARF: Final = _perf("perf record, dwarf", "--call-graph", "dwarf")
PERF: Final = _perf("perf record, frame pointers", "-g")
BCC: Final = Profiler(
    "bcc profile", ("profile-bpfcc", "-f", "-F", str(FREQUENCY_HZ), "-p", "{pid}")
)
BPFTRACE: Final = Profiler("bpftrace", ("bpftrace", "-e", _BPFTRACE))


@dataclass
class Cost:
    """What a profiler took itself."""

    pid: int
    rss_mb: float = 0.0
    shown_s: float = 0.0  # CPU time from its stop until all is shown; good after the block


@contextmanager
def running(bench: Bench, profiler: Profiler, target_pid: int) -> Iterator[Cost]:
    """It is at work for the duration of the block. Raises `PeerError`."""
    path = bench.directory / "perf.data"

    def filled(words: Sequence[str]) -> list[str]:
        return [word.format(pid=target_pid, path=path, hz=FREQUENCY_HZ) for word in words]

    peer = Peer(
        profiler.name,
        lambda _pid: filled(profiler.command),
        re.compile(r"(?!)"),
        is_attached=_has_events,
    )
    before_s = _ended_children_s()
    with peers.running(bench, peer, target_pid) as one:
        cost = Cost(one.pid)
        yield cost
        cost.rss_mb = rss_mb(one.pid)
        cost.shown_s = -kernel.cpu_ns(one.pid) / 1e9
    if profiler.show:
        subprocess.run(
            filled(profiler.show),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        path.unlink(missing_ok=True)
    cost.shown_s += _ended_children_s() - before_s


def _ended_children_s() -> float:
    """CPU time of all children that we have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
