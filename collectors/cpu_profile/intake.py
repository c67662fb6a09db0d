"""Empties a session's ring of samples, also while those of before are worked on: the first look at
a large program takes longer than the ring has room for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from coral.bpf.buffers.long_ring import LongRecords, LongRingReader
from coral.collectors.cpu_profile.samples import Samples, joined

_MOST_BYTES: Final = 48 << 20  # of samples that wait; more are lost in the kernel, and counted
_PART_BYTES: Final = 1 << 20
_EVERY_S: Final = 0.2


class Intake:
    """The samples of RING, in order."""

    def __init__(self, ring: LongRingReader) -> None:
        self._ring = ring
        self._lock = threading.Lock()  # a ring has one reader at a time
        self._parts: list[LongRecords] = []

    def take(self) -> Samples:
        """All samples that there are."""
        with self._lock:
            self._empty()
            parts, self._parts = self._parts, []
        return joined(parts, self._ring.dtype)

    @contextmanager
    def emptying(self) -> Iterator[None]:
        """Empties the ring now and then until the end of the block."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(_EVERY_S):
                with self._lock:
                    self._empty()

        thread = threading.Thread(target=run, name="coral-intake", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no room for a thread
            over.set()
            yield
            return
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _empty(self) -> None:
        waiting = sum(part.words.nbytes for part in self._parts)
        for _ in range(1 + self._ring.capacity_bytes // _PART_BYTES):
            if waiting >= _MOST_BYTES or not self._ring.pending_bytes:
                return
            part = self._ring.drain_long(_PART_BYTES)
            if not len(part.words):
                return  # a program is still writing the next
            self._parts.append(part)
            waiting += part.words.nbytes
