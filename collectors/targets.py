"""The processes that a collector watches, as its options select them.

The C side is bpf/include/targets.bpf.h; the programs of bpf/programs/processes follow forks, execs
and exits. member_map.py writes and reads the kernel's map of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import Features
from coral.bpf.libbpf import BpfError
from coral.collectors.cgroups import (
    cgroup2_mount,
    cgroup_directory,
    cgroup_ids_below,
    cgroup_tgids,
    cgroups_below,
    hierarchy,
    memory_hierarchy,
    tgids_by_group,
)
from coral.collectors.contract import NO_ATTRIBUTES, ServiceProcesses, Watched
from coral.collectors.hubs import FIRST_ENDED, Slot
from coral.collectors.member_map import MemberMap, State
from coral.collectors.members import Members, comm_text
from coral.collectors.options import OptionError
from coral.collectors.procfs import (
    children_of,
    clock_ticks,
    comm_of,
    process_of,
    running_tgids,
    start_time_of,
)
from coral.collectors.resources import EventResources, ResourceTable
from coral.collectors.target_keys import path_hash, place, words
from coral.collectors.target_options import COMM_BYTES, TargetOptions

_MOST_MEMBERS: Final = 10240
_MOST_CGROUPS: Final = 4096
_MOST_LOOKS: Final = 8  # at cgroups that somebody may go on to make


class Targets:
    """The processes that one session watches."""

    def __init__(self, options: TargetOptions, service: ServiceProcesses | None) -> None:
        options.check(service)
        if options.cgroup:
            cgroup_directory(options.cgroup)
        self._options = options
        self._service = service.name if service else ""
        self._tgids = options.pid
        if service and not (options.pid or options.comm or options.cgroup or options.scope):
            self._tgids = service.tgids
        self._live = service.cgroups if service else None
        if (name := options.selector) and not self._live:
            value = getattr(options, name)
            raise OptionError(name, value, "it to an agent, which knows the pods of its node")
        self._changing = threading.Lock()  # held while the cgroups that are watched change
        self._is_open = False
        # A process id may go to another process before `fill`; its start time tells.
        self._started = {tgid: start_time_of(tgid) for tgid in self._tgids}
        self._resolved_at_ticks = clock_ticks()
        self._pidfds: list[int] = []
        self._members = MemberMap(with_groups=bool(self._live))
        self.common: Mapping[str, str] = NO_ATTRIBUTES  # as of `note_common`
        self.notes: tuple[str, ...] = ()  # see `Collector.notes`
        self.spared: frozenset[int] = frozenset()  # processes to leave out, whatever the target

    @property
    def watched(self) -> Watched:
        """What the options and the service resolved to."""
        options, live = self._options, self._live
        return Watched(
            self._tgids,
            options.comm,
            cgroup_directory(options.cgroup) if options.cgroup else None,
            ":".join(live.key) if live else "",
            live.now if live else frozenset(),
            bool(options.scope),
            options.follow_children,
        )

    @property
    def attributes(self) -> Mapping[str, str]:
        """See `Collector.attributes`."""
        return self._live.attributes if self._live else NO_ATTRIBUTES

    def note_common(self) -> None:
        """Notes `attributes` for a batch that begins: what the resources of its rows have beyond
        these."""
        self.common = self.attributes

    def resource_table(self) -> ResourceTable | None:
        """For the rows of a batch; None where the session does not watch pods or containers."""
        return ResourceTable(self._live, self.common) if self._live else None

    def event_resources(self) -> EventResources | None:
        """For the rows of single events; None likewise."""
        return EventResources(self) if self._live else None

    @property
    def label(self) -> str:
        """A name for what is watched: the command's, the cgroup's, or `host`."""
        options = self._options
        if self._live:
            return self._live.label
        if self._tgids:
            return comm_of(self._tgids[0]) or f"pid {self._tgids[0]}"
        return options.comm or Path(options.cgroup).name or "host"

    @property
    def key(self) -> tuple[str, ...]:
        """What is watched, the same for equal targets. A service is one target, whichever processes
        it had when the session began."""
        options = self._options
        if self._live:
            return self._live.key
        if options.cgroup:
            return ("cgroup", str(cgroup_directory(options.cgroup)))
        for name, value in (("comm", options.comm), ("scope", options.scope)):
            if value:
                return (name, value)
        if options.pid:
            return ("pid", *map(str, sorted(options.pid)))
        return ("service", self._service)

    @property
    def maps(self) -> dict[str, int]:
        """The maps that a session needs for its processes, with their sizes."""
        return {"members": _MOST_MEMBERS, **({"cgroups": _MOST_CGROUPS} if self.by_cgroup else {})}

    @property
    def by_cgroup(self) -> bool:
        """Whether processes are watched while they are in some cgroups."""
        return bool(self._options.cgroup or self._live)

    @property
    def _cgroup(self) -> Path | None:
        return cgroup_directory(self._options.cgroup) if self._options.cgroup else None

    @property
    def exit_fds(self) -> Sequence[int]:
        """Process descriptors of the first targets, if the session should end with them."""
        return self._pidfds

    def follow(self, slot: Slot, *, detailed: bool) -> None:
        """The programs begin to follow processes for the session in SLOT, which has its maps. With
        DETAILED, each change becomes a record of the session. Raises `BpfError`."""
        self._slot = slot
        self._members.follow(slot)
        options, cgroup, live = self._options, self._cgroup, self._live
        if options.scope or cgroup or live or options.comm:
            self._members.add(_without_groups(self.spared), State.SPARED)
        if options.comm:
            slot.own("wanted_comms", (words(options.comm, COMM_BYTES + 1),))
        if cgroup:
            slot.own("cgroup_paths", path_hash(cgroup))
            self._add_cgroups(cgroup)
        if live:
            slot.own("cgroup_paths", 0)
            self.notes = live.notes
        kind = live.kind if live else hierarchy(cgroup) if cgroup else None
        slot.activate(
            hierarchy=memory_hierarchy() if kind else None,
            host=bool(options.scope),
            follow=options.follow_children and not kind,
            comm=bool(options.comm),
            cgroup=bool(kind),
            memory=kind == "memory",
            await_exec=options.from_exec,
            detailed=detailed,
        )

    def fill(self) -> None:
        """Adds the processes that run already. Call it after `follow`, so that no fork is missed.
        Raises `BpfError`."""
        options = self._options
        if self._live:
            self._is_open = True
            self._change_cgroups(self._live.follow(self._change_cgroups), frozenset())
        elif cgroup := self._cgroup:
            self._add_cgroups(cgroup)  # those that were made meanwhile
            if not self._add_members(cgroup):
                self._note(f"is in the cgroup {options.cgroup} now; those that come are watched")
        elif options.comm:
            self._tgids = tuple(
                tgid
                for tgid in running_tgids()
                if tgid not in self.spared and comm_of(tgid) == options.comm
            )
            self._members.add(_without_groups(self._tgids), State.ACTIVE)
            if not self._tgids:
                name = f"has the command name {options.comm!r}"
                self._note(f"{name} now; those that get it later are watched")
        else:
            self._tgids = tuple(tgid for tgid in self._tgids if not self._was_replaced(tgid))
            armed = State.ARMED if options.from_exec else State.ACTIVE
            self._members.add(_without_groups(self._tgids), armed)
            if options.follow_children and not options.from_exec:
                self._add_children()
        self._slot.members_changed()
        if options.until_exit:
            self._open_pidfds()

    def _add_members(self, cgroup: Path) -> set[int]:
        """Adds the processes in a cgroup whose id is in the map already; returns them."""
        members = self._in_cgroup(cgroup)
        self._members.add(members, State.ACTIVE)
        # The write undoes that a program saw one leave, or move inside of the cgroup. Programs see
        # those that do so later.
        now = self._in_cgroup(cgroup)
        self._members.delete(members.keys() - now)
        moved = {tgid: group for tgid, group in now.items() if members.get(tgid, group) != group}
        self._members.add(moved, State.ACTIVE)
        return set(members)

    def _in_cgroup(self, directory: Path) -> dict[int, int]:
        """The processes to watch in a cgroup, with their groups."""
        if self._live:
            found = tgids_by_group(directory, is_pod=self._live.is_pod(directory))
        else:
            found = _without_groups(cgroup_tgids(directory))
        return {tgid: group for tgid, group in found.items() if tgid not in self.spared}

    def _change_cgroups(self, added: frozenset[Path], removed: frozenset[Path]) -> None:
        """Pods or containers come and go. Called from their thread, too."""
        with self._changing:
            if not self._is_open:
                return
            for directory in added:
                self._add_cgroups(directory)  # first: programs then see those that enter
                self._add_members(directory)
            for directory in removed:  # they may still be there, if their labels have changed
                ids = cgroup_ids_below(directory)
                self._slot.map("cgroups").delete([each | place(directory) for each in ids])
                self._members.delete(cgroup_tgids(directory) - self.spared)
            self._slot.members_changed()

    def _note(self, that: str) -> None:
        self.notes = (*self.notes, f"no process {that}")

    def _add_children(self) -> None:
        """Adds the children that were forked between the look-up of their parent and `follow`. Each
        is added before its own children are listed, so that programs follow those that come
        later. A note tells of those that were there before."""
        seen, older = set(self._tgids), 0
        parents = list(seen)
        while parents:
            children = set(children_of(parents.pop())) - seen
            found = {child: it for child in children if (it := process_of(child))}
            young = {child for child, it in found.items() if it.started >= self._resolved_at_ticks}
            older += sum(found[child].can_be_watched for child in found.keys() - young)
            self._members.add(_without_groups(young), State.ACTIVE)
            seen |= young
            parents += young
        if older:
            told = f"children that run already are not watched ({older}): name them in `pid`, too"
            self.notes = (*self.notes, told)

    def _add_cgroups(self, directory: Path) -> None:
        """Programs add what is made below a cgroup that is in the map. What was made before it was
        there, and after a look, is found by the next look."""
        wanted, added = self._slot.map("cgroups"), set[int]()
        is_pod = bool(self._live and self._live.is_pod(directory))
        for _ in range(_MOST_LOOKS):
            fresh = [it for it in cgroups_below(directory, is_pod=is_pod) if it.id not in added]
            for each in fresh:
                value = (each.group if self._live else 0, is_pod and each.directory == directory)
                # Without room for it, what starts in it is not seen.
                self._members.put(wanted, each.id | place(directory), value)
            if not fresh:
                break
            added.update(each.id for each in fresh)

    def present(self) -> dict[int, str]:
        """Command names by tgid of the processes that are watched now, for callers that look up
        what these processes already had open. Call it after `fill`."""
        if self._options.scope:
            return {
                tgid: comm_of(tgid) or "" for tgid in running_tgids() if tgid not in self.spared
            }
        if self._options.from_exec:
            return {}
        members = self.read()
        names = map(comm_text, members.comms.tolist())
        present = zip(members.keys.tolist(), names, strict=True)
        return {key: name for key, name in present if key < FIRST_ENDED and key not in self.spared}

    def groups_present(self) -> dict[int, int]:
        """The groups of these, by tgid; none where no groups are told apart."""
        if not self._live:
            return {}
        members = self.read()
        return dict(zip(members.keys.tolist(), members.groups.tolist(), strict=True))

    def _was_replaced(self, tgid: int) -> bool:
        """Whether the process that was asked for has ended and another one has its id."""
        started, now = self._started.get(tgid), start_time_of(tgid)
        return None not in (started, now) and started != now

    def _open_pidfds(self) -> None:
        for tgid in self._tgids:
            try:
                self._pidfds.append(os.pidfd_open(tgid))
            except ProcessLookupError:
                continue  # it has ended since it was asked for
        if not self._pidfds:
            raise BpfError("every process to watch has ended before the programs were attached")

    @property
    def unfollowed(self) -> int:
        """How many processes that ran at the start did not fit into the map. What programs find
        later is in the session's account."""
        return self._members.unfollowed

    def read(self) -> Members:
        """See `MemberMap.read`."""
        return self._members.read()

    def read_with(self, tgids: NDArray[Any], born: NDArray[Any]) -> Members:
        """See `MemberMap.read_with`."""
        return self._members.read_with(tgids, born)

    def name_of(self, process: int) -> bytes:
        """See `MemberMap.name_of`."""
        return self._members.name_of(process)

    def group_of(self, process: int) -> int:
        """See `MemberMap.group_of`."""
        return self._members.group_of(process)

    def groups_of(
        self, members: Members, tgids: NDArray[Any], born: NDArray[Any]
    ) -> NDArray[np.uint32]:
        """See `MemberMap.groups_of`."""
        return self._members.groups_of(members, tgids, born)

    def forget(self, ended: NDArray[np.uint64]) -> None:
        """See `MemberMap.forget`."""
        self._members.forget(ended)

    @property
    def untold_changes(self) -> int:
        """How many changes of these processes could not be sent as records so far."""
        return self._slot.untold_changes

    def close(self) -> None:
        """Closes the process descriptors, and follows no pods any more."""
        with self._changing:
            self._is_open = False
        if self._live:
            self._live.close()
        while self._pidfds:
            os.close(self._pidfds.pop())


def refused_options(features: Features) -> dict[str, str]:
    """Options of `TargetOptions` that are unsupported on this machine, each with the value to use
    instead and the reason."""
    refused = {}
    if not features["pidfd"].available:
        refused["until_exit"] = f"`false`: {features['pidfd'].reason}"
    if cgroup2_mount() is None:
        refused["cgroup"] = (
            "no value: no cgroup2 hierarchy is mounted here; mount -t cgroup2 none /sys/fs/cgroup"
        )
    return refused


def _without_groups(tgids: Iterable[int]) -> dict[int, int]:
    return dict.fromkeys(tgids, 0)
