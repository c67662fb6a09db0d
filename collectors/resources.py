"""Which container each row of a session that watches pods or containers is of.

Programs note the group of each process when they begin to watch it (struct member of
bpf/include/targets.bpf.h): a number that the cgroup of its container makes. A batch has a table of
the containers that its rows are of, and rows point into that, as they do into the strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.contract import LiveCgroups, Summaries
from coral.collectors.members import Members, process_keys
from coral.mesh.v1 import ebpf_pb2 as pb

if TYPE_CHECKING:
    from coral.collectors.targets import Targets

_MOST_ENDED: Final = 65_536  # processes that have ended, whose group is kept


class ResourceTable:
    """The resources of one batch, each once; rows hold 1 + their index, or 0 for none."""

    def __init__(self, live: LiveCgroups, common: Mapping[str, str]) -> None:
        self._live, self._common = live, common
        self._by_group = {0: 0}
        self._resources: list[pb.Resource] = []

    @property
    def resources(self) -> tuple[pb.Resource, ...]:
        """All of them so far."""
        return tuple(self._resources)

    def indices(self, groups: NDArray[Any]) -> NDArray[np.uint32]:
        """What rows of GROUPS hold, both of shape (n,)."""
        distinct, of_row = np.unique(groups, return_inverse=True)
        found = [self._index(group) for group in distinct.tolist()]
        return np.array(found, np.uint32)[of_row]

    def _index(self, group: int) -> int:
        if (known := self._by_group.get(group)) is not None:
            return known
        told, common = self._live.attributes_of(group), self._common
        more = {name: text for name, text in told.items() if common.get(name) != text}
        # What is common to the pods that run now need not be to one that has gone, or has just
        # come: it must not get the others' names.
        more |= dict.fromkeys(common.keys() - told.keys(), "") if told else {}
        if more:
            self._resources.append(pb.Resource(attributes=more))
        found = self._by_group[group] = len(self._resources) if more else 0
        return found


class EndedGroups:
    """The groups of processes that have ended: what they have begun may be told of long after, such
    as a request whose connection goes on."""

    def __init__(self) -> None:
        self._groups: dict[int, int] = {}

    def note(self, members: Members) -> None:
        """Keeps those of MEMBERS that have ended; the oldest give way."""
        ended = members.keys >= np.uint64(1 << 32)
        for key, group in zip(
            members.keys[ended].tolist(), members.groups[ended].tolist(), strict=True
        ):
            keep(self._groups, key, group)

    def groups_of(
        self, members: Members, tgids: NDArray[Any], born: NDArray[Any]
    ) -> NDArray[np.uint32]:
        """The groups of TGIDS that were BORN then, all of shape (n,): of those that have ended by
        MEMBERS, or else as kept, and of those that run by MEMBERS; 0 for one that is in neither."""
        found = members.ended_groups_of(tgids, born)
        missing = found == 0
        if missing.any() and self._groups:  # before those that run: one may have the id by now
            keys, of_row = np.unique(
                process_keys(tgids[missing], born[missing]), return_inverse=True
            )
            kept = np.array([self._groups.get(key, 0) for key in keys.tolist()], np.uint32)
            found[missing] = kept[of_row]
        return np.where(found > 0, found, members.running_groups_of(tgids))


class EventResources:
    """The resources of one session's records of single events. Call `begin` with each drain."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._groups: dict[int, int] = {}  # by process
        self._table: ResourceTable | None = None

    @property
    def resources(self) -> tuple[pb.Resource, ...]:
        """Those of the rows of this drain so far."""
        return self._table.resources if self._table else ()

    def begin(self, changes: NDArray[Any]) -> None:
        """Takes in CHANGES, struct process_change of shape (n,), of the drain that begins. Those
        that have ended are kept: see `EndedGroups`."""
        self._table = self._targets.resource_table()
        if len(changes):
            keys = process_keys(changes["tgid"], changes["born"])
            for key, group in zip(keys.tolist(), changes["group"].tolist(), strict=True):
                keep(self._groups, key, group)

    def of_processes(self, pids: NDArray[Any], born: NDArray[Any]) -> NDArray[np.uint32]:
        """What rows of the processes PIDS hold that were BORN then, all of shape (n,)."""
        distinct, of_row = np.unique(process_keys(pids, born), return_inverse=True)
        groups = [self._group_of(key) for key in distinct.tolist()]
        return self.of_groups(np.array(groups, np.uint32)[of_row])

    def of_groups(self, groups: NDArray[Any]) -> NDArray[np.uint32]:
        """What rows of GROUPS hold, both of shape (n,)."""
        if self._table is None:
            raise RuntimeError("no drain has begun")
        return self._table.indices(groups)

    def _group_of(self, key: int) -> int:
        if key not in self._groups:
            keep(self._groups, key, self._targets.group_of(key))
        return self._groups[key]


def keep(groups: dict[int, int], key: int, group: int) -> None:
    """Notes the GROUP of a process in GROUPS, in which the oldest give way."""
    groups[key] = group
    if len(groups) > _MOST_ENDED:
        del groups[next(iter(groups))]


def with_resources(
    rows: Summaries, resource: NDArray[np.uint32] | None, table: ResourceTable | None
) -> Summaries:
    """ROWS with the column RESOURCE, of shape (k,): the first k rows', and none of those after
    them, which add up others. The same rows where there is no TABLE."""
    if resource is None or table is None:
        return rows
    column = np.zeros(len(rows), np.uint32)
    column[: len(resource)] = resource
    columns = {**rows.columns, "resource": column}
    return replace(rows, columns=columns, resources=table.resources)
