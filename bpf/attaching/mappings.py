"""Mappings of code as records: which file a process has mapped to execute, and where.

The kernel reports them to perf events (PERF_RECORD_MMAP2): those of execve(2) and of the dynamic
linker, of dlopen(3), and memory that is made executable. A program at the end of the system call
mmap would see neither those of execve nor the file's path and number. The reports are of every
process of the machine, because such events have no filter; those of other processes are skipped by
their first bytes. Layout: the kernel's include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Container, Iterable, Iterator
from operator import attrgetter
from typing import Final, NamedTuple, Self

from coral.bpf.attaching.each_cpu import CpuEvent, EachCpu, online_cpus
from coral.bpf.buffers.perf_event import (
    FLAG_MMAP,
    FLAG_MMAP2,
    FLAG_SAMPLE_ID_ALL,
    FLAG_USE_CLOCKID,
    FLAG_WATERMARK,
    PERF_COUNT_SW_DUMMY,
    PERF_TYPE_SOFTWARE,
)
from coral.bpf.libbpf import BpfError

_RING_BYTES: Final = 256 << 10  # about 1,500 reports
_SAMPLE_TIME: Final = 1 << 2
_RECORD_LOST: Final = 2
_RECORD_MMAP2: Final = 10
_HEADER: Final = struct.Struct("=IHHI")  # type, misc, size; of a mapping then the tgid
_LOST: Final = struct.Struct("=8xQQ")  # id, lost
# tid; start, length, offset in the file; major and minor number; inode, generation; prot, flags
_MMAP2: Final = struct.Struct("=12xIQQQIIQQII")
_TIME: Final = struct.Struct("=Q")  # at the end


class MappedCode(NamedTuple):
    """Executable memory of a process, which begins at `start` and has `length` bytes.

    `device` and `inode` are those of the file, as in /proc/PID/maps, and 0 if there is none; its
    content begins at `file_offset`. The path is as the process sees it. `time_ns` is of
    CLOCK_MONOTONIC.
    """

    time_ns: int
    tgid: int
    start: int
    length: int
    file_offset: int
    device: int
    inode: int
    path: str

    @property
    def is_of_exec(self) -> bool:
        """Whether this is the vDSO, which each execve(2) maps once, after the program itself."""
        return self.path == "[vdso]"


class MappingReader:
    """Reads the mappings of code that processes make from now on; older ones are in
    /proc/PID/maps. Rings of `bytes_per_cpu`, a power of two of pages. If WAKES, each report makes a
    descriptor of `fds` readable. Raises `AttachError`."""

    def __init__(
        self,
        bytes_per_cpu: int = _RING_BYTES,
        *,
        wakes: bool = False,
        online: Callable[[], Iterable[int]] = online_cpus,
    ) -> None:
        flags = FLAG_MMAP | FLAG_MMAP2 | FLAG_SAMPLE_ID_ALL | FLAG_USE_CLOCKID
        self.lost = 0  # reports that did not fit into a ring, as the kernel told so far
        self._left: list[bytes] = []  # of rings whose CPU is gone

        def open_(cpu: int) -> CpuEvent:
            return CpuEvent(
                cpu,
                PERF_TYPE_SOFTWARE,
                PERF_COUNT_SW_DUMMY,
                ring_bytes=bytes_per_cpu,
                sample_type=_SAMPLE_TIME,
                flags=flags | (FLAG_WATERMARK if wakes else 0),
                wakeup=int(wakes),
                clock=time.CLOCK_MONOTONIC,
            )

        self._events = EachCpu(open_, retire=self._retire, online=online)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fds(self) -> list[int]:
        """The descriptors of its events, one for each CPU."""
        return [event.fd for event in self._events]

    def _retire(self, event: CpuEvent) -> None:
        self._left.append(event.take().tobytes())

    def follow(self) -> None:
        """See `EachCpu.follow`; once a second is enough."""
        self._events.follow()

    def drain(self, watched: Callable[[], Container[int]]) -> list[MappedCode]:
        """The mappings that processes among WATCHED made since the last drain, by time.

        WATCHED returns process ids. It is called after the rings were read, so that it can know
        the processes that were born before. A loss is known once a later report has fitted.
        Raises `BpfError`.
        """
        taken = self._left + [event.take().tobytes() for event in self._events]
        self._left.clear()
        if not any(taken):
            return []
        wanted = watched()
        found = [mapped for data in taken for mapped in self._decoded(data, wanted)]
        return sorted(found, key=attrgetter("time_ns"))

    def _decoded(self, data: bytes, wanted: Container[int]) -> Iterator[MappedCode]:
        position = 0
        while position < len(data):
            type_, _, size, tgid = _HEADER.unpack_from(data, position)
            end = position + size
            if size < _HEADER.size or end > len(data):
                raise BpfError(f"a ring of mappings is damaged: a record of {size} bytes")
            if type_ == _RECORD_MMAP2 and tgid in wanted:
                yield _mapped(tgid, data[position:end])
            elif type_ == _RECORD_LOST:
                self.lost += _LOST.unpack_from(data, position)[1]
            position = end

    def close(self) -> None:
        """Closes the events. Safe to call twice."""
        self._events.close()


def _mapped(tgid: int, record: bytes) -> MappedCode:
    _, start, length, offset, major, minor, inode, *_ = _MMAP2.unpack_from(record)
    path = record[_MMAP2.size : -_TIME.size].partition(b"\0")[0]
    return MappedCode(
        time_ns=_TIME.unpack(record[-_TIME.size :])[0],
        tgid=tgid,
        start=start,
        length=length,
        file_offset=offset,
        device=os.makedev(major, minor),
        inode=inode,
        path=os.fsdecode(path),
    )
