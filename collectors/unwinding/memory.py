"""The copied stacks as memory: words by their address in the sampled process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding.stacks import Samples

_WORD: Final = 8
_RED_ZONE_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Memory:
    """The stacks of N samples."""

    words: NDArray[np.uint64]  # at least one
    first: NDArray[np.int64]  # (n,)
    base: NDArray[np.int64]  # (n,)
    room: NDArray[np.uint64]  # (n,): bytes from the base at which a whole word may begin
    is_whole: NDArray[np.bool_]  # (n,)

    @classmethod
    def of(cls, samples: Samples) -> Memory:
        """The stacks of SAMPLES. Parts that are outside of `words` count as not copied."""
        size = len(samples.words)
        first = np.clip(samples.first, 0, size).astype(np.int64)
        count = np.clip(samples.count, 0, size - first)
        words = samples.words if size else np.zeros(1, np.uint64)
        first = np.minimum(first, max(size - 1, 0))  # of a stack without words, one is read in vain
        room = np.where(count > 0, count * _WORD - _WORD + 1, 0).astype(np.uint64)
        is_whole = samples.is_whole
        if is_whole is None:
            is_whole = np.zeros(len(samples), np.bool_)
        return cls(words, first, samples.base.astype(np.int64), room, is_whole)

    def take(self, index: NDArray[Any]) -> Memory:
        """The stacks at INDEX, a mask or indexes."""
        return Memory(
            self.words,
            self.first[index],
            self.base[index],
            self.room[index],
            self.is_whole[index],
        )

    def read(self, address: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """The word at an ADDRESS of each stack, (n,), or 0, and whether it was copied."""
        into = address - self.base
        readable = into.view(np.uint64) < self.room
        every = np.count_nonzero(readable) == len(readable)
        if not every:
            into = np.where(readable, into, 0)
        place = self.first + (into >> 3)
        found = self.words[place]
        odd = into & (_WORD - 1)
        if np.count_nonzero(odd):
            low = (odd * 8).astype(np.uint64)  # of the first word, these bits are not wanted
            high = self.words[np.minimum(place + 1, len(self.words) - 1)] << (
                np.uint64(64) - np.maximum(low, np.uint64(1))
            )
            found = np.where(odd > 0, (found >> low) | high, found)
        if not every:
            found = np.where(readable, found, np.uint64(0))
        return found, readable

    def is_beyond(self, address: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
        """Whether an ADDRESS of each stack, (n,), was not copied, and is above the copy by at most
        MOST bytes, unless that is whole, or just below it, where x86-64's leaf functions have their
        red zone."""
        into = address - self.base
        outside = into.view(np.uint64) >= self.room
        outside &= ~self.is_whole | (into < 0)
        return outside & (into >= -_RED_ZONE_BYTES) & (into < most + self.room.astype(np.int64))
