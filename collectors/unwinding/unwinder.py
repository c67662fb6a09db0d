"""Unwinds samples of processes by what those have mapped, and by the tables of the mapped files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.symbols.files import FileKind, MappedFile, memory_of
from coral.collectors.symbols.generations import Generation
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.rules import Cfa, Machine, Rows
from coral.collectors.unwinding.space import Region, Space
from coral.collectors.unwinding.stacks import Samples, Stacks, replaced
from coral.collectors.unwinding.tables import MACHINES, Tables
from coral.collectors.unwinding.walk import unwind

Ints = NDArray[np.int64]
_Key = tuple[ProcessMaps, int]

_MOST_MEMORIES: Final = 1024
_MOST_TABLES: Final = 8192  # there is room for 65,536 in a `Space`
_MOST_ROW_BYTES: Final = 128 << 20  # beside what the processes at hand need
_MOST_ROUNDS: Final = 64  # each finds the next file on a stack of which nothing was known
_NOW: Final = np.iinfo(np.uint64).max
# CPython 3.12 and later write this for `-X perf`, again and again, from the memory's start on:
# sub $8, %rsp; call *%rcx; add $8, %rsp; ret. With CET, endbr64 comes first.
_TRAMPOLINE: Final = bytes.fromhex("4883ec08ffd14883c408c3")
_ENDBR64: Final = bytes.fromhex("f30f1efa")


class Unwinder:
    """The unwinding of one session or of all. Not safe to use from two threads at once."""

    def __init__(self, machine: Machine, tables: Tables | None = None) -> None:
        self.machine = machine
        self.tables = tables or Tables()
        self._space = Space(machine)
        self._rows: dict[MappedFile, Rows | None] = {}
        self._regions: dict[tuple[ProcessMaps, int, int], Region] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, compiled and joined."""
        return self.tables.nbytes + self._space.nbytes

    def unwind(
        self,
        processes: Sequence[ProcessMaps],
        which: Ints,
        times_ns: NDArray[np.uint64],
        samples: Samples,
    ) -> Stacks:
        """The stacks of SAMPLES, whose `memory` is ignored: sample i is of PROCESSES[WHICH[i]],
        taken at TIMES_NS[i]. Maps are read again where a stack leads to memory not in them, and
        the tables of files are compiled when the first stack leads there."""
        stacks = self._unwind(processes, which, times_ns, samples)
        times_ns, read = times_ns.copy(), set[int]()
        for _ in range(_MOST_ROUNDS):
            lost = np.flatnonzero(stacks.unmapped != 0)
            again = np.zeros(len(lost), np.bool_)
            for number in np.unique(which[lost]).tolist():
                process, mine = processes[number], which[lost] == number
                addresses = stacks.unmapped[lost[mine]]
                if self._compile(process, addresses, times_ns[lost[mine]]):
                    again |= mine
                elif number not in read:
                    read.add(number)
                    if (process.locate(addresses) >= 0).any():
                        times_ns[lost[mine]] = _NOW
                        again |= mine
            if not again.any():
                break
            stacks = self._again(stacks, lost[again], (processes, which, times_ns, samples))
        return stacks

    def _again(
        self,
        stacks: Stacks,
        chosen: Ints,
        what: tuple[Sequence[ProcessMaps], Ints, NDArray[np.uint64], Samples],
    ) -> Stacks:
        """STACKS in which those CHOSEN are unwound again, where that finds more."""
        processes, which, times_ns, samples = what
        found = self._unwind(processes, which[chosen], times_ns[chosen], samples.take(chosen))
        is_shorter = found.lengths < stacks.lengths[chosen]
        kept = stacks.take(chosen[is_shorter])
        return replaced(stacks, chosen, replaced(found, np.flatnonzero(is_shorter), kept))

    def _compile(
        self, process: ProcessMaps, addresses: NDArray[np.uint64], times_ns: NDArray[np.uint64]
    ) -> bool:
        """Compiles the tables of the files that PROCESS had mapped at ADDRESSES. Returns whether
        there were any that it had not."""
        found = process.find(addresses, times_ns)
        files = set()
        for mapping in np.unique(found[found >= 0]).tolist():
            if self._region(process, mapping).kind is Cfa.PENDING:
                file = process.files[process.file_indexes[mapping]]
                if file not in self._rows:
                    self._rows[file] = None if file.elf is None else self.tables.of(file.elf)
                files.add(file)
        if not files:
            return False
        self._regions = {
            key: region
            for key, region in self._regions.items()
            if key[:2] != (process, process.resets)
            or process.files[process.file_indexes[key[2]]] not in files
        }
        for generation in process.generations:
            if (process, generation.number) in self._space:
                self._put_all(process, generation)
        return True

    def _unwind(
        self,
        processes: Sequence[ProcessMaps],
        which: Ints,
        times_ns: NDArray[np.uint64],
        samples: Samples,
    ) -> Stacks:
        keys: list[_Key] = []
        place = np.zeros(len(which), np.int64)
        for number in np.unique(which).tolist():
            process, chosen = processes[number], np.flatnonzero(which == number)
            generations = process.generations
            begins = np.array([one.since_ns for one in generations], np.uint64)
            at = np.maximum(np.searchsorted(begins, times_ns[chosen], "right") - 1, 0)
            for index in np.unique(at).tolist():
                place[chosen[at == index]] = len(keys)
                keys.append(self._put(process, generations, index))
        space = self._space
        is_full = len(space) > _MOST_MEMORIES or space.tables > _MOST_TABLES
        if is_full or space.row_bytes > _MOST_ROW_BYTES:
            self._forget(keys)
        slots = np.array([self._space.slot(key) for key in keys], np.int64)
        memory = slots[place] if keys else place
        return unwind(replace(samples, memory=memory), self._space)

    def _put(self, process: ProcessMaps, generations: Sequence[Generation], index: int) -> _Key:
        if not generations:
            key = (process, -1)
            if key not in self._space:
                self._space.put(key, [])
            return key
        generation = generations[index]
        key = (process, generation.number)
        if key not in self._space:
            self._put_all(process, generation)
        return key

    def _put_all(self, process: ProcessMaps, generation: Generation) -> None:
        regions = [self._region(process, mapping) for mapping in generation.ids.tolist()]
        self._space.put((process, generation.number), regions)

    def _region(self, process: ProcessMaps, mapping: int) -> Region:
        key = (process, process.resets, mapping)
        if key not in self._regions:
            self._regions[key] = self._made(process, mapping)
        return self._regions[key]

    def _made(self, process: ProcessMaps, mapping: int) -> Region:
        start, end = int(process.starts[mapping]), int(process.ends[mapping])
        file = process.files[process.file_indexes[mapping]]
        if file.kind is FileKind.ANONYMOUS and file.elf is None:
            return Region(start, end, 0, None, _kind_of(process.tgid, start))
        if file.elf is not None and file not in self._rows:
            return Region(start, end, 0, None, Cfa.PENDING)
        rows, bias = self._rows.get(file), None
        if rows is not None and file.elf is not None:
            bias = file.elf.bias(start, end, int(process.file_offsets[mapping]))
        return Region(start, end, bias or 0, None if bias is None else rows)

    def _forget(self, keys: Sequence[_Key]) -> None:
        self._space.keep_only(set(keys))
        kept = {process for process, _ in keys}
        self._regions = {key: found for key, found in self._regions.items() if key[0] in kept}
        files = {file for process in kept for file in process.files}
        self._rows = {file: rows for file, rows in self._rows.items() if file in files}


def _kind_of(tgid: int, start: int) -> Cfa:
    """What executable memory without a file holds."""
    try:
        with memory_of(tgid) as memory:
            code = os.pread(memory, len(_ENDBR64) + len(_TRAMPOLINE), start)
    except (OSError, OverflowError):  # vsyscall is above what a descriptor can name
        return Cfa.ANONYMOUS
    is_trampoline = code.removeprefix(_ENDBR64).startswith(_TRAMPOLINE)
    return Cfa.TRAMPOLINE if is_trampoline else Cfa.ANONYMOUS


def machine_of(elf_machine: int) -> Machine | None:
    """The registers of a machine by ELF's number for it; None where stacks cannot be unwound."""
    return MACHINES.get(elf_machine)
