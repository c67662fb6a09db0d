"""Files that processes have mapped to execute: opened when first seen, and kept open, so that they
still have names when the process has ended or the file was deleted or replaced. Bounded.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from coral.bpf.attaching.elf import ElfError
from coral.bpf.attaching.uprobes import ProcessFile
from coral.collectors.procfs import PROC
from coral.collectors.symbols.elf import ElfFile, open_bytes

_DELETED: Final = " (deleted)"
_LARGEST_VDSO_BYTES: Final = 64 << 10
_SHARE_OF_DESCRIPTORS: Final = 8
_MOST_OPEN: Final = 512
_CHUNK_BYTES: Final = 64 << 10
_MOST_CHUNKS: Final = 4096  # of a page each: the kernel gives no more at once
_FUSE: Final = re.compile(rb"^\d+ \d+ 0:(\d+) \S+ (\S+) .* - (fuse\S*) ", re.MULTILINE)


class FileKind(Enum):
    """What executable memory comes from."""

    FILE = "file"
    """A file, deleted ones and those in memory (memfd) too."""
    VDSO = "vdso"
    """The library that the kernel maps into every process."""
    ANONYMOUS = "anonymous"
    """Memory without a file, which holds what a runtime has compiled."""


class Sighting(NamedTuple):
    """Memory of a process that maps a file, as a line of /proc/PID/maps says: device as `MM:mm`,
    and the path as the process sees it, with its mark if the file is deleted."""

    tgid: int
    start: int
    end: int
    device: str
    inode: int
    path: str

    @property
    def of_file(self) -> tuple[str, int, str]:
        """Equal for all memory of one file, as long as it is mapped."""
        return self.device, self.inode, self.path.removesuffix(_DELETED)


class MappedFile:
    """What some executable memory comes from.

    `elf` is the file, while it is open; otherwise `why_not` says why there is none. `name` is the
    path as the process saw it, `[vdso]`, or the kernel's name for other memory; `[anonymous]` if it
    has none. `identity` tells files apart that have other content.
    """

    def __init__(self, kind: FileKind, name: str, why_not: str, key: Hashable = None) -> None:
        self.kind = kind
        self.name = name
        self.key = key  # as MappedFiles keeps it
        self.identity = key
        self.elf: ElfFile | None = None
        self.why_not = why_not

    def __repr__(self) -> str:
        return f"<MappedFile {self.module}: {self.why_not or 'open'}>"

    @property
    def module(self) -> str:
        """The last part of the name, for people."""
        if self.name.startswith("["):  # memory that its process has named, perhaps with a slash
            return self.name
        return PurePosixPath(self.name).name or self.name

    @property
    def build_id(self) -> bytes:
        """The file's build id; empty without, or if it is not open."""
        try:
            return self.elf.build_id if self.elf else b""
        except OSError:
            return b""

    def close(self, why: str) -> None:
        """Closes the file, for the reason WHY. Safe to call twice."""
        if self.elf:
            os.close(self.elf.fd)
            self.elf, self.why_not = None, why

    def take(self, fd: int) -> None:
        """FD is this file, and its own from now on."""
        try:
            self.elf, self.why_not = ElfFile(fd), ""
        except (ElfError, OSError) as error:
            self.why_not = str(error)
            os.close(fd)


class MappedFiles:
    """All files of all processes, each open once. Not safe to use from two threads at once.

    At most `most_open` are open, by default an eighth of the descriptors that this process may
    have and at most 512: then those that were not needed for longest are closed, and `closed`
    counts them. They open again when a process has them mapped.
    """

    def __init__(self, most_open: int | None = None) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_open = most_open or max(16, min(_MOST_OPEN, limit // _SHARE_OF_DESCRIPTORS))
        self.closed = 0
        self._open: OrderedDict[Hashable, MappedFile] = OrderedDict()

    def __len__(self) -> int:
        """The number of open files."""
        return len(self._open)

    def get(self, seen: Sighting, mounts: Mounts) -> MappedFile:
        """What the memory SEEN comes from, by the MOUNTS of its process. Never raises: what cannot
        be opened says why."""
        if seen.path == "[vdso]":
            return self._vdso(seen)
        if not seen.inode:
            return MappedFile(FileKind.ANONYMOUS, seen.path or "[anonymous]", "no file")
        # As long as a file is open, no other has its number.
        key = seen.of_file
        if file := self._open.get(key):
            self._open.move_to_end(key)
            return file
        file = MappedFile(FileKind.FILE, seen.path.removesuffix(_DELETED), "", key)
        try:
            opened = _opened(seen, mounts)
        except (OSError, ValueError) as error:
            file.why_not = f"{getattr(error, 'strerror', None) or error}"
            return file
        status = os.fstat(opened.fd)  # the number of a file that is gone can be that of another
        file.identity = (*opened.identity, status.st_size, status.st_mtime_ns)
        self._keep(key, file, opened.fd)
        return file

    def known(self, seen: Sighting) -> MappedFile:
        """Likewise, of a process that has ended: only what is open already."""
        key: Hashable = seen.of_file
        if seen.path == "[vdso]":
            vdsos = (one for one, file in self._open.items() if file.kind is FileKind.VDSO)
            key = next(vdsos, key)
        if file := self._open.get(key):
            return file
        kind = FileKind.FILE if seen.inode else FileKind.ANONYMOUS
        return MappedFile(kind, seen.path or "[anonymous]", "the process had ended", key)

    def needed(self, file: MappedFile) -> None:
        """FILE is in use: others are closed first."""
        if file.elf:
            self._open.move_to_end(file.key)

    def _vdso(self, seen: Sighting) -> MappedFile:
        size = min(seen.end - seen.start, _LARGEST_VDSO_BYTES)
        try:
            with memory_of(seen.tgid) as fd:
                content = os.pread(fd, size, seen.start)
        except OSError as error:
            why_not = f"its memory cannot be read: {error.strerror}"
            return MappedFile(FileKind.VDSO, "[vdso]", why_not)
        key = ("[vdso]", hashlib.blake2b(content).digest())
        if key not in self._open:
            file = MappedFile(FileKind.VDSO, "[vdso]", "", key)
            try:
                self._keep(key, file, open_bytes(content, "vdso"))
            except OSError as error:
                file.why_not = str(error)
            return file
        self._open.move_to_end(key)
        return self._open[key]

    def _keep(self, key: Hashable, file: MappedFile, fd: int) -> None:
        file.take(fd)
        if file.elf is None:
            return
        self._open[key] = file
        while len(self._open) > self.most_open:
            self._open.popitem(last=False)[1].close(f"more than {self.most_open} files are open")
            self.closed += 1

    def close(self) -> None:
        """Closes all files. Safe to call twice."""
        while self._open:
            self._open.popitem()[1].close("closed")


@contextmanager
def memory_of(tgid: int) -> Iterator[int]:
    """A descriptor of a process's memory, for pread(2) at its addresses. Raises OSError without
    the rights of ptrace(2)."""
    fd = os.open(f"{PROC}/{tgid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _opened(seen: Sighting, mounts: Mounts) -> ProcessFile:
    """The file that is mapped; never another that has its path now. Raises OSError, and ValueError
    for one that must not be opened."""
    if filesystem := mounts.that_may_hang(seen.device):
        raise ValueError(f"it is on {filesystem}, which could let the agent wait for ever")
    with suppress(OSError):
        # Another file may have been mapped there meanwhile: it must not pass for this one, whose
        # names all processes share.
        return _checked(ProcessFile.mapped(seen.tgid, f"{seen.start:x}-{seen.end:x}"), seen)
    # Without the capability for that. /proc/PID/exe is the program itself, deleted or not.
    with suppress(OSError):
        program = f"{PROC}/{seen.tgid}/exe"
        if os.readlink(program) == _unescaped(seen.path):  # noqa: PTH115  not a path of ours
            return _checked(ProcessFile.at(program), seen)
    if seen.path.endswith(_DELETED):
        raise ValueError(
            "it is deleted or replaced, and opening it all the same needs "
            "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"
        )
    # The kernel tells where files are, without links: one would be put there since.
    return _checked(ProcessFile(seen.tgid, _unescaped(seen.path), follow_links=False), seen)


def _checked(file: ProcessFile, seen: Sighting) -> ProcessFile:
    """FILE, if it is the one that was SEEN. Raises ValueError, with FILE closed, if it is not."""
    if len(file.identity) == 2:  # noqa: PLR2004  on overlayfs, the numbers are those of other files
        device = f"{os.major(file.device):02x}:{os.minor(file.device):02x}"
        # btrfs gives its subvolumes devices of their own, and says another one in maps.
        both_unnamed = device.startswith("00:") and seen.device.startswith("00:")
        if file.inode != seen.inode or (device != seen.device and not both_unnamed):
            file.close()
            raise ValueError("another file is there now")
    return file


def _unescaped(path: str) -> str:
    """A path of /proc/PID/maps, where a line feed is `\\012`."""
    return path.replace("\\012", "\n")


class Mounts:
    """The file systems that a process sees, read when first asked."""

    def __init__(self, tgid: int) -> None:
        self._tgid = tgid
        self._fuse: list[tuple[bytes, bytes, bytes]] | None = None

    def that_may_hang(self, device: str) -> str:
        """The kind of the file system on DEVICE (`MM:mm`), if a process answers its requests; else
        empty. The list of mounts is asked, because the file system would ask that process."""
        if not device.startswith("00:"):
            return ""
        for minor, _, kind in self._all():
            if f"00:{int(minor):02x}" == device:
                return kind.decode()
        return ""

    def that_hold(self, path: str) -> str:
        """The same for a file at PATH, which is absolute, or mounted there itself; links on it are
        not followed."""
        for _, point, kind in self._all():
            if f"{path}/".encode(errors="surrogateescape").startswith(point.rstrip(b"/") + b"/"):
                return kind.decode()
        return ""

    def _all(self) -> list[tuple[bytes, bytes, bytes]]:
        if self._fuse is None:
            self._fuse = _FUSE.findall(read_whole(self._tgid, "mountinfo"))
        return self._fuse


def read_whole(tgid: int, name: str) -> bytes:
    """The content of one of a process's files that the kernel writes piece by piece, such as
    `maps`; empty for a process that is hidden or has ended, even while it was read, when there
    would be a beginning only. At most 16 MB."""
    chunks: list[bytes] = []
    try:
        fd = os.open(f"{PROC}/{tgid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        while len(chunks) < _MOST_CHUNKS and (chunk := os.read(fd, _CHUNK_BYTES)):
            chunks.append(chunk)
        if not os.pread(fd, 1, 0):
            return b""
    except OSError:
        return b""
    finally:
        os.close(fd)
    return b"".join(chunks)
