"""The walk through the open files of all processes, which finds the connections that existed before
a session did, and their owners. One walk serves all sessions of a hub."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar, Final

from coral.bpf import BpfObject

# After a walk, wait 50 times as long as it was on a CPU, so that walks use at most 2 % of one.
# While other processes have the CPU, it costs nothing: on a busy machine that would be minutes.
_REST: Final = 50


class FileWalk:
    """The walk of one hub. Safe to use by several threads."""

    PROGRAM: ClassVar = "coral_find_iter"

    def __init__(self, bpf_object: BpfObject) -> None:
        self._object = bpf_object
        self._walk = bpf_object.walk(self.PROGRAM, "tcp_connection")
        self._lock = threading.Lock()
        self._number = 0
        self._rests_until_ns = 0

    def run(self, before: Callable[[int], None] = lambda _: None) -> None:
        """Walks once; BEFORE is called with the number of the walk. Raises `BpfError`."""
        with self._lock:
            self._run(before)

    def run_if_rested(self) -> None:
        """Walks once, unless walks would take too much time. Raises `BpfError`."""
        with self._lock:
            if time.monotonic_ns() >= self._rests_until_ns:
                self._run(lambda _: None)

    def _run(self, before: Callable[[int], None]) -> None:
        began_ns = time.thread_time_ns()
        self._number += 1
        before(self._number)
        self._object.write_variable("walk", self._number & 0xFFFFFFFF)
        self._walk.read()
        took_ns = time.thread_time_ns() - began_ns
        self._rests_until_ns = time.monotonic_ns() + _REST * took_ns
