"""TLS: has programs run at the functions of OpenSSL, in each file that watched processes execute
and that defines them: libssl, wherever it lies and in whatever mount namespace, and executables
that contain it. The C side is tls.bpf.h.

A uprobe belongs to a file, so that each file is attached once for all sessions of a hub, until the
last session ends that has watched a process with it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from coral.bpf import BpfError, BpfObject
from coral.bpf.attaching.elf import ElfError, function_offsets
from coral.bpf.attaching.mappings import MappingReader
from coral.bpf.attaching.uprobes import ProcessFile, Uprobes
from coral.collectors.hubs import FIRST_ENDED, Slot
from coral.collectors.hubs.keeper import KEEPER

_log: Final = logging.getLogger(__name__)


class _Hook(NamedTuple):
    program: str
    at_return: bool = False


_RETURN: Final = _Hook("coral_ssl_return", at_return=True)
# SSL_peek and its like are none of these: what they give is given again.
_HOOKS: Final = {
    "SSL_read": (_Hook("coral_ssl_read"), _RETURN),
    "SSL_read_ex": (_Hook("coral_ssl_read_ex"), _RETURN),
    "SSL_write": (_Hook("coral_ssl_write"), _RETURN),
    "SSL_write_ex": (_Hook("coral_ssl_write_ex"), _RETURN),
    "SSL_do_handshake": (_Hook("coral_ssl_handshake"), _RETURN),
    "SSL_new": (_Hook("coral_ssl_new", at_return=True),),
    "SSL_free": (_Hook("coral_ssl_free"),),
    "SSL_shutdown": (_Hook("coral_ssl_shutdown"),),
}
_INDISPENSABLE: Final = {"SSL_read", "SSL_write"}
PROGRAMS: Final = tuple(sorted({hook.program for hooks in _HOOKS.values() for hook in hooks}))
"""The programs, which the hub is to load and not to attach."""

_LOOK_EVERY_S: Final = 0.1
_SWEEP_EVERY: Final = 50  # looks
_MAPPINGS_BYTES: Final = 64 << 10  # for each CPU
_MOST_FILES: Final = 64  # attached at once; each has as many descriptors as there are hooks
_MOST_KNOWN: Final = 8192
_MOST_REASONS: Final = 16
_EXECUTED: Final = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) ..x. ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*) +(/.*)$",
    re.MULTILINE,
)
# Where a program that is yet to be executed will find libssl.
_LIBRARIES: Final = ("lib/*/libssl.so*", "usr/lib/*/libssl.so*", "usr/lib*/libssl.so*")
_DELETED: Final = " (deleted)"


class _Mapped(NamedTuple):
    """Executed code of a process, of a file that may have been replaced since."""

    tgid: int
    device: int
    inode: int
    path: str


@dataclass
class _Session:
    """A session, and what it has made this module look at."""

    slot: Slot
    host: bool
    seen: set[int] = field(default_factory=set)  # tgids whose memory was looked at
    files: dict[tuple[int, ...], None] = field(default_factory=dict)  # by identity, oldest first
    failed: set[str] = field(default_factory=set)  # reasons

    def fail(self, reason: str) -> None:
        """Keeps REASON; a process can map any number of files, so there are not more than a few."""
        if len(self.failed) < _MOST_REASONS:
            self.failed.add(reason)

    def members(self) -> set[int]:
        """The processes that it watches now."""
        keys = self.slot.keys_of("members")
        return set(keys[keys < FIRST_ENDED].tolist())


class TlsHooks:
    """The uprobes of one hub. Safe to use by several threads: a session joins and leaves from its
    own; another one looks for new files meanwhile."""

    def __init__(self, bpf_object: BpfObject) -> None:
        self._object = bpf_object
        self._lock = threading.Lock()
        self._sessions: dict[Slot, _Session] = {}
        self._uprobes = Uprobes()
        self._mappings: MappingReader | None = None
        self._known: dict[tuple[int, int, str], dict[str, list[int]]] = {}  # offsets by function
        self._refused: dict[tuple[int, int, str], str] = {}  # with the reasons
        self._stop = threading.Event()
        self._lost = self._looks = 0

    def __len__(self) -> int:
        """The number of attached places."""
        with self._lock:
            return len(self._uprobes)

    def join(self, slot: Slot, tgids: Iterable[int], executing: Iterable[int] = ()) -> None:
        """The session in SLOT watches the processes TGIDS, and others to come. What these have
        mapped is attached when this returns, and what the processes EXECUTING are likely to map,
        which are about to execute another program. Where it cannot be, see `why_not`."""
        with self._lock:
            session = self._sessions[slot] = _Session(slot, slot.watches_host)
            if len(self._sessions) == 1:
                self._start(session)  # before the look, so that nothing is missed in between
            self._look_at(session, tgids)
            for tgid in executing:
                for path in _libraries(tgid):
                    self._attach(session, _Mapped(tgid, 0, 0, path), "")

    def _start(self, session: _Session) -> None:
        try:
            self._mappings = MappingReader(_MAPPINGS_BYTES)
        except BpfError as error:
            session.fail(f"files that are mapped later are not found: {error}")
            return
        self._stop = threading.Event()
        threading.Thread(
            target=self._run, args=(self._stop,), name="coral-tls", daemon=True
        ).start()

    def why_not(self, slot: Slot) -> Sequence[str]:
        """What of TLS the session in SLOT does not see so far, and why."""
        with self._lock:
            session = self._sessions.get(slot)
            return sorted(session.failed) if session else ()

    def leave(self, slot: Slot) -> None:
        """The session in SLOT ends. Returns at once; detaching takes a tenth of a second for each
        function. No error if it never joined."""
        with self._lock:
            session = self._sessions.pop(slot, None)
            if session is None:
                return
            if not self._sessions:
                self._stop.set()
                if self._mappings:
                    self._mappings.close()
                self._mappings = None
                uprobes, self._uprobes = self._uprobes, Uprobes()
                _later(uprobes.close)
                return
        _later(self._release, session)

    def _release(self, session: _Session) -> None:
        with self._lock:
            for identity in session.files:
                self._uprobes.release((session.slot, identity))

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(_LOOK_EVERY_S):
            with self._lock:
                if stop.is_set():
                    return
                try:
                    self._look()
                except (BpfError, OSError):
                    _log.exception("looking for functions of OpenSSL")

    def _look(self) -> None:
        """Looks at what processes have mapped since the last look."""
        if self._mappings is None:
            return
        members: dict[Slot, set[int]] = {}

        def watched() -> Container[int]:
            members.update((slot, one.members()) for slot, one in self._sessions.items())
            return _Everything() if any(s.host for s in self._sessions.values()) else _Any(members)

        self._mappings.follow()
        mapped = self._mappings.drain(watched)
        lost, self._lost = self._mappings.lost - self._lost, self._mappings.lost
        for slot, session in self._sessions.items():
            present = members.get(slot, set())
            session.seen &= set() if lost else present
            self._look_at(session, present - session.seen)
            for code in mapped:
                if code.path.startswith("/") and (session.host or code.tgid in present):
                    self._attach(
                        session, _Mapped(code.tgid, code.device, code.inode, code.path), ""
                    )
        self._looks += 1
        if self._looks % _SWEEP_EVERY == 0:
            self._sweep()

    def _look_at(self, session: _Session, tgids: Iterable[int]) -> None:
        for tgid in tgids:
            session.seen.add(tgid)
            for code, where in _executed(tgid):
                self._attach(session, code, where)

    def _attach(self, session: _Session, code: _Mapped, where: str) -> None:
        """Attaches what CODE defines; WHERE it lies in memory, if that is known."""
        key = (code.device, code.inode, code.path)
        if key in self._refused:
            session.fail(self._refused[key])
            return
        found = self._known.get(key) if code.inode else None
        if found == {}:
            return
        try:
            with _opened(code, where) as file:
                if found is None:
                    found = _functions(file.fd)
                    if len(self._known) >= _MOST_KNOWN:
                        self._known.clear()
                    self._known[key] = found
                if found and file.identity not in session.files:
                    self._attach_file(session, file, found)
        except BpfError as error:
            if len(self._refused) >= _MOST_KNOWN:
                self._refused.clear()
            self._refused[key] = f"what {code.path} encrypts is not seen: {error}"
            session.fail(self._refused[key])
            _log.warning("%s", self._refused[key])
        except OSError:
            return  # the process has ended, or another one took its place

    def _attach_file(
        self, session: _Session, file: ProcessFile, found: dict[str, list[int]]
    ) -> None:
        while len(session.files) >= _MOST_FILES:
            oldest = next(iter(session.files))
            del session.files[oldest]
            self._uprobes.release((session.slot, oldest))
        user = (session.slot, file.identity)
        with ExitStack() as failing:
            failing.callback(self._uprobes.release, user)
            # Those of objects first, so that no object of which more is seen seems to be whole.
            for name in reversed(_HOOKS):
                for offset in found.get(name, ()):
                    for hook in _HOOKS[name]:
                        program = self._object.program_fd(hook.program)
                        self._uprobes.attach(user, program, file, offset, at_return=hook.at_return)
            failing.pop_all()
        session.files[file.identity] = None

    def _sweep(self) -> None:
        """Forgets the SSL objects of processes that have ended without freeing them."""
        objects = self._object.map("ssl_objects")
        keys, values = objects.read()
        gone = [
            at
            for at, process in enumerate(keys["process"].tolist())
            if not os.path.exists(f"/proc/{process & 0xFFFFFFFF}")  # noqa: PTH110  many of them
        ]
        if gone:
            objects.delete(keys[gone])
            numbers = values["connection"][gone]
            self._object.map("connections").delete(numbers[numbers != 0])


def _later(job: Callable[..., None], *arguments: object) -> None:
    if not KEEPER.submit(job, *arguments):
        job(*arguments)


class _Everything:
    """Contains every process."""

    def __contains__(self, _: object) -> bool:
        return True


class _Any:
    """Contains what one of several sets does."""

    def __init__(self, sets: dict[Slot, set[int]]) -> None:
        self._all = set().union(*sets.values())

    def __contains__(self, tgid: object) -> bool:
        return tgid in self._all


def _executed(tgid: int) -> Iterator[tuple[_Mapped, str]]:
    """The files that a process has mapped to execute, and where; none if it has ended."""
    try:
        with open(f"/proc/{tgid}/maps", "rb") as maps:  # noqa: PTH123  quicker
            text = maps.read()
    except OSError:
        return
    for where, _, device, inode, path in _EXECUTED.findall(text):
        major, minor = (int(part, 16) for part in device.split(b":"))
        yield (
            _Mapped(tgid, os.makedev(major, minor), int(inode), os.fsdecode(path)),
            where.decode(),
        )


def _libraries(tgid: int) -> set[str]:
    """The paths of libssl, as the process sees them, in the usual places."""
    root = Path(f"/proc/{tgid}/root")
    with suppress(OSError):
        return {f"/{path.relative_to(root)}" for name in _LIBRARIES for path in root.glob(name)}
    return set()


def _opened(code: _Mapped, where: str) -> ProcessFile:
    """The file of CODE. Raises OSError: it cannot be known where a replaced one lies now."""
    if where:
        with suppress(OSError):  # of which only privileged processes may look at others
            return ProcessFile.mapped(code.tgid, where)
    if code.path.endswith(_DELETED):
        raise FileNotFoundError(code.path)
    return ProcessFile(code.tgid, code.path)


def _functions(fd: int) -> dict[str, list[int]]:
    """The functions of OpenSSL that a file defines, with their offsets; none without those that
    read and write."""
    try:
        found = function_offsets(fd, _HOOKS.keys())
    except ElfError:
        return {}
    return found if found.keys() >= _INDISPENSABLE else {}
