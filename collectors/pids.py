"""Process ids as users give them: which are accepted, and why others are not."""

from __future__ import annotations

import re
from typing import Final

from coral.collectors.procfs import is_hidden, process_of, thread_group_of

PIDS: Final = "process ids, such as 1234 or 1234,5678"
_NUMBER: Final = re.compile(r"[0-9]+")
_MOST_PIDS: Final = 1 << 22  # PID_MAX_LIMIT: the kernel gives lower numbers alone
_MOST_DIGITS: Final = 7


def pid_anywhere(value: str) -> int:
    """A number that can be the id of a process."""
    if not _NUMBER.fullmatch(value):
        raise ValueError(PIDS)
    if len(value) > _MOST_DIGITS or not 0 < int(value) < _MOST_PIDS:
        raise ValueError(f"{PIDS}, from 1 to {_MOST_PIDS - 1}")
    return int(value)


def running_pid(value: str) -> int:
    """The id of a process that runs now."""
    tgid = thread_group_of(pid_anywhere(value))
    if tgid is None and is_hidden(int(value)):
        raise ValueError(
            f"the ids of processes that the agent may see: /proc hides {value} from it "
            "(hidepid), and CAP_SYS_PTRACE is missing"
        )
    process = process_of(tgid) if tgid else None
    if tgid is None or process is None:
        raise ValueError(f"the ids of processes that run now: {value} does not")
    if tgid != int(value):
        raise ValueError(f"the ids of processes: {value} is a thread of process {tgid}")
    if process.is_zombie:
        raise ValueError(
            f"the ids of processes that run now: {value} has ended, and is a zombie until its "
            f"parent, process {process.parent}, collects its exit status"
        )
    if process.is_kernel_thread:
        raise ValueError(f"the ids of processes: {value} is a kernel thread ({process.comm})")
    return tgid
