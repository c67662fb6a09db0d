"""Hubs: programs that are loaded once and serve many sessions.

A process that nobody watches pays for each program at a hook. So all sessions of a kind share one
loaded object, a hub, and all hubs share the object `processes`, which keeps the processes that each
session watches. A session has a slot: its number in masks, and in maps that hold its own maps.
The C side is bpf/include/sessions.bpf.h.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import (
    BpfObject,
    Features,
    HashMap,
    PerfReader,
    ProgramStats,
    RecordReader,
    RingReader,
    Rung,
    climb,
    kernel_names,
)
from coral.bpf.buffers.account import Account
from coral.bpf.loading.map_definition import InnerMap
from coral.bpf.rung import HOOKS, bytes_per_cpu

_NAMES: Final = ("syscall_stats", "tcp_metrics")  # as enum hub of sessions.bpf.h
_PROCESSES: Final = "processes"
_PROGRAMS: Final = ("coral_fork", "coral_rename", "coral_exec", "coral_exit")
_CGROUP_PROGRAMS: Final = ("coral_attach", "coral_mkdir", "coral_rmdir")
_SELECTIONS: Final = ("host", "follow", "comm", "cgroup", "memory", "detailed")
# Maps of `processes` that the hubs use too.
SHARED_MAPS: Final = (
    "sessions", "counts", "untold_changes", "members", "hints", "accounts", "rings", "perfs",
)
_OF_PROCESSES: Final = ("wanted_comms", "cgroup_paths")  # arrays with an element for each session
# Those that hold a map of each session.
_MAPS_OF_PROCESSES: Final = ("members", "cgroups", "rings", "perfs")
HINTS: Final = 16384  # in a set, as in targets.bpf.h
_CGROUPS: Final = Path("/proc/cgroups")  # with CONFIG_CGROUPS
_IDLE_WORK: Final = 100.0  # events a second
_REBUILT_AFTER: Final = 256  # processes that have ended since
_REBUILT_EVERY_S: Final = 0.5
_COUNT_GENERATION, _COUNT_ENDED = 0, 1  # as in sessions.bpf.h
_ENDED: Final = np.uint64(1 << 32)  # the least key of a member that has ended


@dataclass(frozen=True)
class Plan:
    """The hub NAME, one of the kinds above, as RUNG has it: the arguments of `Rung.object`. SIZES
    are those of the session's own maps. Sessions on the same features share `processes`, and those
    with equal plans a hub."""

    name: str
    features: Features
    rung: Rung
    programs: tuple[str, ...] = field(compare=False)
    options: Mapping[str, object] = field(compare=False)
    sizes: Mapping[str, int] = field(compare=False)
    preallocated: tuple[str, ...] = field(default=(), compare=False)
    walks: tuple[str, ...] = field(default=(), compare=False)
    without_maps: tuple[str, ...] = field(default=(), compare=False)

    def hub(self, shared: Mapping[str, int]) -> BpfObject:
        """The hub's object, which uses the maps SHARED."""
        return self.rung.object(
            self.name,
            programs=self.programs,
            options=self.options,
            map_entries=self._prototypes(of_processes=False),
            preallocated=self.preallocated,
            walks=self.walks,
            without_maps=self.without_maps,
            shared=shared,
        )

    def processes(self) -> BpfObject:
        """The object `processes`."""
        rung = climb(self.features, HOOKS, thread_state=False)
        return rung.object(
            _PROCESSES,
            programs=(*_PROGRAMS, *(_CGROUP_PROGRAMS if has_cgroups() else ())),
            map_entries=self._prototypes(of_processes=True),
            preallocated=("members", "cgroups"),
        )

    def _prototypes(self, *, of_processes: bool) -> Mapping[str, int]:
        """Where sessions cannot share an object, their maps have to be like the prototypes."""
        if self.rung.slots > 1:
            return {}
        return {
            name: size
            for name, size in self.sizes.items()
            if (name in _MAPS_OF_PROCESSES) == of_processes and name != "perfs"
        }


class _Hub:
    """One loaded object and the sessions that use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while it is loaded
        self.object: BpfObject | None = None
        self.slots: set[int] = set()


class _Group:
    """`processes`, and the hubs that share its maps. LOCK protects all of it; nothing that takes
    long happens under it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lock = threading.RLock()
        self.processes = _Hub()
        self.hubs: dict[str, _Hub] = {}
        self.slots: dict[int, Slot] = {}
        self._next = 0
        self._ended = 0  # processes, when the hints were last built
        self._looked_at_s = 0.0
        self._rebuilding = False

    def take(self, plan: Plan) -> Slot | None:
        """A slot for a session by PLAN; None where all are taken."""
        with self.lock:
            if len(self.slots) == self.plan.rung.slots:
                return None
            # In turn, so that a slot that was just freed is the last to be used again.
            free = (n % self.plan.rung.slots for n in range(self._next, self._next + self.plan.rung.slots))
            number = next(n for n in free if n not in self.slots)
            self._next = number + 1
            hub = self.hubs.setdefault(plan.name, _Hub())
            slot = self.slots[number] = Slot(self, hub, plan, number)
            hub.slots.add(number)
            self.processes.slots.add(number)
            return slot

    def loaded(self, hub: _Hub, make: Callable[[], BpfObject]) -> BpfObject:
        """The object of HUB, which the first caller makes and loads; others wait for it."""
        with hub.lock:
            if hub.object is None:
                made = make()
                try:
                    made.load()
                    made.attach()
                except BaseException:
                    made.close()
                    raise
                hub.object = made
            return hub.object

    def release(self, slot: Slot) -> None:
        """Frees a slot, and the objects that no other session uses."""
        unused: list[_Hub] = []
        with self.lock:
            if self.slots.get(slot.number) is not slot:
                return
            del self.slots[slot.number]
            for hub in (slot.hub, self.processes):
                hub.slots.discard(slot.number)
                if not hub.slots:
                    unused.append(hub)
            self.hubs = {key: hub for key, hub in self.hubs.items() if hub.slots}
            # A session that comes meanwhile makes new ones; `processes` is replaced with them.
            if self.processes in unused:
                self.processes = _Hub()
                self._ended = 0
            else:
                self._ended -= _REBUILT_AFTER  # its members' hints are still set
        with ExitStack() as closing:
            for hub in reversed(unused):
                closing.callback(_close, hub)

    # What user space says to the programs.

    def say(self, change: Callable[[NDArray[Any]], None]) -> int:
        """Changes `struct sessions`, by CHANGE; returns the generation from then on."""
        with self.lock:
            if self.processes.object is None:
                return 0
            said = self.processes.object.map("sessions")
            value = np.zeros(1, said.value_dtype)
            value[0] = said.read_one(0)
            change(value)
            value["generation"] += np.uint32(1)
            changed = self.processes.object.map("counts").read_one(_COUNT_GENERATION)
            said.write(0, value[0])
            return (int(value["generation"][0]) + int(changed or 0)) & 0xFFFFFFFF

    def hint(self, tgids: Sequence[int]) -> None:
        """Sets the hints of processes that have just become members."""
        processes = self.processes.object
        if processes is not None and len(tgids):
            at = np.unique(np.array(tgids, np.uint32) % HINTS)
            processes.map("hints").write_many(
                np.concatenate([at, at + np.uint32(HINTS)]), np.ones(2 * len(at), np.uint8)
            )

    def tidy(self) -> None:
        """Has the hints built again once enough members have ended. Otherwise ended processes would
        make all others look like members in time. Takes microseconds: a thread does the work."""
        with self.lock:
            hub, now_s = self.processes, time.monotonic()
            if self._rebuilding or not hub.object or now_s < self._looked_at_s + _REBUILT_EVERY_S:
                return
            self._looked_at_s = now_s
            ended = int(hub.object.map("counts").read_one(_COUNT_ENDED) or 0)
            if (ended - self._ended) % (1 << 32) < _REBUILT_AFTER:
                return
            thread = threading.Thread(target=self._rebuild, args=(hub, ended), name="hints")
            self._rebuilding = True
            try:
                thread.start()
            except RuntimeError:  # none can be started: the next time
                self._rebuilding = False

    def _rebuild(self, hub: _Hub, ended: int) -> None:
        try:
            with hub.lock:
                if hub.object:
                    self._build_hints(hub.object)
            self._ended = ended
        finally:
            self._rebuilding = False

    def _build_hints(self, processes: BpfObject) -> None:
        said = processes.map("sessions").read_one(0)
        unused = 0 if said is not None and said["hints"] & 1 else 1
        hints, first = processes.map("hints"), np.uint32(unused * HINTS)
        hints.write_many(np.arange(HINTS, dtype=np.uint32) + first, np.zeros(HINTS, np.uint8))
        for slot in list(self.slots.values()):
            running = slot.tidied_members()
            at = np.unique(running % np.uint64(HINTS)).astype(np.uint32)
            hints.write_many(at + first, np.ones(len(at), np.uint8))

        def change_over(said: NDArray[Any]) -> None:
            said["hints"] = unused

        self.say(change_over)


def _close(hub: _Hub) -> None:
    with hub.lock:
        if hub.object is not None:
            hub.object.close()
            hub.object = None


class Slot:
    """The place of one session. It is also what the agent asks about the session's programs."""

    def __init__(self, group: _Group, hub: _Hub, plan: Plan, number: int) -> None:
        self._group, self.hub, self._plan, self.number = group, hub, plan, number
        self._processes = group.processes
        self._maps: dict[str, InnerMap] = {}
        self._installed: list[tuple[BpfObject, str]] = []
        self._active = False
        self._detailed = False
        self._lock = threading.Lock()  # held while its maps are read from elsewhere, or closed
        self._ended = np.empty(0, np.uint64)  # members that had ended when they were last tidied
        self._memory_bytes = 0
        self._work = 0.0
        self.since = 0

    @property
    def never(self) -> int:
        """A generation that lies ahead."""
        return (self._group.say(lambda _: None) + (1 << 30)) & 0xFFFFFFFF

    def account(self) -> Account:
        """The session's account, from now on."""
        programs = [*self.processes.program_fds, *self.object.program_fds]
        reasons = self.processes.btf.enum("loss")
        return Account(self.processes.map("accounts"), self.number, reasons, programs)

    def reader(self, order_by: Mapping[str, str | None], size: int) -> RecordReader:
        """The reader of the session's records, of the structs that ORDER_BY names; records of
        different CPUs are sorted by its fields, times. SIZE is that of all buffers."""
        kinds = self.object.record_kinds(order_by)
        if ring := self._maps.get("rings"):
            return RingReader(ring.fd, size, kinds)
        return PerfReader(self._maps["perfs"].fd, bytes_per_cpu(size), kinds)

    @property
    def bit(self) -> int:
        """The session in a mask."""
        return 1 << self.number

    def load(self) -> None:
        """Loads the objects, unless other sessions use them already. Raises `BpfError`."""
        group, plan = self._group, self._plan
        processes = group.loaded(self._processes, plan.processes)
        shared = {name: processes.map_fd(name) for name in SHARED_MAPS}
        shared = {name: fd for name, fd in shared.items() if fd >= 0}
        self.object = group.loaded(self.hub, lambda: plan.hub(shared))
        self.processes = processes

    def install(self, sizes: Mapping[str, int]) -> None:
        """Makes the session's own maps, by name, with so many entries or bytes, and puts them where
        programs find them. Raises `BpfError`."""
        owners = {
            name: self.processes if name in _MAPS_OF_PROCESSES else self.object
            for name in sizes
        }
        for name, size in sizes.items():
            entries = None if name == "perfs" else size  # as many as there are CPUs
            self._maps[name] = owners[name].make_inner(name, entries)
        # The kernel waits for all running programs each time: at once for all of them.
        with ThreadPoolExecutor(len(sizes)) as pool:
            done = [
                pool.submit(owner.install, name, self.number, self._maps[name].fd)
                for name, owner in owners.items()
            ]
        self._installed = [(owner, name) for name, owner in owners.items()]
        for each in done:
            each.result()

    def map(self, name: str) -> HashMap:
        """The session's own map NAME, or one of the hub."""
        return self._maps.get(name) or self.object.map(name)

    def own(self, name: str, value: object) -> None:
        """Sets the session's element of an array with one for each slot."""
        owner = self.processes if name in _OF_PROCESSES else self.object
        owner.map(name).write(self.number, value)

    def activate(self, hierarchy: int | None = None, **selections: bool) -> None:
        """From now on the programs work for the session, which is in the masks of SELECTIONS.
        HIERARCHY is that of its cgroups, the same for all sessions."""
        hub = _NAMES.index(self._plan.name)
        bit = np.uint64(self.bit)

        def set_bits(said: NDArray[Any]) -> None:
            said["of_hub"][0, hub] |= bit
            said["all"] |= bit
            for name in _SELECTIONS:
                if selections.get(name):
                    said[name] |= bit
            if hierarchy is not None:
                said["hierarchy"] = hierarchy

        # Once before, so that no thread can have looked at the slot's last session and not know it.
        self._group.say(lambda _: None)
        self._active, self._detailed = True, bool(selections.get("detailed"))
        self.since = self._group.say(set_bits)

    def members_changed(self) -> None:
        """Threads look up anew who watches them."""
        self._group.say(lambda _: None)

    def hint(self, tgids: Sequence[int]) -> None:
        """See `_Group.hint`."""
        self._group.hint(tgids)

    def tidy(self) -> None:
        """See `_Group.tidy`; to be called at each drain."""
        self._group.tidy()

    def tidied_members(self) -> NDArray[np.uint64]:
        """The ids of the session's members that run. Also removes those that have ended, if user
        space has been sent a record of each, after it has had the time to look up their names."""
        with self._lock:
            members = self._maps.get("members")
            if members is None:
                return np.empty(0, np.uint64)
            keys = members.read_keys()
            if self._detailed:
                ended = keys[keys >= _ENDED]
                members.delete(np.intersect1d(ended, self._ended))
                self._ended = ended
            return keys[keys < _ENDED]

    @property
    def untold_changes(self) -> int:
        """How many changes of what the session watches had no room in its buffer so far."""
        return int(self.processes.map("untold_changes").read_one(self.number) or 0)

    @property
    def attached(self) -> bool:
        """Whether programs work for the session."""
        return self._active

    def detach(self) -> None:
        """The programs stop working for the session; its maps stay readable until `close`. When
        this returns, none of them is still at work."""
        if not self._active:
            return
        self._active = False
        clear = ~np.uint64(self.bit)

        def clear_bits(said: NDArray[Any]) -> None:
            said["of_hub"] &= clear
            for name in ("all", *_SELECTIONS):
                said[name] &= clear

        self._group.say(clear_bits)
        self._uninstall()

    def _uninstall(self) -> None:
        installed, self._installed = self._installed, []
        if not installed:
            return
        with ThreadPoolExecutor(len(installed)) as pool:
            for owner, name in installed:
                pool.submit(owner.uninstall, name, self.number)

    def close(self) -> None:
        """Frees the session's maps and its slot. Safe to call twice."""
        with ExitStack() as closing:
            closing.callback(self._group.release, self)
            closing.callback(self._close_maps)
            closing.callback(self._uninstall)
            closing.callback(self.detach)

    def _close_maps(self) -> None:
        with self._lock, ExitStack() as closing:
            for own in self._maps.values():
                closing.callback(own.close)
            self._maps = {}

    # What the agent asks.

    @property
    def name(self) -> str:
        """The name of the hub."""
        return self._plan.name

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for the session's own maps, and its share of those of the hub;
        the last known figure if there is no descriptor left to read it."""
        try:
            own = sum(each.memory_bytes for each in self._maps.values())
            for hub in (self.hub, self._processes):
                if hub.object is not None and hub.slots:
                    own += hub.object.map_memory_bytes // len(hub.slots)
            self._memory_bytes = own
        except OSError:
            pass
        return self._memory_bytes

    def note_work(self, events: int, seconds: float) -> None:
        """The programs have worked on so many EVENTS of the session in the last SECONDS."""
        self._work = events / max(seconds, 1e-3)

    @property
    def share(self) -> float:
        """Which part of the programs' run time the session causes, by what it was sent or counted.
        What they cost processes that nobody watches is everybody's."""
        with self._group.lock:
            works = [self._group.slots[number].work for number in self.hub.slots]
        return self.work / sum(works) if works else 1.0

    @property
    def work(self) -> float:
        """Events a second, and what a session without any causes."""
        return self._work + _IDLE_WORK

    def program_stats(self) -> Mapping[str, ProgramStats]:
        """The kernel's figures of the programs that work for the session and others."""
        found: dict[str, ProgramStats] = {}
        for hub in (self._processes, self.hub):
            if hub.object is not None:
                found |= hub.object.program_stats()
        return found


@cache
def has_cgroups() -> bool:
    """Whether the kernel tells of cgroups: that they are made, and who enters them."""
    names = {f"btf_trace_{name}" for name in ("cgroup_attach_task", "cgroup_mkdir", "cgroup_rmdir")}
    found = kernel_names(names)
    return found == names if found or kernel_names({"task_struct"}) else _CGROUPS.exists()


class Hubs:
    """All hubs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[_Group] = []

    def take(self, plan: Plan) -> Slot:
        """A slot for a session by PLAN, of a hub that is loaded with it."""
        with self._lock:
            for group in self._fitting(plan):
                if slot := group.take(plan):
                    return slot
            group = _Group(plan)
            self._groups = [each for each in self._groups if each.slots] + [group]
            slot = group.take(plan)
        if slot is None:
            raise RuntimeError("a new hub has no room")
        return slot

    def _fitting(self, plan: Plan) -> Iterator[_Group]:
        return (group for group in self._groups if group.plan.features == plan.features)


HUBS: Final = Hubs()
