"""Pid namespaces: which one this process is in, and the ids that processes have in others.

The kernel's programs know processes by their ids in the first namespace, which an agent in that
namespace sees in /proc. A process in a container has another id inside of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from coral.collectors.procfs import PROC, read, running_tgids

_FIRST: Final = 0xEFFF_FFFC  # PROC_PID_INIT_INO of include/linux/proc_ns.h
_GET_PARENT: Final = 0xB702  # NS_GET_PARENT, ioctl_ns(2)
_NSPID: Final = re.compile(r"^NSpid:\s+(.*)$", re.MULTILINE)
_HIDDEN: Final = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True, slots=True)
class PidNamespace:
    """A pid namespace: its inode, and how many levels it is below that of this process's /proc."""

    inode: int
    depth: int


def obstacle() -> str:
    """Why processes cannot be told apart from here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        inode = (PROC / "self/ns/pid").stat().st_ino
        shown = os.readlink(PROC / "self")  # noqa: PTH115  a number, not a path
    except OSError as error:
        return f"{PROC}/self cannot be read ({error.strerror}): mount proc there"
    if inode == _FIRST and shown == str(os.getpid()):
        return ""
    where = "in a pid namespace of its own" if inode != _FIRST else f"without its own {PROC}"
    return (
        f"the agent is {where}, where processes have other ids than the kernel's programs see: run "
        "it in the host's, by hostPID: true in Kubernetes, `docker run --pid=host`, or outside of "
        "the container"
    )


def own_pid_namespace() -> int:
    """The inode of this process's pid namespace."""
    return (PROC / "self/ns/pid").stat().st_ino


def pid_namespace_of(tgid: int) -> PidNamespace | None:
    """A process's pid namespace; None for a process that has ended or is hidden, from an agent
    without CAP_SYS_PTRACE too."""
    ids = _ids(tgid)
    try:
        return PidNamespace((PROC / str(tgid) / "ns/pid").stat().st_ino, len(ids) - 1)
    except _HIDDEN:
        return None


def tgids_in(namespace: PidNamespace, pids: Collection[int]) -> dict[int, int]:
    """The ids here of the processes that have the ids PIDS in a namespace below, by those."""
    found = {}
    for tgid in running_tgids():
        ids = _ids(tgid)
        if len(ids) > namespace.depth and ids[namespace.depth] in pids:
            levels_up = len(ids) - 1 - namespace.depth
            if _namespace_above(tgid, levels_up) == namespace.inode:
                found[ids[namespace.depth]] = tgid
    return found


def _ids(tgid: int) -> list[int]:
    """A process's ids, in the namespace of this process's /proc and in each one below it, down to
    its own; none for a process that has ended."""
    match = _NSPID.search(read(tgid, "status") or "")
    return list(map(int, match[1].split())) if match else []


def _namespace_above(tgid: int, levels_up: int) -> int | None:
    """The inode of the pid namespace that is LEVELS_UP above a process's own; None for a process
    that has ended or is hidden."""
    try:
        descriptor = os.open(PROC / str(tgid) / "ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except _HIDDEN:
        return None
    try:
        for _ in range(levels_up):
            parent = fcntl.ioctl(descriptor, _GET_PARENT)
            os.close(descriptor)
            descriptor = parent
        return os.fstat(descriptor).st_ino
    except PermissionError:
        return None
    finally:
        os.close(descriptor)
