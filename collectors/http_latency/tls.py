"""TLS: has programs run at the functions of OpenSSL, in each file that watched processes execute
and that defines them: libssl, wherever it lies and in whatever mount namespace, and executables
that contain it. The C side is tls.bpf.h.

A uprobe belongs to a file, so that each file is attached once for all sessions of a hub, until the
last session ends that has watched a process with it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfError, BpfObject, Features, Step
from coral.bpf.attaching.mappings import MappingReader
from coral.bpf.attaching.uprobes import ProcessFile, Uprobes
from coral.collectors.http_latency.openssl import (
    DELETED,
    LIBRARY,
    Mapped,
    executed,
    functions,
    libraries,
    opened,
)
from coral.collectors.http_latency.unfinished import Waiting, spilled_keys, waiting_on
from coral.collectors.hubs import FIRST_ENDED, Slot
from coral.collectors.hubs.keeper import KEEPER

_log: Final = logging.getLogger(__name__)


class _Hook(NamedTuple):
    """A program, and the functions of OpenSSL that it runs at. A function's cookie is the constant
    of `enum ssl_place` with its name in capital letters, 0 if there is none."""

    program: str
    functions: Sequence[str]
    at_return: bool = False


# SSL_peek and its like are none of these: what they give is given again.
_CALLS: Final = (
    *("SSL_read", "SSL_read_ex", "SSL_write", "SSL_write_ex"),
    *("SSL_sendfile", "SSL_do_handshake"),
)
# In the order in which they are attached. A call that is seen to begin is seen to return; and an
# object is seen from its beginning only if no call for it passes unseen.
_HOOKS: Final = (
    _Hook("coral_ssl_end", ("SSL_free", "SSL_shutdown")),
    _Hook("coral_ssl_return", _CALLS, at_return=True),
    _Hook("coral_ssl_enter", _CALLS),
    _Hook("coral_ssl_new", ("SSL_new",), at_return=True),
)
_FUNCTIONS: Final = frozenset(name for hook in _HOOKS for name in hook.functions)
_INDISPENSABLE: Final = {"SSL_read", "SSL_write"}
PROGRAMS: Final = tuple(hook.program for hook in _HOOKS)
"""The programs, which the hub is to load late."""
_MANY: Final = "uprobe_multi"
_SPILLED: Final = "spilled_requests"
_PLACE: Final = "SSL_PLACE_"

_LOOK_EVERY_S: Final = 0.1
_SWEEP_EVERY: Final = 20  # looks
_MAPPINGS_BYTES: Final = 64 << 10  # for each CPU
_MOST_FILES: Final = 64  # attached at once; each has as many descriptors as there are hooks
_MOST_KNOWN: Final = 8192
# What is not seen.
_NO_ACCESS: Final = (
    "TLS of other users' processes is not seen: the files that they execute can only be opened "
    "with CAP_SYS_PTRACE"
)
_REPLACED: Final = (
    "what {} encrypts is not seen: it has been replaced since a process mapped it, and that file "
    "can only be opened with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"
)


def uprobes(features: Features) -> Step:
    """How the programs are attached to functions on this kernel."""
    many = features[_MANY]
    return Step("uprobes", _MANY) if many.available else Step("uprobes", "perf_events", (many,))


@dataclass
class _Session:
    """A session, and what it has made this module look at."""

    slot: Slot
    host: bool
    seen: set[int] = field(default_factory=set)  # tgids whose memory was looked at
    files: dict[tuple[int, ...], None] = field(default_factory=dict)  # by identity, oldest first
    failed: set[str] = field(default_factory=set)  # reasons
    untold: deque[Waiting] = field(default_factory=deque)  # see `TlsHooks.untold`

    def members(self) -> set[int]:
        """The processes that it watches now."""
        keys = self.slot.keys_of("members")
        return set(keys[keys < FIRST_ENDED].tolist())


class TlsHooks:
    """The uprobes of one hub. Safe to use by several threads: a session joins and leaves from its
    own; another one looks for new files meanwhile."""

    def __init__(self, bpf_object: BpfObject) -> None:
        self._object = bpf_object
        places = bpf_object.btf.enum("ssl_place")
        self._cookies = {
            f"SSL_{name.removeprefix(_PLACE).lower()}": it for name, it in places.items()
        }
        self._lock = threading.Lock()
        self._sessions: dict[Slot, _Session] = {}
        self._uprobes = Uprobes()  # of the sessions here
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
        slot.begin_late()
        with self._lock:
            session = self._sessions[slot] = _Session(slot, slot.watches_host)
            if len(self._sessions) == 1:
                self._uprobes = Uprobes(many=slot.plan.many_places)
                self._start(session)  # before the look, so that nothing is missed in between
            self._look_at(session, tgids)
            for tgid in executing:
                for path in libraries(tgid):
                    self._attach(session, Mapped(tgid, 0, 0, path), "")

    def _start(self, session: _Session) -> None:
        try:
            self._mappings = MappingReader(_MAPPINGS_BYTES)
        except BpfError as error:
            session.failed.add(f"files that are mapped later are not found: {error}")
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
        hook, or for each function where the kernel has no link for many. No error if it never
        joined."""
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
                    self._attach(session, Mapped(code.tgid, code.device, code.inode, code.path), "")
        self._looks += 1
        if self._looks % _SWEEP_EVERY == 0:
            self._sweep()

    def _look_at(self, session: _Session, tgids: Iterable[int]) -> None:
        for tgid in tgids:
            session.seen.add(tgid)
            try:
                found = list(executed(tgid))
            except PermissionError:
                session.failed.add(_NO_ACCESS)
                continue
            for code, where in found:
                self._attach(session, code, where)

    def _attach(self, session: _Session, code: Mapped, where: str) -> None:
        """Attaches what CODE defines; WHERE it lies in memory, if that is known."""
        key = (code.device, code.inode, code.path)
        if key in self._refused:
            session.failed.add(self._refused[key])
            return
        found = self._known.get(key) if code.inode else None
        if found == {}:
            return
        try:
            with opened(code, where) as file:
                if found is None:
                    found = functions(file.fd, _FUNCTIONS, _INDISPENSABLE)
                    if len(self._known) >= _MOST_KNOWN:
                        self._known.clear()
                    self._known[key] = found
                if found and file.identity not in session.files:
                    self._attach_file(session, file, found)
        except BpfError as error:
            self._refused[key] = f"what {code.path} encrypts is not seen: {error}"
            session.failed.add(self._refused[key])
            _log.warning("%s", self._refused[key])
        except PermissionError:
            session.failed.add(_NO_ACCESS)
        except OSError:  # the process has ended, or another one took its place
            if LIBRARY in code.path and code.path.endswith(DELETED) and _runs(code.tgid):
                session.failed.add(_REPLACED.format(code.path.removesuffix(DELETED)))

    def _attach_file(
        self, session: _Session, file: ProcessFile, found: dict[str, list[int]]
    ) -> None:
        try:
            programs = session.slot.late()
        except BpfError as error:
            why = str(error).partition("\n")[0]  # without the verifier's log
            session.failed.add(f"what OpenSSL encrypts is not seen: {why}")
            _log.warning("what OpenSSL encrypts is not seen: %s", error)
            return
        while len(session.files) >= _MOST_FILES:
            oldest = next(iter(session.files))
            del session.files[oldest]
            self._uprobes.release((session.slot, oldest))
        user = (session.slot, file.identity)
        with ExitStack() as failing:
            failing.callback(self._uprobes.release, user)
            for hook in _HOOKS:
                cookies = {
                    offset: self._cookies.get(name, 0)
                    for name in hook.functions
                    for offset in found.get(name, ())
                }
                program = programs.program_fd(hook.program)
                if cookies:
                    self._uprobes.attach(user, program, file, cookies, at_return=hook.at_return)
            failing.pop_all()
        session.files[file.identity] = None

    def _sweep(self) -> None:
        """Forgets the SSL objects of processes that have ended without freeing them, and has the
        sessions told of the requests that waited there."""
        objects = self._object.map("ssl_objects")
        keys, values = objects.read()
        processes = np.unique(keys["process"])
        gone = np.isin(keys["process"], [it for it in processes.tolist() if not _runs(it)])
        if not gone.any():
            return
        objects.delete(keys[gone])
        numbers = values["connection"][gone]
        connections = self._object.map("connections")
        read = [connections.read_one(number) for number in numbers[numbers != 0].tolist()]
        left = [it for it in read if it is not None]
        connections.delete(numbers[numbers != 0])
        if left:
            self._tell(np.array(left, connections.value_dtype))

    def _tell(self, left: NDArray[Any]) -> None:
        left = left[(left["unread"] == 0) & (left["made"] != left["answered"])]
        if not len(left):
            return
        spilled = self._object.map(_SPILLED)
        waiting, _ = waiting_on(left, spilled)
        for slot, session in self._sessions.items():
            its = waiting.of_session(slot.bit, slot.since)
            if len(its.requests):
                session.untold.append(its)
        spilled.delete(spilled_keys(waiting.connections, waiting.requests["number"]))

    def untold(self, slot: Slot) -> Iterator[Waiting]:
        """The requests whose process has ended since this was last called, where no socket tells
        that. Waits for nothing."""
        session = self._sessions.get(slot)
        while session and session.untold:
            yield session.untold.popleft()


def _runs(process: int) -> bool:
    return os.path.exists(f"/proc/{process & 0xFFFFFFFF}")  # noqa: PTH110  many of them


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
