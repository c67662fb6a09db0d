"""Control groups as the kernel shows them: directories, and the processes in them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

from coral.collectors.options import OptionError
from coral.collectors.procfs import PROC

_CGROUP2_MOUNT: Final = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)


def cgroup_directory(path: str) -> Path:
    """The directory of a cgroup (v2): PATH itself, or PATH below the hierarchy's mount point.
    Raises `OptionError`.

    Looks at nothing outside the hierarchy: a path on a network mount could block for good. Inside
    it there are no symbolic links, so `..` can be resolved in the text.
    """
    mount = cgroup2_mount()
    accepts = "the path of a cgroup v2 directory"
    if mount is None:
        raise OptionError("cgroup", path, f"{accepts}: no cgroup2 hierarchy is mounted here")
    for candidate in (path, f"{mount}/{path}"):
        resolved = Path(os.path.normpath(candidate))
        if resolved.is_relative_to(mount) and _is_cgroup(resolved):
            return resolved
    raise OptionError("cgroup", path, f"{accepts} below {mount}; there is none at this path")


def _is_cgroup(directory: Path) -> bool:
    try:
        return (directory / "cgroup.procs").exists()
    except (OSError, ValueError):  # a name that is too long; a NUL
        return False


def cgroup_tgids(directory: Path) -> set[int]:
    """The processes in a cgroup and in those below it."""
    tgids: set[int] = set()
    for procs in directory.rglob("cgroup.procs"):
        try:
            tgids.update(map(int, procs.read_text().split()))
        except OSError as error:
            # A cgroup may be removed meanwhile; a threaded one has no list of processes.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                raise
    return tgids - {0}  # a process of another pid namespace


def cgroup2_mount() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted."""
    match = _CGROUP2_MOUNT.search((PROC / "self/mountinfo").read_text())
    return Path(match[1]) if match else None
