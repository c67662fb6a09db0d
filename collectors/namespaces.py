"""Namespaces: which ones processes are in, and the ids that processes have in those of pids.

The kernel's programs know processes by their ids in the first namespace, which an agent in that
namespace sees in /proc. A process in a container has another id inside of it.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Collection
from typing import Final

from coral.collectors.procfs import PROC, read, running_tgids

# PROC_PID_INIT_INO and PROC_CGROUP_INIT_INO of include/linux/proc_ns.h.
_FIRST_PID_NAMESPACE: Final = 0xEFFF_FFFC
FIRST_CGROUP_NAMESPACE: Final = 0xEFFF_FFFB
_GET_PARENT: Final = 0xB702  # NS_GET_PARENT, ioctl_ns(2)
_NSPID: Final = re.compile(r"^NSpid:\s+(.*)$", re.MULTILINE)
_HIDDEN: Final = (FileNotFoundError, ProcessLookupError, PermissionError)


def obstacle() -> str:
    """Why processes cannot be told apart from here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        inode = (PROC / "self/ns/pid").stat().st_ino
        shown = os.readlink(PROC / "self")  # noqa: PTH115  a number, not a path
    except OSError as error:
        return f"{PROC}/self cannot be read ({error.strerror}): mount proc there"
    if inode == _FIRST_PID_NAMESPACE and shown == str(os.getpid()):
        return ""
    where = "in a pid namespace of its own"
    if inode == _FIRST_PID_NAMESPACE:
        where = f"without the {PROC} of its pid namespace"
    return (
        f"the agent is {where}, where processes have other ids than the kernel's programs see: run "
        "it in the host's, by hostPID: true in Kubernetes, `docker run --pid=host`, or outside of "
        "the container"
    )


def namespace_of(process: int | str, kind: str) -> int | None:
    """The inode of the namespace of a KIND, such as `pid`, that a process is in; None for one that
    has ended or is hidden, from an agent without CAP_SYS_PTRACE too. `self` is this process."""
    try:
        return (PROC / str(process) / "ns" / kind).stat().st_ino
    except _HIDDEN:
        return None


def pid_depth(tgid: int) -> int:
    """How many levels a process's pid namespace is below that of this process's /proc."""
    return len(_ids(tgid)) - 1


def tgids_in(namespace: int, depth: int, pids: Collection[int]) -> dict[int, int]:
    """The ids here of the processes that have the ids PIDS in the pid namespace with the inode
    NAMESPACE, which is DEPTH levels below, by those."""
    found = {}
    for tgid in running_tgids():
        ids = _ids(tgid)
        if len(ids) <= depth or ids[depth] not in pids:
            continue
        if _namespace_above(tgid, len(ids) - 1 - depth) == namespace:
            found[ids[depth]] = tgid
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
