"""Tracefs for the time of a run of the bench, whose peers need it, shared by all runs of a mount
namespace.

A run holds a shared lock on its mount namespace. The last one to end gets the lock for itself, and
unmounts what a run has mounted; the mount's source says that a run did.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

TRACEFS: Final = Path("/sys/kernel/tracing")
OURS: Final = "coral-bench"
_NAMESPACE: Final = "/proc/self/ns/mnt"


def mount_source(pid: int | str = "self") -> str:
    """The source of what is mounted on TRACEFS for a process; empty where nothing is."""
    source = ""
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[4] == str(TRACEFS):
            source = filesystem.split()[1]  # the last one covers those before
    return source


def hold_tracefs() -> Callable[[], None]:
    """Mounts tracefs unless it is mounted; what to call when it is not needed any more. Does
    nothing for an ordinary user."""
    if os.geteuid() != 0 or not TRACEFS.is_dir():
        return lambda: None
    lock = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)  # waits for one that just unmounts it
    if not mount_source():
        # Another run may be quicker: the kernel then refuses to mount it twice.
        _run("mount", "-t", "tracefs", OURS, str(TRACEFS))

    def release() -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mount_source() == OURS:
                _run("umount", str(TRACEFS))
        except BlockingIOError:
            pass  # another run needs it still
        finally:
            os.close(lock)

    return release


def _run(*command: str) -> None:
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
