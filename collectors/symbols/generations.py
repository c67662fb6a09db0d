"""What a process had mapped at which time: the states of its memory, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Generation:
    """What was mapped from a time on, until the next one: `ids` of mappings (i32[m]) with their
    `starts` and `ends` (u64[m]), ascending. `program` counts the programs that the process has
    executed; no two generations of a process have the same `number`."""

    number: int
    since_ns: int
    program: int
    ids: NDArray[np.int32]
    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    read_ns: int = 0
    """When it had been read."""

    def find(self, addresses: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The ids of the mappings that contain ADDRESSES (u64[n]); -1 for those in none."""
        if not len(self.ids):
            return np.full(len(addresses), -1, np.int32)
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (at >= 0) & (addresses < self.ends[at])
        return np.where(inside, self.ids[at], -1).astype(np.int32)


def find_in(
    generations: Sequence[Generation],
    addresses: NDArray[np.uint64],
    times_ns: NDArray[np.uint64] | None,
) -> NDArray[np.int32]:
    """The ids of the mappings of GENERATIONS, oldest first, in which ADDRESSES (u64[n]) lay at
    TIMES_NS; see `ProcessMaps.find`."""
    found = np.full(len(addresses), -1, np.int32)
    if times_ns is None:
        times_ns = np.full(len(addresses), np.iinfo(np.uint64).max)
    ends = [generation.since_ns for generation in generations[1:]]
    bounds = [np.uint64(end) for end in ends] + [np.iinfo(np.uint64).max]
    programs = {generation.program for generation in generations}
    for program in sorted(programs):
        of_program = [
            (generation, bound)
            for generation, bound in zip(generations, bounds, strict=True)
            if generation.program == program
        ]
        first = np.uint64(of_program[0][0].since_ns)
        last = of_program[-1][1]
        left = (times_ns >= first) & ((times_ns < last) | (last == np.iinfo(np.uint64).max))
        if program == min(programs):
            left |= times_ns < first
        for generation, bound in of_program:
            _fill(found, left & (times_ns <= bound), generation, addresses)
        for generation, _ in reversed(of_program):
            _fill(found, left, generation, addresses)
    return found


def _fill(
    found: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    generation: Generation,
    addresses: NDArray[np.uint64],
) -> None:
    wanted = wanted & (found < 0)
    if wanted.any():
        found[wanted] = generation.find(addresses[wanted])
