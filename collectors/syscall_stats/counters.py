"""The kernel's counters of system calls: what each reading adds to the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.maps import sum_over_cpus
from coral.collectors.members import process_keys
from coral.collectors.syscall_stats import errno_class

LATENCY_FIRST: Final = 6  # as in syscall_stats.bpf.c
LATENCY_SLOTS: Final = 32
# Columns of a matrix of counters.
TOTAL_NS, ERRORS, LATENCY = 0, 1, 1 + len(errno_class.NAMES)
COLUMNS: Final = LATENCY + LATENCY_SLOTS


@dataclass(frozen=True, slots=True)
class Increase:
    """What one interval added, for the n pairs of process and system call with a call in it."""

    tgids: NDArray[np.uint32]  # (n,)
    born: NDArray[np.uint32]  # (n,): tells processes of one id apart
    numbers: NDArray[np.uint32]  # (n,)
    max_ns: NDArray[np.uint64]  # (n,)
    counters: NDArray[np.uint64]  # (n, 41): total ns, errors by class, latency slots

    @property
    def calls(self) -> NDArray[np.uint64]:
        """Calls, of shape (n,): the sum of the latency histogram."""
        calls: NDArray[np.uint64] = self.counters[:, LATENCY:].sum(axis=1)
        return calls

    def take(self, index: NDArray[Any]) -> Increase:
        """The rows at INDEX, of shape (m,)."""
        return Increase(
            self.tgids[index],
            self.born[index],
            self.numbers[index],
            self.max_ns[index],
            self.counters[index],
        )

    def with_others(self, others: Sequence[Increase]) -> Increase:
        """These rows, and those of OTHERS."""
        if not any(map(len, others)):
            return self
        every = [self, *others]
        return Increase(
            np.concatenate([each.tgids for each in every]),
            np.concatenate([each.born for each in every]),
            np.concatenate([each.numbers for each in every]),
            np.concatenate([each.max_ns for each in every]),
            np.concatenate([each.counters for each in every]),
        )

    def __len__(self) -> int:
        return len(self.tgids)

    def with_sum_of(self, rest: Increase) -> Increase:
        """These rows, and one more that adds up REST, of process 0 and number 0."""
        return Increase(
            np.append(self.tgids, np.uint32(0)),
            np.append(self.born, np.uint32(0)),
            np.append(self.numbers, np.uint32(0)),
            np.append(self.max_ns, rest.max_ns.max()),
            np.vstack([self.counters, rest.counters.sum(axis=0)]),
        )


class Counters:
    """The figures of the last reading, by key."""

    def __init__(self) -> None:
        self._keys = np.empty(0, _KEY)  # sorted
        self._values = np.empty((0, COLUMNS), np.uint64)

    def advance(self, keys: NDArray[Any], values: NDArray[Any], interval: int) -> Increase:
        """Takes in a reading, keys of shape (n,) and values of shape (n, CPUs); returns what it
        adds to the one before. INTERVAL is the programs' number of the interval that ended."""
        packed = _packed(keys)
        order = np.argsort(packed)
        packed, keys, values = packed[order], keys[order], values[order]
        current = np.empty((len(keys), COLUMNS), np.uint64)
        current[:, TOTAL_NS] = sum_over_cpus(values, "total_ns")
        current[:, ERRORS:LATENCY] = sum_over_cpus(values, "errors")
        current[:, LATENCY:] = sum_over_cpus(values, "latency")

        increase = current.copy()
        if len(self._keys) and len(packed):
            at = np.searchsorted(self._keys, packed).clip(max=len(self._keys) - 1)
            known = self._keys[at] == packed
            increase[known] -= self._values[at[known]]
        active = increase[:, LATENCY:].any(axis=1)
        # A call may be counted in the time and not yet in the histogram: count it whole next time.
        current[~active] -= increase[~active]
        self._keys, self._values = packed, current

        increase = increase[active]
        max_ns = _bounded(_max_ns(values[active], interval), increase)
        keys = keys[active]
        return Increase(keys["tgid"], keys["born"], keys["nr"], max_ns, increase)

    def forget(self, processes: NDArray[np.uint64]) -> None:
        """Drops the figures of PROCESSES, keys by `process_keys` of shape (m,), which have
        ended."""
        read = np.frombuffer(self._keys.tobytes(), ">u4").reshape(-1, 3)
        kept = ~np.isin(process_keys(read[:, 0], read[:, 1]), processes)
        self._keys, self._values = self._keys[kept], self._values[kept]


_KEY: Final = np.dtype("S12")  # numpy sorts byte strings, and not records


def _packed(keys: NDArray[Any]) -> NDArray[Any]:
    """KEYS, struct syscall_key of shape (n,), in a form that numpy sorts."""
    parts = np.empty((len(keys), 3), ">u4")
    parts[:, 0], parts[:, 1], parts[:, 2] = keys["tgid"], keys["born"], keys["nr"]
    return parts.view(_KEY).reshape(-1)


def _max_ns(values: NDArray[Any], interval: int) -> NDArray[np.uint64]:
    """The greatest latency over all CPUs since INTERVAL began, of shape (n,), for VALUES of shape
    (n, CPUs)."""
    recent = (interval & 0xFFFFFFFF, (interval + 1) & 0xFFFFFFFF)
    kept = np.where(np.isin(values["max_interval"], recent), values["max_ns"], 0)
    max_ns: NDArray[np.uint64] = kept.max(axis=(1, 2), initial=0)
    return max_ns


def _bounded(max_ns: NDArray[np.uint64], increase: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MAX_NS, within the bounds that the histogram and the total of the same calls set.

    When the interval changes, a maximum can land in the interval beside that of its call: a few
    hundred microseconds pass between the change and the reading.
    """
    latency = increase[:, LATENCY:]
    last_slot = LATENCY_SLOTS - 1 - (latency[:, ::-1] != 0).argmax(axis=1)
    edges = np.append(2 ** np.arange(LATENCY_FIRST, LATENCY_FIRST + LATENCY_SLOTS), 2**62)
    edges[0] = 0
    lower, upper = edges[last_slot].astype(np.uint64), edges[last_slot + 1].astype(np.uint64)
    return max_ns.clip(lower, np.minimum(upper, increase[:, TOTAL_NS]))
