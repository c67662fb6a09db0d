"""A ring buffer of long records whose length varies: a struct, and a tail of any number of words.

Tails are not taken apart: a drain copies the ring's memory once, and says where in the copy each
record's tail begins. Such records are some kilobytes long, so there are few, and jumping from one
to the next costs less than the arrays with which `records` finds many short ones.
"""

from __future__ import annotations

import mmap
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.records import MOST_BYTES, WORD, RecordKind
from coral.bpf.buffers.ring import RingReader
from coral.bpf.libbpf import BpfError

_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_LENGTH: Final = (1 << 30) - 1
_TAIL: Final = "tail"


class LongRecords(NamedTuple):
    """The records of a drain in order: their structs, of shape (n,), and the memory that they were
    in, of shape (m,). The member `tail` of each is where its tail begins in `words`."""

    structs: NDArray[Any]
    words: NDArray[np.uint64]


class LongRingReader(RingReader):
    """The consumer of a ring whose records are all of KIND, whose struct has a member `tail` for
    the reader to fill in."""

    def __init__(self, fd: int, ring_bytes: int, kind: RecordKind) -> None:
        super().__init__(fd, ring_bytes, (kind,))
        self._kind = kind
        self._number = kind.head & 0xFFFFFFFF

    @property
    def dtype(self) -> np.dtype[Any]:
        """The layout of the structs."""
        return self._kind.dtype

    def drain_long(self, most_bytes: int = MOST_BYTES) -> LongRecords:
        """See `RingReader.drain`. Raises `BpfError` for a record of another kind, or that is
        shorter than its struct, or whose length is not that of its frame."""
        kind = self._kind
        pending = min(self.pending_bytes, max(most_bytes, kind.size + WORD))
        if not pending:
            return LongRecords(np.empty(0, kind.dtype), np.empty(0, np.uint64))
        self._barrier()
        at = mmap.PAGESIZE + self._read % self.capacity_bytes
        memory = np.ndarray((self.pending_bytes // WORD,), np.uint64, self._producer_pages, at)
        starts, words, last = frames_in(memory.data, pending // WORD)
        self._barrier()  # headers mark their records as complete
        copied = memory[:words].copy()
        structs = np.empty(len(starts), kind.dtype)
        if starts:
            begins = np.array(starts, np.intp)
            self._check(copied, begins)
            room = words - kind.size // WORD + 1
            view = np.ndarray((room,), kind.plain, copied.data, 0, (WORD,))
            structs = view[begins].view(kind.dtype)
            structs[_TAIL] = begins + kind.size // WORD
        self._barrier()
        if words:
            self._consumer[0] = self._read + WORD * last
            self._read += WORD * words
        return LongRecords(structs, copied)

    def _check(self, words: NDArray[np.uint64], begins: NDArray[np.intp]) -> None:
        lengths = words[begins - 1] & np.uint64(_LENGTH)
        heads = words[begins].view(np.uint32).reshape(-1, 2)
        wrong = (heads[:, 0] != self._number) | (heads[:, 1] != lengths)
        wrong |= heads[:, 1] < self._kind.size
        if wrong.any():
            number, length = heads[wrong.argmax()].tolist()
            raise BpfError(
                f"a record of kind {number} with {length} bytes, where there may be "
                f"{self._kind.name} of at least {self._kind.size}"
            )


def frames_in(memory: memoryview, most_words: int) -> tuple[list[int], int, int]:
    """Where complete records begin in the first MOST_WORDS words of MEMORY, in words; how many
    words they take with their headers, and where the last frame begins. At least one is found,
    however long it is; none that a program is still writing or has discarded."""
    starts: list[int] = []
    at = last = 0
    while at < most_words:
        header = memory[at]
        if header & _BUSY:
            break
        end = at + 1 + ((header & _LENGTH) + WORD - 1) // WORD
        if end > most_words and at:
            break
        if not header & _DISCARDED:
            starts.append(at + 1)
        last, at = at, end
    return starts, at, last
