"""Names for sampled addresses: which function, of which module, at which address of its file."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.mappings import MappedCode
from coral.collectors.symbols.demangle import Demangler
from coral.collectors.symbols.elf import NOWHERE, ElfFile
from coral.collectors.symbols.files import FileKind, MappedFile, MappedFiles
from coral.collectors.symbols.kernel import KernelSymbols
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.named import Named
from coral.collectors.symbols.perf_map import PerfMap
from coral.collectors.symbols.process import KnownProcess
from coral.collectors.symbols.store import CacheStats, StoredTable, SymbolStore
from coral.collectors.symbols.strings import Strings

UNKNOWN: Final = "[unknown]"
"""The function of an address that is in no mapping: the process had ended before its maps were
read, or a stack was unwound wrongly."""
_KERNEL_HALF: Final = np.uint64(1 << 63)
_VSYSCALL: Final = np.uint64(0xFFFF_FFFF_FF60_0000)
_NEW_S: Final = 10.0
_MOST_PROCESSES: Final = 4096
_MOST_COPIES: Final = 8  # of copies, one of the other
_TICK_NS: Final = 10**9 // os.sysconf("SC_CLK_TCK")
_MOST_REASONS: Final = 64
_LARGEST_STRINGS_BYTES: Final = 32 << 20
_LARGEST_PERF_MAPS_BYTES: Final = 192 << 20  # of all processes


class SymbolStats(NamedTuple):
    """What a Symbolizer has in memory, and what it had to drop."""

    tables: CacheStats
    open_files: int
    closed_files: int
    processes: int
    kernel_functions: int
    kernel_bytes: int
    perf_map_functions: int
    perf_map_bytes: int
    strings: int
    string_bytes: int
    names_refused: int


class Symbolizer:
    """Names addresses of processes and of the kernel. A process is known by its id and the time at
    which it was born, in whatever unit the caller has it. Not safe to use from two threads at once.

    Loading the symbols of a file when its first address is looked up takes 0.1 s for Node's
    153,000. At most 4096 processes are known; those that were not asked for longest are forgotten.
    """

    def __init__(self) -> None:
        self.strings = Strings()
        self.files = MappedFiles()
        self.store = SymbolStore()
        self.kernel = KernelSymbols()
        self.demangler = Demangler()
        self._processes: OrderedDict[tuple[int, int], KnownProcess] = OrderedDict()
        self._behind: set[tuple[int, int]] = set()  # those of which more was told than was read
        # Those that may end before they are asked for, with the time until which that is so.
        self._new: dict[tuple[int, int], float] = {}
        self._of_files: WeakKeyDictionary[MappedFile, tuple[int, int]] = WeakKeyDictionary()
        self._of_kernel: dict[str, tuple[int, int]] = {}
        self._reasons: dict[str, None] = {}

    @property
    def stats(self) -> SymbolStats:
        """What is in memory now."""
        perf_maps = list(self._perf_maps())
        return SymbolStats(
            tables=self.store.stats,
            open_files=len(self.files),
            closed_files=self.files.closed,
            processes=len(self._processes),
            kernel_functions=len(self.kernel),
            kernel_bytes=self.kernel.nbytes,
            perf_map_functions=sum(map(len, perf_maps)),
            perf_map_bytes=sum(perf_map.nbytes for perf_map in perf_maps),
            strings=len(self.strings),
            string_bytes=self.strings.memory_bytes,
            names_refused=self.demangler.refused,
        )

    def why_not(self) -> list[str]:
        """Why names are missing, for people; at most 64 reasons."""
        reasons = [*self._reasons, self.kernel.why_not, self.demangler.why_not]
        reasons += [perf_map.why_not for perf_map in self._perf_maps()]
        return sorted(set(filter(None, reasons)))[:_MOST_REASONS]

    def maps(self, tgid: int, born: int = 0) -> ProcessMaps:
        """The mappings of a process. Asking for those of a process makes it known: its maps are
        read and its files opened, so that its addresses have names after it has ended."""
        return self._process(tgid, born).maps

    def _process(self, tgid: int, born: int) -> KnownProcess:
        key = (tgid, born)
        process = self._processes.get(key)
        if process is None:
            perf_map = PerfMap(tgid, self._perf_map_room)
            process = KnownProcess(ProcessMaps(tgid, self.files), [(0, perf_map)])
            self._processes[key] = process
            self._new[key] = time.monotonic() + _NEW_S
            while len(self._processes) > _MOST_PROCESSES:
                self._processes.popitem(last=False)[1].close()
        self._processes.move_to_end(key)
        return process

    def learn(self, mapped: Iterable[MappedCode]) -> None:
        """Known processes have MAPPED code: their maps are read again, soon."""
        codes: dict[int, list[MappedCode]] = {}
        for code in mapped:
            codes.setdefault(code.tgid, []).append(code)
        for (tgid, born), process in self._processes.items():
            if tgid in codes:
                process.maps.mapped(codes[tgid])
                self._behind.add((tgid, born))

    def catch_up(self) -> float | None:
        """Reads the maps that were told of, but not read yet, as far as it is time, and opens the
        perf maps of new processes. Returns the number of seconds until it is time for the next;
        None if nothing is left to read."""
        left = dict[tuple[int, int], float]()
        for key in self._behind:
            process = self._processes.get(key)
            left_s = process.maps.catch_up() if process else None
            if left_s is not None:
                left[key] = left_s
        self._behind = set(left)
        self._open_perf_maps()
        return min(left.values(), default=None)

    def _open_perf_maps(self) -> None:
        """Opens those of new processes, which could not be opened after the process's end."""
        now_s = time.monotonic()
        for key, until_s in list(self._new.items()):
            process = self._processes.get(key)
            if (
                process is None
                or now_s > until_s
                or (process.has_code_of_its_own and process.perf_maps[-1][1].look())
            ):
                del self._new[key]

    def executed(self, tgid: int, time_ns: int, born: int = 0) -> None:
        """A process has executed another program at TIME_NS (CLOCK_MONOTONIC): names of before are
        for samples of before."""
        known = (tgid, born) in self._processes
        process = self._process(tgid, born)
        if known:
            process.maps.executed(time_ns)
            process.begin_program(time_ns, PerfMap(tgid, self._perf_map_room))
            self._new[tgid, born] = time.monotonic() + _NEW_S

    def has_executed(self, tgid: int, time_ns: int, born: int = 0, *, is_over: bool) -> None:
        """The same where the maps know the program already. If it IS OVER, because the process has
        executed another one since, what it has told in a perf map is not known."""
        perf_map = PerfMap(0 if is_over else tgid, self._perf_map_room)
        self._process(tgid, born).begin_program(time_ns, perf_map)

    def copied(self, tgid: int, born: int, parent: tuple[int, int]) -> None:
        """A process is a copy of PARENT (id and birth), whose perf map tells of what both have."""
        self._process(tgid, born).copy_of = parent

    def read_told(self, tgid: int, born: int = 0) -> None:
        """Reads what the runtime of a process has told in its perf map, if it has code of its own:
        soon after samples were taken, because the runtime may tell of other functions at their
        addresses later."""
        process = self._processes.get((tgid, born))
        if process and process.has_code_of_its_own:
            process.perf_maps[-1][1].catch_up()

    def forget(self, tgid: int, born: int = 0) -> None:
        """A process has no more addresses to name. Safe to call for an unknown one."""
        if process := self._processes.pop((tgid, born), None):
            process.close()

    def _perf_map_room(self) -> int:
        """How many bytes perf maps may still take."""
        return _LARGEST_PERF_MAPS_BYTES - sum(one.nbytes for one in self._perf_maps())

    def _perf_maps(self) -> Iterator[PerfMap]:
        """Those of processes that were not asked for longest come first."""
        return (perf_map for one in self._processes.values() for _, perf_map in one.perf_maps)

    def trim(self) -> bool:
        """If the strings take more than 32 MB, forgets them all: numbers given before are void,
        and `strings` is another object. Returns whether it did. Drops perf maps, too, if these take
        all the memory for them. For between two batches."""
        if (room := self._perf_map_room()) <= 0:
            for perf_map in self._perf_maps():
                room += perf_map.nbytes
                perf_map.forget()
                if room >= _LARGEST_PERF_MAPS_BYTES // 2:
                    break
        if self.strings.memory_bytes <= _LARGEST_STRINGS_BYTES:
            return False
        self.strings = Strings()
        self._of_files.clear()
        self._of_kernel.clear()
        self.store.forget_marks()
        self.kernel.marks[:] = 0
        for perf_map in self._perf_maps():
            perf_map.marks[:] = 0
        return True

    def close(self) -> None:
        """Closes all files and ends the process that demangles. Safe to call twice."""
        while self._processes:
            self._processes.popitem()[1].close()
        self.store.close()
        self.files.close()
        self.demangler.close()

    def names(
        self,
        tgid: int,
        addresses: NDArray[np.uint64],
        is_return: NDArray[np.bool_],
        times_ns: NDArray[np.uint64] | None = None,
        born: int = 0,
    ) -> Named:
        """The names of ADDRESSES (u64[n]) of a process, the kernel's among them, of which some are
        return addresses (IS_RETURN, bool[n]): the call is before them. TIMES_NS (u64[n],
        CLOCK_MONOTONIC) are those of the samples, by default now. Never raises for what the process
        or its files are."""
        looked_up = addresses - (is_return & (addresses > 0)).astype(np.uint64)
        named = Named.nothing(len(looked_up))
        named.functions[:] = self.strings.number(UNKNOWN)
        named.addresses[:] = looked_up
        of_kernel = looked_up >= _KERNEL_HALF
        if of_kernel.any():
            self._name_kernel(named, np.flatnonzero(of_kernel), looked_up)
        user = np.flatnonzero(~of_kernel)
        if not len(user):
            return named
        process = self._process(tgid, born)
        maps = process.maps
        ids = np.full(len(looked_up), -1, np.int32)
        ids[user] = maps.locate(looked_up[user], None if times_ns is None else times_ns[user])
        user = user[ids[user] >= 0]
        of_file = maps.file_indexes[ids[user]]
        for number in np.unique(of_file).tolist():
            which = user[of_file == number]
            into = looked_up[which] - maps.starts[ids[which]] + maps.file_offsets[ids[which]]
            file = maps.files[number]
            named.modules[which], build_id = self._of_file(file)
            stored = self.store.get(file, tgid)
            if stored is not None and stored.elf is not None:
                self.files.needed(file)
                named.build_ids[which] = build_id
                self._name_of_elf(named, which, into, stored, stored.elf)
            else:
                if file.kind is not FileKind.ANONYMOUS:
                    self._reasons_add(f"{file.module}: {file.why_not}")
                named.addresses[which] = into
                self._name_of_runtime(named, which, process, looked_up, times_ns)
            self._give_offsets(named, which)
        return named

    def _name_of_elf(
        self,
        named: Named,
        which: NDArray[np.int64],
        offsets: NDArray[np.uint64],
        stored: StoredTable,
        elf: ElfFile,
    ) -> None:
        """Names the addresses WHICH, at OFFSETS in the file ELF."""
        found = elf.addresses(offsets)
        named.addresses[which] = np.where(found == np.uint64(NOWHERE), offsets, found)
        self._give(named, which, stored.table.find(found), stored.marks, stored.table.name)

    def _name_of_runtime(
        self,
        named: Named,
        which: NDArray[np.int64],
        process: KnownProcess,
        looked_up: NDArray[np.uint64],
        times_ns: NDArray[np.uint64] | None,
    ) -> None:
        """Names the addresses WHICH, by the perf maps of PROCESS and of those that it is a copy of:
        they are in memory that no ELF file is mapped to, or none that could be opened."""
        self._name_as_told(named, which, process, looked_up, times_ns)
        for _ in range(_MOST_COPIES):
            which = which[named.is_unnamed[which]]
            original = self._original_of(process) if len(which) else None
            if original is None:
                break
            copied_ns = process.maps.started_ns or 0
            self._name_as_told(named, which, original, looked_up, copied_ns=copied_ns + _TICK_NS)
            process = original

    def _name_as_told(  # noqa: PLR0917
        self,
        named: Named,
        which: NDArray[np.int64],
        process: KnownProcess,
        looked_up: NDArray[np.uint64],
        times_ns: NDArray[np.uint64] | None = None,
        copied_ns: int | None = None,
    ) -> None:
        """By the perf maps of PROCESS alone: as they were at TIMES_NS, or when it was COPIED."""
        if copied_ns is not None:
            times_ns = np.full(len(looked_up), copied_ns, np.uint64)
        for perf_map, mine in process.in_time(which, times_ns):
            found = perf_map.find(looked_up[mine], None if times_ns is None else times_ns[mine])
            if copied_ns is not None and len(perf_map):
                found[~perf_map.was_told(found, copied_ns)] = -1
            hit = np.flatnonzero(found >= 0)
            self._give(named, mine, found, perf_map.marks, perf_map.name)
            named.is_told[mine[hit]] = ~named.is_unnamed[mine[hit]]
            named.addresses[mine[hit]] = looked_up[mine[hit]] - perf_map.starts[found[hit]]

    def _original_of(self, process: KnownProcess) -> KnownProcess | None:
        """The process that PROCESS is a copy of; None if it is no copy, or of an unknown one."""
        if process.copy_of is None:
            return None
        original = self._process(*process.copy_of)
        began, copied = original.maps.started, process.maps.started
        # Another process may have its id by now.
        return None if began is None or copied is None or began > copied else original

    def _name_kernel(
        self, named: Named, which: NDArray[np.int64], looked_up: NDArray[np.uint64]
    ) -> None:
        addresses = looked_up[which]
        found = self.kernel.find(addresses)
        named.addresses[which] = self.kernel.relative(addresses)
        named.modules[which] = self.strings.number("[kernel]")
        named.functions[which] = self.strings.number("[kernel]")
        self._give(named, which, found, self.kernel.marks, self._kernel_name)
        for number in np.unique(found[found >= 0]).tolist():
            mine = which[found == number]
            module = self.kernel.function(number).module
            if module not in self._of_kernel:
                build_id = self.strings.number(self.kernel.build_id(module).hex())
                self._of_kernel[module] = (self.strings.number(module), build_id)
            named.modules[mine], named.build_ids[mine] = self._of_kernel[module]
        unnamed = which[named.is_unnamed[which] & (named.addresses[which] > 0)]
        self._give_offsets(named, unnamed)
        vsyscall = which[(addresses >= _VSYSCALL) & (addresses < _VSYSCALL + np.uint64(4096))]
        named.modules[vsyscall] = named.functions[vsyscall] = self.strings.number("[vsyscall]")

    def _kernel_name(self, number: int) -> bytes:
        return self.kernel.function(number).name.encode()

    def _give(
        self,
        named: Named,
        which: NDArray[np.int64],
        found: NDArray[np.int64],
        marks: NDArray[np.uint32],
        name: Callable[[int], bytes],
    ) -> None:
        """Gives the addresses WHICH the names of the functions FOUND, -1 for none. MARKS remember
        the numbers of names that were asked for before."""
        hit = np.flatnonzero(found >= 0)
        numbers = found[hit]
        new = np.unique(numbers[marks[numbers] == 0]).tolist()
        if new:
            names = self.demangler.demangled([name(number) for number in new])
            for number, text in zip(new, names, strict=True):
                if text:
                    marks[number] = self.strings.number(text)
        given = marks[numbers]
        good = given > 0
        at = which[hit[good]]
        named.functions[at] = given[good]
        named.is_unnamed[at] = False

    def _give_offsets(self, named: Named, which: NDArray[np.int64]) -> None:
        """Names those of the addresses WHICH that have no name by their module and their place in
        it."""
        for at in which[named.is_unnamed[which]].tolist():
            module = self.strings[named.modules[at]]
            named.functions[at] = self.strings.number(f"{module}+0x{named.addresses[at]:x}")

    def _of_file(self, file: MappedFile) -> tuple[int, int]:
        found = self._of_files.get(file)
        if found is None:
            found = (self.strings.number(file.module), self.strings.number(file.build_id.hex()))
            self._of_files[file] = found
        return found

    def _reasons_add(self, reason: str) -> None:
        if len(self._reasons) < _MOST_REASONS:
            self._reasons[reason] = None
