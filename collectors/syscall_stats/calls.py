"""Single system calls, from the kernel to rows: filled in and named by array, not by event."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap, RecordReader
from coral.bpf.buffers.maps import sum_over_cpus
from coral.collectors.contract import EventRows
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.targets import Targets
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_STRINGS: Final = 4096
_TARGETS_READ_EVERY_S: Final = 1.0


class CallReader:
    """Reads the buffer of one collector; keeps the names that its rows point to."""

    def __init__(
        self, records: RecordReader, account: HashMap, targets: Targets, sample_every: int
    ) -> None:
        self.records = records
        self._account = account
        self._targets = targets
        self._sample_every = sample_every
        self._lost = 0
        self._targets_read_at = 0.0
        self._ended: frozenset[int] = frozenset()
        self._forget_names()

    def _forget_names(self) -> None:
        self._strings: list[str] = []
        self._of_number = np.full(
            syscall_table.NR_COMPAT + syscall_table.NR_UNKNOWN + 1, -1, np.int32
        )
        self._pids = np.empty(0, np.uint32)  # sorted
        self._of_pid = np.empty(0, np.uint32)  # index of the command name, for each of `_pids`

    def drain(self) -> EventRows:
        """Every call that has ended since the last drain, as rows with Unix time and names."""
        if len(self._strings) > _MOST_STRINGS:
            self._forget_names()
        records = self.records.drain()
        if len(records):
            # One offset a batch: the two clocks drift by parts in a million.
            records["ended_ns"] += np.uint64(time.time_ns() - time.monotonic_ns())
            records["syscall"] = self._syscall_indices(records["syscall_number"])
            records["comm"] = self._comm_indices(records["pid"])
        self._forget_ended()
        return EventRows(pb.SyscallCall, records, tuple(self._strings), self._sample_every)

    def lost(self) -> int:
        """Records that the buffer refused since this was last asked. Programs know it, but for
        perf buffers before Linux 5.1, where the kernel alone does."""
        told = int(sum_over_cpus(self._account.read()[1], "lost")[0])
        total = max(told, self.records.lost)
        lost, self._lost = total - self._lost, total
        return lost

    def _syscall_indices(self, numbers: NDArray[Any]) -> NDArray[np.int32]:
        indices: NDArray[np.int32] = self._of_number[numbers]
        if (indices < 0).any():
            for number in np.unique(numbers[indices < 0]).tolist():
                self._of_number[number] = self._index(syscall_table.name_of(number))
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
        names, _ = self._targets.read()
        indices = [self._index(names.get(pid, "")) for pid in pids.tolist()]
        order = np.argsort(merged := np.concatenate([self._pids, pids]))
        self._pids = merged[order]
        self._of_pid = np.concatenate([self._of_pid, np.array(indices, np.uint32)])[order]

    def _index(self, name: str) -> int:
        if name not in self._strings:
            self._strings.append(name)
        return self._strings.index(name)

    def _forget_ended(self) -> None:
        """Now and then: processes that have ended, and the names that others may have by now."""
        now = time.monotonic()
        if now - self._targets_read_at < _TARGETS_READ_EVERY_S:
            return
        self._targets_read_at = now
        names, ended = self._targets.read()
        # Of one that has just ended, calls may still be in the ring: it goes the next time.
        gone = [tgid for tgid in ended if tgid in self._ended]
        self._ended = frozenset(ended)
        self._targets.forget(gone)
        kept = ~np.isin(self._pids, gone)
        self._pids, self._of_pid = self._pids[kept], self._of_pid[kept]
        for position, pid in enumerate(self._pids.tolist()):
            if pid in names:  # an exec gives a process another name
                self._of_pid[position] = self._index(names[pid])
