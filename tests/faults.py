"""Injects failures into the system calls of a running agent: the Python half of
tests/programs/preload/faults.c."""

from __future__ import annotations

import errno
import mmap
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tests.support import ROOT

_SOURCE: Final = ROOT / "tests/programs/preload/faults.c"
_KEPT: Final = 1024
_CONTROL: Final = np.dtype(
    [
        *((name, np.uint32) for name in ("failing", "from", "error", "call", "seen", "failed")),
        ("calls", np.uint32, (_KEPT,)),
    ]
)


class Call(IntEnum):
    """The calls that can fail: the system call in the upper half, its operation in the lower."""

    MAP_CREATE = 1 << 16 | 0
    MAP_LOOKUP = 1 << 16 | 1
    MAP_UPDATE = 1 << 16 | 2
    MAP_NEXT_KEY = 1 << 16 | 4
    PROG_LOAD = 1 << 16 | 5
    RAW_TRACEPOINT_OPEN = 1 << 16 | 17
    BTF_LOAD = 1 << 16 | 18
    MAP_LOOKUP_BATCH = 1 << 16 | 24
    LINK_CREATE = 1 << 16 | 28
    BPF = 1 << 16 | 0xFFFF  # any of them
    PERF_EVENT_OPEN = 2 << 16
    MMAP_FD = 3 << 16  # all of these map shared memory
    MMAP_ANONYMOUS = 3 << 16 | 1
    PERF_IOCTL = 4 << 16 | 0xFFFF
    EPOLL_CREATE = 5 << 16
    PIDFD_OPEN = 6 << 16
    THREAD_CREATE = 7 << 16


class Faults:
    """Makes calls fail in the processes that are started with `environment`; at first, none."""

    def __init__(self, directory: Path) -> None:
        library, control = directory / "faults.so", directory / "faults"
        subprocess.run(
            [
                *("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"),
                *(_SOURCE, "-o", library),
            ],
            check=True,
        )
        control.write_bytes(bytes(_CONTROL.itemsize))
        with control.open("r+b") as file:
            self._control: NDArray[Any] = np.frombuffer(mmap.mmap(file.fileno(), 0), _CONTROL)
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "FAULTS": str(control)}

    @contextmanager
    def failing(
        self,
        number: int,
        error: int = errno.ENOMEM,
        *,
        call: Call | None = None,
        all_after: bool = False,
        of_any_type: bool = False,
    ) -> Iterator[None]:
        """For the duration of the block, call NUMBER (from 1) fails with ERROR, and with ALL_AFTER
        all later ones do. With CALL, only calls of that type count, and fail, unless those after it
        fail OF_ANY_TYPE."""
        told = self._control[0]
        told["from"], told["error"], told["call"] = number, error, call or 0
        told["seen"] = told["failed"] = 0
        told["failing"] = 3 if of_any_type else 2 if all_after else 1
        try:
            yield
        finally:
            told["failing"] = 0

    @property
    def failed(self) -> int:
        """How many calls failed in the last block."""
        return int(self._control["failed"][0])

    @property
    def seen(self) -> int:
        """How many calls in the last block could have failed."""
        return int(self._control["seen"][0])

    def call(self, number: int) -> int:
        """The type of call NUMBER in the last block."""
        return int(self._control["calls"][0, number - 1])
