"""Which watched processes the programs have met: those that have executed a program, and those that
have their first sample of a session."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, Final, Self

from numpy.typing import NDArray

from coral.bpf import BpfError, BpfObject, RingReader
from coral.bpf.attaching.link import Link
from coral.bpf.buffers.records import drain_whole

_log: Final = logging.getLogger(__name__)

PROGRAM: Final = "coral_execution"
_RECORD: Final = "sighting"
_RING: Final = "sightings"
_RING_BYTES: Final = 64 << 10  # as in cpu_profile.bpf.c


class Sightings:
    """Those of all sessions of a hub. Safe to close twice."""

    def __init__(self, ring: RingReader, link: Link) -> None:
        self._ring, self._link = ring, link

    @classmethod
    def of(cls, bpf_object: BpfObject) -> Self | None:
        """Attaches `PROGRAM` of BPF_OBJECT; None where it cannot be."""
        try:
            kinds = bpf_object.record_kinds({_RECORD: None})
            ring = RingReader(bpf_object.map_fd(_RING), _RING_BYTES, kinds)
        except OSError:
            return None
        try:
            return cls(ring, bpf_object.attach_one(PROGRAM))
        except BpfError:
            _log.debug("executed programs are not told", exc_info=True)
            ring.close()
            return None

    @property
    def fd(self) -> int:
        """A descriptor that is readable while there are any."""
        return self._ring.fd

    def take(self) -> NDArray[Any] | None:
        """The sightings since this was called before: struct sighting, of shape (n,); None without
        any. Raises `BpfError`."""
        if not self._ring.pending_bytes:
            return None
        taken = drain_whole(self._ring)[_RECORD]
        self._ring.rest()
        return taken

    def close(self) -> None:
        """Detaches the program."""
        try:
            with suppress(BpfError):
                self._link.detach()
        finally:
            self._ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
