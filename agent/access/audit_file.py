"""A file that lines are appended to, by a thread of its own; renamed or removed, it is made anew.

Whatever the file is, a FIFO without a reader or a disk that is full or slow, only that thread meets
it: lines that cannot be written are dropped and counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from coral.wire.log_writer import LogWriter

# Never waits for the reader of a FIFO, nor follows a link that somebody else put there.
_FLAGS: Final = (
    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    | os.O_NOFOLLOW
)  # fmt: skip
_MODE: Final = 0o600
_CLOSED: Final = -1


class AuditFile(LogWriter):
    """Lines on their way to the file at PATH."""

    def __init__(
        self, path: Path, notice: Callable[[int], str], *, most_waiting_bytes: int = 1 << 20
    ) -> None:
        super().__init__(_CLOSED, notice, most_waiting_bytes=most_waiting_bytes, name="coral-audit")
        self._path = path
        self._inode = (0, 0)

    def open(self) -> None:
        """Opens the file, so that a path that cannot be written is found at the start. Raises
        OSError; for a FIFO without a reader too."""
        if self._fd == _CLOSED:
            fd = os.open(self._path, _FLAGS, _MODE)
            found = os.fstat(fd)
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
                os.close(fd)
                raise OSError(f"{self._path} is neither a regular file nor a FIFO")
            inode = found.st_dev, found.st_ino
            if inode != self._inode:
                self._torn = False  # the other half of a line is in another file
            self._fd, self._inode = fd, inode

    def _write(self, line: bytes) -> bool:
        if self._fd != _CLOSED and self._was_replaced():
            self._close()
        try:
            self.open()
        except OSError:
            return False
        written = super()._write(line)
        if not written:  # perhaps the FIFO's reader has left: try a new one with the next line
            self._close()
        return written

    def _was_replaced(self) -> bool:
        try:
            found = self._path.lstat()
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._inode

    def _close(self) -> None:
        with suppress(OSError):
            os.close(self._fd)
        self._fd = _CLOSED
