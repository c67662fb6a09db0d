"""What orders our reads and writes of shared pages against the kernel's. Both buffers need it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

_SYS_MEMBARRIER: Final = {"aarch64": 283}
_MEMBARRIER_PRIVATE_EXPEDITED: Final = 1 << 3
_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: Final = 1 << 4


def memory_barrier() -> Callable[[], None]:
    """A function to call once before the records are read and once before they are given back.

    x86-64 keeps loads in order, stores in order, and a store behind the loads before it, which is
    all that is asked: there it does nothing. arm64 does not; Python has no acquire and release, so
    membarrier(2) stands in: it is a full barrier in the calling thread.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = ctypes.c_long(_SYS_MEMBARRIER[platform.machine()])
    syscall(number, ctypes.c_int(_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED), 0, 0)

    def barrier() -> None:
        syscall(number, ctypes.c_int(_MEMBARRIER_PRIVATE_EXPEDITED), 0, 0)

    return barrier
