"""What the sessions of a hub have in common: what is known of code, and a thread that looks at new
processes while they are there."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from coral.bpf import BpfError, BpfObject
from coral.bpf.attaching.mappings import MappingReader
from coral.collectors.cpu_profile.naming import Code
from coral.collectors.hubs import FIRST_ENDED, Slot

_log: Final = logging.getLogger(__name__)

_MAPPINGS_BYTES: Final = 64 << 10  # for each CPU
_LOOK_EVERY_S: Final = 0.5  # at least, to notice the end and new CPUs
_GATHER_S: Final = 0.002  # while the dynamic linker maps what a program needs
# After a look, rest this many times as long: 5 % of a CPU at most while watched processes map code,
# 0.7 % while only others do, whose reports the kernel cannot leave out.
_REST_FACTOR: Final = 20
_REST_FACTOR_OTHERS: Final = 150


class Shared:
    """What the sessions of a hub use in turn. It is made for the first that joins, and closed when
    the last has left."""

    def __init__(self, bpf_object: BpfObject) -> None:  # noqa: ARG002  as `Slot.common` makes it
        self._lock = threading.Lock()
        self._slots: set[Slot] = set()
        self._code: Code | None = None
        self._stop = threading.Event()
        self.why_not = ""
        """Why processes that end soon may have no names; empty if they have."""

    def join(self, slot: Slot) -> None:
        """A session begins."""
        with self._lock:
            self._slots.add(slot)
            if len(self._slots) == 1:
                self._start()

    def leave(self, slot: Slot) -> None:
        """A session has ended. No error if it never joined."""
        with self._lock:
            self._slots.discard(slot)
            if not self._slots:
                self._stop.set()
                if self._code:
                    self._code.close()
                self._code = None

    @contextmanager
    def code(self) -> Iterator[Code]:
        """For one batch: no other session uses it meanwhile."""
        with self._lock:
            code = self._opened()
            code.trim()
            yield code
            code.note_memory()

    def _opened(self) -> Code:
        if self._code is None:
            self._code = Code()
        return self._code

    def _start(self) -> None:
        self._stop = threading.Event()
        try:
            reader = MappingReader(_MAPPINGS_BYTES, wakes=True)
        except BpfError as error:
            self.why_not = f"processes that end soon may have no names: {error}"
            return
        self.why_not = ""
        threading.Thread(
            target=self._run, args=(reader, self._stop), name="coral-profile", daemon=True
        ).start()

    def _run(self, reader: MappingReader, stop: threading.Event) -> None:
        with reader:
            followed_s = 0.0
            while not stop.is_set():
                began_s = time.thread_time()  # without its wait for a batch to be done
                found = True
                try:
                    if time.monotonic() > followed_s + _LOOK_EVERY_S:
                        followed_s = time.monotonic()
                        reader.follow()
                    found = self._look(reader, stop)
                except (BpfError, OSError):
                    _log.debug("looking at new processes failed", exc_info=True)
                took_s = time.thread_time() - began_s
                rest_s = took_s * (_REST_FACTOR if found else _REST_FACTOR_OTHERS)
                if not stop.wait(max(_GATHER_S, min(rest_s, _LOOK_EVERY_S))):
                    _wait(reader.fds)

    def _look(self, reader: MappingReader, stop: threading.Event) -> bool:
        """Whether watched processes have mapped code."""
        with self._lock:
            if stop.is_set():
                return False
            if mapped := reader.drain(self._watched):
                self._opened().processes.meet(mapped)
            return bool(mapped)

    def _watched(self) -> set[int]:
        found = set[int]()
        for slot in self._slots:
            keys = slot.keys_of("members")
            found.update(keys[keys < FIRST_ENDED].tolist())
        return found


def _wait(fds: list[int]) -> None:
    """Returns when one of FDS is readable, or after a while."""
    polled = select.poll()
    for fd in fds:
        polled.register(fd, select.POLLIN)
    polled.poll(_LOOK_EVERY_S * 1000)
