"""Processes as /proc shows them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_READ_BYTES: Final = 16 << 10
_KERNEL_THREAD: Final = 0x0020_0000  # PF_KTHREAD of include/linux/sched.h
# Of the fields after the command name in /proc/PID/stat, from 0.
_STATE, _PPID, _FLAGS, _THREADS, _STARTTIME = 0, 1, 6, 17, 19


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as /proc/PID/stat has it. `started` is in clock ticks since boot."""

    tgid: int
    comm: str
    parent: int
    started: int
    is_kernel_thread: bool
    is_zombie: bool

    @property
    def can_be_watched(self) -> bool:
        """Whether it is a program that runs."""
        return not (self.is_kernel_thread or self.is_zombie)


def running_tgids() -> list[int]:
    """The ids of all processes on this machine."""
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]  # noqa: PTH208  four times faster


def read(tgid: int, name: str, errors: str = "replace") -> str | None:
    """The text of one of a process's files that the kernel writes at once, such as `stat`; None for
    a process that has ended or is hidden. There can be thousands of processes, and
    `Path.read_text` takes four times as long."""
    try:
        descriptor = os.open(f"{PROC}/{tgid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        content = chunk = os.read(descriptor, _READ_BYTES)
        while len(chunk) == _READ_BYTES:
            chunk = os.read(descriptor, _READ_BYTES)
            content += chunk
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)
    return content.decode(errors=errors)


def comm_of(tgid: int) -> str | None:
    """A process's command name; None for a process that has ended or is hidden."""
    text = read(tgid, "comm")
    return text.removesuffix("\n") if text is not None else None


def process_of(tgid: int) -> Process | None:
    """A process; None for one that has ended or is hidden."""
    text = read(tgid, "stat")
    if not text:
        return None
    start, _, rest = text.rpartition(")")
    fields = rest.split()
    # A process whose first thread has ended, and no other, is no zombie though its state says so.
    has_ended = fields[_STATE] in "ZX" and int(fields[_THREADS]) <= 1
    return Process(
        tgid,
        start.partition("(")[2],
        int(fields[_PPID]),
        int(fields[_STARTTIME]),
        is_kernel_thread=bool(int(fields[_FLAGS]) & _KERNEL_THREAD),
        is_zombie=has_ended,
    )


def start_time_of(tgid: int) -> int | None:
    """When a process started, in clock ticks since boot; None for one that has ended or is
    hidden."""
    process = process_of(tgid)
    return process.started if process else None


def watchable() -> dict[int, Process]:
    """The processes that can be watched, by their ids: neither zombies nor threads of the
    kernel."""
    found = filter(None, map(process_of, running_tgids()))
    return {process.tgid: process for process in found if process.can_be_watched}


def with_descendants(tgids: Collection[int], processes: Mapping[int, Process]) -> set[int]:
    """TGIDS and their descendants among PROCESSES."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.tgid)
    found: set[int] = set()
    left = list(tgids)
    while left:
        if (tgid := left.pop()) not in found:
            found.add(tgid)
            left += children.get(tgid, ())
    return found


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
    status = read(tid, "status")
    if status is None:
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
