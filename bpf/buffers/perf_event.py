"""perf_event_open(2), on which perf buffers are built."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from ctypes import c_long
from typing import Final

_SYS_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241}
# struct perf_event_attr up to clockid, which kernels accept since 4.1: ten members from type to
# config1, then config2, branch_sample_type, sample_regs_user, sample_stack_user, clockid.
_ATTR: Final = struct.Struct("=IIQQQQQIIQQQQIi")

PERF_TYPE_HARDWARE: Final = 0
PERF_COUNT_HW_CPU_CYCLES: Final = 0
PERF_TYPE_SOFTWARE: Final = 1
PERF_COUNT_SW_CPU_CLOCK: Final = 0
PERF_COUNT_SW_DUMMY: Final = 9
# Bits of perf_event_attr: flags.
FLAG_DISABLED: Final = 1 << 0
FLAG_PINNED: Final = 1 << 2  # always counts while its CPU is on, or not at all
FLAG_EXCLUDE_HYPERVISOR: Final = 1 << 6
FLAG_EXCLUDE_IDLE: Final = 1 << 7
FLAG_MMAP: Final = 1 << 8  # report mappings of code
FLAG_FREQ: Final = 1 << 10
FLAG_WATERMARK: Final = 1 << 14  # `wakeup` counts bytes
FLAG_SAMPLE_ID_ALL: Final = 1 << 18
FLAG_EXCLUDE_GUEST: Final = 1 << 20
FLAG_MMAP2: Final = 1 << 23
FLAG_USE_CLOCKID: Final = 1 << 25
# Requests of ioctl(2) on an event.
IOC_ENABLE: Final = 0x2400
IOC_SET_BPF: Final = 0x40042408

_PERF_FLAG_FD_CLOEXEC: Final = 1 << 3
_EVERY_PROCESS, _NO_GROUP = -1, -1


def open_perf_event(
    type_: int,
    config: int,
    cpu: int,
    *,
    period: int = 1,
    sample_type: int = 0,
    read_format: int = 0,
    flags: int = 0,
    wakeup: int = 0,
    config1: int = 0,
    config2: int = 0,
    user_registers: int = 0,
    user_stack_bytes: int = 0,
    clock: int = 0,
) -> int:
    """The descriptor of an event of every process on one CPU; the arguments are members of
    struct perf_event_attr, PERIOD a frequency in Hz if `FLAG_FREQ` is set. Raises OSError."""
    number = _SYS_PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"perf events on {platform.machine()} are not known here")
    attributes = _ATTR.pack(
        *(type_, _ATTR.size, config, period, sample_type, read_format, flags, wakeup, 0, config1),
        *(config2, 0, user_registers, user_stack_bytes, clock),
    )
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(
        c_long(number),
        attributes,
        c_long(_EVERY_PROCESS),
        c_long(cpu),
        c_long(_NO_GROUP),
        c_long(_PERF_FLAG_FD_CLOEXEC),
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd
