"""Small files that an operator names: read without the risk that one blocks or fills the memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(
    path: Path, most_bytes: int, *, owners_alone: bool = False, secret: bool = False
) -> bytes:
    """The bytes of a regular file of at most MOST_BYTES. Never waits for a writer, as opening a
    FIFO would. Raises OSError; with OWNERS_ALONE also for a file that others than its owner may
    write, with SECRET also for one that others than its owner and group may read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if secret and mode & (stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(
                errno.EPERM,
                "others than its owner may read or write it "
                f"(mode {stat.S_IMODE(mode):04o}): give a file of mode 0600, or 0640",
                str(path),
            )
        if owners_alone and mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(errno.EPERM, "others than its owner may write it", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content
