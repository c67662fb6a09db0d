"""The place of one session in a hub."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from coral.bpf import (
    BpfError,
    BpfObject,
    ElementReader,
    HashMap,
    LoadError,
    PerfReader,
    ProgramStats,
    RecordReader,
    RingReader,
    Walk,
)
from coral.bpf.buffers.account import Account
from coral.bpf.buffers.long_ring import LongRingReader
from coral.bpf.loading.map_definition import InnerMap
from coral.bpf.rung import bytes_per_cpu
from coral.collectors.hubs.group import HUBS, Group, Place
from coral.collectors.hubs.hub import Hub
from coral.collectors.hubs.keeper import KEEPER
from coral.collectors.hubs.kit import Kit
from coral.collectors.hubs.plan import Plan

_SELECTIONS: Final = ("host", "follow", "comm", "cgroup", "memory", "await_exec", "detailed")
# Arrays with an element for each session.
_OF_PROCESSES: Final = ("wanted_comms", "cgroup_paths", "untold_changes")
_CommonT = TypeVar("_CommonT")
# The maps of the next session are prepared where it would not take a slot that others need, and
# unless they are large: entries and bytes.
_MANY_SLOTS: Final = 16
_MOST_PREPARED: Final = 8 << 20
_IDLE_WORK: Final = 100.0  # events a second
_WORK_WINDOW_S: Final = 1.0
FIRST_ENDED: Final = np.uint64(1 << 32)
"""The least key in `members` of a process that has ended."""


class Slot:
    """The place of one session. It is also what the agent asks about the session's programs. It is
    nowhere until it is loaded."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._place: Place | None = None
        self._kit: Kit | None = None
        self._arrays: dict[str, HashMap] = {}
        self._readers: list[Walk | ElementReader] = []
        self._active = self._closed = self._detailed = self._has_prepared = False
        self.watches_host = False
        self.before_detach: Callable[[], None] | None = None
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

    def long_reader(self, record: str, size: int) -> LongRingReader:
        """The reader of the session's records, all of the struct RECORD with a tail, through a ring
        of SIZE bytes. Raises `LoadError`."""
        (kind,) = self.object.record_kinds({record: None})
        try:
            return LongRingReader(self._maps["rings"].fd, size, kind)
        except OSError as error:
            what = "opening the ring buffer rings"
            raise LoadError(what, error.errno or errno.EIO) from error

    @property
    def bit(self) -> int:
        """The session in a mask."""
        return 1 << self.number

    def load(self) -> None:
        """Takes a slot, and loads the objects, unless other sessions use them already. Raises
        `BpfError`."""
        place = self._place = HUBS.place(self)
        self._kit = place.kit
        self.processes, self.object = place.group.load(place, self.plan)
        place.group.attach(place.hub, self.plan.wanted)

    def begin_late(self) -> None:
        """Has a thread load the late programs of the plan, which use all maps of the hub."""
        self.hub.begin_late(self.plan, self._group.number_of(self.plan.name))

    def late(self) -> BpfObject:
        """The object with these programs, when they are loaded. Raises `BpfError`."""
        return self.hub.loaded_late()

    def install(self) -> None:
        """Makes the session's own maps, by its plan, and puts them where programs find them, unless
        that is done already. Raises `BpfError`."""
        if self._kit is None:
            self._kit = Kit(self.plan, self.number)
            self._kit.install(self.processes, self.object)

    @property
    def _at(self) -> Place:
        if self._place is None:
            raise RuntimeError("not loaded")
        return self._place

    @property
    def _group(self) -> Group:
        return self._at.group

    @property
    def hub(self) -> Hub:
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

        KEEPER.submit(run)

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
        self._array(name).write(self.number, value)

    def _array(self, name: str) -> HashMap:
        if name not in self._arrays:
            owner = self.processes if name in _OF_PROCESSES else self.object
            self._arrays[name] = owner.map(name)
        return self._arrays[name]

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
        """See `Group.hint`."""
        self._group.hint(tgids)

    def tidy(self) -> None:
        """To be called at each drain. At the first, when the session is here to stay, has the maps
        of a next one prepared; for the rest, see `Group.tidy`."""
        if not self._has_prepared:
            self._has_prepared = True
            if self.prepares_next:
                KEEPER.submit(self._group.prepare, self.plan)
        self._group.tidy()

    @property
    def prepares_next(self) -> bool:
        """Whether the maps of a next session like this one are made before it comes."""
        sizes = self.plan.sizes.values()
        return self.plan.rung.slots >= _MANY_SLOTS and sum(sizes) <= _MOST_PREPARED

    def tidied_members(self) -> NDArray[np.uint64]:
        """The ids of the session's members that run; none before there are any. Where each end is
        sent as a record, removes those that have ended, after some time to look up their names."""
        with self._lock:
            members = self._maps.get("members")
            if members is None:
                return np.empty(0, np.uint64)
            keys = members.read_keys()
            if self._detailed:
                ended = keys[keys >= FIRST_ENDED]
                members.delete(np.intersect1d(ended, self._ended))
                self._ended = ended
            return keys[keys < FIRST_ENDED]

    @property
    def untold_changes(self) -> int:
        """How many changes of what the session watches had no room in its buffer so far."""
        return int(self._array("untold_changes").read_one(self.number) or 0)

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
        """The programs stop working for the session, after `before_detach`; its maps stay readable
        until `close`. When this returns, none of them is still at work."""
        try:
            if self._active and self.before_detach:
                self.before_detach()
        finally:
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
                own = sum(each.memory_bytes for each in list(self._maps.values()))
                own += self._buffers_bytes
                for hub in (self._place.hub, self._place.processes):
                    if sharers := len(hub.slots):
                        own += sum(each.map_memory_bytes for each in hub.objects) // sharers
                own += self._group.memory_of_kits(self.plan.name) // max(len(self.hub.slots), 1)
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
        if self._place is None:
            return {}
        with self._group.lock:
            if self.number not in self.hub.slots:  # it has ended
                return {}
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
    def _for_each_program(hub: Hub, share: float) -> dict[str, float]:
        programs = [name for loaded in hub.objects for name in loaded.loaded_programs]
        return dict.fromkeys(programs, share)

    def program_stats(self) -> Mapping[str, ProgramStats]:
        """The kernel's figures of the programs that work for the session and others."""
        found: dict[str, ProgramStats] = {}
        for hub in (self._place.processes, self._place.hub) if self._place else ():
            for loaded in hub.objects:
                found |= loaded.program_stats()
        return found


class SlotReader:
    """Reads the elements of one session's map where the sessions of a hub have one room for it."""

    def __init__(self, slot: Slot, reader: ElementReader) -> None:
        self._slot, self._reader = slot, reader

    def read(self) -> NDArray[Any]:
        """See `ElementReader`."""
        with self._slot.hub.reading:
            self._slot.object.write_variable("live_slot", self._slot.number)
            return self._reader.read()
