"""What orders our reads and writes of shared pages against the kernel's. Both buffers need it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

_SYS_MEMBARRIER: Final = {"aarch64": 283}
_MEMBARRIER_GLOBAL_EXPEDITED: Final = 1 << 1


def memory_barrier() -> Callable[[], None]:
    """A function to call between two steps of reading that others must see, or have done, in order.

    x86-64 keeps loads in order, stores in order, and a store behind the loads before it, which is
    all that is asked: there it does nothing. arm64 does not; Python has no acquire and release, so
    membarrier(2) stands in: it is a full barrier in the calling thread. The global one, which
    interrupts no process that has not asked for it; the private one does nothing at all for a
    process of one thread.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = ctypes.c_long(_SYS_MEMBARRIER[platform.machine()])
    command = ctypes.c_int(_MEMBARRIER_GLOBAL_EXPEDITED)

    def barrier() -> None:
        syscall(number, command, 0, 0)

    return barrier
