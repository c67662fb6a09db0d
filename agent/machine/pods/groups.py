"""What the groups of cgroups are: by the numbers that programs note for processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from coral.agent.machine.pods.cgroup_names import Place

_MOST_GONE: Final = 4096
"""Cgroups that are gone and still known: what ran there may be told of in a while."""


@dataclass
class Groups:
    """The places of the cgroups of one hierarchy by group (`coral.collectors.cgroups.Below`): of
    at most MOST that are there, and of some that have gone. The number of one that has gone is
    another's once the kernel has given out all others: 2^31, of which each file of a cgroup has one
    too (kernfs_new_node in fs/kernfs/dir.c of Linux)."""

    most: int
    places: dict[int, Place] = field(default_factory=dict)
    _by_directory: dict[Path, int] = field(default_factory=dict)
    _gone: dict[int, None] = field(default_factory=dict)  # the oldest first

    def made(self, directory: Path, place: Place, group: int) -> None:
        """A cgroup is there."""
        before = self._by_directory.get(directory)
        if (
            not group
            or group == before
            or (before is None and len(self._by_directory) >= self.most)
        ):
            return
        if before is not None:
            self.removed(directory)
        self._by_directory[directory], self.places[group] = group, place
        self._gone.pop(group, None)  # or its place would go with that of the one before

    def removed(self, directory: Path) -> None:
        """It is gone."""
        group = self._by_directory.pop(directory, None)
        if group is None:
            return
        self._gone.pop(group, None)
        self._gone[group] = None
        if len(self._gone) > _MOST_GONE:
            oldest = next(iter(self._gone))
            del self._gone[oldest]
            self.places.pop(oldest, None)

    def keep(self, there: Iterable[Path]) -> None:
        """All but these are gone."""
        for directory in self._by_directory.keys() - set(there):
            self.removed(directory)
