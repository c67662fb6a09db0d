"""Programs that fill a collector: 10,240 rows in every interval, of system calls or of connections.

10,240 is how many entries a collector's map has by default. The rows are real: `many.c` makes the
calls and the connections.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench import Bench, BenchError
from coral import bpf
from coral.agent.streams import Header
from coral.collectors.contract import Collector, Summaries
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.collectors.tcp_metrics.collector import COLLECTOR as TCP_METRICS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import field_of
from tests.support import at_work

ROWS: Final = 10_240
_PROCESSES: Final = 128
# Calls that do nothing with -1 for every argument but to fail, or to tell an id.
_NAMES: Final = (
    "accept", "accept4", "bind", "close", "connect", "copy_file_range", "dup", "dup3", "epoll_ctl",
    "epoll_pwait", "faccessat", "fadvise64", "fallocate", "fchdir", "fchmod", "fchmodat", "fchown",
    "fchownat", "fcntl", "fdatasync", "fgetxattr", "flistxattr", "flock", "fremovexattr",
    "fsetxattr", "fstat", "fstatfs", "fsync", "ftruncate", "getdents64", "getegid", "geteuid",
    "getgid", "getpeername", "getpgid", "getpid", "getppid", "getsid", "getsockname", "getsockopt",
    "gettid", "getuid", "inotify_rm_watch", "ioctl", "linkat", "listen", "lseek", "mkdirat",
    "openat", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read",
    "readahead", "readlinkat", "readv", "recvfrom", "recvmmsg", "recvmsg", "sched_getparam",
    "sched_getscheduler", "sendfile", "sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
    "splice", "symlinkat", "syncfs", "tee", "timerfd_gettime", "timerfd_settime", "unlinkat",
    "vmsplice", "write", "writev",
)  # fmt: skip
_FILLED_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True)
class Workload:
    """A program that is at work, and how to start a collector that has a row for each pair of
    process and call, or for each end of a connection."""

    kind: pb.EbpfCollectorKind
    config: dict[str, str]
    collector: Callable[[dict[str, str]], Collector]

    def fill(self, intervals: int = 1, interval_s: float = 1.0) -> list[Summaries]:
        """What a collector in this process drains: INTERVALS full ones. Raises `BenchError`."""
        collector = self.collector(self.config)
        full: list[Summaries] = []
        end = time.monotonic() + _FILLED_TIMEOUT_S + intervals * interval_s
        with at_work(collector):
            while len(full) < intervals:
                if time.monotonic() > end:
                    raise BenchError(f"no interval of {ROWS:,} rows in {_FILLED_TIMEOUT_S:g} s")
                time.sleep(interval_s)
                rows = collector.drain().rows
                if isinstance(rows, Summaries) and len(rows) >= ROWS:
                    full.append(rows)
        return full


@contextmanager
def calls(bench: Bench) -> Iterator[Workload]:
    """128 processes that make 80 different calls each; ended with the block."""
    numbers = [str(syscall_table.numbers()[name]) for name in _NAMES]
    with _running(bench, "calls", str(_PROCESSES), *numbers) as pids:
        yield Workload(
            pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
            {"pid": ",".join(pids), "include": ",".join(_NAMES)},
            lambda config: SyscallStatsCollector.create(config, None, bpf.probe()),
        )


@contextmanager
def connections(bench: Bench) -> Iterator[Workload]:
    """A process with both ends of 5,120 connections; ended with the block."""
    with _running(bench, "connections", str(ROWS // 2)) as pids:
        yield Workload(
            pb.EBPF_COLLECTOR_KIND_TCP_METRICS,
            # A few entries more, for connections that the kernel has not freed yet.
            {"pid": ",".join(pids), "entries": str(2 * ROWS)},
            lambda config: TCP_METRICS.create(config, None, bpf.probe()),
        )


WORKLOADS: Final[dict[str, Callable[[Bench], AbstractContextManager[Workload]]]] = {
    "SyscallStats": calls,
    "TcpMetrics": connections,
}


@contextmanager
def _running(bench: Bench, *arguments: str) -> Iterator[Sequence[str]]:
    """many.c at work; the ids of its processes."""
    program = bench.program("many", "benchmarks")
    process: Any = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        pids = list(iter(process.stdout.readline, "\n"))
        if not pids or process.poll() is not None:
            raise BenchError("many.c ended before it was at work")
        yield [pid.strip() for pid in pids]
    finally:
        process.kill()
        process.communicate()


def header_of(rows: Summaries) -> Header:
    """What messages of ROWS say of their session."""
    kind = field_of(rows.message.DESCRIPTOR).kind
    return Header("bench", kind, "bench", "bench")  # type: ignore[arg-type]
