"""The names of addresses, as this machine's resolver has them.

A table never waits for a name: it shows the address until the name is known. Daemon threads ask the
resolver: a program that ends waits for the threads of the loop's executor, and a name server that
does not answer would hold it up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from coral.wire.text import safe

_THREADS: Final = 8
_MOST_NAMES: Final = 20_000
_MOST_WAITING: Final = 1000
_SETTLE_S: Final = 2.0


def look_up(address: str) -> str:
    """The name of an address; empty where it has none."""
    try:
        name, _ = socket.getnameinfo((address, 0), socket.NI_NAMEREQD)
    except (OSError, UnicodeError):
        return ""
    return safe(name)


class Names:
    """Looks up each address once, in a few threads that end with the process."""

    def __init__(self, ask: Callable[[str], str] = look_up) -> None:
        self._ask = ask
        self._known: dict[str, str] = {}
        self._waiting: set[str] = set()
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._changed = threading.Condition()
        self._threads = 0

    def of(self, address: str) -> str:
        """The name of an address, if it is known by now; else starts a look-up, and is empty."""
        with self._changed:
            if address in self._known:
                return self._known[address]
            full = len(self._known) >= _MOST_NAMES or len(self._waiting) >= _MOST_WAITING
            if address in self._waiting or full:
                return ""
            self._waiting.add(address)
            if self._threads < min(_THREADS, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name="coral-names", daemon=True).start()
        self._queue.put(address)
        return ""

    def settle(self, timeout_s: float = _SETTLE_S) -> None:
        """Waits at most TIMEOUT_S for the look-ups that have been started, before a last table."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def _work(self) -> None:
        while True:
            address = self._queue.get()
            name = self._ask(address)
            with self._changed:
                self._known[address] = name
                self._waiting.discard(address)
                self._changed.notify_all()
