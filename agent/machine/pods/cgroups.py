"""The cgroups of pods and containers on this machine: all that are there, and each that is made or
removed, as soon as the kernel has done it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from coral.agent.machine.pods.cgroup_names import Place, place_of
from coral.bpf import BpfError, BpfObject, Features, LoadError
from coral.bpf.buffers.ring import RingReader
from coral.bpf.rung import HOOKS, Rung, climb
from coral.collectors.cgroups import group_of_cgroup, memory_hierarchy
from coral.collectors.hierarchies import Hierarchy, Kind, hierarchies, subdirectories

_OBJECT: Final = "cgroups"
_PROGRAMS: Final = ("coral_cgroup_made", "coral_cgroup_removed")
_RECORD: Final = "cgroup_change"
_RING_BYTES: Final = 1 << 18  # as in cgroups.bpf.c, as the next
_MADE: Final = 0
_PATH_BYTES: Final = 1023
_GROUP: Final = (1 << 32) - 1


class CgroupChange(NamedTuple):
    """A cgroup that was made, or removed."""

    kind: Kind
    directory: Path
    place: Place
    made: bool
    group: int = 0  # see `Inventory.made`


@dataclass(frozen=True)
class Tree:
    """The hierarchies of cgroups that this agent can look at as a whole."""

    of: dict[Kind, Hierarchy]

    @classmethod
    def here(cls) -> Tree:
        """As they are mounted now."""
        return cls({found.kind: found for found in hierarchies() if found.is_whole})

    def scan(self, kind: Kind) -> dict[Path, tuple[Place, int]]:
        """The cgroups of pods and containers of one hierarchy, with their groups."""
        top = self.of[kind].directory
        return {
            path: (place, group_of_cgroup(path))
            for path in _below(top)
            if (place := self._place(path, top))
        }

    @staticmethod
    def _place(path: Path, top: Path) -> Place | None:
        return place_of(f"/{path.relative_to(top)}")


def _below(directory: Path) -> Iterator[Path]:
    left = subdirectories(directory)
    while left:
        yield (path := left.pop())
        left += subdirectories(path)


class CgroupChanges:
    """Follows what happens to the cgroups of TREE, by programs on cgroup_mkdir and cgroup_rmdir.
    Raises `BpfError`, with nothing left in the kernel, where they cannot be loaded."""

    @staticmethod
    def rung(features: Features) -> Rung:
        """The rung of these programs. Raises `BpfError` where there is none."""
        if features.obstacle:
            raise BpfError(features.obstacle)
        rung = climb(features, HOOKS, thread_state=False)
        if rung.missing or rung.buffer.taken != "ring_buffer" or rung.loader.taken != "core":
            whys = "; ".join(step.why_not for step in rung if step.why_not)
            raise BpfError(f"following cgroups needs BTF and ring buffers: {whys}")
        return rung

    def __init__(self, tree: Tree, features: Features) -> None:
        rung = self.rung(features)
        self._by_number: dict[int, Kind] = {0: "v2"}
        if number := memory_hierarchy():
            self._by_number[number] = "memory"
        self._tree = tree
        self._object = BpfObject(
            _OBJECT,
            programs=_PROGRAMS,
            options={"memory_hierarchy": number},
            without_maps=("rings", "perfs", "record_drafts", "accounts", "sessions"),
            typed=rung.hook.taken == "tp_btf",
        )
        try:
            self._object.load()
            kinds = self._object.record_kinds({_RECORD: None})
            try:
                self._ring = RingReader(self._object.map_fd("changes"), _RING_BYTES, kinds)
            except OSError as error:
                raise LoadError("opening the ring of changes", error.errno or 0) from error
            self._object.attach()
        except BaseException:
            self.close()
            raise
        self._lost = 0

    def fileno(self) -> int:
        """A descriptor that is readable when there may be something to read, once `rest` has said
        that there is nothing yet."""
        return self._ring.wakeup.fileno()

    def rest(self) -> bool:
        """See `RingReader.rest`."""
        return self._ring.rest()

    def read(self) -> tuple[list[CgroupChange], bool]:
        """What has happened since the last call, in order; and whether something is missing, so
        that the tree has to be scanned again."""
        found, missing = [], False
        for record in self._ring.drain()[_RECORD]:
            path = bytes(record["path"]).partition(b"\0")[0].decode(errors="surrogateescape")
            kind = self._by_number.get(int(record["hierarchy"]))
            missing |= len(path) >= _PATH_BYTES
            if kind not in self._tree.of or not (place := place_of(path)):
                continue
            directory = self._tree.of[kind].directory / path.lstrip("/")
            made, group = int(record["change"]) == _MADE, int(record["id"]) & _GROUP
            found.append(CgroupChange(kind, directory, place, made, group))
        lost = int(self._object.read_variable("changes_lost"))
        missing |= lost != self._lost
        self._lost = lost
        return found, missing

    def close(self) -> None:
        """Detaches. Safe to call twice."""
        if ring := getattr(self, "_ring", None):
            ring.close()
        self._object.close()
