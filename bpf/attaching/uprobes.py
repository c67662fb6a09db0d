"""Programs attached to functions of user space, by the file that contains them.

A uprobe belongs to a file, not to a process: the kernel puts it into every process that maps the
file's code. So two processes that use the same library share one, which stands until the last of
them needs it no more. Files are found through the process's own root directory, as it sees them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from coral.bpf.attaching.each_cpu import online_cpus
from coral.bpf.buffers.perf_event import IOC_ENABLE, IOC_SET_BPF, open_perf_event
from coral.bpf.libbpf import AttachError

_PMU: Final = Path("/sys/bus/event_source/devices/uprobe")
_SYS_OPENAT2: Final = 437  # on every processor
_RESOLVE_NO_XDEV: Final = 0x01
_RESOLVE_IN_ROOT: Final = 0x10
_OPEN_HOW: Final = struct.Struct("=QQQ")
_STATFS_BYTES: Final = 256  # more than any has; the first member is the type
_OVERLAYFS: Final = 0x794C7630
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class ProcessFile:
    """A regular file, opened as the process PID sees it: through its root directory, with its
    mounts. PATH is absolute; links on it stay inside that root, and WITHIN_MOUNT, in the file
    system of that root.

    Whatever happens to the path or the process later, `fd` is this file. Files with the same
    `identity` are one to the kernel: containers of one image have mounts (overlayfs) with device
    numbers of their own, but share the files below. Raises OSError.
    """

    def __init__(self, pid: int, path: str, *, within_mount: bool = False) -> None:
        resolve = _RESOLVE_IN_ROOT | (_RESOLVE_NO_XDEV if within_mount else 0)
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


class _Place(NamedTuple):
    """What is attached at most once."""

    program_fd: int
    file: tuple[int, ...]
    offset: int
    at_return: bool


class Uprobes:
    """Programs at places in files, each attached while it has a user.

    A user is whatever asks for a place, usually a process with the time of its start. Not safe to
    use from two threads at once.
    """

    def __init__(self) -> None:
        self._events: dict[_Place, int] = {}
        self._users: dict[_Place, set[Hashable]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of attached places."""
        return len(self._events)

    def attach(
        self,
        user: Hashable,
        program_fd: int,
        file: ProcessFile,
        offset: int,
        *,
        at_return: bool = False,
    ) -> None:
        """Has a `uprobe` program run whenever a process executes the instruction at OFFSET of FILE,
        or AT_RETURN of the function that begins there, on behalf of USER. Every process, not only
        this one: the program must look who runs it. Processes that map the file later are included.

        Raises `AttachError`.
        """
        place = _Place(program_fd, file.identity, offset, at_return)
        if place not in self._events:
            self._events[place] = _open_uprobe(place, file.fd)
        self._users.setdefault(place, set()).add(user)

    def release(self, user: Hashable) -> None:
        """USER needs nothing any more: what nobody else needs is detached, which waits for the
        kernel for 20 to 100 ms each. No error if it had nothing."""
        for place, users in list(self._users.items()):
            users.discard(user)
            if not users:
                del self._users[place]
                os.close(self._events.pop(place))

    def close(self) -> None:
        """Detaches everything. Safe to call twice."""
        self._users.clear()
        while self._events:
            os.close(self._events.popitem()[1])


def _open_uprobe(place: _Place, file_fd: int) -> int:
    what = f"attaching a uprobe at offset {place.offset:#x}"
    try:
        type_, at_return = _pmu()
        # By the descriptor, so that it is certainly this file.
        path = ctypes.create_string_buffer(f"/proc/self/fd/{file_fd}".encode())
        fd = open_perf_event(
            type_,
            at_return if place.at_return else 0,
            online_cpus()[0],  # counts there, but runs its program on every CPU
            config1=ctypes.addressof(path),
            config2=place.offset,
        )
    except OSError as error:
        raise AttachError(what, error.errno or errno.EIO) from error
    try:
        fcntl.ioctl(fd, IOC_SET_BPF, place.program_fd)
        fcntl.ioctl(fd, IOC_ENABLE, 0)
    except OSError as error:
        os.close(fd)
        raise AttachError(what, error.errno or errno.EIO) from error
    return fd


@cache
def _pmu() -> tuple[int, int]:
    """The type of uprobe events, and the value of `config` that means returns. Raises OSError: the
    kernel has none before 4.17, or without CONFIG_UPROBE_EVENTS."""
    bit = (_PMU / "format/retprobe").read_text().strip().removeprefix("config:")
    return int((_PMU / "type").read_text()), 1 << int(bit)
