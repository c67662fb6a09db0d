"""Single system calls: rows made from the kernel's records by array, not by event."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import CLOCK
from coral.collectors.columns import Strings
from coral.collectors.contract import EventRows
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.targets import Targets, comm_text
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_STRINGS: Final = 4096
_TARGETS_READ_EVERY_S: Final = 1.0
_NUMBERS: Final = syscall_table.NR_COMPAT + syscall_table.NR_UNKNOWN + 1


class CallRows:
    """Makes the rows of one session; keeps the names that they point to."""

    def __init__(self, targets: Targets, sample_every: int) -> None:
        self._targets = targets
        self._sample_every = sample_every
        self._targets_read_at = 0.0
        self._ended = np.empty(0, np.uint32)
        self._forget_names()

    def _forget_names(self) -> None:
        self._strings = Strings()
        self._of_number = np.full(_NUMBERS, -1, np.int32)
        self._pids = np.empty(0, np.uint32)  # sorted
        self._of_pid = np.empty(0, np.uint32)  # index of the command name, for each of `_pids`

    def rows(self, records: NDArray[Any]) -> EventRows:
        """The rows of RECORDS, struct syscall_call of shape (n,), which it changes: to Unix time,
        and to indices of names."""
        if len(self._strings) > _MOST_STRINGS:
            self._forget_names()
        if len(records):
            records["ended_ns"] = CLOCK.unix_ns(records["ended_ns"])
            records["syscall"] = self._syscall_indices(records["syscall_number"])
            records["comm"] = self._comm_indices(records["pid"])
        self._forget_ended()
        return EventRows(pb.SyscallCall, records, self._strings.table, self._sample_every)

    def _syscall_indices(self, numbers: NDArray[Any]) -> NDArray[np.int32]:
        indices: NDArray[np.int32] = self._of_number[numbers]
        if (indices < 0).any():
            for number in np.unique(numbers[indices < 0]).tolist():
                self._of_number[number] = self._strings.index(syscall_table.name_of(number))
            indices = self._of_number[numbers]
        return indices

    def _comm_indices(self, pids: NDArray[Any]) -> NDArray[np.uint32]:
        found, known = self._look_up(pids)
        if not known.all():
            self._learn(np.unique(pids[~known]))
            found, _ = self._look_up(pids)
        return self._of_pid[found]

    def _look_up(self, pids: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if not len(self._pids):
            return np.zeros(len(pids), np.intp), np.zeros(len(pids), bool)
        found = np.searchsorted(self._pids, pids).clip(max=len(self._pids) - 1)
        return found, self._pids[found] == pids

    def _learn(self, pids: NDArray[Any]) -> None:
        indices = self._strings.indices(self._targets.read().comms_of(pids), comm_text)
        order = np.argsort(merged := np.concatenate([self._pids, pids]))
        self._pids = merged[order]
        self._of_pid = np.concatenate([self._of_pid, indices])[order]

    def _forget_ended(self) -> None:
        """Now and then, forgets processes that have ended, and reads names again: an exec gives a
        process another one."""
        now = time.monotonic()
        if now - self._targets_read_at < _TARGETS_READ_EVERY_S:
            return
        self._targets_read_at = now
        members = self._targets.read()
        # A process that just exited may still have calls in the ring; forget it the next time.
        gone = np.intersect1d(members.ended, self._ended)
        self._ended = members.ended
        self._targets.forget(gone)
        kept = ~np.isin(self._pids, gone)
        self._pids, self._of_pid = self._pids[kept], self._of_pid[kept]
        named = np.isin(self._pids, members.tgids)
        comms = members.comms_of(self._pids[named])
        self._of_pid[named] = self._strings.indices(comms, comm_text)
