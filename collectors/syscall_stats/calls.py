"""Single system calls: rows made from the kernel's records by array, not by event."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import CLOCK
from coral.collectors.columns import Strings
from coral.collectors.contract import EventRows
from coral.collectors.process_names import ProcessNames
from coral.collectors.resources import EventResources
from coral.collectors.syscall_stats import table as syscall_table
from coral.collectors.targets import Targets
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_STRINGS: Final = 4096
_NUMBERS: Final = syscall_table.NR_COMPAT + syscall_table.NR_UNKNOWN + 1


class CallRows:
    """Makes the rows of one session; keeps the names that they point to."""

    def __init__(self, targets: Targets, sample_every: int) -> None:
        self._sample_every = sample_every
        self._processes = ProcessNames(targets)
        self._resources = targets.event_resources()
        self._forget_strings()

    def _forget_strings(self) -> None:
        self._strings = Strings()
        self._of_number = np.full(_NUMBERS, -1, np.int32)
        self._processes.forget_indices()

    def rows(self, records: NDArray[Any], changes: NDArray[Any]) -> EventRows:
        """The rows of RECORDS, struct syscall_call of shape (n,), which it changes: to Unix time,
        and to indices of names. CHANGES are the struct process_change of the same drain."""
        if len(self._strings) > _MOST_STRINGS:
            self._forget_strings()
        self._processes.learn(changes)
        if len(records):
            records["ended_ns"] = CLOCK.unix_ns(records["ended_ns"])
            records["syscall"] = self._syscall_indices(records["syscall_number"])
            records["comm"] = self._processes.indices(
                records["pid"], records["born"], self._strings
            )
        self._processes.forget(changes)
        strings, every = self._strings.table, self._sample_every
        if not (resources := self._resources):
            return EventRows(pb.SyscallCall, records, strings, every)
        resources.begin(changes)
        records = _with_resources(records, resources)
        return EventRows(pb.SyscallCall, records, strings, every, resources.resources)

    def _syscall_indices(self, numbers: NDArray[Any]) -> NDArray[np.int32]:
        indices: NDArray[np.int32] = self._of_number[numbers]
        if (indices < 0).any():
            for number in np.unique(numbers[indices < 0]).tolist():
                self._of_number[number] = self._strings.index(syscall_table.name_of(number))
            indices = self._of_number[numbers]
        return indices


def _with_resources(records: NDArray[Any], resources: EventResources) -> NDArray[Any]:
    """RECORDS with the field `resource` in the place of `born`, which is of no more use."""
    of_row = resources.of_processes(records["pid"], records["born"])
    layout: Any = records.dtype
    names = ["resource" if name == "born" else name for name in layout.names]
    fields = [layout.fields[name] for name in layout.names]
    renamed = np.dtype(
        {
            "names": names,
            "formats": [field[0] for field in fields],
            "offsets": [field[1] for field in fields],
            "itemsize": layout.itemsize,
        }
    )
    found = records.view(renamed)
    found["resource"] = of_row
    return found
