"""Groups of hubs: who shares which objects, and what user space tells their programs of all
sessions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfError, BpfObject
from coral.bpf.closing import close_all
from coral.collectors.hubs.hub import Hub
from coral.collectors.hubs.keeper import KEEPER
from coral.collectors.hubs.kit import Background, Kit
from coral.collectors.hubs.plan import Plan

if TYPE_CHECKING:
    from coral.collectors.hubs.slot import Slot

HINTS: Final = 16384  # in a set, as in targets.bpf.h
# Maps of `processes` that the hubs use too.
_SHARED_MAPS: Final = (
    "members", "sessions", "shared_counts", "untold_changes", "hints", "accounts", "rings", "perfs",
)  # fmt: skip
_LAST_PLACES: Final = 8  # for which no maps are prepared: sessions may need them meanwhile
_REBUILT_AFTER: Final = 256  # processes that have ended since
_REBUILT_EVERY_S: Final = 0.5
_COUNT_GENERATION, _COUNT_ENDED = 0, 1  # as in sessions.bpf.h


class Group:
    """`processes`, and the hubs that share its maps. LOCK protects all of it; nothing that takes
    long happens under it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lock = threading.RLock()
        self.processes = Hub()
        self.hubs: dict[str, Hub] = {}
        self._numbers: dict[str, int] = {}
        self.slots: dict[int, Slot] = {}
        self.kits: list[Kit] = []
        self._next = 0
        self._ended = 0  # processes, when the hints were last built
        self._looked_at_s = 0.0
        self._rebuilding = False

    def take(self, slot: Slot) -> Place | None:
        """A place for SLOT by its plan; None where all are taken. Blocks where it takes the place
        of maps that wait for a session of another sort."""
        plan = slot.plan
        while True:
            with self.lock:
                kit = next((kit for kit in self.kits if kit.fits(plan)), None)
                number = kit.number if kit else self._free_number()
                if number is not None:
                    if kit:
                        self.kits.remove(kit)
                    hub = self.hubs.setdefault(plan.name, Hub())
                    self.slots[number] = slot
                    hub.slots.add(number)
                    self.processes.slots.add(number)
                    return Place(self, number, self.processes, hub, kit)
                idle = next((kit for kit in self.kits if kit.is_ready), None)
                if idle is None:
                    return None
                idle.is_ready = False
            self._give_up_idle(idle)

    def _give_up_idle(self, kit: Kit) -> None:
        """Gives up a kit, for a caller that does not keep the last session of its hub from ending
        meanwhile."""
        with ExitStack() as held:
            for lock in kit.locks:
                held.enter_context(lock)
            self._give_up(kit)

    def _give_up(self, kit: Kit) -> None:
        """Closes a kit that no session can take any more. Its number is free once its maps are out
        of the slot: until then a session there would lose its own."""
        try:
            with suppress(BpfError, RuntimeError):  # its objects may be closed
                kit.close()
        finally:
            with self.lock:
                self.kits.remove(kit)

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
            hub, processes = self.hubs.get(plan.name), self.processes
            if hub is None:
                return
            kit = Kit(plan, 0, locks=(processes.lock, hub.lock))
            like = [other for other in self.kits if kit.is_like(other)]
            if any(other.sizes == kit.sizes for other in like):
                return
            if self.plan.rung.slots - len(self.slots) - len(self.kits) < _LAST_PLACES:
                return
            # One of another size is not waited for any more.
            given_up = _withdrawn(like)
            number = self._free_number()
            if number is not None:
                kit.number = number  # which is taken from now on
                self.kits.append(kit)
        with processes.lock, hub.lock:  # which nobody closes meanwhile
            for other in given_up:
                self._give_up(other)
            if number is None:
                return
            installed = False
            try:
                if processes.object is not None and hub.object is not None:
                    with suppress(BpfError, OSError, RuntimeError):
                        kit.install(processes.object, hub.object)
                        installed = True
            finally:
                with self.lock:
                    kit.is_ready = is_wanted = installed and bool(hub.slots)
                if not is_wanted:
                    self._give_up(kit)

    def give_up_prepared(self) -> None:
        """Frees the maps that wait for a session. They count for nobody when this returns; a thread
        does the work."""
        with self.lock:
            idle = _withdrawn(self.kits)
        for kit in idle:
            if not KEEPER.submit(self._give_up_idle, kit):
                self._give_up_idle(kit)

    def memory_of_kits(self, name: str) -> int:
        """What the kernel charges for maps that wait for a session of the hub NAME. Raises
        OSError."""
        with self.lock:
            return sum(kit.memory_bytes for kit in self.kits if kit.name == name)

    def number_of(self, name: str) -> int:
        """The number of the hubs NAME in `struct sessions`."""
        with self.lock:
            return self._numbers.setdefault(name, len(self._numbers))

    def load(self, place: Place, plan: Plan) -> tuple[BpfObject, BpfObject]:
        """The loaded objects of PLACE: `processes`, and that of the hub of PLAN. The first caller
        loads them; others wait. Raises `BpfError`."""
        processes, hub = place.processes, place.hub
        with processes.lock:
            if (first := processes.object) is None:
                first = plan.processes()
                with ExitStack() as failing:
                    failing.callback(first.close)
                    if plan.rung.loader.taken == "core":
                        # Most of a start is the verifier's work. With the maps that hubs share,
                        # they can be verified at the same time.
                        first.make_maps(_SHARED_MAPS)
                        processes.loading = Background(partial(_start, first))
                    else:
                        _start(first)
                    failing.pop_all()
                processes.object = first
        with hub.lock, ExitStack() as failing:
            if (second := hub.object) is None:
                second = plan.hub(self.number_of(plan.name), first.map_fds(_SHARED_MAPS))
                failing.callback(second.close)
                try:
                    second.load()
                finally:
                    processes.wait()
                second.attach()
                failing.pop_all()
                hub.object = second
            return first, second

    def attach(self, hub: Hub, names: Sequence[str]) -> None:
        """Attaches optional programs that a session wants. Raises `AttachError`."""
        with hub.lock:
            for name in names:
                if name not in hub.links and hub.object is not None:
                    hub.links[name] = hub.object.attach_one(name)

    def detach_unwanted(self, hub: Hub) -> None:
        """Detaches the optional programs that no session wants any more."""
        with hub.lock:
            with self.lock:
                slots = [self.slots[number] for number in hub.slots]
            wanted = {name for slot in slots for name in slot.plan.wanted}
            unwanted = [hub.links.pop(name) for name in hub.links.keys() - wanted]
            close_all([link.detach for link in unwanted])

    def release(self, slot: Slot) -> None:
        """Frees a slot, and the objects that no other session uses."""
        unused: list[Hub] = []
        with self.lock:
            if self.slots.get(slot.number) is not slot:
                return
            del self.slots[slot.number]
            for hub in (slot.hub, self.processes):
                hub.slots.discard(slot.number)
                if not hub.slots:
                    unused.append(hub)
            # Those that are not ready are for others to give up.
            kits = _withdrawn(
                kit for kit in self.kits if slot.hub in unused and kit.name == slot.plan.name
            )
            self.hubs = {key: hub for key, hub in self.hubs.items() if hub.slots}
            # A session that comes meanwhile makes new ones; `processes` is replaced with them.
            if self.processes in unused:
                self.processes = Hub()
                self._ended = 0
            else:
                self._ended -= _REBUILT_AFTER  # the hints of its members are still set
        with ExitStack() as closing:
            for hub in reversed(unused):
                closing.callback(hub.close)
            if slot.hub not in unused:
                closing.callback(self.detach_unwanted, slot.hub)
            for kit in kits:
                closing.callback(self._give_up, kit)

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
            changed = self.processes.object.map("shared_counts").read_one(_COUNT_GENERATION)
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
            ended = int(hub.object.map("shared_counts").read_one(_COUNT_ENDED) or 0)
            if (ended - self._ended) % (1 << 32) < _REBUILT_AFTER:
                return
            self._rebuilding = True  # before the thread can say that it is done
            if not KEEPER.submit(self._rebuild, hub, self._ended, ended):
                self._rebuilding = False

    def _rebuild(self, hub: Hub, before: int, ended: int) -> None:
        """BEFORE and ENDED are `_ended` as it was, and as it is to be."""
        try:
            with suppress(BpfError), hub.lock:  # if it fails, again the next time
                if hub.object:
                    self._build_hints(hub.object)
                with self.lock:
                    if self.processes is hub:
                        self._ended += ended - before
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


def _withdrawn(kits: Iterable[Kit]) -> list[Kit]:
    """Those of KITS that wait for a session: none can take them any more. Call it under the group's
    lock."""
    withdrawn = [kit for kit in kits if kit.is_ready]
    for kit in withdrawn:
        kit.is_ready = False
    return withdrawn


def _start(made: BpfObject) -> None:
    made.load()
    made.attach()


@dataclass(frozen=True)
class Place:
    """Where a session is: a number in a group, the objects that work for it, and its maps if they
    were prepared."""

    group: Group
    number: int
    processes: Hub
    hub: Hub
    kit: Kit | None


class Hubs:
    """All hubs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[Group] = []

    def place(self, slot: Slot) -> Place:
        """A place for SLOT, where others have the same features or in a new group."""
        features = slot.plan.features
        with self._lock:
            for group in self._groups:
                if group.plan.features == features and (place := group.take(slot)):
                    return place
            group = Group(slot.plan)
            self._groups = [each for each in self._groups if each.slots] + [group]
            place = group.take(slot)
        if place is None:
            raise RuntimeError("a new hub has no room")
        return place

    def give_up_prepared(self) -> None:
        """See `Group.give_up_prepared`."""
        with self._lock:
            groups = list(self._groups)
        for group in groups:
            group.give_up_prepared()


HUBS: Final = Hubs()
