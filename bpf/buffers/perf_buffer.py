"""A BPF perf buffer drained in bulk: no Python per event.

For kernels that have no ring buffer map (before 5.8). There is one ring per CPU, not mapped twice
as a ring buffer is: a record may begin at the end of the memory and continue at its start, so each
drain copies what it takes into one piece. Layout: perf_event_open(2) and the kernel's
include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ctypes import byref, c_uint32
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.barrier import memory_barrier
from coral.bpf.buffers.maps import fdinfo
from coral.bpf.buffers.perf_event import open_perf_event
from coral.bpf.buffers.records import (
    FILLING_SHARE,
    MOST_BYTES,
    WORD,
    Finder,
    RecordKind,
    Records,
    merged,
)
from coral.bpf.libbpf import BpfError, call

_BPF_MAP_TYPE_PERF_EVENT_ARRAY: Final = 4
_ONLINE_CPUS: Final = Path("/sys/devices/system/cpu/online")

_PERF_TYPE_SOFTWARE: Final = 1
_PERF_COUNT_SW_BPF_OUTPUT: Final = 10
_PERF_SAMPLE_RAW: Final = 1 << 10
_PERF_FORMAT_LOST: Final = 1 << 4
_ATTR_DISABLED: Final = 1 << 0
_ATTR_WATERMARK: Final = 1 << 14
_PERF_EVENT_IOC_ENABLE: Final = 0x2400

# struct perf_event_mmap_page
_DATA_HEAD_AT: Final = 1024
_DATA_TAIL_AT: Final = 1032
_DATA_OFFSET_AT: Final = 1040

# struct perf_event_header as one number: type in the low half, then misc, then size.
_HEADER_BYTES: Final = 8
_TYPE_MASK: Final = np.uint64(0xFFFF_FFFF)
_SIZE_SHIFT: Final = np.uint64(48)
_MOST_SIZE: Final = 0xFFFF
_MOST_WAKEUP: Final = 0xFFFF_FFFF
_TYPE_AND_SIZE: Final = np.uint64(0xFFFF_0000_FFFF_FFFF)
_PERF_RECORD_LOST: Final = 2
_PERF_RECORD_SAMPLE: Final = 9
_RAW_AT: Final = _HEADER_BYTES + 4  # behind the u32 length of the raw data
_LOST_BYTES: Final = 24
_LOST_AT: Final = _HEADER_BYTES + 8  # behind the u64 id


class _PerfFraming:
    """A word of type, misc and size; for a sample, the length of the data, the record, padding to
    8 bytes."""

    record_at = _RAW_AT

    def words(self, headers: NDArray[np.uint64]) -> NDArray[np.int64]:
        lengths = headers >> _SIZE_SHIFT >> np.uint64(3)
        result: NDArray[np.int64] = np.maximum(lengths, np.uint64(1)).astype(np.int64)
        return result

    def frame_words(self, record_bytes: int) -> int:
        return (_RAW_AT + record_bytes + WORD - 1) // WORD

    def complete(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.ones(headers.shape, bool)  # the kernel publishes no others

    def filled(self, headers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = np.equal(headers & _TYPE_MASK, _PERF_RECORD_SAMPLE)
        return result

    significant = _TYPE_AND_SIZE

    def header(self, record_bytes: int) -> int:
        return _PERF_RECORD_SAMPLE | WORD * self.frame_words(record_bytes) << int(_SIZE_SHIFT)


FRAMING: Final = _PerfFraming()


def records_between(
    memory: NDArray[np.uint8],
    tail: int,
    head: int,
    finder: Finder,
    most_bytes: int | None = None,
) -> tuple[Sequence[tuple[RecordKind, NDArray[np.void]]], int, int]:
    """The records that FINDER finds in [TAIL, HEAD) of one ring, in order, the number of records
    that the kernel reports lost among them, and the position behind the last of them.

    MEMORY is the ring's data, of shape (2^n,). TAIL and HEAD are multiples of 8 and do not wrap, as
    in the kernel: a byte lies at its position modulo 2^n. It takes what fits into MOST_BYTES, and
    at least one record; records of other types are skipped. Raises `BpfError` for a sample that is
    of none of its kinds, and for data that no kernel writes.
    """
    length = head - tail
    if not length:
        return (), 0, tail
    if most_bytes is not None:
        length = min(length, max(most_bytes, _MOST_SIZE + 1) // WORD * WORD)
    start = tail % len(memory)
    taken = memory[start : start + length]
    if len(taken) < length:
        taken = np.concatenate((taken, memory[: length - len(taken)]))
    words = taken.view(np.uint64)
    found = finder.find(words, 0, len(words))
    if length == head - tail and found.words < len(words):
        raise _damage(int(words[found.words] >> _SIZE_SHIFT), WORD * (len(words) - found.words))
    end = tail + WORD * found.words
    if not len(found.others):
        return found.records, 0, end
    headers = words[found.others]
    sizes, types = headers >> _SIZE_SHIFT, headers & _TYPE_MASK
    damaged = (sizes < _HEADER_BYTES) | (sizes % WORD != 0)
    if damaged.any():
        at = int(damaged.argmax())
        raise _damage(int(sizes[at]), head - tail - WORD * int(found.others[at]))
    losses = found.others[(types == _PERF_RECORD_LOST) & (sizes >= _LOST_BYTES)]
    lost = int(words[losses + _LOST_AT // WORD].sum())
    return found.records, lost, end


def _damage(size: int, left: int) -> BpfError:
    return BpfError(f"a perf buffer is damaged: {size} bytes of {left} left")


def cpus_in(text: str) -> list[int]:
    """The CPUs of a list in the kernel's notation: `0-3,5`."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


class PerfReader:
    """The consumer of one perf event array, whose records are of KINDS.

    Every CPU that is online gets a ring of `bytes_per_cpu`, a power of two of pages; a CPU that
    comes online later has none, and what programs send there is refused them (ENOENT). A program is
    refused a record (ENOSPC) while its CPU's ring is full. Records of a kind without an order come
    CPU after CPU.

    `wakeup` is readable (epoll) once for every `wakeup_bytes` that the programs on a CPU have
    written, as soon as the next record exceeds them, however much is drained by then; 0 stands for
    a quarter of a ring. The kernel reports a wake-up only once: register `wakeup` with an event
    loop (another epoll) before programs write.

    Raises `BpfError` with the errno of the step that failed; nothing is left open then. There may
    be one reader per map, and two threads must not drain at once. The reader may outlive the map's
    object.
    """

    wakes_at_rest: Final = False

    def __init__(
        self,
        map_fd: int,
        bytes_per_cpu: int,
        kinds: Sequence[RecordKind],
        wakeup_bytes: int = 0,
        *,
        count_lost: bool = True,
    ) -> None:
        self._count_lost = count_lost
        pages, rest = divmod(bytes_per_cpu, mmap.PAGESIZE)
        if rest or pages.bit_count() != 1:
            raise BpfError(f"{bytes_per_cpu} bytes are no power of two of pages", errno.EINVAL)
        self._kinds = kinds
        self._finder = Finder(FRAMING, kinds, lambda: None)
        for kind in kinds:
            if WORD * FRAMING.frame_words(kind.size) > _MOST_SIZE:
                raise BpfError(f"records of {kind.size} bytes in a perf buffer", errno.E2BIG)
        self._barrier = memory_barrier()
        self._rings: list[CpuRing] = []
        self._lost = 0
        with ExitStack() as opened:
            with _step("opening an epoll for the perf buffer"):
                self.wakeup: select.epoll = opened.enter_context(select.epoll())
                # A duplicate, so that closing never affects a map that has reused the number.
                self._map_fd = os.dup(map_fd)
            opened.callback(os.close, self._map_fd)
            with _step("asking what map is to hold the perf events"):
                map_type = fdinfo(self._map_fd).get("map_type")
            if map_type != _BPF_MAP_TYPE_PERF_EVENT_ARRAY:  # others may have keys of any length
                raise BpfError("a perf buffer in a map that is no perf event array", errno.EINVAL)
            with _step("reading which CPUs are online"):
                online = cpus_in(_ONLINE_CPUS.read_text())
            wakeup_bytes = wakeup_bytes or min(bytes_per_cpu // FILLING_SHARE, _MOST_WAKEUP)
            for cpu in online:
                self._open(cpu, bytes_per_cpu, wakeup_bytes, opened)
            if not self._rings:
                raise BpfError("opening a perf event on any CPU", errno.ENODEV)
            self._opened = opened.pop_all()

    def _open(self, cpu: int, bytes_: int, wakeup_bytes: int, opened: ExitStack) -> None:
        try:
            fd, counts_lost = _open_event(cpu, wakeup_bytes, count_lost=self._count_lost)
        except OSError as error:
            if error.errno == errno.ENODEV:  # it has gone offline
                return
            raise BpfError(f"opening a perf event on CPU {cpu}", error.errno or 0) from error
        opened.callback(os.close, fd)
        with _step(f"mapping the perf buffer of CPU {cpu}"):
            ring = CpuRing(fd, bytes_, counts_lost=counts_lost)
        opened.callback(ring.close)
        with _step(f"enabling the perf event of CPU {cpu}"):
            self.wakeup.register(fd, select.EPOLLIN | select.EPOLLET)
            fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
        key, value = c_uint32(cpu), c_uint32(fd)
        refused = -call("bpf_map_update_elem", self._map_fd, byref(key), byref(value), 0)
        if refused:
            raise BpfError(f"putting the perf event of CPU {cpu} into its map", refused)
        opened.callback(call, "bpf_map_delete_elem", self._map_fd, byref(key))
        self._rings.append(ring)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def capacity_bytes(self) -> int:
        """The size of the rings of all CPUs."""
        return sum(len(ring.memory) for ring in self._rings)

    @property
    def memory_bytes(self) -> int:
        """The memory of the rings and their first pages."""
        return self.capacity_bytes + mmap.PAGESIZE * len(self._rings)

    @property
    def counts_lost(self) -> bool:
        """Whether losses are read from the kernel's counter (6.0 and later, unless `count_lost` is
        off); otherwise the kernel reports them before the next record."""
        return all(ring.counts_lost for ring in self._rings)

    @property
    def pending_bytes(self) -> int:
        """Bytes that programs have written and that have not been drained."""
        return sum(ring.head - ring.tail for ring in self._rings)

    @property
    def lost(self) -> int:
        """Records lost for lack of room since the start, as counted by the kernel.

        Since Linux 6.0 the count is read, by one system call per CPU, which interrupts that CPU.
        Earlier kernels report losses with the first record that fits again: a loss that no record
        has followed, or that has not been drained, is not known yet.
        """
        if self._rings:
            self._lost = sum(ring.lost() for ring in self._rings)
        return self._lost

    @property
    def filling(self) -> bool:
        """Whether a drain should not wait any longer: a CPU's ring is a quarter full."""
        return any(
            (ring.head - ring.tail) * FILLING_SHARE >= len(ring.memory) for ring in self._rings
        )

    def rest(self) -> bool:
        """Whether there is no record yet. The kernel wakes nobody for the next one."""
        return self.pending_bytes == 0

    def drain(self, most_bytes: int = MOST_BYTES) -> Records:
        """The records, as copies; frees their space. It takes about MOST_BYTES, and at least one
        record of each CPU that has any.

        Sorted by the kind's field `order_by`, equal ones in the order of CPUs, and on each CPU as
        written. Only the records of one drain are sorted: a record written after a CPU's ring was
        looked at is in the next drain. Raises `BpfError`, and frees nothing, for a record that is
        of none of the kinds, or of another length than its kind.
        """
        heads = [ring.head for ring in self._rings]
        self._barrier()
        share = most_bytes // max(len(heads), 1)
        found: list[tuple[RecordKind, NDArray[np.void]]] = []
        freed = []
        for ring, head in zip(self._rings, heads, strict=True):
            records, lost, end = records_between(ring.memory, ring.tail, head, self._finder, share)
            found += records
            freed.append((ring, end, lost))
        self._barrier()
        for ring, end, lost in freed:
            ring.give_back(end, lost)
        return merged(self._kinds, found, sort=True)

    def close(self) -> None:
        """Removes the rings from the map and unmaps them. Safe to call twice; `lost` stays."""
        with suppress(OSError):  # then the last value stays
            _ = self.lost
        self._rings.clear()
        self._opened.close()


class CpuRing:
    """The mapped ring of one CPU's perf event."""

    def __init__(self, fd: int, bytes_: int, *, counts_lost: bool) -> None:
        self._fd = fd
        self.counts_lost = counts_lost
        self._lost_told = 0
        self._pages = mmap.mmap(
            fd, mmap.PAGESIZE + bytes_, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        )
        (data_offset,) = np.frombuffer(self._pages, np.uint64, 1, _DATA_OFFSET_AT)
        self.memory = np.frombuffer(self._pages, np.uint8, bytes_, int(data_offset))
        self._head = np.frombuffer(self._pages, np.uint64, 1, _DATA_HEAD_AT)
        self._tail = np.frombuffer(self._pages, np.uint64, 1, _DATA_TAIL_AT)

    @property
    def head(self) -> int:
        """The number of bytes that the kernel has written in total."""
        return int(self._head[0])

    @property
    def tail(self) -> int:
        """The number of bytes whose space was freed."""
        return int(self._tail[0])

    def give_back(self, head: int, lost: int) -> None:
        """Frees the space up to HEAD; LOST is the number of losses reported on the way."""
        self._tail[0] = head
        self._lost_told += lost

    def lost(self) -> int:
        """Records for which the kernel had no room."""
        if not self.counts_lost:
            return self._lost_told
        return int.from_bytes(os.read(self._fd, 16)[8:], sys.byteorder)  # after the event's count

    def close(self) -> None:
        """Unmaps it."""
        del self.memory, self._head, self._tail
        # A traceback of a failed drain may still refer to the memory, which is then freed with it.
        with suppress(BufferError):
            self._pages.close()


def _open_event(cpu: int, wakeup_bytes: int, *, count_lost: bool) -> tuple[int, bool]:
    """The perf event that BPF programs on one CPU write to, and whether it counts its losses.
    Raises OSError."""
    for read_format in (_PERF_FORMAT_LOST, 0) if count_lost else (0,):
        try:
            fd = open_perf_event(
                _PERF_TYPE_SOFTWARE,
                _PERF_COUNT_SW_BPF_OUTPUT,
                cpu,
                sample_type=_PERF_SAMPLE_RAW,
                read_format=read_format,
                flags=_ATTR_DISABLED | _ATTR_WATERMARK,
                wakeup=wakeup_bytes,
            )
        except OSError as error:
            if error.errno != errno.EINVAL or not read_format:  # a kernel before 6.0 cannot count
                raise
        else:
            return fd, bool(read_format)
    raise AssertionError("the second try returns or raises")


@contextmanager
def _step(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BpfError(what, error.errno or errno.EIO) from error
