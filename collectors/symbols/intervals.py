"""Ranges of addresses that may overlap, made disjoint, so that a lookup is one binary search."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranges(NamedTuple):
    """Disjoint ranges, ascending: `starts` and `ends` (u64[m]; the end is not part of it), and the
    number of the range that each came from (i64[m])."""

    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    owners: NDArray[np.int64]


def disjoint(starts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> Ranges:
    """The ranges from STARTS to ENDS (u64[n], in any order), where of several that contain an
    address the last one has it. Empty ranges are left out; what remains of one may be in pieces."""
    numbers = np.flatnonzero(ends > starts)
    numbers = numbers[np.argsort(starts[numbers], kind="stable")]
    first, last = starts[numbers], ends[numbers]
    if (last[:-1] <= first[1:]).all():
        return Ranges(first, last, numbers)
    reach = np.maximum.accumulate(last)
    begins = np.concatenate(([True], first[1:] >= reach[:-1]))
    alone = begins & np.concatenate((begins[1:], [True]))
    painted = _painted(starts, ends, numbers[~alone])
    columns = zip(painted, Ranges(first[alone], last[alone], numbers[alone]), strict=True)
    merged = [np.concatenate(pair) for pair in columns]
    order = np.argsort(merged[0], kind="stable")
    return Ranges(*(column[order] for column in merged))


def _painted(
    starts: NDArray[np.uint64], ends: NDArray[np.uint64], numbers: NDArray[np.int64]
) -> Ranges:
    """`disjoint` for the ranges NUMBERS, which overlap.

    Between all bounds are cells; a range covers cells from `a` to `b`, and each cell belongs to the
    largest number that covers it. Two overlapping runs of 2^k cells cover any range; numbers of
    runs of 2^k cells pass to the two halves of each, down to single cells: n log n, in numpy.
    """
    bounds = distinct(np.concatenate((starts[numbers], ends[numbers])))
    a = np.searchsorted(bounds, starts[numbers])
    b = np.searchsorted(bounds, ends[numbers])
    levels = np.frexp((b - a).astype(np.float64))[1] - 1  # floor(log2)
    owners = np.full(len(bounds) - 1, -1, np.int64)
    for level in range(int(levels.max(initial=0)), -1, -1):
        here = levels == level
        np.maximum.at(owners, a[here], numbers[here])
        np.maximum.at(owners, b[here] - (1 << level), numbers[here])
        if level:
            half = 1 << (level - 1)
            upper = owners[:-half].copy()
            np.maximum(owners[half:], upper, out=owners[half:])
    changes = np.concatenate(([True], owners[1:] != owners[:-1]))
    at = np.flatnonzero(changes)
    until = np.concatenate((at[1:], [len(owners)]))
    owned = owners[at] >= 0
    return Ranges(bounds[at[owned]], bounds[until[owned]], owners[at[owned]])


def distinct(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The different ones of NUMBERS, ascending. `np.unique` hashes, which takes 8 s for 2 million
    addresses."""
    ordered = np.sort(numbers)
    return np.asarray(ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]])


def find(
    starts: NDArray[np.unsignedinteger],
    ends: NDArray[np.unsignedinteger],
    addresses: NDArray[np.unsignedinteger],
) -> NDArray[np.int64]:
    """Which of the disjoint ranges contain ADDRESSES; -1 for those in none. All of one type."""
    if not len(starts):
        return np.full(len(addresses), -1, np.int64)
    at = np.searchsorted(starts, addresses, side="right") - 1
    return np.where((at >= 0) & (addresses < ends[at]), at, -1)
