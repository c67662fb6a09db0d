"""What a worker gives up before it looks at a stranger's text: memory, time, files, privileges.

DuckDB's own locks are the first wall (`worker.py`); this is the second, of the kernel, for the day
that somebody finds a way through the first.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
# include/uapi/asm-generic/unistd.h: the same numbers on every architecture.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
# include/uapi/linux/landlock.h
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_FS_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_NET_RIGHTS: Final = 0b11  # bind and connect TCP, from version 4 on
_NICE: Final = 10
_OOM_FIRST: Final = "1000"


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when PARENT ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def step_back() -> None:
    """Others come first: for the CPU, and when memory runs out it is this process that goes."""
    os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_FIRST)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """At most so much more memory than now, and so much CPU time; no file is written, no process
    started, no core dumped."""
    data_kib = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    most = data_kib * 1024 + memory_bytes
    for what, value in (
        (resource.RLIMIT_DATA, most),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (least, least))


def confine(files: Iterable[str]) -> bool:
    """From now on only FILES can be opened, to be read, and no TCP port reached. Whether the kernel
    can do that (Landlock, from 5.13 on)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = _FS_RIGHTS[min(version, max(_FS_RIGHTS))]
    with_net = version >= 4  # noqa: PLR2004
    ruleset = _Ruleset(rights, _NET_RIGHTS if with_net else 0)
    size = ctypes.sizeof(ruleset) if with_net else ctypes.sizeof(ctypes.c_uint64)
    ruleset_fd = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if ruleset_fd < 0:
        return False
    try:
        for path in files:
            with suppress(OSError):  # it was deleted: the statement will say so
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rule = _PathBeneath(_READ_FILE, fd)
                libc.syscall(
                    _LANDLOCK_ADD_RULE, ruleset_fd, _RULE_PATH_BENEATH, ctypes.byref(rule), 0
                )
                os.close(fd)
        return bool(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset_fd, 0) == 0)
    finally:
        os.close(ruleset_fd)
