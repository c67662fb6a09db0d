"""The samples of an interval as arrays: what cpu_profile.bpf.c has sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.long_ring import LongRecords
from coral.collectors.cpu_profile.ragged import Ragged, gather

# Bits of `flags`, as in cpu_profile.bpf.c.
IN_KERNEL: Final = 1
KERNEL_CUT: Final = 2
NO_USER: Final = 4
STACK_CUT: Final = 8
BY_FRAMES: Final = 16
STACK_HIDDEN: Final = 32

_WORD: Final = 8


class Samples(NamedTuple):
    """The samples: struct cpu_sample of shape (n,), and the words that their tails are in."""

    structs: NDArray[Any]
    words: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.structs)

    def has(self, flag: int) -> NDArray[np.bool_]:
        """Which of the samples have a flag, of shape (n,)."""
        has: NDArray[np.bool_] = (self.structs["flags"] & np.uint32(flag)) != 0
        return has

    @property
    def kernel_frames(self) -> Ragged:
        """The addresses on the stack of the kernel, innermost first."""
        return gather(self.words, self.structs["tail"], self.structs["kernel_frames"])

    @property
    def first_words(self) -> NDArray[np.int64]:
        """Where in `words` the copy of each user stack begins."""
        first: NDArray[np.int64] = self.structs["tail"].astype(np.int64)
        first += self.structs["kernel_frames"]
        return first

    @property
    def word_counts(self) -> NDArray[np.int64]:
        """How many words of each user stack were copied."""
        counts: NDArray[np.int64] = self.structs["stack_bytes"].astype(np.int64) // _WORD
        return counts

    @property
    def user_frames(self) -> Ragged:
        """The addresses on user stacks that the kernel has followed itself, innermost first; none
        of samples with a copy of their stack."""
        counts = np.where(self.has(BY_FRAMES), self.word_counts, 0)
        return gather(self.words, self.first_words, counts)


def joined(parts: Sequence[LongRecords], dtype: np.dtype[Any]) -> Samples:
    """The records of several drains as one; their structs have the layout DTYPE."""
    if not parts:
        return Samples(np.empty(0, dtype), np.empty(0, np.uint64))
    if len(parts) == 1:
        return Samples(parts[0].structs, parts[0].words)
    before = 0
    for part in parts:
        part.structs["tail"] += np.uint64(before)
        before += len(part.words)
    return Samples(
        np.concatenate([part.structs for part in parts]),
        np.concatenate([part.words for part in parts]),
    )
