"""What the agent tells systemd, by sd_notify(3): ready, stopping, what it waits for, still alive.

Without NOTIFY_SOCKET in the environment nothing is sent. Nothing here blocks or raises: a service
manager that does not listen holds up nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

_MOST_STATUS: Final = 500  # characters; systemctl shows one line


class Notifier:
    """The service manager's end of a datagram socket."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        # A name that begins with "@" is abstract: its first byte is 0.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket: socket.socket | None = None
        if path.startswith(("@", "/")):
            self._socket = socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
        self.watchdog_s = _watchdog_s(environment)

    def ready(self) -> None:
        """The agent listens."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The agent ends."""
        self._send("STOPPING=1\nSTATUS=stopping")

    def status(self, text: str) -> None:
        """What `systemctl status` shows of it, in one line."""
        self._send(f"STATUS={' '.join(text.split())[:_MOST_STATUS]}")

    def alive(self) -> None:
        """The loop turns, for the watchdog if there is one."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Sends nothing more."""
        if self._socket:
            self._socket.close()

    def _send(self, text: str) -> None:
        if self._socket:
            with suppress(OSError):
                self._socket.sendto(text.encode(errors="backslashreplace"), self._address)


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """How long the watchdog waits for a sign of life, in seconds; 0 without a watchdog."""
    usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not usec.isdigit() or pid not in ("", str(os.getpid())):
        return 0.0
    return int(usec) / 1e6
