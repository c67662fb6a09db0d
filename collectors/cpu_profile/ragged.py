"""Lists of different lengths as one flat array and their lengths: stacks are kept like this."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ragged(NamedTuple):
    """The values of all lists, one list after the other, of shape (m,), and the length of each
    list, of shape (n,)."""

    flat: NDArray[Any]
    lengths: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each list begins in `flat`."""
        starts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return starts

    @property
    def owner(self) -> NDArray[np.intp]:
        """The list that each value belongs to, of shape (m,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def places(self) -> NDArray[np.int64]:
        """The place of each value in its list, from 0, of shape (m,)."""
        places: NDArray[np.int64] = np.arange(len(self.flat)) - np.repeat(self.starts, self.lengths)
        return places

    def take(self, lists: NDArray[np.intp]) -> Ragged:
        """The lists of these numbers, in this order."""
        return gather(self.flat, self.starts[lists], self.lengths[lists])


def gather(values: NDArray[Any], first: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
    """The lists that begin at FIRST in VALUES and have LENGTHS, both of shape (n,)."""
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    index = np.repeat(first.astype(np.int64) - starts, lengths) + np.arange(total)
    return Ragged(values[index], lengths)


def joined_reversed(first: Ragged, second: Ragged) -> Ragged:
    """For each list number, the list of FIRST and then that of SECOND, each from its end to its
    beginning."""
    lengths = first.lengths + second.lengths
    starts = np.cumsum(lengths) - lengths
    flat = np.empty(len(first.flat) + len(second.flat), first.flat.dtype)
    for part, before in ((first, np.zeros_like(lengths)), (second, first.lengths)):
        ends = starts + before + part.lengths - 1
        flat[np.repeat(ends, part.lengths) - part.places] = part.flat
    return Ragged(flat, lengths)


def fingerprints(lists: Ragged, of_value: NDArray[np.uint64], factor: int) -> NDArray[np.uint64]:
    """A number for each list, the same for equal lists: a polynomial in FACTOR, which is odd, whose
    coefficients are OF_VALUE, by value; modulo 2^64."""
    most = int(lists.lengths.max(initial=0))
    powers = np.cumprod(np.full(most + 1, factor, np.uint64), dtype=np.uint64)
    terms = of_value[lists.flat] * powers[lists.places]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    starts = lists.starts
    found: NDArray[np.uint64] = sums[starts + lists.lengths] - sums[starts]
    return found + lists.lengths.astype(np.uint64)
