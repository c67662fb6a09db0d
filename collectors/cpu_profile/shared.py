"""What the sessions of a hub have in common: what is known of code, and a thread that looks at new
processes while they are there."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Final

from coral.bpf import BpfError, BpfObject
from coral.bpf.attaching.mappings import MappingReader
from coral.collectors.cpu_profile.naming import Code
from coral.collectors.cpu_profile.sightings import Sightings
from coral.collectors.hubs import FIRST_ENDED, Slot

_log: Final = logging.getLogger(__name__)

_MAPPINGS_BYTES: Final = 64 << 10  # for each CPU
_LOOK_EVERY_S: Final = 0.5  # at least, to notice the end and what processes map later
_FOLLOW_EVERY_S: Final = 2.0  # to notice new CPUs
_NEW_S: Final = 1.0  # for how long a program is new: what it maps is looked at as it comes
_GATHER_S: Final = 0.002  # while the dynamic linker maps what a program needs
# After a look, rest this many times as long: 5 % of a CPU at most while watched processes map code,
# 0.7 % while only others do, whose reports the kernel cannot leave out.
_REST_FACTOR: Final = 20
_REST_FACTOR_OTHERS: Final = 150


class Shared:
    """What the sessions of a hub use in turn. It is made for the first that joins, and closed when
    the last has left."""

    def __init__(self, bpf_object: BpfObject) -> None:
        self._object = bpf_object
        self._lock = threading.Lock()
        self._slots: set[Slot] = set()
        self._code: Code | None = None
        self._reader: MappingReader | None = None
        self._work: _Work | None = None
        self._new_until_s = 0.0  # since a watched process has executed a program
        self.why_not = ""
        """Why processes that end soon may have no names; empty if they have."""

    def join(self, slot: Slot) -> None:
        """A session begins."""
        with self._lock:
            self._slots.add(slot)
            if len(self._slots) == 1:
                self._start()
            self._opened().processes.expect(_running(slot))

    def leave(self, slot: Slot) -> None:
        """A session has ended. When the last has left, nothing of this is in the kernel any more.
        No error if it never joined."""
        work: _Work | None = None
        with self._lock:
            self._slots.discard(slot)
            if not self._slots:
                work, self._work = self._work, None
                self._reader = None
                if self._code:
                    self._code.close()
                self._code = None
        if work:
            work.end()

    def prepare(self) -> None:
        """Before names are asked for: reads what takes longest, while new processes are looked
        at."""
        with self._lock:
            code = self._opened()
        code.prepare()

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
            self._code = Code(self._meet)
        return self._code

    def _start(self) -> None:
        try:
            reader = MappingReader(_MAPPINGS_BYTES, wakes=True)
        except BpfError as error:
            self.why_not = f"processes that end soon may have no names: {error}"
            return
        self.why_not = ""
        sightings = Sightings.of(self._object)
        self._work = _Work(lambda stop: self._run(reader, sightings, stop))

    def _run(self, reader: MappingReader, sightings: Sightings | None, stop: _Stop) -> None:
        with reader, sightings or nullcontext():
            followed_s = 0.0
            next_s: float | None = None
            while not stop.is_set:
                began_s = time.thread_time()  # without its wait for a batch to be done
                found = True
                try:
                    follow = time.monotonic() > followed_s + _FOLLOW_EVERY_S
                    followed_s = time.monotonic() if follow else followed_s
                    found, next_s = self._look(reader, sightings, stop, follow=follow)
                except (BpfError, OSError):
                    _log.debug("looking at new processes failed", exc_info=True)
                took_s = time.thread_time() - began_s
                rest_s = took_s * (_REST_FACTOR if found else _REST_FACTOR_OTHERS)
                by_report = not sightings or time.monotonic() < self._new_until_s
                # What others do wakes this thread by reports alone.
                if found or by_report:
                    stop.wait([], max(_GATHER_S, min(rest_s, _LOOK_EVERY_S)))
                fds = [sightings.fd] if sightings else []
                if by_report:
                    fds += reader.fds
                stop.wait(fds, min(_LOOK_EVERY_S, _LOOK_EVERY_S if next_s is None else next_s))

    def _look(
        self,
        reader: MappingReader,
        sightings: Sightings | None,
        stop: _Stop,
        *,
        follow: bool,
    ) -> tuple[bool, float | None]:
        """Whether watched processes have mapped code or are new, and the number of seconds until
        there is more to read; None if there is not."""
        with self._lock:
            if stop.is_set:  # another thread may read the sightings by now
                return False, None
            self._reader = reader
            if follow:
                reader.follow()
            seen = sightings.take() if sightings else None
            if seen is not None and seen["has_executed"].any():
                self._new_until_s = time.monotonic() + _NEW_S
            found = self._meet(() if seen is None else seen["tgid"].tolist())
            return found, self._code.processes.catch_up() if self._code else None

    def _meet(self, sighted: Collection[int] = ()) -> bool:
        """Looks at the processes SIGHTED and those that have mapped code since the last time, if
        there are any. The lock is held."""
        try:
            mapped = self._reader.drain(self._watched) if self._reader else []
            if mapped or sighted:
                self._opened().processes.meet(mapped, sighted)
            return bool(mapped or sighted)
        except (BpfError, OSError):
            _log.debug("looking at new processes failed", exc_info=True)
            return False

    def _watched(self) -> set[int]:
        """Process ids, those of processes that have just ended too."""
        found = set[int]()
        for slot in self._slots:
            found.update((slot.keys_of("members") % FIRST_ENDED).tolist())
        return found


def _running(slot: Slot) -> list[int]:
    keys = slot.keys_of("members")
    running: list[int] = keys[keys < FIRST_ENDED].tolist()
    return running


class _Stop:
    """The wish that a thread ends, which wakes it."""

    def __init__(self) -> None:
        self.is_set = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def set(self) -> None:
        """It shall end."""
        self.is_set = True
        os.eventfd_write(self.fd, 1)

    def wait(self, fds: Sequence[int], most_s: float) -> None:
        """Returns when it shall end, one of FDS is readable, or MOST_S have passed."""
        polled = select.poll()
        for fd in (self.fd, *fds):
            polled.register(fd, select.POLLIN)
        polled.poll(most_s * 1000)


class _Work:
    """The thread, at work until `end`."""

    def __init__(self, run: Callable[[_Stop], None]) -> None:
        self._stop = _Stop()
        self._thread = threading.Thread(
            target=run, args=(self._stop,), name="coral-profile", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Returns once it has ended, and has closed what it held."""
        self._stop.set()
        self._thread.join()
        os.close(self._stop.fd)
