"""Where log lines go: a bounded queue, and one thread that writes it to a descriptor.

A descriptor that is full, broken or slow holds up that thread alone. Lines for which there is no
room, or which cannot be written, are dropped and counted. This module does not know what a line
holds.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final

_MOST_WAITING_BYTES: Final = 1 << 20


class LogWriter:
    """Lines on their way to a descriptor.

    The descriptor stays as it is: a terminal shares its flags with the shell, so it may not be made
    non-blocking. NOTICE makes the line that says how many lines were dropped.
    """

    def __init__(
        self,
        fd: int,
        notice: Callable[[int], str],
        *,
        most_waiting_bytes: int = _MOST_WAITING_BYTES,
        name: str = "log",
    ) -> None:
        try:
            self._fd = os.dup(fd)
        except OSError:  # it is closed: every write fails, and is counted
            self._fd = -1
        self._notice = notice
        self._name = name  # the thread's
        self._most_waiting_bytes = most_waiting_bytes
        # Putting into a SimpleQueue is reentrant: a finalizer that logs may interrupt a `put`.
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.RLock()
        self._put_bytes = self._refused = 0  # under the lock
        self._taken_bytes = self._failed = 0  # of the thread alone
        self._torn = False  # part of a line was written, without its end
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """How many lines were dropped so far."""
        return self._refused + self._failed

    def put(self, line: str) -> None:
        """Queues LINE, or drops it. Never blocks, never raises."""
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._lock:
            if self._put_bytes - self._taken_bytes + len(data) > self._most_waiting_bytes:
                self._refused += 1
                return
            self._put_bytes += len(data)
        self._queue.put(data)

    def start(self) -> None:
        """Starts to write. Without a thread, lines are queued and then dropped."""
        if not self._thread:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            with suppress(RuntimeError):  # the limit of threads is reached
                thread.start()
                self._thread = thread

    def close(self, patience_s: float) -> None:
        """Writes what waits, for at most PATIENCE_S seconds. The thread is a daemon: where it is
        stuck in a write, it ends with the process."""
        self.start()
        self._queue.put(None)
        if self._thread:
            self._thread.join(patience_s)

    def _run(self) -> None:
        told = 0
        while True:
            line = self._queue.get()
            dropped = self.dropped
            if dropped > told and self._write(f"{self._notice(dropped - told)}\n".encode()):
                told = dropped
            if line is None:
                return
            if not self._write(line):
                self._failed += 1
            self._taken_bytes += len(line)

    def _write(self, line: bytes) -> bool:
        rest = memoryview(b"\n" + line if self._torn else line)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                    self._torn = bool(rest)
                except BlockingIOError:  # another process made it non-blocking
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                    poll.poll()
        except OSError:  # nobody reads it, or the disk is full
            return False
        return True


class Lines:
    """What structlog logs to: WRITER queues each line, whatever its level."""

    def __init__(self, writer: LogWriter) -> None:
        self.msg = writer.put

    def __getattr__(self, _level: str) -> Any:  # noqa: ANN401  as structlog's own loggers
        return self.msg
