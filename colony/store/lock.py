"""One colony a directory: a lock that the kernel gives back however the process ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from coral.colony.store.errors import StoreInUseError


class DirectoryLock:
    """Holds DIRECTORY/lock until `release`. Raises `StoreInUseError` where another process, or
    another store of this one, holds it."""

    def __init__(self, directory: Path) -> None:
        # Whoever may write the directory could make it a link to a file that this user owns.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._file = os.open(directory / "lock", flags, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise StoreInUseError(
                f"{directory}: the colony with process id {holder} has this directory open; "
                "give each colony a directory of its own"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets others have the directory."""
        os.close(self._file)
