"""Processes as /proc shows them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_STAT_STARTTIME: Final = 19  # of the fields after the command name in /proc/PID/stat, from 0


def running_tgids() -> list[int]:
    """The ids of all processes on this machine."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def comm_of(tgid: int) -> str | None:
    """A process's command name; None for a process that has ended or is hidden."""
    try:
        return (PROC / str(tgid) / "comm").read_text(errors="replace").removesuffix("\n")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def start_time_of(tgid: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that has ended or is
    hidden."""
    try:
        text = (PROC / str(tgid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return int(text.rpartition(")")[2].split()[_STAT_STARTTIME])


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
