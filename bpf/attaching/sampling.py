"""A program that runs at a fixed frequency on every CPU, for profiles."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

from coral.bpf.attaching.each_cpu import CpuEvent, EachCpu, online_cpus
from coral.bpf.buffers.perf_event import (
    FLAG_EXCLUDE_IDLE,
    FLAG_FREQ,
    PERF_COUNT_SW_CPU_CLOCK,
    PERF_TYPE_SOFTWARE,
)
from coral.bpf.libbpf import AttachError

_MOST_HZ: Final = Path("/proc/sys/kernel/perf_event_max_sample_rate")  # the kernel may lower it


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
