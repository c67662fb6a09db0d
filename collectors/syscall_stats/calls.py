"""Single system calls: rows made from the kernel's records by array, not by event."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import CLOCK
from coral.collectors.columns import Strings
from coral.collectors.contract import EventRows
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.targets import Targets, comm_text, process_keys
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_STRINGS: Final = 4096
_NUMBERS: Final = syscall_table.NR_COMPAT + syscall_table.NR_UNKNOWN + 1
_NAMED, _ENDED = 2, 3  # enum change of targets.bpf.h


class CallRows:
    """Makes the rows of one session; keeps the names that they point to.

    The session's records tell of each process before its first call, and of its new name when it
    has one. A process that ran at the start is looked up when it is first seen; all are, again,
    when there was no room for such a record.
    """

    def __init__(self, targets: Targets, sample_every: int) -> None:
        self._targets = targets
        self._sample_every = sample_every
        self._names: dict[int, bytes] = {}  # command names by process
        self._untold = 0
        self._forget_strings()

    def _forget_strings(self) -> None:
        self._strings = Strings()
        self._of_number = np.full(_NUMBERS, -1, np.int32)
        self._forget_processes()

    def _forget_processes(self) -> None:
        self._keys = np.empty(0, np.uint64)  # processes, sorted
        self._of_key = np.empty(0, np.uint32)  # index of the command name, for each of `_keys`

    def rows(self, records: NDArray[Any], changes: NDArray[Any]) -> EventRows:
        """The rows of RECORDS, struct syscall_call of shape (n,), which it changes: to Unix time,
        and to indices of names. CHANGES are the struct process_change of the same drain."""
        if len(self._strings) > _MOST_STRINGS:
            self._forget_strings()
        if (untold := self._targets.untold_changes) != self._untold:
            self._untold = untold
            self._names.clear()
            self._forget_processes()
        if len(changes):
            self._learn(changes)
        if len(records):
            records["ended_ns"] = CLOCK.unix_ns(records["ended_ns"])
            records["syscall"] = self._syscall_indices(records["syscall_number"])
            records["comm"] = self._comm_indices(process_keys(records["pid"], records["born"]))
        if len(changes):
            self._forget(changes)
        return EventRows(pb.SyscallCall, records, self._strings.table, self._sample_every)

    def _syscall_indices(self, numbers: NDArray[Any]) -> NDArray[np.int32]:
        indices: NDArray[np.int32] = self._of_number[numbers]
        if (indices < 0).any():
            for number in np.unique(numbers[indices < 0]).tolist():
                self._of_number[number] = self._strings.index(syscall_table.name_of(number))
            indices = self._of_number[numbers]
        return indices

    def _comm_indices(self, keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
        found, known = self._look_up(keys)
        if not known.all():
            self._add(np.unique(keys[~known]))
            found, _ = self._look_up(keys)
        return self._of_key[found]

    def _look_up(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if not len(self._keys):
            return np.zeros(len(keys), np.intp), np.zeros(len(keys), bool)
        found = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return found, self._keys[found] == keys

    def _add(self, keys: NDArray[np.uint64]) -> None:
        comms = [self._name_of(key) for key in keys.tolist()]
        indices = np.array([self._strings.index(comm_text(comm)) for comm in comms], np.uint32)
        order = np.argsort(merged := np.concatenate([self._keys, keys]))
        self._keys = merged[order]
        self._of_key = np.concatenate([self._of_key, indices])[order]

    def _name_of(self, key: int) -> bytes:
        if key not in self._names:
            self._names[key] = self._targets.name_of(key)
        return self._names[key]

    def _learn(self, changes: NDArray[Any]) -> None:
        keys = process_keys(changes["tgid"], changes["born"])
        self._names.update(zip(keys.tolist(), changes["comm"].tolist(), strict=True))
        self._drop(keys[changes["change"] == _NAMED])

    def _forget(self, changes: NDArray[Any]) -> None:
        ended = changes[changes["change"] == _ENDED]
        keys = process_keys(ended["tgid"], ended["born"])
        for key in keys.tolist():
            self._names.pop(key, None)
        self._drop(keys)

    def _drop(self, keys: NDArray[np.uint64]) -> None:
        if len(keys):
            kept = ~np.isin(self._keys, keys)
            self._keys, self._of_key = self._keys[kept], self._of_key[kept]
