"""Starts a command in two steps: a process that waits, and then its exec.

So a collector can be attached to the process first, and counts from the command's exec on.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

EXIT_NOT_FOUND: Final = 127
EXIT_NOT_EXECUTABLE: Final = 126
_REPORT_BYTES: Final = 8192
_PR_SET_CHILD_SUBREAPER: Final = 36
# Reads a byte, then execs; exits silently when the pipe closes first. The command must not inherit
# what Python has changed for itself: LC_CTYPE, ignored signals, one more descriptor.
_HELD: Final = f"""
import os, signal, sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own prints a traceback
signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGINT}})
release_fd, report_fd, path, *command = sys.argv[1:]
with open(f"/proc/{{os.getppid()}}/environ", "rb") as file:
    given = dict(item.split(b"=", 1) for item in file.read().split(b"\\0") if b"=" in item)
for fd in release_fd, report_fd:
    os.set_inheritable(int(fd), False)
os.read(int(release_fd), 1) or os._exit(0)
for number in signal.SIGPIPE, signal.SIGXFSZ:
    signal.signal(number, signal.SIG_DFL)
try:
    os.execve(path, command, given)
except OSError as error:
    os.write(int(report_fd), f"{{path}}: {{error.strerror}}".encode())
    os._exit({EXIT_NOT_EXECUTABLE})
"""


class HeldCommand:
    """A command that has a process id before its exec."""

    def __init__(self, process: Process, release_fd: int, report_fd: int) -> None:
        self._process = process
        self._release_fd = release_fd
        self._report_fd = report_fd
        self._released = False

    @classmethod
    async def start(cls, command: Sequence[str]) -> HeldCommand:
        """Starts the process that waits. Exits with 127, as a shell does, where there is no such
        command, and with 126 where the file is not executable."""
        path = _found(command[0])
        _adopt_orphans()
        read_fd, release_fd = os.pipe()
        report_fd, write_fd = os.pipe()
        # A Ctrl-C, which reaches the new process too, waits until it no longer prints a traceback.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _HELD, str(read_fd), str(write_fd)),
                *(path, *command),
                pass_fds=(read_fd, write_fd),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(read_fd)
        os.close(write_fd)
        return cls(process, release_fd, report_fd)

    @property
    def pid(self) -> int:
        """The process id, the same before and after the exec."""
        return self._process.pid

    def release(self) -> None:
        """Lets it exec."""
        with suppress(BrokenPipeError):  # a signal has ended it
            os.write(self._release_fd, b"x")
        self._released = True
        self._close()

    def exec_error(self) -> str:
        """Why the released process could not exec the command; empty if it could."""
        # The writing end is closed by the exec, or by the end of the process.
        return os.read(self._report_fd, _REPORT_BYTES).decode() if self._released else ""

    async def abandon(self) -> None:
        """Ends the process if it still waits for its release."""
        self._close()
        os.close(self._report_fd)
        if not self._released:
            self.end(signal.SIGKILL)
            await self._process.wait()  # or else asyncio reports it after its loop was closed

    def _close(self) -> None:
        if self._release_fd >= 0:
            os.close(self._release_fd)
            self._release_fd = -1

    def end(self, number: int) -> None:
        """Passes on a signal that ends the tap. The terminal has sent a Ctrl-C to both."""
        if number != signal.SIGINT and self._process.returncode is None:
            self._process.send_signal(number)

    def left_running(self) -> list[int]:
        """The ids of the processes that the command has started and left, once it has ended."""
        return [pid for pid in _children() if pid != self.pid]

    async def wait(self) -> int:
        """Waits for the command's end; its exit status, as a shell has it. Ends it where this is
        cancelled."""
        try:
            status = await self._process.wait()
        except asyncio.CancelledError:
            self.end(signal.SIGTERM)
            raise
        return status if status >= 0 else 128 - status


def _adopt_orphans() -> None:
    """From now on a process whose parent ends becomes a child of this one, if it descends from it:
    so it can be told. Does nothing on a kernel without this (before 3.4)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


def _children() -> list[int]:
    """The children of this process that run; none where the kernel does not list them
    (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return [pid for pid in found if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def own_namespace(kind: str) -> int:
    """The inode of this process's namespace of a KIND, such as `pid`; 0 where there is none."""
    try:
        return Path("/proc/self/ns", kind).stat().st_ino
    except OSError:
        return 0


def _found(name: str) -> str:
    """The path of a command. Exits as a shell does where there is none."""
    if path := shutil.which(name):
        return path
    status, why = EXIT_NOT_FOUND, "there is no such command"
    if "/" in name and Path(name).exists():
        status = EXIT_NOT_EXECUTABLE
        why = os.strerror(errno.EISDIR if Path(name).is_dir() else errno.EACCES)
    click.echo(f"coral: {name}: {why}", err=True)
    sys.exit(status)
