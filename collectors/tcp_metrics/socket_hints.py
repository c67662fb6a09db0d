"""The hints of sockets (connections.bpf.h): built again as connections end. Otherwise sockets that
are gone would make all others look as if a session followed them in time."""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject
from coral.collectors.hubs import Slot

HINTS: Final = 65536  # in a set: SOCKET_HINTS
_FACTOR: Final = np.uint32(0x9E3779B1)  # as in hash_of
_REBUILT_AFTER: Final = HINTS // 4  # connections that have ended since


class SocketHints:
    """The hints of one hub. Safe to use by several threads."""

    def __init__(self, bpf_object: BpfObject) -> None:
        self._object = bpf_object
        self._lock = threading.Lock()
        self._ended = 0

    def note_ended(self, count: int, slot: Slot) -> None:
        """COUNT connections of the session in SLOT have ended."""
        with self._lock:
            self._ended += count
            if self._ended < _REBUILT_AFTER:
                return
            self._ended = 0
        slot.with_hub_later(lambda: self.rebuild(slot))

    def rebuild(self, slot: Slot) -> None:
        """Builds the set that is not in use, and changes over. Programs set a hint in both sets,
        after they have added the connection: either it is read here, or its hints are set after
        those here were cleared. Raises `BpfError`."""
        unused = 1 - int(self._object.read_variable("socket_hints_in_use"))
        hints, first = self._object.map("socket_hints"), np.uint32(unused * HINTS)
        hints.write_many(np.arange(HINTS, dtype=np.uint32) + first, np.zeros(HINTS, np.uint8))
        for keys in slot.keys_in_hub("connections"):
            at = np.unique(hash_of(keys)) + first
            hints.write_many(at, np.ones(len(at), np.uint8))
        self._object.write_variable("socket_hints_in_use", unused)


def hash_of(addresses: NDArray[Any]) -> NDArray[np.uint32]:
    """The hashes of sockets, of shape (n,), as in connections.bpf.h."""
    hashed: NDArray[np.uint32] = (addresses.astype(np.uint32) * _FACTOR) >> np.uint32(16)
    return hashed
