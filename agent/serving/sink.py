"""A socket that the gate writes to, with back-pressure to what is written to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable


class Sink:
    """A socket that is written to. While it does not take everything, its source is paused."""

    def __init__(
        self,
        sink: socket.socket,
        pause: Callable[[], None],
        resume: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        self.held = b""
        self._loop = asyncio.get_running_loop()
        self._socket = sink
        self._pause, self._resume, self._failed = pause, resume, failed

    def send(self, data: memoryview | bytes) -> None:
        """Sends DATA, and holds what the socket does not take. Never called while it holds."""
        sent = self._send(data)
        if sent < len(data):
            self.held = bytes(data[sent:])
            self._pause()
            self._loop.add_writer(self._socket, self._flush)

    def append(self, data: bytes) -> None:
        """Sends DATA after what it holds."""
        if self.held:
            self.held += data
        else:
            self.send(data)

    def _flush(self) -> None:
        self.held = self.held[self._send(self.held) :]
        if not self.held and self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket)
            self._resume()

    def _send(self, data: memoryview | bytes) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # its other end is gone, and with it the need to hold anything
            self._failed()
            return len(data)
