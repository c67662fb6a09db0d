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
from coral.collectors.syscall_stats import table as syscall_table

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


def _has_programs(peer_pid: int, _target_pid: int) -> bool:
    return kernel.attachments(peer_pid) > 0


def _is_tracer(peer_pid: int, target_pid: int) -> bool:
    return f"TracerPid:\t{peer_pid}\n" in Path(f"/proc/{target_pid}/status").read_text()


@dataclass(frozen=True)
class Peer:
    """One tool. `calls` is how many calls it is measured over."""

    name: str
    command: Callable[..., Sequence[str]]  # by the target: its pid, and what else tells it
    counted: re.Pattern[str]  # finds the getppid calls, or the lines, in what it prints
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

# What tcplife does, on the tracepoint. A listener's child has its port.
_BPFTRACE_LIFE: Final = """
tracepoint:sock:inet_sock_set_state /args->protocol == 6 && args->sport == {port}/ {{
    if (args->newstate < 4 && !@birth[args->skaddr]) {{ @birth[args->skaddr] = nsecs; }}
    if (args->newstate == 7 && @birth[args->skaddr]) {{
        $tp = (struct tcp_sock *)args->skaddr;
        printf("closed %s %d %s %d %lld %lld %lld\\n", ntop(args->saddr), args->sport,
            ntop(args->daddr), args->dport, $tp->bytes_acked, $tp->bytes_received,
            nsecs - @birth[args->skaddr]);
        delete(@birth[args->skaddr]);
    }}
}}
"""
# And a histogram of round trips, and bytes by process: what tcprtt and tcptop do.
_BPFTRACE_ALL: Final = f"""{_BPFTRACE_LIFE}
tracepoint:tcp:tcp_probe /args->sport == {{port}}/ {{{{ @rtt_us = hist(args->srtt); }}}}
tracepoint:sock:sock_send_length /pid == {{pid}} && args->ret > 0/ {{{{
    @sent[pid] = sum(args->ret);
}}}}
tracepoint:sock:sock_recv_length /pid == {{pid}} && args->ret > 0/ {{{{
    @received[pid] = sum(args->ret);
}}}}
"""
_LIFE: Final = re.compile(r"^\d+ .* 127\.0\.0\.1 ", re.MULTILINE)
_STATE: Final = re.compile(r"-> CLOSE\s")
_CLOSED: Final = re.compile(r"^closed ", re.MULTILINE)
NONE: Final = re.compile(r"(?!)")  # they tell no single connection


def _tcp(name: str, counted: re.Pattern[str], *command: str) -> Peer:
    """A tool for TCP, told what to watch by `{pid}` and `{port}` in COMMAND."""

    def filled(pid: int, port: int) -> list[str]:
        return [word.format(pid=pid, port=port) for word in command]

    return Peer(name, filled, counted, is_attached=_has_programs)


# Of a server's connections: its command is by pid and port.
TCP: Final = (
    _tcp("libbpf-tools tcplife", _LIFE, "tcplife", "-L", "{port}"),
    _tcp("libbpf-tools tcpstates", _STATE, "tcpstates", "-L", "{port}"),
    _tcp("libbpf-tools tcptop", NONE, "tcptop", "-C", "-p", "{pid}", "1"),
    _tcp("libbpf-tools tcprtt", NONE, "tcprtt", "-i", "1", "-p", "{port}"),
    _tcp("libbpf-tools tcpconnlat", NONE, "tcpconnlat", "-p", "{pid}"),
    _tcp("libbpf-tools tcptracer", NONE, "tcptracer", "-p", "{pid}"),
    _tcp("bcc tcplife", _LIFE, "tcplife-bpfcc", "-L", "{port}"),
    _tcp("bcc tcpstates", _STATE, "tcpstates-bpfcc", "-L", "{port}"),
    _tcp("bcc tcptop", NONE, "tcptop-bpfcc", "-C", "-p", "{pid}", "1"),
    _tcp("bcc tcprtt", NONE, "tcprtt-bpfcc", "-i", "1", "-p", "{port}"),
    _tcp("bcc tcpconnlat", NONE, "tcpconnlat-bpfcc", "-p", "{pid}"),
    _tcp("bcc tcpaccept", _LIFE, "tcpaccept-bpfcc", "-P", "{port}"),
    _tcp("bpftrace, ends", _CLOSED, "bpftrace", "-e", _BPFTRACE_LIFE),
    _tcp("bpftrace, ends, round trips, bytes", _CLOSED, "bpftrace", "-e", _BPFTRACE_ALL),
)


# A histogram of times to first byte and a count, with nothing of HTTP: a send after a receive on
# the same socket answers a request.
_BPFTRACE_HTTP: Final = """
tracepoint:sock:sock_recv_length /pid == {pid} && args->ret > 0 && !@began[args->sk]/ {{
    @began[args->sk] = nsecs;
}}
tracepoint:sock:sock_send_length /pid == {pid} && args->ret > 0 && @began[args->sk]/ {{
    @ns = hist(nsecs - @began[args->sk]);
    @requests = count();
    delete(@began[args->sk]);
}}
"""
# The same by the functions of OpenSSL.
_BPFTRACE_HTTPS: Final = """
uprobe:{libssl}:SSL_read /pid == {pid}/ {{ @ssl[tid] = arg0; }}
uretprobe:{libssl}:SSL_read /pid == {pid} && (int32)retval > 0 && !@began[@ssl[tid]]/ {{
    @began[@ssl[tid]] = nsecs;
}}
uprobe:{libssl}:SSL_write /pid == {pid} && @began[arg0]/ {{
    @ns = hist(nsecs - @began[arg0]);
    @requests = count();
    delete(@began[arg0]);
}}
"""
_REQUESTS: Final = re.compile(r"^@requests: (\d+)", re.MULTILINE)
_LIBSSL: Final = re.compile(r" (/\S*/libssl\.so\S*)$", re.MULTILINE)


def _bpftrace_https(pid: int) -> Sequence[str]:
    found = _LIBSSL.search(Path(f"/proc/{pid}/maps").read_text())
    if not found:
        raise PeerError("the server has no libssl")
    return ("bpftrace", "-e", _BPFTRACE_HTTPS.format(pid=pid, libssl=found[1]))


# Of a server's requests, in the clear and in TLS.
HTTP: Final = (
    Peer(
        "bpftrace, times to first byte",
        lambda pid: ("bpftrace", "-e", _BPFTRACE_HTTP.format(pid=pid)),
        _REQUESTS,
    ),
)
HTTPS: Final = (
    Peer("bpftrace, times to first byte", _bpftrace_https, _REQUESTS, is_attached=_has_programs),
)


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

    def lines_counted(self) -> int:
        """How many of its lines are what is counted. After `stop`."""
        return len(self._peer.counted.findall(self._output.read_text(errors="replace")))


@contextmanager
def running(bench: Bench, peer: Peer, target_pid: int, *target: int) -> Iterator[RunningPeer]:
    """A peer at work on the target; ended with the block. Raises `PeerError`."""
    command = peer.command(target_pid, *target)
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
