"""Memory barriers between our accesses to shared pages and the kernel's, for both buffers."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

_SYS_MEMBARRIER: Final = {"aarch64": 283}
_MEMBARRIER_GLOBAL_EXPEDITED: Final = 1 << 1


def memory_barrier() -> Callable[[], None]:
    """A function to call between two accesses whose order matters.

    x86-64 keeps loads in order, stores in order, and a store behind earlier loads, which is
    sufficient: the function does nothing there. arm64 does not, and Python has no acquire and
    release; membarrier(2) replaces them, as a full barrier in the calling thread. It is the global
    command, which interrupts no process that has not registered for it: the private one does
    nothing in a process with one thread.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = ctypes.c_long(_SYS_MEMBARRIER[platform.machine()])
    command = ctypes.c_int(_MEMBARRIER_GLOBAL_EXPEDITED)

    def barrier() -> None:
        syscall(number, command, 0, 0)

    return barrier
