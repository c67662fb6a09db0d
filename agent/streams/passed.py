"""What a filter takes of a frame, as it waits in queues. Loop-free.

As many subscribers as there may be can each have a filter of its own and read slowly. So a queue
holds the frame that all of them share, and which of its rows pass; a frame of these rows is made,
and encoded, when it is about to be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from coral.agent.streams.filter import Filter
from coral.agent.streams.frame import Frame, Held
from coral.mesh.v1 import ebpf_pb2 as pb

# What a `Passed` takes beside its bits; tests/unit/test_streams.py measures it.
PASSED_BYTES: Final = 450
# Rows that are fewer than this share of a frame do not keep all of it in memory: the frame of them
# is made at once.
_FEW_ROWS_SHARE: Final = 16


class Passed:
    """The rows of the frame SOURCE that pass a filter: those of MASK, of shape (rows,)."""

    def __init__(self, source: Frame, mask: NDArray[np.bool_]) -> None:
        self.source = source
        self.count = int(np.count_nonzero(mask))
        self.size_bytes = source.size_with(self.count)  # about that of `frame()`
        self._bits = np.packbits(mask)
        self._frame: ref[Frame] | None = None  # readers that keep up share it while one sends it
        self._holders = 0
        self._held_in: Held | None = None

    @property
    def first_seq(self) -> int:
        """The first number that it accounts for."""
        return self.source.first_seq

    @property
    def covered(self) -> int:
        """How many numbers it accounts for."""
        return self.source.covered

    @property
    def losses(self) -> Mapping[int, int]:
        """Those that the frame tells, by stage."""
        return self.source.losses

    @property
    def lost_in_kernel_before(self) -> Mapping[int, int]:
        """Lost in the kernel before the frame."""
        return self.source.lost_in_kernel_before

    @property
    def event_bytes(self) -> int:
        """About what one of the rows takes as an encoded EbpfEvent."""
        return self.source.event_bytes

    @property
    def end(self) -> pb.SessionEnd | None:
        """None: a filter has nothing to take of an end."""
        return None

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory without its source."""
        return PASSED_BYTES + self._bits.nbytes

    def hold(self, held: Held) -> None:
        """Adds it and its source to what is HELD, each once."""
        self._holders += 1
        if self._holders == 1:
            held.size_bytes += self.memory_bytes
            self._held_in = held
            self.source.hold(held)

    def release(self) -> None:
        """Undoes one call of `hold`."""
        self._holders -= 1
        if not self._holders and self._held_in:
            self._held_in.size_bytes -= self.memory_bytes
            self._held_in = None
            self.source.release()

    def frame(self) -> Frame:
        """A frame of these rows; the same one for all readers while any holds it."""
        frame = self._frame() if self._frame else None
        if frame is None:
            mask = np.unpackbits(self._bits, count=self.source.count).view(bool)
            frame = self.source.with_rows(mask)
            self._frame = ref(frame)
        return frame


Queued: TypeAlias = Frame | Passed


def filtered(frame: Frame, wanted: Filter) -> Queued:
    """The rows of FRAME that pass; the same object for equal filters while FRAME is recent and any
    reader holds it."""
    if not frame.rows or not wanted:
        return frame
    shared = frame.selections
    if shared is not None and (found := shared.get(wanted)):
        same: Queued = found
        return same
    passed = Passed(frame, wanted.mask(frame.rows, frame.attributes))
    if passed.count == frame.count:
        return frame
    is_few = passed.count and passed.size_bytes < frame.size_bytes // _FEW_ROWS_SHARE
    queued = passed.frame() if is_few else passed
    if shared is not None:
        shared[wanted] = queued
    return queued
