"""The processes of a session as its map in the kernel has them, as arrays: struct member of
bpf/include/targets.bpf.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.collectors.hubs import FIRST_ENDED


@dataclass(frozen=True, slots=True)
class Members:
    """The n processes in one reading of a session's map: those that run, and those that have ended
    and still have a name. A process is known by its id and by when it was born, because an id can
    go from a process that has ended to another one."""

    keys: NDArray[np.uint64]  # (n,), sorted: the id of one that runs; with `born` if it has ended
    comms: NDArray[np.bytes_]  # (n,): their command names
    groups: NDArray[np.uint32]  # (n,): of cgroups, see `cgroups.Below`; 0 where none are told apart

    @property
    def ended(self) -> NDArray[np.uint64]:
        """Those that have ended, as `process_keys` gives them."""
        return self.keys[self.keys >= FIRST_ENDED]

    def comms_of(self, tgids: NDArray[Any], born: NDArray[Any] | int = 0) -> NDArray[np.bytes_]:
        """The command names of TGIDS that were BORN then, all of shape (m,); empty for a process
        that is not here."""
        if not len(self.keys):
            return np.zeros(len(tgids), self.comms.dtype)
        names = self._at(self.comms, process_keys(tgids, born))
        running = self._at(self.comms, tgids.astype(np.uint64))
        return np.where(names != b"", names, running)

    def ended_groups_of(self, tgids: NDArray[Any], born: NDArray[Any]) -> NDArray[np.uint32]:
        """The groups of TGIDS that were BORN then and have ended, all of shape (m,); 0 for a
        process that is not here, or runs."""
        return self._groups_at(process_keys(tgids, born))

    def running_groups_of(self, tgids: NDArray[Any]) -> NDArray[np.uint32]:
        """The groups of TGIDS that run, both of shape (m,), whenever they were born; 0 for a
        process that is not here, or has ended."""
        return self._groups_at(tgids.astype(np.uint64))

    def _groups_at(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        if not len(self.keys):
            return np.zeros(len(keys), np.uint32)
        return self._at(self.groups, keys)

    def __or__(self, more: Members) -> Members:
        keys, at = np.unique(np.concatenate([self.keys, more.keys]), return_index=True)
        return Members(
            keys,
            np.concatenate([self.comms, more.comms])[at],
            np.concatenate([self.groups, more.groups])[at],
        )

    def _at(self, values: NDArray[Any], keys: NDArray[np.uint64]) -> NDArray[Any]:
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, values[at], np.zeros(1, values.dtype))


def process_keys(tgids: NDArray[Any], born: NDArray[Any] | int) -> NDArray[np.uint64]:
    """Processes as numbers, of shape (n,): BORN and the id."""
    shifted = np.asarray(born).astype(np.uint64) << np.uint64(32)
    keys: NDArray[np.uint64] = shifted | tgids.astype(np.uint64)
    return keys


def comm_text(comm: bytes) -> str:
    """A command name as text; in the kernel it ends at its first zero."""
    return comm.split(b"\0")[0].decode(errors="replace")
