"""Small files that an operator names: read without the risk that one blocks or fills the memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(
    path: Path,
    most_bytes: int,
    *,
    follow: bool = True,
    owners_alone: bool = False,
    secret: bool = False,
) -> bytes:
    """The bytes of a regular file of at most MOST_BYTES. Never waits for a writer, as opening a
    FIFO would. Without FOLLOW, PATH itself must not be a symbolic link. Raises OSError; with
    OWNERS_ALONE also for a file that others than its owner may write, with SECRET also for one that
    others than its owner and group may read."""
    content, mode = read_with_mode(path, most_bytes, follow=follow)
    if secret and mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(
            errno.EPERM,
            "others than its owner may read or write it "
            f"(mode {stat.S_IMODE(mode):04o}): give a file of mode 0600, or 0640",
            str(path),
        )
    if owners_alone and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EPERM, "others than its owner may write it", str(path))
    return content


def read_with_mode(path: Path, most_bytes: int, *, follow: bool = True) -> tuple[bytes, int]:
    """The bytes of such a file, and the mode of the file that was read, as of `st_mode`. Raises
    OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = bytearray()
        # One byte beyond the limit tells a file that is too long from one that just fits.
        while len(content) <= most_bytes and (read := os.read(fd, most_bytes + 1 - len(content))):
            content += read
    finally:
        os.close(fd)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return bytes(content), mode
