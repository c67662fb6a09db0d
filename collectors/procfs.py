"""Processes as /proc shows them."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
# Of the fields after the command name in /proc/PID/stat, from 0.
_STAT_THREADS: Final = 17
_STAT_STARTTIME: Final = 19
_COMM_BYTES: Final = 15  # those of kernel threads may be followed by more


def running_tgids() -> list[int]:
    """The ids of all processes on this machine."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


@dataclass(frozen=True, slots=True)
class Stat:
    """A process as /proc/PID/stat has it."""

    comm: bytes
    start_ticks: int  # since boot
    has_ended: bool  # and nobody has waited for it yet


def stat_of(tgid: int) -> Stat | None:
    """A process; None for one that nobody has to wait for any more, or that is hidden."""
    try:
        text = (PROC / str(tgid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    before, _, after = text.rpartition(b")")
    fields = after.split()
    # The first thread of several may end before the others.
    has_ended = fields[0] in b"ZX" and int(fields[_STAT_THREADS]) <= 1
    comm = before.partition(b"(")[2][:_COMM_BYTES]
    return Stat(comm, int(fields[_STAT_STARTTIME]), has_ended)


def comm_of(tgid: int) -> str | None:
    """A process's command name; None for a process that has ended or is hidden."""
    try:
        return (PROC / str(tgid) / "comm").read_text(errors="replace").removesuffix("\n")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def start_time_of(tgid: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that has ended or is
    hidden."""
    found = stat_of(tgid)
    return found.start_ticks if found else None


def children_of(tgid: int) -> list[int]:
    """The processes whose parent a process is; none for one that has ended, or where the kernel
    does not list them (CONFIG_PROC_CHILDREN)."""
    children: list[int] = []
    try:
        for task in (PROC / str(tgid) / "task").iterdir():
            children += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return children


def clock_ticks() -> int:
    """The time since boot, as `start_time_of` gives it."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def thread_group_of(tid: int) -> int | None:
    """The process that a thread belongs to; None for a thread that has ended or is hidden."""
    try:
        status = (PROC / str(tid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    match = re.search(r"^Tgid:\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else None


def is_hidden(pid: int) -> bool:
    """Whether a process that /proc does not show exists all the same."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
