"""What a hub loads, and for which session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from coral.bpf import BpfObject, Features, Rung, climb, kernel_names
from coral.bpf.rung import HOOKS

_PROCESSES: Final = "processes"
_PROGRAMS: Final = ("coral_fork", "coral_rename", "coral_exec", "coral_exit")
_CGROUP_PROGRAMS: Final = ("coral_attach", "coral_mkdir", "coral_rmdir")
# Maps of `processes` that hold a map of each session.
MAPS_OF_PROCESSES: Final = ("members", "cgroups", "rings", "perfs")
_CGROUPS: Final = Path("/proc/cgroups")  # with CONFIG_CGROUPS


@dataclass(frozen=True)
class Plan:
    """The hub NAME, as RUNG has it: the arguments of `Rung.object`. SIZES are those of the maps
    that the session has of its own. Sessions on the same features share `processes`, and those of
    one name a hub: their plans differ in `sizes`, `wanted`, `late` and `read_last` alone."""

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
    # Programs that are loaded after the others (`Slot.begin_late`), and how (`BpfObject`).
    late: tuple[str, ...] = field(default=(), compare=False)
    many_places: bool = field(default=False, compare=False)
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

    def late_part(self, number: int, shared: Mapping[str, int]) -> BpfObject:
        """An object with the late programs of the hub of this NUMBER, which uses all of its maps,
        SHARED. Nothing of it is attached by itself."""
        return self.rung.object(
            self.name,
            programs=(),
            options={**self.options, "hub": number},
            walks=self.late,
            without_maps=self.without_maps,
            shared=shared,
            many_places=self.many_places,
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
            if (name in MAPS_OF_PROCESSES) == of_processes and name != "perfs"
        }


@cache
def has_cgroups() -> bool:
    """Whether the kernel tells of cgroups: that they are made, and who enters them."""
    hooks = ("cgroup_attach_task", "cgroup_mkdir", "cgroup_rmdir")
    names = {f"btf_trace_{name}" for name in hooks}
    found = kernel_names(names)
    return found == names if found or kernel_names({"task_struct"}) else _CGROUPS.exists()
