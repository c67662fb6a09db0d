"""The kernel's counters of system calls, read again and again: what each reading adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.maps import sum_over_cpus
from coral.collectors.syscall_stats import errno_class

LATENCY_FIRST: Final = 6  # as in syscall_stats.bpf.c
LATENCY_SLOTS: Final = 32
# Columns of a matrix of counters.
TOTAL_NS, ERRORS, LATENCY = 0, 1, 1 + len(errno_class.NAMES)
COLUMNS: Final = LATENCY + LATENCY_SLOTS


@dataclass(frozen=True, slots=True)
class Increase:
    """What one interval added, for n pairs of process and system call that made a call in it."""

    tgids: NDArray[np.uint32]  # (n,)
    numbers: NDArray[np.uint32]  # (n,)
    max_ns: NDArray[np.uint64]  # (n,)
    counters: NDArray[np.uint64]  # (n, 41): total ns, errors by class, latency slots

    @property
    def calls(self) -> NDArray[np.uint64]:
        """Calls, of shape (n,): the sum of the latency histogram."""
        calls: NDArray[np.uint64] = self.counters[:, LATENCY:].sum(axis=1)
        return calls

    def take(self, index: NDArray[Any]) -> Increase:
        """The rows at INDEX."""
        return Increase(
            self.tgids[index], self.numbers[index], self.max_ns[index], self.counters[index]
        )


class Counters:
    """The figures as they were read last, by key."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)  # sorted
        self._values = np.empty((0, COLUMNS), np.uint64)

    def advance(self, keys: NDArray[Any], values: NDArray[Any], interval: int) -> Increase:
        """Takes in what was read: keys (n,), values (n, CPUs); returns what it adds to the reading
        before."""
        packed = keys["tgid"].astype(np.uint64) << np.uint64(32) | keys["nr"]
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
        # A call whose time is in and which is not itself in yet: all of it next time.
        current[~active] -= increase[~active]
        self._keys, self._values = packed, current

        increase = increase[active]
        max_ns = _bounded(_max_ns(values[active], interval), increase)
        return Increase(keys["tgid"][active], keys["nr"][active], max_ns, increase)

    def forget(self, tgids: Sequence[int]) -> None:
        """Drops the figures of processes that have ended."""
        kept = ~np.isin(self._keys >> np.uint64(32), np.array(tgids, np.uint64))
        self._keys, self._values = self._keys[kept], self._values[kept]


def _max_ns(values: NDArray[Any], interval: int) -> NDArray[np.uint64]:
    """The greatest latency over all CPUs since INTERVAL began: values (n, CPUs) become (n,)."""
    recent = (interval & 0xFFFFFFFF, (interval + 1) & 0xFFFFFFFF)
    kept = np.where(np.isin(values["max_interval"], recent), values["max_ns"], 0)
    max_ns: NDArray[np.uint64] = kept.max(axis=(1, 2), initial=0)
    return max_ns


def _bounded(max_ns: NDArray[np.uint64], increase: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MAX_NS as far as the histogram and the total of the same calls allow it.

    Around the change of interval a maximum can fall to the neighbouring one, while its call does
    not: a few hundred microseconds lie between that change and the read.
    """
    latency = increase[:, LATENCY:]
    last_slot = LATENCY_SLOTS - 1 - (latency[:, ::-1] != 0).argmax(axis=1)
    edges = np.append(2 ** np.arange(LATENCY_FIRST, LATENCY_FIRST + LATENCY_SLOTS), 2**62)
    edges[0] = 0
    lower, upper = edges[last_slot].astype(np.uint64), edges[last_slot + 1].astype(np.uint64)
    return max_ns.clip(lower, np.minimum(upper, increase[:, TOTAL_NS]))
