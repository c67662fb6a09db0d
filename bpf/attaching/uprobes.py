"""Programs attached to functions of user space, by the file that contains them.

A uprobe belongs to a file, not to a process: the kernel puts it into every process that maps the
file's code. So two processes that use the same library share one, which stands until the last of
them needs it no more. Files are found through the process's own root directory, as it sees them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple, Self

from coral.bpf.attaching.link import Link
from coral.bpf.attaching.uprobe_links import attach_each, attach_many
from coral.bpf.closing import close_all

_SYS_OPENAT2: Final = 437  # on every processor
_RESOLVE_NO_XDEV: Final = 0x01
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_IN_ROOT: Final = 0x10
_OPEN_HOW: Final = struct.Struct("=QQQ")
_STATFS_BYTES: Final = 256  # more than any has; the first member is the type
_OVERLAYFS: Final = 0x794C7630
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class ProcessFile:
    """A regular file, opened as the process PID sees it: through its root directory, with its
    mounts. PATH is absolute; links on it stay inside that root, and WITHIN_MOUNT, in the file
    system of that root; without FOLLOW_LINKS, a link on it is an error (ELOOP).

    Whatever happens to the path or the process later, `fd` is this file. Files with the same
    `identity` are one to the kernel: containers of one image have mounts (overlayfs) with device
    numbers of their own, but share the files below. Raises OSError.
    """

    def __init__(
        self, pid: int, path: str, *, within_mount: bool = False, follow_links: bool = True
    ) -> None:
        resolve = _RESOLVE_IN_ROOT | (_RESOLVE_NO_XDEV if within_mount else 0)
        resolve |= 0 if follow_links else _RESOLVE_NO_SYMLINKS
        self._take(_open_in_root(f"/proc/{pid}/root", path, resolve), path)

    @classmethod
    def mapped(cls, pid: int, where: str) -> Self:
        """The file that PID has mapped at the addresses WHERE, as /proc/PID/maps writes them, even
        if it was deleted or replaced since. Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN."""
        bounds = "-".join(f"{int(bound, 16):x}" for bound in where.split("-"))  # without zeros
        return cls.at(f"/proc/{pid}/map_files/{bounds}")

    @classmethod
    def at(cls, path: str) -> Self:
        """The file at PATH as this process sees it. Links are followed: only for paths in which
        nobody else can put one, such as /proc/PID/exe."""
        file = cls.__new__(cls)
        file._take(os.open(path, _OPEN_FLAGS), path)  # noqa: SLF001
        return file

    def _take(self, fd: int, path: str) -> None:
        self.fd = fd
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            self.device, self.inode = status.st_dev, status.st_ino
            self.identity: tuple[int, ...] = (self.device, self.inode)
            if _is_on_overlayfs(self.fd):
                # Its number is that of the file below, or of the one that it was copied from; only
                # its times tell these apart.
                times = (status.st_mtime_ns, status.st_ctime_ns)
                self.identity = (_OVERLAYFS, self.inode, status.st_size, *times)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes it; what is attached stays. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_on_overlayfs(fd: int) -> bool:
    filesystem = ctypes.create_string_buffer(_STATFS_BYTES)
    if _LIBC.fstatfs(ctypes.c_int(fd), filesystem):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int.from_bytes(filesystem.raw[:8], sys.byteorder) == _OVERLAYFS


def _open_in_root(root: str, path: str, resolve: int) -> int:
    directory = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        how = _OPEN_HOW.pack(_OPEN_FLAGS, 0, resolve)
        fd: int = _LIBC.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory),
            os.fsencode(path),
            how,
            ctypes.c_size_t(len(how)),
        )
        error = ctypes.get_errno()
        if fd < 0 and error == errno.ENOSYS:  # before 5.6
            # A link would lead out of the root. The kernel's own paths (/proc/PID/maps) have none.
            return os.open(path.lstrip("/"), _OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
        if fd < 0:
            raise OSError(error, os.strerror(error), path)
        return fd
    finally:
        os.close(directory)


class _Places(NamedTuple):
    """What is attached at most once."""

    program_fd: int
    file: tuple[int, ...]
    cookies: tuple[tuple[int, int], ...]  # by offset
    at_return: bool


class Uprobes:
    """Programs at places in files, each attached while it has a user.

    A user is whatever asks for a place, usually a process with the time of its start. MANY, the
    programs are loaded for many places at once (`BpfObject`). Not safe to use from two threads at
    once.
    """

    def __init__(self, *, many: bool = False) -> None:
        self._attach = attach_many if many else attach_each
        self._links: dict[_Places, Link] = {}
        self._users: dict[_Places, set[Hashable]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of attached places."""
        return sum(len(places.cookies) for places in self._links)

    def attach(
        self,
        user: Hashable,
        program_fd: int,
        file: ProcessFile,
        cookies: Mapping[int, int],
        *,
        at_return: bool = False,
    ) -> None:
        """Has a `uprobe` program run whenever a process executes the instructions at the offsets of
        COOKIES in FILE, or AT_RETURN of the functions that begin there, on behalf of USER; the
        program finds the cookie of the offset (bpf_get_attach_cookie). Every process, not only this
        one: the program must look who runs it. Processes that map the file later are included.

        Raises `AttachError`.
        """
        places = _Places(program_fd, file.identity, tuple(sorted(cookies.items())), at_return)
        if places not in self._links:
            # By the descriptor, so that it is certainly this file.
            path = f"/proc/self/fd/{file.fd}"
            self._links[places] = self._attach(program_fd, path, cookies, at_return=at_return)
        self._users.setdefault(places, set()).add(user)

    def release(self, user: Hashable) -> None:
        """USER needs nothing any more: what nobody else needs is detached, which waits for the
        kernel for 20 to 100 ms, once or for each place. No error if it had nothing."""
        unused = []
        for places, users in list(self._users.items()):
            users.discard(user)
            if not users:
                del self._users[places]
                unused.append(self._links.pop(places))
        close_all([link.detach for link in unused])

    def close(self) -> None:
        """Detaches everything. Safe to call twice."""
        self._users.clear()
        links, self._links = self._links, {}
        close_all([link.detach for link in links.values()])
