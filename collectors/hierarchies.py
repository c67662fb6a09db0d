"""Where this process can reach the hierarchies of control groups.

Two are of use: the unified one (v2), and that of v1's memory controller, where container runtimes
on v1 hosts put every process. In a cgroup namespace of its own, which pods usually have, a
process's own mounts begin at its own cgroup; the host's mounts, through /proc/1/root, begin at the
root.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

from coral.collectors.procfs import PROC, read

Kind = Literal["v2", "memory"]

_ROOT_INODE: Final = 1  # of every hierarchy, since kernfs numbers from 1
# Device, root within the hierarchy, mount point, type, options of the superblock; see proc(5).
_MOUNT: Final = re.compile(
    r"^\S+ \S+ (\d+):(\d+) (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)$", re.MULTILINE
)
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A hierarchy as this process can reach it.

    `mount_point` is what users write before a cgroup's path, `directory` where this process finds
    it. `root` is the place of `directory` in the hierarchy, relative to the root of this process's
    cgroup namespace, such as `/` or `/../..`. `is_whole` says that `directory` is the real root.
    """

    kind: Kind
    mount_point: Path
    directory: Path
    root: str
    is_whole: bool

    def place_of(self, path: str) -> Path | None:
        """The directory of a cgroup by its PATH in /proc/PID/cgroup, which is relative to this
        process's cgroup namespace; None for one that is outside `directory`."""
        ups, names = _split(path)
        root_ups, root_names = _split(self.root)
        if ups == root_ups:
            inside = names[: len(root_names)] == root_names
            return self.directory.joinpath(*names[len(root_names) :]) if inside else None
        if ups > root_ups or root_names:
            return None
        top = _namespace_root(self.directory, self.kind, root_ups)
        return [top, *top.parents][ups].joinpath(*names) if top else None


def hierarchies(seen_by: int | None = None) -> list[Hierarchy]:
    """The hierarchies that this process can reach, or those that the process SEEN_BY sees, v2
    first; of each, the mount that shows most."""
    found: dict[Kind, Hierarchy] = {}
    for hierarchy in _mounted(("self", "1") if seen_by is None else (str(seen_by),)):
        known = found.get(hierarchy.kind)
        if known is None or (hierarchy.is_whole and not known.is_whole):
            found[hierarchy.kind] = hierarchy
    return [found[kind] for kind in ("v2", "memory") if kind in found]


def cgroup_path_of(tgid: int, kind: Kind) -> str | None:
    """The path of a process's cgroup in one hierarchy, relative to this process's cgroup namespace;
    None for a process that has ended or is hidden."""
    text = read(tgid, "cgroup", "surrogateescape")
    if text is None:
        return None
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if (kind == "v2" and not controllers) or kind in controllers.split(","):
            return path.removesuffix(" (deleted)")
    return None


def _mounted(processes: Iterable[str]) -> Iterator[Hierarchy]:
    """All mounts of hierarchies that PROCESSES have."""
    for process in processes:
        try:
            text = (PROC / process / "mountinfo").read_text(errors="surrogateescape")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        top = Path("/") if process == "self" else PROC / process / "root"
        for major, minor, root, point, of_type, options in _MOUNT.findall(text):
            if of_type == "cgroup" and "memory" not in options.split(","):
                continue
            mount_point = Path(_unescaped(point))
            directory = top / mount_point.relative_to("/")
            try:
                status = directory.stat()
            except OSError:  # no permission to go there (CAP_SYS_PTRACE), or unmounted meanwhile
                continue
            if status.st_dev != os.makedev(int(major), int(minor)):
                continue  # another mount hides it
            yield Hierarchy(
                "v2" if of_type == "cgroup2" else "memory",
                mount_point,
                directory,
                _unescaped(root),
                status.st_ino == _ROOT_INODE,
            )


@cache
def _namespace_root(directory: Path, kind: Kind, depth: int) -> Path | None:
    """The root of this process's cgroup namespace: the directory DEPTH levels below DIRECTORY that
    has this process at the place where its namespace shows it."""
    ups, names = _split(cgroup_path_of(os.getpid(), kind) or "/..")
    if ups:
        return None  # it has been moved out of its namespace
    level = [directory]
    for _ in range(depth):
        level = [child for parent in level for child in subdirectories(parent)]
    for top in level:
        try:
            members = top.joinpath(*names, "cgroup.procs").read_text().split()
        except OSError:  # it is not there, or is threaded
            continue
        if str(os.getpid()) in members:
            return top
    return None


def subdirectories(directory: Path) -> list[Path]:
    """The directories in one, which may be removed meanwhile."""
    try:
        with os.scandir(directory) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ENODEV:
            return []
        raise


def _split(path: str) -> tuple[int, list[str]]:
    """How many levels a path goes up first, and the names below."""
    names = [name for name in path.split("/") if name]
    ups = next((at for at, name in enumerate(names) if name != ".."), len(names))
    return ups, names[ups:]


def _unescaped(text: str) -> str:
    """A path of mountinfo, which writes blanks and backslashes as octal numbers."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
