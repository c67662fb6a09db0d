"""A BPF ring buffer drained in bulk: no Python per event.

The kernel maps the data pages twice in a row, so that the readable data is always contiguous.
Layout: the kernel's Documentation/bpf/ringbuf.rst and include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.barrier import memory_barrier
from coral.bpf.buffers.maps import MapMemory
from coral.bpf.buffers.records import (
    FILLING_SHARE,
    MOST_BYTES,
    WORD,
    Finder,
    RecordKind,
    Records,
    merged,
)

_BUSY: Final = np.uint64(1 << 31)
_DISCARDED: Final = np.uint64(1 << 30)
_LENGTH: Final = np.uint64((1 << 30) - 1)
_LENGTH_AND_FLAGS: Final = np.uint64((1 << 32) - 1)


class _RingFraming:
    """A word of length and flags, the record, padding to 8 bytes."""

    record_at = WORD

    def words(self, headers: NDArray[np.uint64]) -> NDArray[np.int64]:
        return ((headers & _LENGTH) + np.uint64(2 * WORD - 1) >> np.uint64(3)).view(np.int64)

    def frame_words(self, record_bytes: int) -> int:
        return (record_bytes + 2 * WORD - 1) // WORD

    def complete(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = np.equal(headers & _BUSY, 0)
        return result

    def filled(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = np.equal(headers & _DISCARDED, 0)
        return result

    significant = _LENGTH_AND_FLAGS

    def header(self, record_bytes: int) -> int:
        return record_bytes


FRAMING: Final = _RingFraming()


class RingReader:
    """The consumer of one ring buffer map of RING_BYTES, whose records are of KINDS.

    A drain keeps the space of its last record: the kernel wakes a reader for the next record only
    if that reader has freed everything, by `rest`. Programs also wake it once a quarter of the ring
    is waiting (records.bpf.h). One
    reader to a ring; it is not safe to drain from two threads at once. The reader may outlive the
    map's object. Raises OSError; nothing is left open then.
    """

    wakes_at_rest: Final = True

    def __init__(self, fd: int, ring_bytes: int, kinds: Sequence[RecordKind]) -> None:
        self.capacity_bytes = ring_bytes
        self._memory, self._memory_bytes = MapMemory(), 0
        self._kinds = kinds
        self._barrier = memory_barrier()
        self._finder = Finder(FRAMING, kinds, self._barrier)
        page = mmap.PAGESIZE
        with ExitStack() as opened:
            # A duplicate: callers close theirs once the map is where programs find it.
            self.fd = os.dup(fd)
            opened.callback(os.close, self.fd)
            # Readable once for each wake-up, not whenever there is data; polling it makes it
            # unreadable again. Closed with the ring.
            self.wakeup: select.epoll = opened.enter_context(select.epoll())
            self.wakeup.register(self.fd, select.EPOLLIN | select.EPOLLET)
            self._consumer_page = opened.enter_context(
                mmap.mmap(self.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            )
            self._producer_pages = opened.enter_context(
                mmap.mmap(
                    self.fd, page + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
                )
            )
            self._opened = opened.pop_all()
        self._consumer = np.frombuffer(self._consumer_page, np.uint64, 1)
        self._read = int(self._consumer[0])
        self._producer = np.frombuffer(self._producer_pages, np.uint64, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pending_bytes(self) -> int:
        """Bytes that programs have reserved and that have not been drained; 0 once closed."""
        if not hasattr(self, "_consumer"):
            return 0
        return int(self._producer[0]) - self._read

    @property
    def filling(self) -> bool:
        """Whether a drain should not wait any longer."""
        return self.pending_bytes * FILLING_SHARE >= self.capacity_bytes

    @property
    def lost(self) -> int:
        """0: only the programs know what a ring buffer refused."""
        return 0

    @property
    def memory_bytes(self) -> int:
        """What the kernel charges for the ring; the last known figure if there is no descriptor
        left to read it, or once closed."""
        if hasattr(self, "_consumer"):
            with suppress(OSError):
                told = self._memory.read(self.fd)
                self._memory_bytes = max(told, self.capacity_bytes)  # before 6.4 it tells 0
        return self._memory_bytes

    def drain(self, most_bytes: int = MOST_BYTES) -> Records:
        """Complete records, in order, as copies; frees the space of all but the last one.

        It takes what fits into MOST_BYTES, and at least one record; stops at the first record that
        a program is still writing; leaves out records that a program discarded. Empty once the
        reader is closed. Raises `BpfError`, and frees nothing, for a record that is of none of the
        kinds, or of another length than its kind.
        """
        pending = self.pending_bytes
        if not pending:
            return merged(self._kinds, ())
        self._barrier()
        start = mmap.PAGESIZE + self._read % self.capacity_bytes
        words = pending // WORD
        if pending > most_bytes:
            first = np.ndarray((1,), np.uint64, self._producer_pages, start)
            words = max(most_bytes // WORD, int(FRAMING.words(first)[0]))
        found = self._finder.find(self._producer_pages, start, words)
        self._barrier()
        if found.words:
            self._consumer[0] = self._read + WORD * found.last
            self._read += WORD * found.words
        return merged(self._kinds, found.records)

    def rest(self) -> bool:
        """Frees everything that was drained, so that the kernel wakes the reader for the next
        record; whether there is none yet, so that waiting makes sense."""
        if not hasattr(self, "_consumer"):
            return True
        self._consumer[0] = self._read
        # Between the write and the read below there has to be a full barrier, as a program writes
        # its record and then reads our position; a system call, and the interpreter's lock that is
        # let go and taken for it, are one. Wake-ups from before are taken back.
        self.wakeup.poll(0)
        return self.pending_bytes == 0

    def close(self) -> None:
        """Unmaps the ring. Safe to call twice."""
        if hasattr(self, "_consumer"):
            del self._consumer, self._producer
            self._opened.close()
