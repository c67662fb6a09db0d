"""Runs the call frame instructions of all functions of a file at once.

All programs' instructions are one long array, in which a register's rule at some instruction is
that of the last instruction before it that sets it: `maximum.accumulate` over indexes. A restored
state refers to the remembered one the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding.effects import RESTORED, Effects
from coral.collectors.unwinding.instructions import (
    REMEMBER_STATE,
    RESTORE_STATE,
    Code,
    Programs,
    Stream,
    advances,
    instructions,
)
from coral.collectors.unwinding.rules import Machine

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ran:
    """The rows of N programs."""

    program: Ints  # (m,): ascending
    address: Ints  # (m,): ascending within a program
    rules: Ints  # (m, columns)
    damaged: NDArray[np.bool_]  # (n,): the program's rows are not to be trusted


def run(code: Code, programs: Programs, machine: Machine) -> Ran:
    """Runs PROGRAMS of the section CODE. Never raises for damaged programs: they are marked."""
    stream, damaged = instructions(code, programs)
    advance, reaches = advances(code.data, stream, programs)
    cumulated = np.cumsum(advance)
    first = np.flatnonzero(stream.opcode < 0)
    base = cumulated[first]
    rows = np.flatnonzero((stream.opcode < 0) | (advance > 0))
    # A row's rule is that of the last instruction before the next row.
    last = np.append(rows[1:], len(stream.at))[: len(rows)] - 1
    program = stream.program[rows]
    address = cumulated[rows] - base[program] + programs.start[program]
    damaged |= ~reaches

    states = _States(stream, damaged)
    rules = programs.initial[program]
    effects = Effects(code, stream, programs, damaged)
    for column, sets, value in effects.columns(machine):
        setter = states.setter(sets, last)
        found = value[setter]
        keeps = (stream.opcode[setter] < 0) | (found == RESTORED)
        rules[:, column] = np.where(keeps, rules[:, column], found)
    return Ran(program, address, rules, damaged)


class _States:
    """Which instruction set something last, as seen from others, across restored states."""

    def __init__(self, stream: Stream, damaged: NDArray[np.bool_]) -> None:
        self._index = np.arange(len(stream.at), dtype=np.int32)
        self._is_mark = stream.opcode < 0
        self._restores = np.flatnonzero(stream.opcode == RESTORE_STATE)
        self._slot = np.zeros(len(stream.at), np.int32)
        self._slot[self._restores] = np.arange(len(self._restores))
        self._is_restore = np.zeros(len(stream.at), np.bool_)
        self._is_restore[self._restores] = True
        self._remembered = self._match(stream, damaged)

    def _match(self, stream: Stream, damaged: NDArray[np.bool_]) -> Ints:
        """The instruction that remembered what each restoring one restores, (r,)."""
        remembers = stream.opcode == REMEMBER_STATE
        events = np.flatnonzero(remembers | self._is_restore)
        remembering = remembers[events]
        program = stream.program[events]
        depth = np.cumsum(np.where(remembering, 1, -1))
        begins = np.diff(program, prepend=-1) > 0
        before = np.where(remembering, depth - 1, depth + 1)[begins]
        depth -= before[np.cumsum(begins) - 1]
        level = np.where(remembering, depth, depth + 1)
        # Those of one level of one program take turns: remember, restore.
        order = np.lexsort((events, level, program))
        previous = np.roll(order, 1)
        fits = remembering[previous] & ~remembering[order] & (level[order] >= 1)
        fits &= (program[previous] == program[order]) & (level[previous] == level[order])
        source = np.full(len(events), -1, np.int64)
        source[order] = np.where(fits, events[previous], -1)
        source = source[~remembering]
        unmatched = source < 0
        damaged[stream.program[self._restores[unmatched]]] = True
        mark = np.flatnonzero(self._is_mark)[stream.program[self._restores]]
        return np.where(unmatched, mark, source)

    def setter(self, sets: NDArray[np.bool_], seen_from: Ints) -> Ints:
        """The last of the instructions SETS, (t,), or the mark of the beginning, as seen from each
        of SEEN_FROM, (k,)."""
        stops = sets | self._is_mark | self._is_restore
        last = np.maximum.accumulate(np.where(stops, self._index, np.int32(0)))
        origin = last[self._remembered]
        while len(again := np.flatnonzero(self._is_restore[origin])):
            # All chains halve at once: the origin of an origin is known as far as this one's.
            origin[again] = origin[self._slot[origin[again]]]
        found = last[seen_from].astype(np.int64)
        again = np.flatnonzero(self._is_restore[found])
        found[again] = origin[self._slot[found[again]]]
        return found
