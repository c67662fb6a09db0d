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
# struct perf_event_attr in its first version, which every kernel accepts.
_ATTR: Final = struct.Struct("=IIQQQQQIIQ")
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
) -> int:
    """The descriptor of an event of every process on one CPU; the arguments are members of
    struct perf_event_attr. Raises OSError."""
    number = _SYS_PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"perf events on {platform.machine()} are not known here")
    attributes = _ATTR.pack(
        type_, _ATTR.size, config, period, sample_type, read_format, flags, wakeup, 0, 0
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
