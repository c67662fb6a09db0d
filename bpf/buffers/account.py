"""A session's account in the kernel (account.bpf.h): what programs wanted to report for it, and
what they could not, by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.maps import HashMap
from coral.bpf.buffers.program_stats import read_program_stats
from coral.bpf.libbpf import BpfError, call, possible_cpus

# A reason that no program can count itself: the kernel skipped it.
PROGRAM_MISSED: Final = "PROGRAM_MISSED"
_PREFIX: Final = "LOSS_"


class Counts(NamedTuple):
    """What one reading of an account adds to the one before. `lost` is by reason and has no zeros;
    a reason is a constant of `enum loss` without its prefix, or `PROGRAM_MISSED`."""

    produced: int
    seen: int
    lost: Mapping[str, int]


class Account:
    """The account of the session in one slot, which begins with the first event after this object
    is made.

    `accounts` is the map; `reasons` are the constants of `enum loss`, by name. `programs` are the
    descriptors of the programs whose runs the session needs: those that the kernel skips are losses
    of each session that uses the programs. Of `twins`, one that runs is sufficient: what each of
    them has missed is an upper bound.
    """

    def __init__(
        self,
        accounts: HashMap,
        slot: int,
        reasons: Mapping[str, int],
        programs: Sequence[int] = (),
        twins: Sequence[int] = (),
    ) -> None:
        self._fd, self._programs, self._twins = accounts.fd, tuple(programs), tuple(twins)
        self._key = np.array(slot, np.uint32)
        words = accounts.value_dtype.itemsize // 8
        self._values = np.zeros((possible_cpus(), words), np.int64)
        self._addresses = self._key.ctypes.data, self._values.ctypes.data
        self._reasons = {
            name.removeprefix(_PREFIX): number
            for name, number in reasons.items()
            if name.startswith(_PREFIX)
        }
        self._before, self._missed_before = self._read()

    def read(self) -> Counts:
        """Everything since the last reading, of all CPUs. Raises `BpfError`."""
        total, missed = self._read()
        added = (total - self._before).tolist()
        self._before, missed_before, self._missed_before = total, self._missed_before, missed
        lost = {name: added[2 + number] for name, number in self._reasons.items()}
        lost[PROGRAM_MISSED] = missed - missed_before
        return Counts(added[0], added[1], {name: count for name, count in lost.items() if count})

    def _read(self) -> tuple[NDArray[np.int64], int]:
        error = -call("bpf_map_lookup_elem", self._fd, *self._addresses)
        if error:
            raise BpfError("reading an account", error)
        missed = sum(map(recursion_misses, self._programs))
        missed += min(map(recursion_misses, self._twins), default=0)
        return self._values.sum(axis=0), missed


def recursion_misses(program: int) -> int:
    """How often the kernel has skipped the program with the descriptor PROGRAM because it was
    running on that CPU already; 0 before Linux 5.12, which does not count that. Raises
    `BpfError`."""
    return read_program_stats(program).recursion_misses
