"""What the processes of a session use that the programs cannot read: another protocol, a connection
that was joined in its middle, bytes that nobody can see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap
from coral.collectors.contract import Unread

# By enum unread of connection.bpf.h; at UNREAD_NONE, reads and writes.
_BY_NUMBER: Final = (
    "unseen", "joined", "tls", "http2", "other", "upgraded", "behind", "peer", "io_uring",
)  # fmt: skip
IN_PROGRESS: Final = "in_progress"
"""Requests that had not ended when the session did."""
WHAT: Final = (*_BY_NUMBER, IN_PROGRESS)


class UnreadCounts:
    """The counts of the session in one slot, from now on."""

    def __init__(self, unreads: HashMap, slot: int) -> None:
        self._unreads, self._slot = unreads, slot
        self._before = self._read()

    def read(self) -> Mapping[str, Unread]:
        """Everything since the last reading, by what it is. Raises `BpfError`."""
        total = self._read()
        added, self._before = total - self._before, total
        return {
            what: Unread(int(count), int(size))
            for what, (count, size) in zip(_BY_NUMBER, added.T, strict=False)
            if count or size
        }

    def _read(self) -> NDArray[np.uint64]:
        """Counts and bytes of all CPUs, of shape (2, UNREADS)."""
        found: NDArray[Any] | None = self._unreads.read_one(self._slot)
        if found is None:
            raise KeyError(self._slot)
        return np.stack([found["count"].sum(axis=0), found["bytes"].sum(axis=0)])
