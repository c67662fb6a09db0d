"""The kernel's connections: what each reading adds to the one before, as arrays.

A connection is identified by its socket's address and the time it was found. Every reading has it
while it is open, and it comes once more, through the ring, when it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# Upper bounds of the histograms' slots, in microseconds, as in tcp_metrics.bpf.c; the last slot has
# none.
BOUNDS_US: Final = (
    20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    500_000, 1_000_000,
)  # fmt: skip
SLOTS: Final = len(BOUNDS_US) + 1

# Columns of a matrix of counters: the fields of pb.TcpCounters, then the slots of the histogram
# and the sum of what is in them.
NAMES: Final = (
    "bytes_sent", "bytes_acked", "bytes_received", "bytes_retransmitted", "segments_sent",
    "segments_received", "retransmits", "retransmits_fast", "retransmits_timeout",
    "retransmits_tail_probe", "retransmits_handshake", "resets_sent", "resets_received",
    "syn_ack_retransmits", "listen_drops",
)  # fmt: skip
_KINDS: Final = NAMES.index("retransmits_fast")
RTT: Final = len(NAMES)
RTT_SUM: Final = RTT + SLOTS  # of all samples, in microseconds
COLUMNS: Final = RTT_SUM + 1
LISTENER: Final = 3  # enum TcpRole

# The ring reports an end at once. A socket that its process keeps open after the end stays in the
# map: its end is reported from there after this time, when a reset that was the cause is surely
# counted, even if the virtual machine did not run in between.
_LINGERS_NS: Final = 250_000_000
# A reading leaves out a connection that changes meanwhile; the next one has it again. A connection
# that is missing from this many readings, for this long, has ended, and its record was lost.
_MOST_MISSING: Final = 3
_MISSING_NS: Final = 2_000_000_000
_KEY: Final = np.dtype("S16")  # numpy sorts byte strings, and not records
_NEVER: Final = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class Changes:
    """The n connections on which anything moved in one interval."""

    connections: NDArray[Any]  # (n,): struct tcp_connection
    total: NDArray[np.uint64]  # (n, COLUMNS)
    delta: NDArray[np.uint64]  # (n, COLUMNS)
    new: NDArray[np.bool_]  # (n,): not in any reading before
    established: NDArray[np.bool_]  # (n,): in this interval
    open: NDArray[Any]  # (m,): all that are open now

    def take(self, index: NDArray[Any]) -> Changes:
        """The connections at INDEX, of shape (m,)."""
        return Changes(
            self.connections[index],
            self.total[index],
            self.delta[index],
            self.new[index],
            self.established[index],
            self.open,
        )

    def __len__(self) -> int:
        return len(self.connections)


class Connections:
    """The figures of the last reading."""

    def __init__(self) -> None:
        self._keys = np.empty(0, _KEY)  # sorted
        self._totals = np.empty((0, COLUMNS), np.uint64)
        self._told = np.empty((0, 3), np.uint64)  # what is told beside the counters
        self._missing = np.empty(0, np.int64)
        self._read_at_ns = np.empty(0, np.int64)

    def advance(
        self, live: NDArray[Any], ended: NDArray[Any], now_ns: int, *, everything: bool = False
    ) -> Changes:
        """Takes in a reading of the map and one of the ring after it: both struct tcp_connection,
        of shape (n,). NOW_NS is on the programs' clock. With EVERYTHING, for the last reading, all
        open connections are among the changes."""
        live = live[live["pid"] > 0]  # others are still without an owner
        settled = now_ns - live["ended_ns"].astype(np.int64) > _LINGERS_NS
        waits = (live["ended_ns"] > 0) & ~settled & (not everything)
        self._missing[np.isin(self._keys, _keys_of(live[waits]))] = 0
        live = live[~waits & ~np.isin(_keys_of(live), _keys_of(ended))]
        read = np.concatenate([live, ended])
        in_map = np.arange(len(read)) < len(live)

        keys, current = _keys_of(read), counters_of(read)
        told = _told_of(read)
        before = _found_with(read)
        told_before = np.full_like(told, _NEVER)
        at, known = self._find(keys)
        before[known], told_before[known] = self._totals[at[known]], self._told[at[known]]
        current = _widened(current, before, known, _is_narrow(read.dtype))
        is_open = read["ended_ns"] == 0
        # A figure that moves while it is read may seem to fall. Those of ended ones are final.
        np.maximum(current, before, out=current, where=is_open[:, np.newaxis])
        delta = current - np.minimum(current, before)

        moved = delta.any(axis=1)
        changed = moved | (told != told_before).any(axis=1) | (everything & is_open)
        listens = read["role"] == LISTENER
        changed &= ~listens | moved | (read["backlog"] > read["backlog_limit"])
        established = (told[:, 2] > 0) & (~known | (told_before[:, 2] == 0))
        self._keep(keys[in_map], current[in_map], told[in_map], now_ns)
        return Changes(
            read[changed],
            current[changed],
            delta[changed],
            ~known[changed],
            established[changed],
            read[is_open & ~listens],
        )

    def _find(self, keys: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        if not len(self._keys):
            return np.zeros(len(keys), np.intp), np.zeros(len(keys), bool)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return at, self._keys[at] == keys

    def _keep(
        self,
        keys: NDArray[Any],
        totals: NDArray[np.uint64],
        told: NDArray[np.uint64],
        now_ns: int,
    ) -> None:
        missing = self._missing + 1
        at, known = self._find(keys)
        kept = (now_ns - self._read_at_ns < _MISSING_NS) | (missing <= _MOST_MISSING)
        kept[at[known]] = False
        keys = np.concatenate([self._keys[kept], keys])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._totals = np.concatenate([self._totals[kept], totals])[order]
        self._told = np.concatenate([self._told[kept], told])[order]
        read = len(keys) - int(kept.sum())
        self._missing = np.concatenate([missing[kept], np.zeros(read, np.int64)])[order]
        self._read_at_ns = np.concatenate(
            [self._read_at_ns[kept], np.full(read, now_ns, np.int64)]
        )[order]


def _keys_of(connections: NDArray[Any]) -> NDArray[Any]:
    pairs = np.empty((len(connections), 2), ">u8")
    pairs[:, 0], pairs[:, 1] = connections["sk"], connections["found_ns"]
    return pairs.view(_KEY).reshape(-1)


def _told_of(connections: NDArray[Any]) -> NDArray[np.uint64]:
    told = np.empty((len(connections), 3), np.uint64)
    told[:, 0] = connections["state"].astype(np.uint64) << np.uint64(8) | connections["end"]
    told[:, 1] = connections["pid"]
    told[:, 2] = connections["established_ns"]
    return told


def _found_with(connections: NDArray[Any]) -> NDArray[np.uint64]:
    """The counters of connections when they were found, of shape (n, COLUMNS)."""
    counters = np.zeros((len(connections), COLUMNS), np.uint64)
    for column, name in enumerate(NAMES):
        if f"found_{name}" in (connections.dtype.names or ()):
            counters[:, column] = connections[f"found_{name}"]
    return counters


def _is_narrow(record: np.dtype[Any]) -> NDArray[np.bool_]:
    """Which counters have 32 bits in struct tcp_connection, of shape (COLUMNS,)."""
    narrow = np.zeros(COLUMNS, bool)
    for column, name in enumerate(NAMES):
        narrow[column] = name in (record.names or ()) and record[name] == np.uint32
    narrow[_KINDS : _KINDS + 4] = narrow[RTT:RTT_SUM] = True
    return narrow


def _widened(
    current: NDArray[np.uint64],
    before: NDArray[np.uint64],
    known: NDArray[np.bool_],
    narrow: NDArray[np.bool_],
) -> NDArray[np.uint64]:
    """CURRENT, of shape (n, COLUMNS), with NARROW columns as 64-bit numbers: what was added to
    BEFORE, modulo 2^32. Of KNOWN connections, a figure that seems to fall a little is no
    wrap-around."""
    added = (current - before).astype(np.uint32)
    signed = np.where(known[:, np.newaxis], added.view(np.int32), added.astype(np.int64))
    return np.where(narrow, before + signed.astype(np.uint64), current)


def counters_of(connections: NDArray[Any]) -> NDArray[np.uint64]:
    """The counters of connections, of shape (n, COLUMNS)."""
    counters = np.empty((len(connections), COLUMNS), np.uint64)
    for column, name in enumerate(NAMES):
        if name in (connections.dtype.names or ()):
            counters[:, column] = connections[name]
    counters[:, _KINDS : _KINDS + 4] = connections["retransmits_of"]
    counters[:, RTT:RTT_SUM] = connections["rtt"]
    counters[:, RTT_SUM] = connections["rtt_sum_us"]
    return counters
