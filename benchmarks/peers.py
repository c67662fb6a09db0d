"""Other tools at the same job: how each is started, known to be attached, stopped, and read.

Each is a process of its own, on a process of ours, and ended by its id.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import kernel
from benchmarks.bench import Bench
from collectors import syscall_table

_ATTACH_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 15.0
_COMPLAINT: Final = re.compile(r"error|fail|unable", re.IGNORECASE)
_GETPPID: Final = syscall_table.numbers()["getppid"]

# Count, total time and errors by system call: what `syscall_stats` does, less the histogram.
_BPFTRACE: Final = """
tracepoint:raw_syscalls:sys_enter /pid == {pid}/ {{ @start[tid] = nsecs; }}
tracepoint:raw_syscalls:sys_exit /pid == {pid} && @start[tid]/ {{
    @calls[args->id] = count();
    @total_ns[args->id] = sum(nsecs - @start[tid]);
    if (args->ret < 0) {{ @errors[args->id] = count(); }}
    delete(@start[tid]);
}}
"""


class PeerError(Exception):
    """A peer that is not here, or cannot start here; the message says why in one line."""


def _has_two_programs(peer_pid: int, _target_pid: int) -> bool:
    return kernel.attachments(peer_pid) >= 2


def _is_tracer(peer_pid: int, target_pid: int) -> bool:
    return f"TracerPid:\t{peer_pid}\n" in Path(f"/proc/{target_pid}/status").read_text()


@dataclass(frozen=True)
class Peer:
    """One tool. `calls` is how many calls it is measured over."""

    name: str
    command: Callable[[int], Sequence[str]]  # by the target's pid
    counted: re.Pattern[str]  # finds the getppid calls in what it prints
    calls: int = 1_000_000
    is_attached: Callable[[int, int], bool] = _has_two_programs


LIBBPF_SYSCOUNT: Final = Peer(
    "libbpf-tools syscount -L",
    lambda pid: ("syscount", "-L", "-p", str(pid)),
    re.compile(r"^getppid\s+(\d+)", re.MULTILINE),
)
BPFTRACE: Final = Peer(
    "bpftrace",
    lambda pid: ("bpftrace", "-e", _BPFTRACE.format(pid=pid)),
    re.compile(rf"^@calls\[{_GETPPID}\]: (\d+)", re.MULTILINE),
)
BCC_SYSCOUNT: Final = Peer(
    "bcc syscount -L",
    lambda pid: ("syscount-bpfcc", "-L", "-p", str(pid)),
    re.compile(r"^getppid\s+(\d+)", re.MULTILINE),
)
STRACE: Final = Peer(
    "strace -c",
    lambda pid: ("strace", "-c", "-f", "-p", str(pid)),
    re.compile(r"(\d+)\s+getppid$", re.MULTILINE),
    calls=10_000,
    is_attached=_is_tracer,
)
ALL: Final = (LIBBPF_SYSCOUNT, BPFTRACE, BCC_SYSCOUNT, STRACE)


class RunningPeer:
    """A peer that is attached."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes], output: Path) -> None:
        self._peer = peer
        self._process = process
        self._output = output
        self.pid = process.pid

    def stop(self) -> None:
        """Asks it for its figures, as a person would by Ctrl-C, and waits for its end: then its
        programs are detached."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def calls_counted(self) -> int:
        """How many getppid calls it says that it saw. After `stop`."""
        match = self._peer.counted.search(self._output.read_text(errors="replace"))
        return int(match[1]) if match else 0


@contextmanager
def running(bench: Bench, peer: Peer, target_pid: int) -> Iterator[RunningPeer]:
    """A peer at work on the target; ended with the block. Raises `PeerError`."""
    command = peer.command(target_pid)
    require(command[0])
    path = bench.directory / "peer.out"
    with path.open("wb") as output:
        # Both as one: strace writes its table to standard error.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=bench.environment(),
        )
    one = RunningPeer(peer, process, path)
    try:
        end = time.monotonic() + _ATTACH_TIMEOUT_S
        while not peer.is_attached(process.pid, target_pid):
            if process.poll() is not None:
                raise PeerError(complaint(path) or "it ended at once")
            if time.monotonic() > end:
                raise PeerError(f"not attached after {_ATTACH_TIMEOUT_S:g} s")
        yield one
    finally:
        one.stop()


def require(program: str) -> None:
    """Raises `PeerError` unless the program is installed."""
    if not shutil.which(program):
        raise PeerError(f"{program} is not installed")


def complaint(path: Path) -> str:
    """Of what a tool printed, the last line that names an error, or else the last one."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return next(filter(_COMPLAINT.search, reversed(lines)), lines[-1] if lines else "")
