"""The link between a loaded program and its hook: it lasts until it is detached."""

from __future__ import annotations

import os
from typing import Protocol


class Link(Protocol):
    """One attachment of one program."""

    def detach(self) -> None:
        """Detaches the program from the hook. Safe to call twice. Raises `BpfError` or OSError."""


class FdLink:
    """An attachment that lasts as long as a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def detach(self) -> None:
        """See `Link`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
