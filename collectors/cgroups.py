"""Control groups as targets: their directories, the kernel's ids, and the processes in them.

Cgroups come and go while these functions look: one that is removed meanwhile is left out.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from coral.collectors.hierarchies import (
    Hierarchy,
    Kind,
    cgroup_path_of,
    hierarchies,
    subdirectories,
)
from coral.collectors.options import OptionError
from coral.collectors.procfs import PROC, thread_group_of

_AT_FDCWD: Final = -100
_ID_BYTES: Final = 8
_GROUP: Final = (1 << 32) - 1
# Errors of a cgroup that is removed meanwhile, before and after its file is opened.
_REMOVED: Final = (errno.ENOENT, errno.ENODEV)
_IS_OUTSIDE: Final = (
    "; the agent sees only a part of the hierarchy, from its own cgroup down: show it all of it, "
    "by a mount of the host's {mount}, by `docker run --cgroupns=host`, or by hostPID: true and "
    "CAP_SYS_PTRACE"
)


def cgroup_directory(path: str) -> Path:
    """The directory of a cgroup: PATH itself, or PATH below the mount point of a hierarchy, v2
    before v1's memory. Raises `OptionError`.

    Looks at nothing outside the hierarchies: a path on a network mount could block for good. Inside
    them there are no symbolic links, so `..` can be resolved in the text.
    """
    reached = hierarchies()
    if directory := _resolved(path, reached):
        return directory
    partial = next((hierarchy for hierarchy in reached if not hierarchy.is_whole), None)
    why = _IS_OUTSIDE.format(mount=partial.mount_point) if partial else ""
    raise OptionError("cgroup", path, f"{_accepted(reached)}{why}")


def directory_seen_by(tgid: int, path: str) -> Path:
    """The directory here of the cgroup that has this PATH for another process, which may see only
    a part of the hierarchy. Looks at every cgroup. Raises `OptionError`."""
    seen = hierarchies(tgid)
    directory = _resolved(path, seen)
    if not directory:
        raise OptionError("cgroup", path, f"{_accepted(seen)}, in the caller's container")
    wanted = directory.stat()
    for hierarchy in hierarchies():
        for candidate in _walk(hierarchy.directory):
            with suppress(FileNotFoundError):
                if os.path.samestat(candidate.stat(), wanted):
                    return candidate
    raise OptionError(
        "cgroup", path, f"the path of a cgroup that the agent sees too; this one is {directory}"
    )


def hierarchy(directory: Path) -> Kind:
    """The hierarchy that a cgroup's DIRECTORY, of `cgroup_directory`, is in."""
    return _hierarchy(directory).kind


def path_in_hierarchy(directory: Path) -> str:
    """The path of a cgroup's DIRECTORY from the root of its hierarchy; empty where that is out of
    sight."""
    found = _hierarchy(directory)
    return f"/{directory.relative_to(found.directory)}" if found.is_whole else ""


def memory_hierarchy() -> int:
    """The kernel's number of the hierarchy of v1's memory controller; 0 if there is none."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        number, controllers, _ = line.split(":", 2)
        if "memory" in controllers.split(","):
            return int(number)
    return 0


def cgroup2_mount() -> Path | None:
    """Where this process reaches the cgroup v2 hierarchy."""
    return next((found.directory for found in hierarchies() if found.kind == "v2"), None)


def cgroup_of(tgid: int, kind: Kind = "v2") -> Path | None:
    """The directory of a process's cgroup; None for a process that has ended or is in none that is
    visible."""
    path = cgroup_path_of(tgid, kind)
    reached = next((found for found in hierarchies() if found.kind == kind), None)
    return reached.place_of(path) if reached and path else None


def above(directory: Path) -> list[Path]:
    """A cgroup's DIRECTORY and those above it, up to the top of what is visible."""
    top = _hierarchy(directory).directory
    return [path for path in (directory, *directory.parents) if path.is_relative_to(top)]


def cgroup_id(directory: Path) -> int:
    """The kernel's id of a cgroup: that of its kernfs node, which bpf_get_current_cgroup_id()
    returns in v2. Raises OSError with ENOENT or ENODEV for a cgroup that is removed."""
    handle = _FileHandle(_ID_BYTES)
    mount_id = ctypes.c_int()
    name = os.fsencode(directory)
    if not _libc().name_to_handle_at(
        _AT_FDCWD, name, ctypes.byref(handle), ctypes.byref(mount_id), 0
    ):
        return int(handle.id)
    if ctypes.get_errno() in _REMOVED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    # A seccomp profile may refuse that call. Since Linux 5.5 the inode's number is the same.
    return directory.stat().st_ino


def cgroup_ids_below(directory: Path) -> frozenset[int]:
    """The ids of a cgroup and of all below it, as far as they exist; none if it is removed."""
    return frozenset(found for path in _walk(directory) if (found := _id_or_none(path)) is not None)


def cgroup_tgids(directory: Path) -> set[int]:
    """The processes in a cgroup and in those below it. A process with threads in several cgroups,
    which threaded ones (v2) and v1 allow, is in each of them."""
    tgids: set[int] = set()
    for path in _walk(directory):
        tgids |= _members(path)
    return tgids - {0}  # a process of another pid namespace


class Below(NamedTuple):
    """A cgroup, its id, and the group that the processes in it belong to: the lower half of the id
    of a cgroup, which is unique among those of its hierarchy that there are at one time."""

    directory: Path
    id: int
    group: int


def cgroups_below(directory: Path, *, is_pod: bool) -> list[Below]:
    """A cgroup's DIRECTORY and all below it, as far as they exist: all one group or, in that of a
    pod, with a group for each cgroup directly below it, which are its containers'."""
    found: list[Below] = []
    left = [(directory, 0)]
    while left:
        path, group = left.pop()
        number = _id_or_none(path)
        if number is None:
            continue
        own = group or number & _GROUP
        found.append(Below(path, number, own))
        inherited = 0 if is_pod and path == directory else own
        left += [(below, inherited) for below in subdirectories(path)]
    return found


def tgids_by_group(directory: Path, *, is_pod: bool) -> dict[int, int]:
    """The processes of `cgroup_tgids`, each with its group as `cgroups_below` has it."""
    found: dict[int, int] = {}
    for below in cgroups_below(directory, is_pod=is_pod):
        found |= dict.fromkeys(_members(below.directory), below.group)
    found.pop(0, None)
    return found


def group_of_cgroup(directory: Path) -> int:
    """The group that a cgroup's id makes; 0 for one that is removed."""
    try:
        return directory.stat().st_ino & _GROUP  # the lower half is the same on every kernel
    except OSError:
        return 0


class _FileHandle(ctypes.Structure):
    """struct file_handle of name_to_handle_at(2), with room for a cgroup's id."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("id", ctypes.c_uint64),
    )


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _resolved(path: str, reached: Sequence[Hierarchy]) -> Path | None:
    for hierarchy in reached:
        for candidate in (path, f"{hierarchy.mount_point}/{path}"):
            resolved = Path(os.path.normpath(candidate))
            for top in (hierarchy.mount_point, hierarchy.directory):
                if not resolved.is_relative_to(top):
                    continue
                directory = hierarchy.directory / resolved.relative_to(top)
                if _is_cgroup(directory):
                    return directory
    return None


def _accepted(reached: Sequence[Hierarchy]) -> str:
    if not reached:
        return "the path of a cgroup: no hierarchy of cgroups is mounted here"
    mounts = " or ".join(str(hierarchy.mount_point) for hierarchy in reached)
    return f"the path of a cgroup below {mounts}; there is none at this path"


def _hierarchy(directory: Path) -> Hierarchy:
    inside = (found for found in hierarchies() if directory.is_relative_to(found.directory))
    # One hierarchy may be mounted below another's mount point.
    return max(inside, key=lambda found: len(found.directory.parts))


def _is_cgroup(directory: Path) -> bool:
    try:
        return (directory / "cgroup.procs").exists()
    except (OSError, ValueError):  # a name that is too long; a NUL
        return False


def _walk(directory: Path) -> Iterator[Path]:
    """A cgroup and all below it."""
    left = [directory]
    while left:
        yield (path := left.pop())
        left += subdirectories(path)


def _id_or_none(directory: Path) -> int | None:
    try:
        return cgroup_id(directory)
    except OSError as error:
        if error.errno not in _REMOVED:
            raise
        return None


def _members(directory: Path) -> set[int]:
    """The processes in one cgroup."""
    try:
        return set(map(int, (directory / "cgroup.procs").read_text().split()))
    except OSError as error:
        if error.errno in _REMOVED:
            return set()
        if error.errno != errno.EOPNOTSUPP:
            raise
    # A threaded cgroup lists threads alone.
    try:
        tids = (directory / "cgroup.threads").read_text().split()
    except OSError as error:
        if error.errno not in _REMOVED:
            raise
        return set()
    return {tgid for tid in tids if (tgid := thread_group_of(int(tid))) is not None}
