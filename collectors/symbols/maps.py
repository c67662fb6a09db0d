"""The code that one process has mapped: where, and from which byte of which file, now and before.

Samples are named some time after they were taken. So earlier states of the memory are kept, with
the times from which they hold: what a process had mapped before it executed another program, or
unloaded a library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.mappings import MappedCode
from coral.collectors.procfs import start_time_of
from coral.collectors.symbols.files import (
    FileKind,
    MappedFile,
    MappedFiles,
    Mounts,
    Sighting,
    read_whole,
)
from coral.collectors.symbols.generations import Generation, find_in
from coral.collectors.symbols.map_lines import Line, Neighbours, lines_of, nearest_files
from coral.collectors.symbols.moved_text import original_of

_MOST_GENERATIONS: Final = 32
_MOST_MAPPINGS: Final = 1 << 16  # 30 MB; runtimes map code at new addresses again and again
_MOST_AT_ONCE: Final = 1 << 15
_MOST_TOLD: Final = 256
_MOST_EXECUTIONS: Final = 256
_REST_FACTOR: Final = 20  # after a look, rest this many times as long: 5 % of a CPU at most
_SHORTEST_REST_S: Final = 0.02
_TICK_NS: Final = 10**9 // os.sysconf("SC_CLK_TCK")
_KERNEL_HALF: Final = np.uint64(1 << 63)
_COLUMNS: Final = np.dtype(
    [("start", "u8"), ("end", "u8"), ("offset", "u8"), ("file", "i4"), ("moved", "?")]
)


class ProcessMaps:
    """The executable mappings of the process TGID, those of now and those of before.

    Each has an id, by which these are indexed: `starts`, `ends` and `file_offsets` (u64), and
    `file_indexes` (i32) into `files`. An id keeps its meaning until `resets` changes, which
    happens after 65,536 mappings, of which 32,768 can be there at once. Memory without a file is a
    `MappedFile` as well. Text that the process has moved into anonymous memory, for huge pages,
    counts as mapped from its file if the memory's pages are those of the file; `is_moved` (bool)
    tells. `generations` are the states of the memory that are remembered, oldest first.

    Times are of CLOCK_MONOTONIC, as the kernel's programs take them. Not safe to use from two
    threads at once. Never raises for what the process does or is: without its maps, it has none.
    """

    def __init__(self, tgid: int, files: MappedFiles) -> None:
        self.tgid = tgid
        self.has_ended = False
        self.resets = 0
        self._taken = 0
        self.files: list[MappedFile] = []
        self._registry = files
        self.started = start_time_of(tgid)
        """In clock ticks since boot; None if it had ended."""
        self._program = 0
        self._noticed = -1  # the program that was not told, but seen in the maps
        self._rest_until = 0.0
        self._text = b""
        self.read_ns = 0  # when the maps were read last
        self._executed_ns: list[int] = []  # when the process executed programs, as was told last
        self._executions: list[int] = []  # all that were told
        self._taken_ns = 0  # when the newest generation was read
        self._told_ns: int | None = None
        self._told: list[MappedCode] = []  # by a process that had ended
        self._forget_all()
        self.refresh(since_ns=0)

    def _forget_all(self) -> None:
        self.files.clear()
        self._file_numbers: dict[int, int] = {}
        self._without_elf: dict[tuple[FileKind, str, Hashable], MappedFile] = {}
        self._known: dict[tuple[int, int, int, int], int] = {}
        self._columns: list[tuple[int, int, int, int, bool]] = []
        self.generations: tuple[Generation, ...] = ()
        self._index()

    def _index(self) -> None:
        table = np.array(self._columns, _COLUMNS)
        self.starts, self.ends = table["start"].copy(), table["end"].copy()
        self.file_offsets = table["offset"].copy()
        self.file_indexes = table["file"].copy()
        self.is_moved = table["moved"].copy()

    def find(
        self, addresses: NDArray[np.uint64], times_ns: NDArray[np.uint64] | None = None
    ) -> NDArray[np.int32]:
        """The ids of the mappings in which ADDRESSES (u64[n]) lay at TIMES_NS (u64[n], by default
        now); -1 for those that lay in none.

        An address that is in no mapping known of its time is looked for in those of later times,
        then in earlier ones, of the program that the process executed then.
        """
        return find_in(self.generations, addresses, times_ns)

    def locate(
        self, addresses: NDArray[np.uint64], times_ns: NDArray[np.uint64] | None = None
    ) -> NDArray[np.int32]:
        """As `find`, and reads the maps again if an address is in none of them, or more were told.
        Since addresses can be wrong, and processes can have very many mappings, this takes at most
        5 % of a CPU."""
        found = self.find(addresses, times_ns)
        wanted = self._told_ns is not None or (found < 0).any()
        if wanted and time.monotonic() >= self._rest_until and self.refresh(self._told_ns):
            found = self.find(addresses, times_ns)
        return found

    def mapped(self, codes: Sequence[MappedCode]) -> None:
        """The process has mapped CODES, by time: the maps are read again, now or with the next
        `locate` or `catch_up`. If it had ended before they were read at all, what was told counts
        instead, as far as its files are known from other processes."""
        time_ns = codes[0].time_ns
        executed_ns = max((code.time_ns for code in codes if code.is_of_exec), default=None)
        if executed_ns is not None:  # what was told before is of another program
            self._told_ns = executed_ns
            self._executed_ns = [code.time_ns for code in codes if code.is_of_exec]
            self._executions = [*self._executions, *self._executed_ns][-_MOST_EXECUTIONS:]
            self._begin()
        elif self._told_ns is None:
            self._told_ns = time_ns
        self.catch_up()
        if not self.has_ended:
            return
        if self._told or not self.generations:
            self._told = [*self._told, *codes][-_MOST_TOLD:]
            is_clear = sum(code.is_of_exec for code in self._told) == 1
            self.generations = ()
            self._take_told(self._told if is_clear else [], np.zeros(0, np.int32), 0)
            return
        later = [code for code in codes if code.time_ns > self.read_ns][-_MOST_TOLD:]
        if not any(code.is_of_exec for code in later):
            self._take_told(later, self.generations[-1].ids, time_ns)

    def began(self, time_ns: int, *, is_over: bool) -> int | None:
        """When the process executed the program that it was at TIME_NS, 0 for the first one, if
        what that had mapped is known: it was read before the next one was executed, as there was,
        if it IS OVER. None otherwise, and if any of this was not told."""
        begun_ns = max((it for it in self._executions if it <= time_ns), default=0)
        next_ns = min((it for it in self._executions if it > time_ns), default=None)
        if (next_ns is None) if is_over else begun_ns == 0:
            return None
        for one in reversed(self.generations):
            if one.since_ns <= time_ns:
                in_time = next_ns is None or one.read_ns < next_ns
                return begun_ns if one.since_ns >= begun_ns and len(one.ids) and in_time else None
        return None

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, even if another has its number now."""
        return self.has_ended or start_time_of(self.tgid) != self.started

    def began_after(self, time_ns: int) -> bool:
        """Whether the process began after TIME_NS: whatever had its number then was another one.
        False if that is not known. /proc tells the beginning in ticks since boot, rounded down;
        this clock stands still while the machine sleeps, so the result is never too late."""
        started_ns = self.started_ns
        return started_ns is not None and started_ns > time_ns

    @property
    def started_ns(self) -> int | None:
        """When the process began, rounded down to 10 ms; None if it had ended."""
        if self.started is None:
            return None
        monotonic_ns = time.monotonic_ns()
        slept_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - monotonic_ns
        return max(0, self.started * _TICK_NS - slept_ns)

    def catch_up(self) -> float | None:
        """Reads the maps again if more was told than is known, and it is time. Returns the number
        of seconds until it is time; None if nothing is left to read."""
        if self._told_ns is None:
            return None
        left_s = self._rest_until - time.monotonic()
        if left_s > 0:
            return left_s
        self.refresh(self._told_ns)
        return None

    def executed(self, time_ns: int) -> None:
        """The process executed another program at TIME_NS: what it has mapped from then on is
        another memory."""
        if self._noticed == self._program and self.generations[-1].since_ns >= time_ns:
            # It was seen in the maps before it was told here.
            self.generations = tuple(
                replace(one, since_ns=min(one.since_ns, time_ns))
                if one.program == self._program
                else one
                for one in self.generations
            )
            self._noticed = -1
            self._begin()
            return
        self._program += 1
        self._text = b""
        self.refresh(since_ns=time_ns)

    def refresh(self, since_ns: int | None = None) -> bool:
        """Reads what is mapped now, which holds from SINCE_NS on, by default from now on. Returns
        whether anything has changed."""
        begun = time.thread_time()  # without its waits, which are long on a busy machine
        if self.has_ended or start_time_of(self.tgid) != self.started or self.started is None:
            self.has_ended = True
            self._told_ns = None
            return False
        self._told_ns = None
        read_ns = time.monotonic_ns()
        text = read_whole(self.tgid, "maps")
        self.read_ns = read_ns if text else self.read_ns
        changed = bool(text) and text != self._text
        if changed:
            self._text = text
            changed = self._take(text, time.monotonic_ns() if since_ns is None else since_ns)
        took = time.thread_time() - begun
        self._rest_until = time.monotonic() + max(took * _REST_FACTOR, _SHORTEST_REST_S)
        return changed

    def _take(self, text: bytes, since_ns: int) -> bool:
        lines = list(lines_of(self.tgid, text, _MOST_AT_ONCE))
        if len(self._columns) + sum(line.executable for line in lines) > _MOST_MAPPINGS:
            self.resets += 1
            self._forget_all()
        mounts = Mounts(self.tgid)
        around = list(zip(nearest_files(lines), nearest_files(lines[::-1])[::-1], strict=True))
        ids = [
            self._id_of(line, neighbours, mounts)
            for line, neighbours in zip(lines, around, strict=True)
            if line.executable
        ]
        self._index()
        numbers = np.array(ids, np.int32)
        if self.generations:
            newest = self.generations[-1]
            if newest.program == self._program and np.array_equal(newest.ids, numbers):
                return False
            of_process = newest.ids[newest.starts < _KERNEL_HALF]  # not [vsyscall]
            if newest.program == self._program and not np.isin(of_process, numbers).any():
                self._program += 1  # only execve(2) replaces everything
                self._noticed = self._program
            since_ns = max(since_ns, newest.since_ns)
        generation = Generation(
            self._taken,
            since_ns,
            self._program,
            numbers,
            self.starts[numbers],
            self.ends[numbers],
            time.monotonic_ns(),
        )
        self._taken += 1
        self._taken_ns = self.read_ns
        self.generations = (*self.generations, generation)[-_MOST_GENERATIONS:]
        self._begin()
        return True

    def _begin(self) -> None:
        """If the newest generation was read after the process had executed a program, it is of that
        program, and what was mapped before is not known."""
        if not self.generations:
            return
        newest = self.generations[-1]
        begun_ns = max((it for it in self._executed_ns if it < self._taken_ns), default=0)
        if newest.since_ns >= begun_ns:
            return
        nothing, nowhere = np.zeros(0, np.int32), np.zeros(0, np.uint64)
        unknown = Generation(
            self._taken, newest.since_ns, newest.program, nothing, nowhere, nowhere
        )
        self._program += 1
        self._taken += 2
        newest = replace(newest, number=self._taken - 1, since_ns=begun_ns, program=self._program)
        self.generations = (*self.generations[:-1], unknown, newest)[-_MOST_GENERATIONS:]

    def _take_told(
        self, codes: Sequence[MappedCode], before: NDArray[np.int32], since_ns: int
    ) -> None:
        """From SINCE_NS on, there were CODES beside the mappings BEFORE, which they replace where
        they overlap."""
        kept = {(int(self.starts[id_]), int(self.ends[id_])): int(id_) for id_ in before}
        for code in codes:
            start, end = code.start, code.start + code.length
            device = f"{os.major(code.device):02x}:{os.minor(code.device):02x}"
            seen = Sighting(self.tgid, start, end, device, code.inode, code.path)
            kept = {one: id_ for one, id_ in kept.items() if one[1] <= start or one[0] >= end}
            file = self._registry.known(seen)
            kept[start, end] = self._id(seen, code.file_offset, file, moved=False)
        if not codes:
            return
        self._index()
        ids = np.array([id_ for _, id_ in sorted(kept.items())], np.int32)
        generation = Generation(
            self._taken, since_ns, self._program, ids, self.starts[ids], self.ends[ids]
        )
        self._taken += 1
        self.generations = (*self.generations, generation)[-_MOST_GENERATIONS:]

    def _id_of(self, line: Line, neighbours: Neighbours, mounts: Mounts) -> int:
        seen, offset, moved = line.seen, line.offset, False
        file = self._registry.get(seen, mounts)
        if file.elf is None:
            original = None
            if file.kind is not FileKind.VDSO:
                original = original_of(line, neighbours, self._registry, mounts)
            if original:
                file, offset = original
                moved = True
            else:
                file = self._without_elf.setdefault((file.kind, file.name, file.key), file)
        return self._id(seen, offset, file, moved=moved)

    def _id(self, seen: Sighting, offset: int, file: MappedFile, *, moved: bool) -> int:
        number = self._file_numbers.get(id(file))
        if number is None:
            number = self._file_numbers[id(file)] = len(self.files)
            self.files.append(file)  # so that no other object has its id
        key = (seen.start, seen.end, offset, number)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self._columns)
            self._columns.append((*key, moved))
        return found
