"""A perf event on every CPU that is online, kept so while CPUs come and go.

The kernel removes the events of a CPU that goes offline, and does not restore them when it comes
back: its descriptors stay open, but their time stands still. So `EachCpu.follow` compares the CPUs
with what is attached; call it now and then, for example before each drain.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.barrier import memory_barrier
from coral.bpf.buffers.perf_buffer import CpuRing, cpus_in
from coral.bpf.buffers.perf_event import (
    FLAG_DISABLED,
    IOC_ENABLE,
    IOC_SET_BPF,
    open_perf_event,
)
from coral.bpf.libbpf import AttachError

_ONLINE: Final = Path("/sys/devices/system/cpu/online")
_FORMAT_TOTAL_TIME_ENABLED: Final = 1 << 0
_READ: Final = struct.Struct("=QQ")  # the event's count, and its time in ns


class CpuEvent:
    """One perf event of all processes on one CPU, enabled.

    `program_fd` is a program to run at each sample, `ring_bytes` the size of a ring for its records
    (a power of two of pages), `attributes` those of `open_perf_event`. Raises OSError with nothing
    left open, with ENODEV if the CPU is offline.
    """

    def __init__(
        self,
        cpu: int,
        type_: int,
        config: int,
        *,
        program_fd: int | None = None,
        ring_bytes: int = 0,
        flags: int = 0,
        **attributes: int,
    ) -> None:
        self.cpu = cpu
        self._ring: CpuRing | None = None
        self._barrier = memory_barrier()
        self._enabled_ns = 0
        self.fd = open_perf_event(
            type_,
            config,
            cpu,
            read_format=_FORMAT_TOTAL_TIME_ENABLED,
            flags=flags | FLAG_DISABLED,
            **attributes,
        )
        try:
            if ring_bytes:
                self._ring = CpuRing(self.fd, ring_bytes, counts_lost=False)
            if program_fd is not None:
                fcntl.ioctl(self.fd, IOC_SET_BPF, program_fd)
            fcntl.ioctl(self.fd, IOC_ENABLE, 0)
        except OSError:
            self.close()
            raise

    def has_stopped(self) -> bool:
        """Whether the event's time has stood still since the last call: its CPU was offline. Or the
        event cannot be read any more, because the kernel has given it up."""
        try:
            told = os.read(self.fd, _READ.size)
        except OSError:
            return True
        if len(told) < _READ.size:
            return True
        _, enabled_ns = _READ.unpack(told)
        before_ns, self._enabled_ns = self._enabled_ns, enabled_ns
        return bool(enabled_ns == before_ns)

    def is_counting(self) -> bool:
        """Whether the kernel has given the event what it counts with: one that is pinned reads as
        empty otherwise (perf_event_open(2))."""
        return bool(os.read(self.fd, _READ.size))

    def take(self) -> NDArray[np.uint8]:
        """The records in its ring, whole and in order, as a copy; frees their space. They begin
        with a struct perf_event_header each. Empty without a ring."""
        if self._ring is None:
            return np.empty(0, np.uint8)
        ring, tail, head = self._ring, self._ring.tail, self._ring.head
        if head == tail:
            return np.empty(0, np.uint8)
        self._barrier()
        begin, size = tail % len(ring.memory), head - tail
        first = ring.memory[begin : begin + size]
        data = np.concatenate((first, ring.memory[: size - len(first)]))
        self._barrier()
        ring.give_back(head, 0)
        return data

    def close(self) -> None:
        """Disables the event, which detaches its program. Safe to call twice."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def online_cpus() -> list[int]:
    """The CPUs that are online. Raises OSError."""
    return cpus_in(_ONLINE.read_text())


class EachCpu:
    """The events that OPEN makes, one for each CPU of ONLINE.

    `retire` gets an event whose CPU is gone before it is closed, to read the rest of its ring.
    Raises `AttachError`, with nothing left open, if a CPU that is online refuses its event.
    """

    def __init__(
        self,
        open_: Callable[[int], CpuEvent],
        *,
        retire: Callable[[CpuEvent], object] = lambda _: None,
        online: Callable[[], Iterable[int]] = online_cpus,
    ) -> None:
        self._open = open_
        self._retire = retire
        self._online = online
        self._events: dict[int, CpuEvent] = {}
        try:
            self.follow()
            if not self._events:
                raise AttachError("opening a perf event on any CPU", errno.ENODEV)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[CpuEvent]:
        return iter(self._events.values())

    @property
    def cpus(self) -> list[int]:
        """The CPUs with an event, ascending."""
        return sorted(self._events)

    def follow(self) -> None:
        """Opens an event on each CPU that is online and has none or one that stopped; closes those
        of CPUs that are offline. Interrupts every CPU once. Raises `AttachError` for a CPU that
        refuses its event; those of other CPUs stay."""
        try:
            online = set(self._online())
        except OSError as error:
            raise AttachError("reading which CPUs are online", error.errno or 0) from error
        for cpu, event in list(self._events.items()):
            if cpu not in online or event.has_stopped():
                del self._events[cpu]
                try:
                    self._retire(event)
                finally:
                    event.close()
        for cpu in sorted(online - self._events.keys()):
            try:
                self._events[cpu] = self._open(cpu)
            except OSError as error:
                if error.errno != errno.ENODEV:  # it has gone offline meanwhile
                    what = f"opening a perf event on CPU {cpu}"
                    raise AttachError(what, error.errno or 0) from error

    def close(self) -> None:
        """Closes every event. Safe to call twice."""
        while self._events:
            self._events.popitem()[1].close()
