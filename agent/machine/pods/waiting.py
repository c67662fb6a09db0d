"""When the thread that follows pods goes on, when it asks the sources for names, and what it
uses."""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from coral.agent.machine.pods.cgroups import CgroupChanges

# How soon to ask again for a name that no source has yet, and how long.
_FIRST_PAUSE_S: Final = 0.01
_MOST_PAUSE_S: Final = 1.0
_PATIENCE_S: Final = 30.0
ASK_EVERY_S: Final = 10.0
"""How often to ask in any case, for labels that have changed."""


class Waiting:
    """Waits for a change of cgroups, for a poke, or for some time."""

    def __init__(self, changes: CgroupChanges | None, poke: int) -> None:
        self._changes, self._poke_fd = changes, poke
        self._poll = select.poll()
        self._poll.register(poke, select.POLLIN)
        if changes:
            self._poll.register(changes.fileno(), select.POLLIN)

    def wait(self, most_s: float) -> None:
        """Returns at once where there is something to read already."""
        if not self._changes or self._changes.rest():
            self._poll.poll(int(most_s * 1000) + 1)
        with suppress(BlockingIOError):
            os.eventfd_read(self._poke_fd)


@dataclass
class Asking:
    """When to ask the sources for names: at once for a new cgroup, then with growing pauses until
    it has a name, and now and then in any case."""

    _unnamed: set[str] = field(default_factory=set)
    _since: float = 0.0
    _next: float = field(default_factory=lambda: time.monotonic() + ASK_EVERY_S)
    _pause_s: float = _FIRST_PAUSE_S

    def pause_s(self, most_s: float) -> float:
        """How long to wait for something else."""
        return min(most_s, max(0.0, self._next - time.monotonic()))

    def is_due(self, unnamed: set[str]) -> bool:
        """Whether to ask now. UNNAMED are the cgroups without a name."""
        now = time.monotonic()
        if unnamed - self._unnamed:
            self._since, self._pause_s = now, _FIRST_PAUSE_S
        elif now < self._next:
            self._unnamed = unnamed
            return False
        self._unnamed = unnamed
        if unnamed and now - self._since < _PATIENCE_S:
            self._next = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)
        else:
            self._next = now + ASK_EVERY_S
        return True


class Cpu:
    """The CPU time of threads, each of which charges its own now and then."""

    def __init__(self) -> None:
        self.used_s = 0.0
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    def charge(self) -> None:
        """Adds what this thread has used since its last charge."""
        now_s = time.thread_time()
        before_s = getattr(self._of_thread, "charged_s", 0.0)
        self._of_thread.charged_s = now_s
        with self._lock:
            self.used_s += now_s - before_s
