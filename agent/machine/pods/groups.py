"""What the groups of cgroups are: by the numbers that programs note for processes."""

from __future__ import annotations

from collections import deque
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
    another's once the kernel has given out all others, 2^32 of them."""

    most: int
    places: dict[int, Place] = field(default_factory=dict)
    _by_directory: dict[Path, int] = field(default_factory=dict)
    _gone: deque[int] = field(default_factory=deque)

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

    def removed(self, directory: Path) -> None:
        """It is gone."""
        group = self._by_directory.pop(directory, None)
        if group is None:
            return
        self._gone.append(group)
        if len(self._gone) > _MOST_GONE:
            self.places.pop(self._gone.popleft(), None)

    def keep(self, there: Iterable[Path]) -> None:
        """All but these are gone."""
        for directory in self._by_directory.keys() - set(there):
            self.removed(directory)
