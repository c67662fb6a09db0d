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
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from coral.bpf import (
    BpfError,
    BpfObject,
    ElementReader,
    Features,
    HashMap,
    LoadError,
    PerfReader,
    ProgramStats,
    RecordReader,
    RingReader,
    Rung,
    Walk,
    climb,
    kernel_names,
)
from coral.bpf.attaching.link import Link
from coral.bpf.buffers.account import Account
from coral.bpf.closing import close_all
from coral.bpf.loading.map_definition import InnerMap
from coral.bpf.rung import HOOKS, bytes_per_cpu

_PROCESSES: Final = "processes"
_PROGRAMS: Final = ("coral_fork", "coral_rename", "coral_exec", "coral_exit")
_CGROUP_PROGRAMS: Final = ("coral_attach", "coral_mkdir", "coral_rmdir")
_SELECTIONS: Final = ("host", "follow", "comm", "cgroup", "memory", "detailed")
# Maps of `processes` that the hubs use too.
SHARED_MAPS: Final = (
    "sessions", "counts", "untold_changes", "members", "hints", "accounts", "rings", "perfs",
)  # fmt: skip
_OF_PROCESSES: Final = ("wanted_comms", "cgroup_paths")  # arrays with an element for each session
# Those that hold a map of each session.
_MAPS_OF_PROCESSES: Final = ("members", "cgroups", "rings", "perfs")
HINTS: Final = 16384  # in a set, as in targets.bpf.h
_CGROUPS: Final = Path("/proc/cgroups")  # with CONFIG_CGROUPS
_CommonT = TypeVar("_CommonT")
_IDLE_WORK: Final = 100.0  # events a second
_WORK_WINDOW_S: Final = 1.0
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
    # Programs that only some sessions of the hub want to be attached, and those of this session.
    optional: tuple[str, ...] = field(default=(), compare=False)
    wanted: tuple[str, ...] = field(default=(), compare=False)
    # Maps of the session that programs read for user space after it was detached.
    read_last: tuple[str, ...] = field(default=(), compare=False)

    def hub(self, number: int, shared: Mapping[str, int]) -> BpfObject:
        """The object of the hub of this NUMBER, which uses the maps SHARED."""
        return self.rung.object(
            self.name,
            programs=self.programs,
            options={**self.options, "hub": number},
            map_entries=self._prototypes(of_processes=False),
            preallocated=self.preallocated,
            walks=(*self.optional, *self.walks),
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
        self.links: dict[str, Link] = {}  # of the optional programs
        self.common: dict[object, object] = {}  # see `Slot.common`
        self.making = threading.Lock()  # held while something in common is made
        self.reading = threading.Lock()  # held while the one room for readings is used


class _Group:
    """`processes`, and the hubs that share its maps. LOCK protects all of it; nothing that takes
    long happens under it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lock = threading.RLock()
        self.processes = _Hub()
        self.hubs: dict[str, _Hub] = {}
        self._numbers: dict[str, int] = {}
        self.slots: dict[int, Slot] = {}
        self.kits: list[_Kit] = []
        self._next = 0
        self._ended = 0  # processes, when the hints were last built
        self._looked_at_s = 0.0
        self._rebuilding = False

    def take(self, slot: Slot) -> _Place | None:
        """A place for SLOT by its plan; None where all are taken."""
        plan = slot.plan
        with self.lock:
            kit = next((kit for kit in self.kits if kit.fits(plan)), None)
            number = kit.number if kit else self._free_number()
            if number is None:
                return None
            if kit:
                self.kits.remove(kit)
            hub = self.hubs.setdefault(plan.name, _Hub())
            self.slots[number] = slot
            hub.slots.add(number)
            self.processes.slots.add(number)
            return _Place(self, number, self.processes, hub, kit)

    def _free_number(self) -> int | None:
        slots = self.plan.rung.slots
        taken = {*self.slots, *(kit.number for kit in self.kits)}
        # In turn, so that a slot that was just freed is the last to be used again.
        turns = (n % slots for n in range(self._next, self._next + slots))
        number = next((n for n in turns if n not in taken), None)
        self._next = 0 if number is None else number + 1
        return number

    def prepare(self, plan: Plan) -> None:
        """Makes and installs the maps of a next session like the one of PLAN: most of the time that
        a start takes is the kernel's wait for running programs when a map is installed. Blocks;
        does nothing where it cannot."""
        with self.lock:
            hub = self.hubs.get(plan.name)
            kit = _Kit(plan, 0)
            if hub is None or any(kit.is_like(other) for other in self.kits):
                return
            number, processes = self._free_number(), self.processes
            if number is None:
                return
            kit.number = number  # which is taken from now on
            self.kits.append(kit)
        with processes.lock, hub.lock:  # which nobody closes meanwhile
            if processes.object is not None and hub.object is not None:
                with suppress(BpfError, OSError, RuntimeError):
                    kit.install(processes.object, hub.object)
            with self.lock:
                is_wanted = kit in self.kits and kit.is_ready and bool(hub.slots)
                if kit in self.kits and not is_wanted:
                    self.kits.remove(kit)
            if not is_wanted:
                kit.close()

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

    def attach(self, hub: _Hub, names: Sequence[str]) -> None:
        """Attaches optional programs that a session wants. Raises `AttachError`."""
        with hub.lock:
            for name in names:
                if name not in hub.links and hub.object is not None:
                    hub.links[name] = hub.object.attach_one(name)

    def detach_unwanted(self, hub: _Hub) -> None:
        """Detaches the optional programs that no session wants any more."""
        with hub.lock:
            with self.lock:
                slots = [self.slots[number] for number in hub.slots]
            wanted = {name for slot in slots for name in slot.plan.wanted}
            unwanted = [hub.links.pop(name) for name in hub.links.keys() - wanted]
            close_all([link.detach for link in unwanted])

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
            kits = [kit for kit in self.kits if slot.hub in unused and kit.name == slot.plan.name]
            self.kits = [kit for kit in self.kits if kit not in kits]
            self.hubs = {key: hub for key, hub in self.hubs.items() if hub.slots}
            # A session that comes meanwhile makes new ones; `processes` is replaced with them.
            if self.processes in unused:
                self.processes = _Hub()
                self._ended = 0
            else:
                self._ended -= _REBUILT_AFTER  # the hints of its members are still set
        with ExitStack() as closing:
            for hub in reversed(unused):
                closing.callback(_close, hub)
            if slot.hub not in unused:
                closing.callback(self.detach_unwanted, slot.hub)
            for kit in kits:
                closing.callback(kit.close)

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
            self._rebuilding = True  # before the thread can say that it is done
            if not _keeper.submit(self._rebuild, hub, ended):
                self._rebuilding = False

    def _rebuild(self, hub: _Hub, ended: int) -> None:
        try:
            with suppress(BpfError), hub.lock:  # if it fails, again the next time
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
        with self.lock:
            slots = list(self.slots.values())
        for slot in slots:
            running = slot.tidied_members()
            if not slot.watches_host:  # which needs no hints
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
            hub.common, hub.links = {}, {}


class _Kit:
    """The maps of one session, by its plan, for the slot NUMBER."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.name, self.sizes, self.number = plan.name, dict(plan.sizes), number
        self.maps: dict[str, InnerMap] = {}
        self.is_ready = False
        self._installed: list[tuple[BpfObject, str]] = []

    def is_like(self, other: _Kit) -> bool:
        """Whether both have the same maps, of any size."""
        return (self.name, self.sizes.keys()) == (other.name, other.sizes.keys())

    def fits(self, plan: Plan) -> bool:
        """Whether a session by PLAN can use it."""
        return self.is_ready and (plan.name, plan.sizes) == (self.name, self.sizes)

    def install(self, processes: BpfObject, hub: BpfObject) -> None:
        """Makes the maps, and puts them where programs find them. Raises `BpfError`."""
        owners = {name: processes if name in _MAPS_OF_PROCESSES else hub for name in self.sizes}
        for name, size in self.sizes.items():
            entries = None if name == "perfs" else size  # as many as there are CPUs
            self.maps[name] = owners[name].make_inner(name, entries)
        self._installed = [(owner, name) for name, owner in owners.items()]
        self._each(lambda owner, name: owner.install(name, self.number, self.maps[name].fd))
        self.is_ready = True

    def uninstall(self, kept: Collection[str] = ()) -> None:
        """Takes the maps away from the programs, except for those KEPT; when this returns, none is
        still at work with them. They stay readable. Safe to call twice. Raises `BpfError`."""
        installed = [each for each in self._installed if each[1] not in kept]
        self._installed = [each for each in self._installed if each[1] in kept]
        self._each(lambda owner, name: owner.uninstall(name, self.number), installed)

    def _each(
        self,
        work: Callable[[BpfObject, str], None],
        maps: Sequence[tuple[BpfObject, str]] | None = None,
    ) -> None:
        maps = self._installed if maps is None else maps
        _at_once([partial(work, *of) for of in maps])

    def close(self) -> None:
        """Frees the maps. Safe to call twice."""
        with ExitStack() as closing:
            for own in self.maps.values():
                closing.callback(own.close)
            closing.callback(self.uninstall)


@dataclass(frozen=True)
class _Place:
    """Where a session is: a number in a group, the objects that work for it, and its maps if they
    were prepared."""

    group: _Group
    number: int
    processes: _Hub
    hub: _Hub
    kit: _Kit | None


class Slot:
    """The place of one session. It is also what the agent asks about the session's programs. It is
    nowhere until it is loaded."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._place: _Place | None = None
        self._kit: _Kit | None = None
        self._arrays: dict[str, HashMap] = {}
        self._readers: list[Walk | ElementReader] = []
        self._active = self._closed = self._detailed = False
        self.watches_host = False
        self._lock = threading.Lock()  # held while its maps are read from elsewhere, or closed
        self._ended = np.empty(0, np.uint64)  # members that had ended when they were last tidied
        self._memory_bytes = 0
        self._buffers_bytes = 0  # what is in no map
        self._work = 0.0
        self.since = 0

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
        programs += [self.object.program_fd(name) for name in self.plan.wanted]
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
        """Takes a slot, and loads the objects, unless other sessions use them already. Raises
        `BpfError`."""
        place = self._place = HUBS.place(self)
        group, plan = place.group, self.plan
        self.processes = group.loaded(place.processes, plan.processes)
        shared = {name: self.processes.map_fd(name) for name in SHARED_MAPS}
        shared = {name: fd for name, fd in shared.items() if fd >= 0}
        number = group.number_of(plan.name)
        self.object = group.loaded(place.hub, lambda: plan.hub(number, shared))
        group.attach(place.hub, plan.wanted)

    def install(self) -> None:
        """Makes the session's own maps, by its plan, and puts them where programs find them, unless
        that is done already. Raises `BpfError`."""
        self._kit = self._at.kit
        if self._kit is None:
            self._kit = _Kit(self.plan, self.number)
            self._kit.install(self.processes, self.object)
        if self.plan.rung.slots > 1:
            _keeper.submit(self._group.prepare, self.plan)

    @property
    def _at(self) -> _Place:
        if self._place is None:
            raise RuntimeError("not loaded")
        return self._place

    @property
    def _group(self) -> _Group:
        return self._at.group

    @property
    def hub(self) -> _Hub:
        """The hub that works for the session."""
        return self._at.hub

    @property
    def number(self) -> int:
        """The number of the slot."""
        return self._at.number

    @property
    def _maps(self) -> Mapping[str, InnerMap]:
        return self._kit.maps if self._kit else {}

    def map(self, name: str) -> HashMap:
        """The session's own map NAME, or one of the hub."""
        return self._maps.get(name) or self.object.map(name)

    def keys_in_hub(self, name: str) -> list[NDArray[Any]]:
        """The keys of the map NAME of each session of the hub."""
        with self._group.lock:
            slots = [self._group.slots[number] for number in self.hub.slots]
        return [slot.keys_of(name) for slot in slots]

    def with_hub_later(self, job: Callable[[], None]) -> None:
        """Has JOB, which uses the hub's object, done soon; not if that is closed by then."""
        hub = self.hub

        def run() -> None:
            with hub.lock, suppress(BpfError, OSError):
                if hub.object is not None:
                    job()

        _keeper.submit(run)

    def common(self, make: Callable[[BpfObject], _CommonT]) -> _CommonT:
        """What the sessions of a hub have in common: the first MAKEs it of the hub's object."""
        hub = self.hub
        with hub.making:  # not the other lock, which is held while the next session is prepared
            if make not in hub.common:
                hub.common[make] = make(self.object)
            return cast("_CommonT", hub.common[make])

    def walk(self, program: str, record: str, *, map_name: str) -> Walk:
        """See `BpfObject.walk`; through the session's own map. It is closed with the session."""
        dtype = self.object.btf.struct_dtype(record)
        walk = Walk(self.object.program_fd(program), self.map(map_name).fd, dtype)
        self._readers.append(walk)
        return walk

    def element_reader(self, program: str, record: str, *, keys: str, records: str) -> SlotReader:
        """See `BpfObject.element_reader`; of the session's own map. The program finds the slot in
        the variable `live_slot`; sessions take turns."""
        reader = self.object.element_reader(program, record, keys=self.map(keys), records=records)
        self._readers.append(reader)
        return SlotReader(self, reader)

    def own(self, name: str, value: object) -> None:
        """Sets the session's element of an array with one for each slot."""
        if name not in self._arrays:
            owner = self.processes if name in _OF_PROCESSES else self.object
            self._arrays[name] = owner.map(name)
        self._arrays[name].write(self.number, value)

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
        self._active, self._detailed = True, bool(selections.get("detailed"))
        self.watches_host = bool(selections.get("host"))
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
        """The ids of the session's members that run; none before there are any. Where each end is
        sent as a record, removes those that have ended, after some time to look up their names."""
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

    def keys_of(self, name: str) -> NDArray[Any]:
        """The keys of the session's own map NAME, of 64 bits; none before it is made."""
        with self._lock:
            own = self._maps.get(name)
            return own.read_keys() if own else np.empty(0, np.uint64)

    @property
    def attached(self) -> bool:
        """Whether programs work for the session."""
        return self._active

    def detach(self) -> None:
        """The programs stop working for the session; its maps stay readable until `close`. When
        this returns, none of them is still at work."""
        self._detach(self.plan.read_last)

    def _detach(self, kept: Collection[str] = ()) -> None:
        if not self._active:
            return
        self._active = False
        clear = ~np.uint64(self.bit)

        def clear_bits(said: NDArray[Any]) -> None:
            said["of_hub"] &= clear
            for name in ("all", *_SELECTIONS):
                said[name] &= clear

        self._group.say(clear_bits)
        if self._kit:
            self._kit.uninstall(kept)

    def close(self) -> None:
        """Frees the session's maps and its slot. Safe to call twice."""
        if self._place is None or self._closed:
            return
        self._closed = True
        with ExitStack() as closing:
            closing.callback(self._group.release, self)
            closing.callback(self._close_maps)
            closing.callback(self._detach)
            for reader in self._readers:
                closing.callback(reader.close)

    def _close_maps(self) -> None:
        with self._lock:
            kit, self._kit = self._kit, None
            if kit:
                kit.close()

    # What the agent asks.

    @property
    def name(self) -> str:
        """The file of the hub's object."""
        return f"{self.plan.name}.bpf.o"

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for the session's own maps and buffers, and its share of the
        maps of the hub; the last known figure if there is no descriptor left to read it."""
        try:
            if self._place:
                own = sum(each.memory_bytes for each in self._maps.values())
                own += self._buffers_bytes
                for hub in (self._place.hub, self._place.processes):
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
        if self._place is None or self._closed:
            return {}
        with self._group.lock:
            slots = [self._group.slots[number] for number in self.hub.slots]
            ours = self.work / sum(slot.work for slot in slots)
            alike = 1 / len(self._at.processes.slots)
        return self._for_each_program(self._at.processes, alike) | self._for_each_program(
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
        for hub in (self._place.processes, self._place.hub) if self._place else ():
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


class SlotReader:
    """Reads the elements of one session's map where the sessions of a hub have one room for it."""

    def __init__(self, slot: Slot, reader: ElementReader) -> None:
        self._slot, self._reader = slot, reader

    def read(self) -> NDArray[Any]:
        """See `ElementReader`."""
        with self._slot.hub.reading:
            self._slot.object.write_variable("live_slot", self._slot.number)
            return self._reader.read()


@cache
def has_cgroups() -> bool:
    """Whether the kernel tells of cgroups: that they are made, and who enters them."""
    hooks = ("cgroup_attach_task", "cgroup_mkdir", "cgroup_rmdir")
    names = {f"btf_trace_{name}" for name in hooks}
    found = kernel_names(names)
    return found == names if found or kernel_names({"task_struct"}) else _CGROUPS.exists()


class _Keeper:
    """Runs what need not be waited for, one after another, in a thread that ends when there is
    nothing left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_running = False

    def submit(self, job: Callable[..., None], *arguments: Any) -> bool:
        """Runs JOB soon; whether there is a thread for it."""
        with self._lock:
            self._jobs.append(partial(job, *arguments))
            if self._is_running:
                return True
            try:
                threading.Thread(target=self._run, daemon=True).start()
                self._is_running = True
            except RuntimeError:  # no thread can be started: it was not needed
                self._jobs.clear()
            return self._is_running

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._is_running = False
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException:  # the next one gets a new thread
                with self._lock:
                    self._is_running = False
                raise


class Hubs:
    """All hubs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[_Group] = []

    def place(self, slot: Slot) -> _Place:
        """A place for SLOT, where others have the same features or in a new group."""
        features = slot.plan.features
        with self._lock:
            for group in self._groups:
                if group.plan.features == features and (place := group.take(slot)):
                    return place
            group = _Group(slot.plan)
            self._groups = [each for each in self._groups if each.slots] + [group]
            place = group.take(slot)
        if place is None:
            raise RuntimeError("a new hub has no room")
        return place


HUBS: Final = Hubs()
_keeper: Final = _Keeper()
