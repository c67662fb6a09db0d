"""Starts a command in two steps: a process that waits, and then its exec.

So a collector can be attached to the process first, and counts from the command's exec on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from typing import Final

import click

EXIT_NOT_FOUND: Final = 127
EXIT_NOT_EXECUTABLE: Final = 126
# Reads a byte, then execs; exits silently when the pipe closes first. The command must not inherit
# what Python has changed for itself: LC_CTYPE, ignored signals, one more descriptor.
_HELD: Final = f"""
import os, signal, sys
release_fd, path, *command = sys.argv[1:]
with open(f"/proc/{{os.getppid()}}/environ", "rb") as file:
    given = dict(item.split(b"=", 1) for item in file.read().split(b"\\0") if b"=" in item)
os.set_inheritable(int(release_fd), False)
os.read(int(release_fd), 1) or os._exit(0)
for number in signal.SIGPIPE, signal.SIGXFSZ:
    signal.signal(number, signal.SIG_DFL)
try:
    os.execve(path, command, given)
except OSError as error:
    os.write(2, f"coral: {{path}}: {{error.strerror}}\\n".encode())
    os._exit({EXIT_NOT_EXECUTABLE})
"""


class HeldCommand:
    """A command that has a process id before its exec."""

    def __init__(self, process: Process, release_fd: int) -> None:
        self._process = process
        self._release_fd = release_fd

    @classmethod
    async def start(cls, command: Sequence[str]) -> HeldCommand:
        """Starts the process that waits. Exits with 127, as a shell does, where there is no such
        command."""
        path = shutil.which(command[0])
        if path is None:
            click.echo(f"coral: {command[0]}: there is no such command", err=True)
            sys.exit(EXIT_NOT_FOUND)
        read_fd, release_fd = os.pipe()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _HELD, str(read_fd), path, *command,
            pass_fds=(read_fd,),
        )  # fmt: skip
        os.close(read_fd)
        return cls(process, release_fd)

    @property
    def pid(self) -> int:
        """The process id, the same before and after the exec."""
        return self._process.pid

    def release(self) -> None:
        """Lets it exec."""
        os.write(self._release_fd, b"x")
        self._close()

    def abandon(self) -> None:
        """Ends the process if it still waits."""
        self._close()

    def _close(self) -> None:
        if self._release_fd >= 0:
            os.close(self._release_fd)
            self._release_fd = -1

    async def wait(self) -> int:
        """Waits for the command's end; its exit status, as a shell has it."""
        status = await self._process.wait()
        return status if status >= 0 else 128 - status
