"""A program that runs at a fixed frequency on every CPU, for profiles.

One timer of one period would be in step with any work of that period, and show one part of it only.
So `SpreadClock` has several timers for each CPU, whose periods have no common multiple: together
they fire as often as one would, at no more cost, and work can be in step with one of them at most.
`CycleCounter` has one event for each CPU, because counters of the hardware are few.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final, Self

from coral.bpf.attaching.each_cpu import CpuEvent, EachCpu, online_cpus
from coral.bpf.buffers.perf_event import (
    FLAG_EXCLUDE_GUEST,
    FLAG_EXCLUDE_HYPERVISOR,
    FLAG_EXCLUDE_IDLE,
    FLAG_FREQ,
    FLAG_PINNED,
    PERF_COUNT_HW_CPU_CYCLES,
    PERF_COUNT_SW_CPU_CLOCK,
    PERF_TYPE_HARDWARE,
    PERF_TYPE_SOFTWARE,
)
from coral.bpf.libbpf import AttachError

_NS_PER_S: Final = 1_000_000_000
# How often the timers of a CPU fire, relative to one another, and by how much of that each varies
# by chance, so that CPUs and sessions differ.
_SPREAD: Final = (1.0, 1.093, 1.217, 1.361)
_SPREAD_VARIES: Final = 0.03
MARKS: Final = 64
"""How many numbers a period can carry."""

_MOST_HZ: Final = Path("/proc/sys/kernel/perf_event_max_sample_rate")  # the kernel may lower it
_CPUS: Final = Path("/sys/devices/system/cpu")
_CPU_INFO: Final = Path("/proc/cpuinfo")
_MHZ: Final = re.compile(r"^cpu MHz\s*: ([0-9.]+)$", re.MULTILINE)
_USUAL_CLOCK_HZ: Final = 2_500_000_000  # of a CPU that tells nothing


def cpu_clock(cpu: int, freq_hz: int, **options: int) -> CpuEvent:
    """An event that samples what runs on a CPU, FREQ_HZ times a second, unless the CPU is idle.

    It is the software cpu-clock, a timer of the kernel: it exists on every machine, virtual ones
    too, and cannot run out as hardware counters can. While interrupts are off, it is late. OPTIONS
    are those of `CpuEvent`.
    """
    flags = options.pop("flags", 0) | FLAG_FREQ | FLAG_EXCLUDE_IDLE
    return CpuEvent(
        cpu, PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, period=freq_hz, flags=flags, **options
    )


def sample_with(
    program_fd: int, freq_hz: int, *, online: Callable[[], Iterable[int]] = online_cpus
) -> EachCpu:
    """Attaches a `perf_event` program to a `cpu_clock` of every CPU. Raises `AttachError`."""
    limit_hz = int(_MOST_HZ.read_text())
    if not 0 < freq_hz <= limit_hz:
        raise AttachError(
            f"sampling at {freq_hz} Hz: kernel.perf_event_max_sample_rate allows 1 to {limit_hz}",
            errno.EINVAL,
        )
    return EachCpu(partial(cpu_clock, freq_hz=freq_hz, program_fd=program_fd), online=online)


class SpreadClock:
    """Timers of every CPU that run a `perf_event` program FREQ_HZ times a second in all, unless the
    CPU is idle. Each timer's period in nanoseconds, which the program finds as `sample_period`, is
    MARK modulo `MARKS`. Raises `AttachError`."""

    def __init__(
        self,
        program_fd: int,
        freq_hz: int,
        mark: int,
        *,
        online: Callable[[], Iterable[int]] = online_cpus,
    ) -> None:
        self._freq_hz, self._mark, self._program_fd = freq_hz, mark, program_fd
        self._online, self._cpus = online, tuple(online())
        self._periods_ns: dict[int, list[int]] = {}  # by CPU
        with ExitStack() as failing:
            self._timers = [
                failing.enter_context(EachCpu(partial(self._open, number), online=self._known))
                for number in range(len(_SPREAD))
            ]
            failing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, number: int, cpu: int) -> CpuEvent:
        if cpu not in self._periods_ns:
            self._periods_ns[cpu] = periods_ns(self._freq_hz, self._mark)
        return CpuEvent(
            cpu,
            PERF_TYPE_SOFTWARE,
            PERF_COUNT_SW_CPU_CLOCK,
            program_fd=self._program_fd,
            period=self._periods_ns[cpu][number],
            flags=FLAG_EXCLUDE_IDLE,
        )

    def _known(self) -> Iterable[int]:
        return self._cpus

    def follow(self) -> None:
        """See `EachCpu.follow`. A CPU stops all of its timers: one of them is asked."""
        try:
            self._cpus = tuple(self._online())
        except OSError as error:
            raise AttachError("reading which CPUs are online", error.errno or 0) from error
        first, *others = self._timers
        before = set(first)
        first.follow()
        if set(first) != before:
            for timer in others:
                timer.follow()

    def close(self) -> None:
        """Stops the timers. Safe to call twice."""
        for timer in self._timers:
            timer.close()


class CycleCounter:
    """Counters of CPU cycles, one for each CPU, that run a `perf_event` program every
    `period_cycles`. That is FREQ_HZ times a second on a CPU at its highest clock, and less often on
    one that is slower or halts. `period_cycles` is the same on all CPUs, so that all samples stand
    for equally many cycles, and MARK modulo `MARKS`; the program finds it as `sample_period`.
    Raises `AttachError`, with ENOENT where there are no such counters."""

    def __init__(
        self,
        program_fd: int,
        freq_hz: int,
        mark: int,
        *,
        online: Callable[[], Iterable[int]] = online_cpus,
    ) -> None:
        self.period_cycles = period_cycles(highest_clock_hz(), freq_hz, mark)
        self._events = EachCpu(
            partial(cycle_counter, period=self.period_cycles, program_fd=program_fd), online=online
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow(self) -> None:
        """See `EachCpu.follow`."""
        self._events.follow()

    def close(self) -> None:
        """Stops the counters. Safe to call twice."""
        self._events.close()


def cycle_counter(cpu: int, period: int, **options: int) -> CpuEvent:
    """An event that samples what runs on a CPU each time that it has counted PERIOD cycles; a CPU
    that halts counts none. OPTIONS are those of `CpuEvent`.

    The cycles of virtual machines and of a hypervisor are left out: what ran there has no stack
    here. `exclude_idle` is not set, because arm64 refuses it. A counter that the kernel would share
    out by time is not accepted, since its samples would be a part of the truth that nothing tells.
    """
    flags = options.pop("flags", 0) | FLAG_PINNED | FLAG_EXCLUDE_HYPERVISOR | FLAG_EXCLUDE_GUEST
    event = CpuEvent(
        cpu, PERF_TYPE_HARDWARE, PERF_COUNT_HW_CPU_CYCLES, period=period, flags=flags, **options
    )
    try:
        if not event.is_counting():
            raise OSError(errno.EBUSY, "all counters of the CPU are in use")
    except OSError:
        event.close()
        raise
    return event


def highest_clock_hz(cpus: Path = _CPUS, info: Path = _CPU_INFO) -> int:
    """The highest clock of this machine's CPUs in Hz: what the governor of the clock says in the
    folder CPUS, otherwise what x86 says in the file INFO, otherwise a usual one."""
    found = []
    for path in cpus.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        with suppress(OSError, ValueError):
            found.append(int(path.read_text()) * 1000)
    if not found:
        with suppress(OSError):
            text = info.read_text()
            found = [round(float(mhz) * 1e6) for mhz in _MHZ.findall(text)]
    return max(found, default=0) or _USUAL_CLOCK_HZ


def period_cycles(clock_hz: int, freq_hz: int, mark: int) -> int:
    """A period that is reached about FREQ_HZ times a second by CLOCK_HZ, and is MARK modulo
    `MARKS`. It varies by chance, so that sessions differ."""
    varied = random.uniform(1 - _SPREAD_VARIES, 1 + _SPREAD_VARIES)  # noqa: S311
    return round(varied * clock_hz / freq_hz / MARKS) * MARKS + mark


def periods_ns(freq_hz: int, mark: int) -> list[int]:
    """Periods of timers that fire FREQ_HZ times a second together, each MARK modulo `MARKS`."""
    shares = [one * random.uniform(1 - _SPREAD_VARIES, 1 + _SPREAD_VARIES) for one in _SPREAD]  # noqa: S311
    periods = [_NS_PER_S * sum(shares) / (share * freq_hz) for share in shares]
    return [round(period / MARKS) * MARKS + mark for period in periods]
