"""Hubs: programs that are loaded once and serve many sessions.

A process that nobody watches pays for each program at a hook. So all sessions of a kind share one
loaded object, a hub, and all hubs share the object `processes`, which keeps the processes that each
session watches. A session has a slot: its number in masks, and in maps that hold its own maps.
The C side is bpf/include/sessions.bpf.h.
"""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import (
    BpfError,
    BpfObject,
    Features,
    HashMap,
    LoadError,
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

_PROCESSES: Final = "processes"
_PROGRAMS: Final = ("coral_fork", "coral_rename", "coral_exec", "coral_exit")
_CGROUP_PROGRAMS: Final = ("coral_attach", "coral_mkdir")
_SELECTIONS: Final = ("host", "follow", "comm", "cgroup", "memory", "detailed")
# Maps of `processes` that the hubs use too.
SHARED_MAPS: Final = ("sessions", "changes", "members", "hints", "accounts", "rings", "perfs")
_OF_PROCESSES: Final = ("wanted_comms", "cgroup_paths")  # arrays with an element for each session
# Those that hold a map of each session.
_MAPS_OF_PROCESSES: Final = ("members", "cgroups", "rings", "perfs")
HINTS: Final = 16384  # in a set, as in targets.bpf.h
_CGROUPS: Final = Path("/proc/cgroups")  # with CONFIG_CGROUPS
_IDLE_WORK: Final = 100.0  # events a second
_WORK_WINDOW_S: Final = 1.0
_REBUILT_AFTER: Final = 256  # processes that have ended since


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
    map_entries: Mapping[str, int] = field(default_factory=dict, compare=False)
    is_shared: bool = True  # or each session has an object of its own, beside `processes`

    def hub(self, number: int, shared: Mapping[str, int], slot: int) -> BpfObject:
        """The object of the hub of this NUMBER, which uses the maps SHARED; the first session is in
        SLOT."""
        return self.rung.object(
            self.name,
            programs=self.programs,
            options={
                **self.options,
                "hub": number,
                **({} if self.is_shared else {"own_slot": slot}),
            },
            map_entries={**self.map_entries, **self._prototypes(of_processes=False)},
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
        self.hubs: dict[tuple[str, int], _Hub] = {}
        self._numbers: dict[str, int] = {}
        self.slots: dict[int, Slot] = {}
        self._next = 0
        self._ended = 0

    def take(self, slot: Slot) -> bool:
        """Gives a session its slot, unless all are taken."""
        plan = slot.plan
        with self.lock:
            if len(self.slots) == self.plan.rung.slots:
                return False
            # In turn, so that a slot that was just freed is the last to be used again.
            slots = plan.rung.slots
            turns = (n % slots for n in range(self._next, self._next + slots))
            number = next(n for n in turns if n not in self.slots)
            self._next = number + 1
            hub = self.hubs.setdefault((plan.name, 0 if plan.is_shared else number), _Hub())
            self.slots[number] = slot
            hub.slots.add(number)
            self.processes.slots.add(number)
            slot.placed(self, hub, number)
            return True

    def number_of(self, name: str) -> int:
        """The number of the hubs NAME in `struct sessions`."""
        with self.lock:
            return self._numbers.setdefault(name, len(self._numbers))

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
            said.write(0, value[0])
            changed = self.processes.object.map("changes").read_one(0)
            return (int(value["generation"][0]) + int(changed or 0)) & 0xFFFFFFFF

    def hint(self, tgids: Sequence[int]) -> None:
        """Sets the hints of processes that have just become members."""
        processes = self.processes.object
        if processes is not None and len(tgids):
            at = np.unique(np.array(tgids, np.uint32) % HINTS)
            processes.map("hints").write_many(
                np.concatenate([at, at + np.uint32(HINTS)]), np.ones(2 * len(at), np.uint8)
            )

    def note_ended(self, count: int) -> None:
        """COUNT members have ended: builds the hints again where it is worth it. Otherwise ended
        processes would make all others look like members in time."""
        with self.lock:
            self._ended += count
            if self._ended < _REBUILT_AFTER or self.processes.object is None:
                return
            self._ended = 0
            self._rebuild(self.processes.object)

    def _rebuild(self, processes: BpfObject) -> None:
        unused = 1 - int(processes.map("sessions").read_one(0)["hints"] & 1)  # type: ignore[index]
        hints, first = processes.map("hints"), np.uint32(unused * HINTS)
        hints.write_many(np.arange(HINTS, dtype=np.uint32) + first, np.zeros(HINTS, np.uint8))
        for slot in self.slots.values():
            keys = slot.member_keys()
            at = np.unique(keys[keys < 1 << 32] % np.uint64(HINTS)).astype(np.uint32)
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
    """The place of one session, from `load` to `close`. It is also what the agent asks about the
    session's programs, before and after that too."""

    number: int
    hub: _Hub
    _processes: _Hub
    _group: _Group

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._placed = False
        self._maps: dict[str, InnerMap] = {}
        self._installed: list[tuple[BpfObject, str]] = []
        self._active = False
        self._memory_bytes = 0
        self._buffers_bytes = 0  # what is in no map
        self._work = 0.0
        self.since = 0

    def placed(self, group: _Group, hub: _Hub, number: int) -> None:
        """GROUP has given it a place."""
        self._group, self.hub, self.number = group, hub, number
        self._processes = group.processes
        self._placed = True

    @property
    def never(self) -> int:
        """A generation that lies ahead."""
        return (self._group.say(lambda _: None) + (1 << 30)) & 0xFFFFFFFF

    def account(self, twins: Sequence[str] = ()) -> Account:
        """The session's account, from now on. TWINS are programs of which one has to run."""
        objects = (self.processes, self.object)
        programs = [
            each.program_fd(name) for each in objects for name in each.programs if name not in twins
        ]
        reasons = self.processes.btf.enum("loss")
        return Account(
            self.processes.map("accounts"),
            self.number,
            reasons,
            programs,
            [self.object.program_fd(name) for name in twins],
        )

    def reader(self, order_by: Mapping[str, str | None], size: int) -> RecordReader:
        """The reader of the session's records, of the structs that ORDER_BY names; records of
        different CPUs are sorted by its fields, times. SIZE is that of all buffers. Raises
        `LoadError`."""
        kinds = self.object.record_kinds(order_by)
        if ring := self._maps.get("rings"):
            try:
                return RingReader(ring.fd, size, kinds)
            except OSError as error:
                what = "opening the ring buffer rings"
                raise LoadError(what, error.errno or errno.EIO) from error
        try:
            reader = PerfReader(self._maps["perfs"].fd, bytes_per_cpu(size), kinds)
        except BpfError as error:
            raise LoadError(error.what, error.errno, error.log) from error
        self._buffers_bytes = reader.memory_bytes
        return reader

    @property
    def bit(self) -> int:
        """The session in a mask."""
        return 1 << self.number

    def load(self) -> None:
        """Takes a place, and loads the objects unless other sessions use them already. Raises
        `BpfError`."""
        HUBS.take(self)
        group, plan = self._group, self.plan
        processes = group.loaded(self._processes, plan.processes)
        shared = {name: processes.map_fd(name) for name in SHARED_MAPS}
        shared = {name: fd for name, fd in shared.items() if fd >= 0}
        hub = group.number_of(plan.name)
        self.object = group.loaded(self.hub, lambda: plan.hub(hub, shared, self.number))
        self.processes = processes

    def install(self, sizes: Mapping[str, int]) -> None:
        """Makes the session's own maps, by name, with so many entries or bytes, and puts them where
        programs find them. Raises `BpfError`."""
        owners = {
            name: self.processes if name in _MAPS_OF_PROCESSES else self.object for name in sizes
        }
        for name, size in sizes.items():
            entries = None if name == "perfs" else size  # as many as there are CPUs
            self._maps[name] = owners[name].make_inner(name, entries)
        self._installed = [(owner, name) for name, owner in owners.items()]
        _at_once(
            [
                partial(owner.install, name, self.number, self._maps[name].fd)
                for owner, name in self._installed
            ]
        )

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
        hub = self._group.number_of(self.plan.name)
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
        self._active = True
        self.since = self._group.say(set_bits)

    def members_changed(self) -> None:
        """Threads look up anew who watches them."""
        self._group.say(lambda _: None)

    def hint(self, tgids: Sequence[int]) -> None:
        """See `_Group.hint`."""
        self._group.hint(tgids)

    def note_ended(self, count: int) -> None:
        """See `_Group.note_ended`."""
        self._group.note_ended(count)

    def member_keys(self) -> NDArray[Any]:
        """The keys of the session's members; none before there are any."""
        members = self._maps.get("members")
        return members.read_keys() if members else np.empty(0, np.uint64)

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
        if not self.plan.is_shared:
            self.object.detach()
        self._uninstall()

    def _uninstall(self) -> None:
        installed, self._installed = self._installed, []
        _at_once([partial(owner.uninstall, name, self.number) for owner, name in installed])

    def close(self) -> None:
        """Frees the session's maps and its slot. Safe to call twice."""
        if not self._placed:
            return
        self._placed = False
        with ExitStack() as closing:
            closing.callback(self._group.release, self)
            for own in self._maps.values():
                closing.callback(own.close)
            closing.callback(self._uninstall)
            closing.callback(self.detach)
        self._maps = {}

    # What the agent asks.

    @property
    def name(self) -> str:
        """The file of the hub's object."""
        return f"{self.plan.name}.bpf.o"

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for the session's own maps and buffers, and its share of the
        maps of the hub; the last known figure if there is no descriptor left to read it."""
        if not self._placed:
            return 0
        try:
            own = sum(each.memory_bytes for each in self._maps.values()) + self._buffers_bytes
            for hub in (self.hub, self._processes):
                if hub.object is not None and hub.slots:
                    own += hub.object.map_memory_bytes // len(hub.slots)
            self._memory_bytes = own
        except OSError:
            pass
        return self._memory_bytes

    def note_work(self, events: int, seconds: float) -> None:
        """The programs have counted or sent EVENTS for the session in the last SECONDS."""
        kept = math.exp(-seconds / _WORK_WINDOW_S)
        self._work = self._work * kept + events / max(seconds, 1e-9) * (1 - kept)

    @property
    def shares(self) -> Mapping[str, float]:
        """Which part of each program's run time the session causes. The programs of the hub work
        for it as much as they counted or sent for it lately; those of `processes`, and any that
        meet processes that nobody watches, for all sessions alike."""
        if not self._placed:
            return {}
        with self._group.lock:
            slots = [self._group.slots[number] for number in self.hub.slots]
            ours = self.work / sum(slot.work for slot in slots)
            alike = 1 / len(self._processes.slots)
        return self._for_each_program(self._processes, alike) | self._for_each_program(
            self.hub, ours
        )

    @property
    def work(self) -> float:
        """Events a second, and what a session without any causes."""
        return self._work + _IDLE_WORK

    @staticmethod
    def _for_each_program(hub: _Hub, share: float) -> dict[str, float]:
        return dict.fromkeys(hub.object.loaded_programs, share) if hub.object else {}

    def program_stats(self) -> Mapping[str, ProgramStats]:
        """The kernel's figures of the programs that work for the session and others."""
        found: dict[str, ProgramStats] = {}
        for hub in (self._processes, self.hub) if self._placed else ():
            if hub.object is not None:
                found |= hub.object.program_stats()
        return found


def _at_once(steps: Sequence[Callable[[], None]]) -> None:
    """Runs STEPS, in each of which the kernel waits for all running programs, at one time; in turn
    where no thread can be started. Raises the `BpfError` of one that failed."""
    failures: list[BpfError] = []

    def run(step: Callable[[], None]) -> None:
        try:
            step()
        except BpfError as error:
            failures.append(error)

    threads = []
    for step in steps[1:]:
        thread = threading.Thread(target=run, args=(step,))
        try:
            thread.start()
        except RuntimeError:
            run(step)
        else:
            threads.append(thread)
    for step in steps[:1]:
        run(step)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@cache
def has_cgroups() -> bool:
    """Whether the kernel tells of cgroups: that they are made, and who enters them."""
    names = {f"btf_trace_{name}" for name in ("cgroup_attach_task", "cgroup_mkdir")}
    found = kernel_names(names)
    return found == names if found or kernel_names({"task_struct"}) else _CGROUPS.exists()


class Hubs:
    """All hubs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[_Group] = []

    def take(self, slot: Slot) -> None:
        """Finds a place for SLOT, where others have the same features or in a new group."""
        plan = slot.plan
        with self._lock:
            fitting = (group for group in self._groups if group.plan.features == plan.features)
            if not any(group.take(slot) for group in fitting):
                group = _Group(plan)
                self._groups = [each for each in self._groups if each.slots] + [group]
                group.take(slot)


HUBS: Final = Hubs()
