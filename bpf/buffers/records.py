"""Records of several kinds and sizes, found in a buffer's memory in bulk: no Python per record.

A buffer holds frames: a header of 8 bytes with the frame's size, and a record, which begins with
`struct record_head` (records.bpf.h). Records of one kind in a row, which is most of what there is,
are one strided array: one comparison, one copy. What follows in mixed order is found by jumping
from header to header with arrays of jumps.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from coral.bpf.libbpf import BpfError

WORD: Final = 8
_HEAD_BYTES: Final = 8  # struct record_head
# What a drain takes at most unless its caller says otherwise: about 3 ms of work for all that
# follows, for records of 64 bytes.
MOST_BYTES: Final = 1 << 20
FILLING_SHARE: Final = 4  # of a buffer, from which on it should be drained: as in records.bpf.h
_JUMPS: Final = 3  # doublings: jumps of 8 frames
_BLOCK_WORDS: Final = 1 << 14

_NO_OTHERS: Final = np.empty(0, np.intp)

Records = Mapping[str, NDArray[Any]]
"""The records of a drain by the name of their struct, each of shape (n,), in order."""

Memory = mmap.mmap | NDArray[np.uint64]


class RecordKind:
    """One kind of records: `struct NAME` with the layout DTYPE, and NUMBER in its head. `order_by`
    names the field to sort records of different CPUs by."""

    def __init__(
        self, name: str, number: int, dtype: np.dtype[Any], order_by: str | None = None
    ) -> None:
        if order_by is not None:
            dtype[order_by]  # raises a KeyError with its name
        self.name, self.dtype, self.order_by = name, dtype, order_by
        self.size = dtype.itemsize
        self.head = _head(number, self.size)
        # As plain bytes, which numpy copies whole in 4 ns; structures field by field, in 25 ns.
        self.plain = np.dtype(f"V{self.size}")


def _head(number: int, length: int) -> int:
    """A record's head as one word."""
    return int.from_bytes(
        number.to_bytes(4, sys.byteorder) + length.to_bytes(4, sys.byteorder), sys.byteorder
    )


class Framing(Protocol):
    """How a kind of buffer frames its records."""

    record_at: int  # the offset of a record in its frame

    def words(self, headers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The length of frames with HEADERS, of any shape, in words, at least 1."""

    def frame_words(self, record_bytes: int) -> int:
        """The length of the frame of a record, in words."""

    def complete(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether the frames may be read yet."""

    def filled(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether complete frames contain a record."""

    significant: np.uint64  # the bits of a header that tell its size, and if it is complete

    def header(self, record_bytes: int) -> int:
        """The significant bits of the header of a complete record of RECORD_BYTES."""


@dataclass(frozen=True)
class Found:
    """What was found: copies of records, by kind and in order; how many words they and the frames
    without a record take; where the last of all frames begins; and where those without a record
    do, in words."""

    records: Sequence[tuple[RecordKind, NDArray[np.void]]]
    words: int
    last: int
    others: NDArray[np.intp]


class Finder:
    """Finds records of KINDS in a buffer's memory. BARRIER keeps accesses to memory in order."""

    def __init__(
        self, framing: Framing, kinds: Sequence[RecordKind], barrier: Callable[[], None]
    ) -> None:
        self._framing, self._kinds, self._barrier = framing, kinds, barrier
        self._frames = [
            (kind, framing.frame_words(kind.size), framing.header(kind.size)) for kind in kinds
        ]
        self._significant = int(framing.significant)

    def find(self, memory: Memory, start: int, words: int) -> Found:
        """The records in WORDS words of MEMORY from the byte START on, where a frame begins, up to
        the first frame that is not complete or not wholly there. Raises `BpfError` for a record
        that is of none of the kinds, or of another length than its kind."""
        framing = self._framing
        records = []
        done = last = 0
        if row := self._row(memory, start, words):
            records.append(row)
            step = framing.frame_words(row[0].size)
            done = len(row[1]) * step
            last = done - step
        if done == words:
            return Found(records, done, last, _NO_OTHERS)
        headers = np.ndarray((words - done,), np.uint64, memory, start + WORD * done)
        if not framing.complete(headers[:1])[0]:
            return Found(records, done, last, _NO_OTHERS)
        headers = headers.copy()
        starts = _frames(headers, framing)
        found = headers[starts]
        complete = framing.complete(found)
        if not complete.all():
            starts, found = starts[: complete.argmin()], found[: complete.argmin()]
        self._barrier()  # the header marks its record as complete
        filled, lengths = framing.filled(found), framing.words(found)
        rest = _Rest(memory, start + WORD * done + framing.record_at, words - done)
        records += rest.sorted(starts[filled], lengths[filled], framing, self._kinds)
        others = starts[~filled] + done
        if len(starts):
            last = done + int(starts[-1])
            done = last + int(lengths[-1])
        return Found(records, done, last, others)

    def _row(
        self, memory: Memory, start: int, words: int
    ) -> tuple[RecordKind, NDArray[np.void]] | None:
        """The records that are of the same kind as the first, up to the first other frame."""
        record_at, significant = self._framing.record_at, self._framing.significant
        for kind, step, header in self._frames:
            frames, stride = words // step, (step * WORD,)
            headers = np.ndarray((frames,), np.uint64, memory, start, stride)
            if not frames or int(headers[0]) & self._significant != header:
                continue
            heads = np.ndarray((frames,), np.uint64, memory, start + record_at, stride)
            alike = headers & significant == header
            self._barrier()  # the header marks its record as complete
            alike &= heads == kind.head
            count = int(alike.argmin())
            if alike[count]:
                count = frames
            if count:
                at = start + record_at
                return kind, np.ndarray((count,), kind.plain, memory, at, stride).copy()
        return None


def _frames(headers: NDArray[np.uint64], framing: Framing) -> NDArray[np.intp]:
    """Where the frames of HEADERS begin, as indices of words: the first at 0, each where the one
    before ends, without one that is not wholly there."""
    parts, at = [np.empty(0, np.intp)], 0
    while at < len(headers):
        # In blocks: their arrays stay in the cache, and need no new pages.
        lengths = framing.words(headers[at : at + _BLOCK_WORDS])
        starts = _chain(lengths)
        parts.append(starts + at)
        at += int(starts[-1] + lengths[starts[-1]])
    starts = np.concatenate(parts)
    return starts[:-1] if at > len(headers) else starts


def _chain(steps: NDArray[np.int64]) -> NDArray[np.intp]:
    """The indices 0, steps[0], steps[0] + steps[steps[0]] and so on, as far as STEPS goes."""
    count = len(steps)
    following = np.empty(count + 1, np.intp)
    np.add(steps, np.arange(count), out=following[:count])
    np.minimum(following, count, out=following)
    following[count] = count
    jump = following
    for _ in range(_JUMPS):
        jump = jump.take(jump)
    far, at, anchors = jump.data, 0, []
    while at < count:
        anchors.append(at)
        at = far[at]
    chain = np.empty((len(anchors), 1 << _JUMPS), np.intp)
    reached = np.array(anchors, np.intp)
    for column in range(1 << _JUMPS):
        chain[:, column] = reached
        reached = following.take(reached)
    starts = chain.ravel()
    return starts[: starts.searchsorted(count)]


class _Rest:
    """Memory in which records begin at any word."""

    def __init__(self, memory: Memory, records_at: int, words: int) -> None:
        self._memory, self._records_at, self._words = memory, records_at, words

    def _at(self, starts: NDArray[np.intp], dtype: np.dtype[Any], record_at: int) -> NDArray[Any]:
        if not len(starts):
            return np.empty(0, dtype)
        room = (self._words * WORD - record_at - dtype.itemsize) // WORD + 1
        view = np.ndarray((room,), dtype, self._memory, self._records_at, (WORD,))
        found: NDArray[Any] = view[starts]
        return found

    def sorted(
        self,
        starts: NDArray[np.intp],
        lengths: NDArray[np.int64],
        framing: Framing,
        kinds: Sequence[RecordKind],
    ) -> Iterable[tuple[RecordKind, NDArray[np.void]]]:
        """The records of frames of LENGTHS words that begin at STARTS, by kind."""
        headed = lengths * WORD >= framing.record_at + _HEAD_BYTES
        heads = np.zeros(len(starts), np.uint64)
        heads[headed] = self._at(starts[headed], np.dtype(np.uint64), framing.record_at)
        known = np.zeros(len(starts), bool)
        for kind in kinds:
            of_kind = (heads == kind.head) & (lengths == framing.frame_words(kind.size))
            if of_kind.any():
                known |= of_kind
                yield kind, self._at(starts[of_kind], kind.plain, framing.record_at)
        if not known.all():
            wrong = int(known.argmin())
            number, length = np.array([heads[wrong]]).view(np.uint32).tolist()
            room = int(lengths[wrong]) * WORD - framing.record_at
            raise BpfError(
                f"a record of kind {number} with {length} bytes, in {room} with padding, where "
                f"there may be {', '.join(f'{kind.name} ({kind.size})' for kind in kinds)}"
            )


def merged(
    kinds: Sequence[RecordKind],
    parts: Iterable[tuple[RecordKind, NDArray[np.void]]],
    *,
    sort: bool = False,
) -> Records:
    """One array for each of KINDS from PARTS, in order or, if SORT, sorted by its `order_by`."""
    by_kind: dict[str, list[NDArray[np.void]]] = {kind.name: [] for kind in kinds}
    for kind, records in parts:
        by_kind[kind.name].append(records)
    return {kind.name: _joined(kind, by_kind[kind.name], sort=sort) for kind in kinds}


def _joined(kind: RecordKind, parts: list[NDArray[np.void]], *, sort: bool) -> NDArray[Any]:
    if not parts:
        return np.empty(0, kind.dtype)
    plain = parts[0] if len(parts) == 1 else np.concatenate(parts)
    records: NDArray[Any] = plain.view(kind.dtype)
    if kind.order_by is None or not sort:
        return records
    keys = records[kind.order_by]
    if (keys[1:] >= keys[:-1]).all():
        return records
    # take: a fifth of what an index costs, 1.3 ns a record
    return plain.take(keys.argsort(kind="stable")).view(kind.dtype)


class _Drained(Protocol):
    """What `drain_whole` needs of a reader."""

    @property
    def pending_bytes(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...

    def drain(self, most_bytes: int = ...) -> Records: ...


def drain_whole(reader: _Drained, most_bytes: int = MOST_BYTES) -> Records:
    """All records of READER that are there now, drained in parts so that other threads get their
    turn, and joined: sorted within each part. For callers that may block."""
    parts = [reader.drain(most_bytes)]
    for _ in range(reader.capacity_bytes // most_bytes):
        if not reader.pending_bytes:
            break
        parts.append(reader.drain(most_bytes))
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
