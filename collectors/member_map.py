"""The kernel's map of the processes that a session watches, written and read: struct member of
bpf/include/targets.bpf.h.

Programs change the map at the same time. So what is written is checked against what runs, and what
is read may have moved meanwhile.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap
from coral.bpf.libbpf import BpfError
from coral.collectors.hubs import Slot
from coral.collectors.members import Members
from coral.collectors.procfs import Process, process_of
from coral.collectors.resources import EndedGroups
from coral.collectors.target_options import COMM_BYTES

# The kernel keeps some free elements for each CPU and makes more a moment later.
_MOMENTARY: Final = (errno.ENOMEM, errno.EBUSY)
_TRIES: Final = 5
_PAUSE_S: Final = 0.002


class State(IntEnum):
    """Of a member, as in targets.bpf.h: it is watched, will be from its next exec on, or is spared
    whatever the target is."""

    ACTIVE = 0
    ARMED = 1
    SPARED = 2


class MemberMap:
    """The map of one session, once `follow` has said whose it is. WITH_GROUPS: members have groups
    of cgroups, which are kept for those that have ended."""

    def __init__(self, *, with_groups: bool) -> None:
        self._with_groups = with_groups
        self._ended = EndedGroups()
        # Names and groups by id: no record tells of these.
        self._at_start: dict[int, tuple[bytes, int]] = {}
        self.unfollowed = 0
        """How many elements did not fit into a map so far."""

    def follow(self, slot: Slot) -> None:
        """SLOT has the map."""
        self._slot, self._map = slot, slot.map("members")

    def add(self, tgids: Mapping[int, int], state: State) -> None:
        """Adds running processes, with their groups, in this state. Those for which there is no
        room are counted."""
        added: dict[int, Process] = {}
        for tgid, group in tgids.items():
            found = process_of(tgid)
            if found is None or not found.can_be_watched:
                continue  # a program has removed it, or it was never there
            if self.put(self._map, tgid, _member(found, state, group)):
                added[tgid] = found
        self._slot.hint(list(added))
        # What programs did between the look and the write, the write has undone: one that ended
        # meanwhile would stay, and its id would become another's.
        for tgid, before in added.items():
            now = process_of(tgid)
            if now is None or now.is_zombie or now.started != before.started:
                self._map.delete([tgid])
            elif now.comm != before.comm:
                # An exec has activated it; no program changes the name of a member later than that.
                state_now = State.ACTIVE if state is State.ARMED else state
                self._map.write(tgid, _member(now, state_now, tgids[tgid]))
                added[tgid] = now
        self._at_start |= {tgid: (_name(found), tgids[tgid]) for tgid, found in added.items()}

    def put(self, table: HashMap, key: int, value: object) -> bool:
        """Sets an element, or counts that there is no room for it. Raises `BpfError`."""
        for _ in range(_TRIES):
            try:
                table.write(key, value)
            except BpfError as error:
                if error.errno == errno.E2BIG:
                    break
                if error.errno not in _MOMENTARY:
                    raise
                time.sleep(_PAUSE_S)
            else:
                return True
        self.unfollowed += 1
        return False

    def delete(self, tgids: Iterable[int]) -> None:
        """Processes that run are not watched any more."""
        self._map.delete(sorted(tgids))

    def read(self) -> Members:
        """The processes that are watched now, and those that have ended since they were last
        forgotten."""
        keys, members = self._map.read()
        keys, at = np.unique(keys, return_index=True)
        found = Members(keys, members["comm"][at], members["group"][at])
        if self._with_groups:
            self._ended.note(found)
        return found

    def read_with(self, tgids: NDArray[Any], born: NDArray[Any]) -> Members:
        """The same, surely with the processes TGIDS that were BORN then, all of shape (n,).

        The element of a process that ends goes to another place of the map, so one reading may miss
        it at both; then there is a second one.
        """
        members = self.read()
        if (members.comms_of(tgids, born) == b"").any():
            members |= self.read()
        return members

    def name_of(self, process: int) -> bytes:
        """The command name of one process, by `process_keys`: the one that it had at the start if
        it has ended and no record has told of it; empty if it was never watched."""
        tgid = process % (1 << 32)
        member = self._map.read_one(process)
        if member is None:  # it runs, or it is not known when it was born
            member = self._map.read_one(tgid)
        return self._at_start.get(tgid, (b"", 0))[0] if member is None else bytes(member["comm"])

    def group_of(self, process: int) -> int:
        """The group of one process, likewise; 0 if it was never watched."""
        tgid = process % (1 << 32)
        member = self._map.read_one(process)
        if member is None:
            member = self._map.read_one(tgid)
        return self._at_start.get(tgid, (b"", 0))[1] if member is None else int(member["group"])

    def groups_of(
        self, members: Members, tgids: NDArray[Any], born: NDArray[Any]
    ) -> NDArray[np.uint32]:
        """The groups of TGIDS that were BORN then, all of shape (n,): by MEMBERS, or as they were
        when the processes ended. 0 for one that is not known."""
        return self._ended.groups_of(members, tgids, born)

    def forget(self, ended: NDArray[np.uint64]) -> None:
        """Removes the names of processes that have ended: ENDED of `Members`."""
        if len(ended):
            self._map.delete(ended)


def _member(process: Process, state: State, group: int) -> tuple[bytes, int, int, int, int]:
    return _name(process), state, 0, 0, group


def _name(process: Process) -> bytes:
    return process.comm.encode(errors="replace")[:COMM_BYTES]
