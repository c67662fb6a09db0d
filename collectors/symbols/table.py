"""The functions of one ELF file, by virtual address: sorted arrays, and names that stay in the file
until somebody asks for one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.elf import PF_X, SYMBOL, ElfError, read_exactly, read_table
from coral.collectors.symbols import intervals, plt
from coral.collectors.symbols.elf import SHF_EXECINSTR, ElfFile

LONGEST_NAME_BYTES: Final = 4096
_NO_TYPE, _FUNCTION, _INDIRECT_FUNCTION = 0, 2, 10
_GLOBAL, _WEAK, _UNIQUE = 1, 2, 10
_CHUNK: Final = 1 << 16
_MOST_SYMBOLS: Final = 4 << 20  # read
_MOST_FUNCTIONS: Final = 512 << 10  # kept: 130 MB and 2 s at worst, if all overlap
_LARGEST_STRINGS_BYTES: Final = 128 << 20
_EH_FRAME_HEADER: Final = 0x6474_E550  # PT_GNU_EH_FRAME
# Version 1, and the usual encodings: 4 bytes relative to the header (LSB, .eh_frame_hdr).
_SORTED_TABLE: Final = b"\x01\x1b\x03\x3b"
_HEADER_BYTES: Final = 12
_LARGEST_OFFSET: Final = (1 << 63) - 1  # that pread(2) accepts; headers may say more
_PLT_SUFFIX: Final = b"@plt"
_LONGEST_COMPARED_BYTES: Final = 255
_COMPARED_AT_ONCE: Final = 4096  # names

_FOUND: Final = np.dtype(
    [
        *(("start", "u8"), ("bytes", "u8"), ("until", "u8")),  # until: where its section ends
        *(("name", "u4"), ("source", "u1"), ("is_typed", "?"), ("bind", "u1")),
    ]
)


@dataclass(frozen=True, slots=True)
class _Strings:
    """A table of names: in a file, or in memory, with what to append to each name."""

    fd: int = -1
    offset: int = 0
    size: int = 0
    content: bytes = b""
    suffix: bytes = b""

    def read(self, at: int) -> bytes:
        if at >= self.size or self.offset + at > _LARGEST_OFFSET:
            return b""
        wanted = min(LONGEST_NAME_BYTES, self.size - at)
        if self.fd < 0:
            data = self.content[at : at + wanted]
        else:
            data = os.pread(self.fd, wanted, self.offset + at)
        name = data.partition(b"\0")[0]
        return name + self.suffix if name else b""

    def whole(self) -> NDArray[np.uint8]:
        data = self.content if self.fd < 0 else read_exactly(self.fd, self.offset, self.size)
        return np.frombuffer(data, np.uint8)


@dataclass(slots=True)
class SymbolTable:
    """Functions by their virtual addresses, disjoint. `find` gives numbers of them, `name` the name
    of one, as the file has it. Holds no descriptor: those of the files must stay open for names.
    """

    base: int
    starts: NDArray[np.uint32 | np.uint64]  # from `base` on
    ends: NDArray[np.uint32 | np.uint64]
    names: NDArray[np.uint32]
    sources: NDArray[np.uint8]
    strings: list[_Strings]
    origins: list[str] = field(default_factory=list)
    """Where the symbols are from, such as `.symtab`, for people."""

    @classmethod
    def empty(cls) -> Self:
        """A table without functions."""
        nothing = np.zeros(0, np.uint32)
        return cls(0, nothing, nothing, nothing, nothing.astype(np.uint8), [])

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        arrays = (self.starts, self.ends, self.names, self.sources)
        return sum(array.nbytes for array in arrays) + sum(len(s.content) for s in self.strings)

    def find(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The numbers of the functions that contain virtual ADDRESSES (u64[n]); -1 for those in
        none."""
        into = addresses - np.uint64(self.base)  # unsigned: those before are huge
        if self.starts.dtype == np.uint64 or not len(self.starts):
            return intervals.find(self.starts, self.ends, into)
        inside = into < self.ends[-1]
        narrow = np.where(inside, into, 0).astype(np.uint32)
        return np.where(inside, intervals.find(self.starts, self.ends, narrow), -1)

    def name(self, number: int) -> bytes:
        """The name of a function as the file has it, at most 4096 bytes, without the version of a
        symbol; empty if it cannot be read any more."""
        try:
            return _without_version(
                self.strings[self.sources[number]].read(int(self.names[number]))
            )
        except OSError:
            return b""


def _name_lengths(text: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lengths of the names that begin at STARTS in TEXT, at most 255. Looks at these alone: a
    file's tables of names may be mostly zeros, a place each."""
    found = np.empty(len(starts), np.int64)
    into = np.arange(_LONGEST_COMPARED_BYTES)
    for first in range(0, len(starts), _COMPARED_AT_ONCE):
        at = starts[first : first + _COMPARED_AT_ONCE]
        ends = text[np.minimum(at[:, np.newaxis] + into, len(text) - 1)] == 0
        ends[:, -1] |= ~ends.any(axis=1)
        found[first : first + len(at)] = np.minimum(ends.argmax(axis=1), len(text) - 1 - at)
    return found


def _without_version(name: bytes) -> bytes:
    """NAME without `@@VERSION`, or `@VERSION`, which the linker appends in .symtab."""
    start, at, version = name.partition(b"@")
    if at and start and version != b"plt":
        rest = version.removeprefix(b"@")
        if rest[:1].isupper() and rest.replace(b".", b"").replace(b"_", b"").isalnum():
            return start
    return name


class TableBuilder:
    """Gathers the functions of one file, ELF, from several tables."""

    def __init__(self, elf: ElfFile) -> None:
        self._elf = elf
        code = elf.loads[elf.loads["flags"] & PF_X != 0]
        self._code_ends = code["address"] + code["memory"]
        self._code = intervals.disjoint(code["address"], self._code_ends)
        self._found: list[NDArray[Any]] = []
        self._strings: list[_Strings] = []
        self._texts: dict[int, NDArray[np.uint8]] = {}
        self._origins: list[str] = []

    def add_section(self, source: ElfFile, name: str, origin: str = "") -> int:
        """Adds the functions in the table NAME (.symtab, .dynsym) of SOURCE, which is the file or
        has its debug information, except at addresses where others are. Returns how many. Raises
        `ElfError`, and OSError."""
        header = source.header_of(name)
        if header is None or header["type"] == 8 or header["link"] >= len(source.sections):  # noqa: PLR2004
            return 0
        strings_header = source.sections[header["link"]]
        strings = _Strings(source.fd, int(strings_header["offset"]), int(strings_header["bytes"]))
        if strings.size > _LARGEST_STRINGS_BYTES:
            raise ElfError(f"{strings.size} bytes of names")
        text = strings.whole()
        others = np.sort(np.concatenate(self._found)["start"]) if self._found else None
        count = min(int(header["bytes"]) // SYMBOL.itemsize, _MOST_SYMBOLS)
        number, added = len(self._strings), 0
        for first in range(0, count, _CHUNK):
            at = int(header["offset"]) + first * SYMBOL.itemsize
            size = min(_CHUNK, count - first) * SYMBOL.itemsize
            chosen = self._functions(source, read_table(source.fd, at, size, SYMBOL), text)
            if others is not None:
                chosen = chosen[intervals.find(others, others + np.uint64(1), chosen["start"]) < 0]
            chosen = chosen[: max(0, _MOST_FUNCTIONS - sum(map(len, self._found)))]
            chosen["source"] = number
            self._found.append(chosen)
            added += len(chosen)
        self._strings.append(strings)
        self._texts[number] = text
        if added:
            self._origins.append(origin or name)
        if sum(map(len, self._found)) >= _MOST_FUNCTIONS:
            self._origins.append(f"only {_MOST_FUNCTIONS} functions are known")
        return added

    def _functions(
        self, source: ElfFile, symbols: NDArray[Any], text: NDArray[np.uint8]
    ) -> NDArray[Any]:
        kind = symbols["info"] & 0xF
        typed = (kind == _FUNCTION) | (kind == _INDIRECT_FUNCTION)
        named = (symbols["name"] > 0) & (symbols["name"] < len(text)) & (symbols["section"] > 0)
        symbols = symbols[named & (typed | (kind == _NO_TYPE))]
        typed = symbols["info"] & 0xF != _NO_TYPE
        segment = intervals.find(self._code.starts, self._code.ends, symbols["address"])
        in_code = segment >= 0
        until = np.zeros(len(symbols), np.uint64)
        until[in_code] = self._code_ends[self._code.owners[segment[in_code]]]
        sections = source.sections
        number = np.where(symbols["section"] < len(sections), symbols["section"], 0)
        if len(sections):
            end = sections["address"][number] + sections["bytes"][number]
            inside = (number > 0) & (
                symbols["address"] - sections["address"][number] < sections["bytes"][number]
            )
            until = np.where(inside, end, until)
            # Labels of hand-written code. `.` and `$` begin names that tools have put there.
            letter = text[symbols["name"]] if len(symbols) else np.zeros(0, np.uint8)
            label = inside & (sections["flags"][number] & SHF_EXECINSTR != 0)
            typed_or_label = typed | (label & (letter != ord(".")) & (letter != ord("$")))
        else:
            typed_or_label = typed
        chosen = in_code & typed_or_label
        found = np.zeros(int(chosen.sum()), _FOUND)
        found["start"], found["bytes"] = symbols["address"][chosen], symbols["bytes"][chosen]
        found["until"], found["name"] = until[chosen], symbols["name"][chosen]
        found["is_typed"], found["bind"] = typed[chosen], symbols["info"][chosen] >> 4
        return found

    def add_stubs(self) -> None:
        """Adds the stubs through which the file calls others. Raises `ElfError`, and OSError."""
        stubs = plt.stubs_of(self._elf)
        header = self._elf.header_of(".dynstr")
        dynamic = stubs.names > 0
        if dynamic.any() and header is not None:
            strings = _Strings(
                self._elf.fd, int(header["offset"]), int(header["bytes"]), suffix=_PLT_SUFFIX
            )
            self._add_stubs(
                stubs.starts[dynamic], stubs.sizes[dynamic], stubs.names[dynamic], strings
            )
        direct = ~dynamic
        if direct.any():
            known = self._build_table()
            numbers = known.find(stubs.targets[direct])
            named = numbers >= 0
            names = [known.name(number) for number in numbers[named].tolist()]
            lengths = np.array([len(name) + 1 for name in names], np.uint32)
            at = np.cumsum(lengths, dtype=np.uint32) - lengths
            content = b"".join(name + b"\0" for name in names)
            strings = _Strings(size=len(content), content=content, suffix=_PLT_SUFFIX)
            self._add_stubs(stubs.starts[direct][named], stubs.sizes[direct][named], at, strings)

    def _add_stubs(
        self,
        starts: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        names: NDArray[np.uint32],
        strings: _Strings,
    ) -> None:
        found = np.zeros(len(starts), _FOUND)
        found["start"], found["bytes"], found["until"] = starts, sizes, starts + sizes
        found["name"], found["source"] = names, len(self._strings)
        self._strings.append(strings)
        self._found.append(found)
        self._origins.append("plt")

    def build(self) -> SymbolTable:
        """The table of all that was added. Raises `ElfError`, and OSError."""
        return self._build_table()

    def _build_table(self) -> SymbolTable:
        found = np.concatenate(self._found) if self._found else np.zeros(0, _FOUND)
        found = self._without_aliases(found)
        ends = self._ends(found)
        ranges = intervals.disjoint(found["start"], ends)
        base = int(ranges.starts[0]) if len(ranges.starts) else 0
        starts, stops = ranges.starts - np.uint64(base), ranges.ends - np.uint64(base)
        kind: type[np.unsignedinteger] = np.uint64
        if not len(stops) or stops[-1] < 1 << 32:
            kind = np.uint32
        return SymbolTable(
            base,
            starts.astype(kind),
            stops.astype(kind),
            found["name"][ranges.owners].copy(),
            found["source"][ranges.owners].copy(),
            list(self._strings),
            list(self._origins),
        )

    def _without_aliases(self, found: NDArray[Any]) -> NDArray[Any]:
        """One function for each address, ascending, with the largest of the sizes: the one with a
        size, then the one with a type, then the fewest underscores in front, then global before
        weak before local, then the shortest name, then the first by its letters."""
        if not len(found):
            return found
        bind = np.select(
            [np.isin(found["bind"], (_GLOBAL, _UNIQUE)), found["bind"] == _WEAK], [0, 1], 2
        )
        rank = (found["bytes"] == 0) * 2 + ~found["is_typed"]
        order = np.argsort(found["start"], kind="stable")
        found, rank, bind = found[order], rank[order], bind[order]
        begins = np.concatenate(([True], found["start"][1:] != found["start"][:-1]))
        shared = ~begins | np.concatenate((~begins[1:], [False]))
        if shared.any():
            at = np.flatnonzero(shared)
            keys = self._name_keys(found[at])
            best = np.lexsort((*keys[::-1][:-1], bind[at], keys[0], rank[at], found["start"][at]))
            sizes = np.maximum.reduceat(found["bytes"], np.flatnonzero(begins))
            found[at] = found[at][best]
            found = found[begins]
            found["bytes"] = sizes
        return found

    def _name_keys(self, found: NDArray[Any]) -> list[NDArray[Any]]:
        """What to order names by: the underscores in front (at most 3), the length (at most 255),
        the first 8 letters as a number, and where the name is."""
        underscores = np.zeros(len(found), np.int64)
        lengths = np.zeros(len(found), np.int64)
        letters = np.zeros(len(found), np.uint64)
        for number, strings in enumerate(self._strings):
            mine = np.flatnonzero(found["source"] == number)
            if not len(mine):
                continue
            text = self._texts.get(number)
            text = strings.whole() if text is None else text
            if not len(text):
                continue
            end = len(text) - 1
            at = np.minimum(found["name"][mine].astype(np.int64), end)
            lengths[mine] = _name_lengths(text, at)
            leading = np.ones(len(mine), np.bool_)
            first = np.zeros(len(mine), np.uint64)
            for n in range(8):
                letter = text[np.minimum(at + n, end)]
                leading &= letter == ord("_")
                if n < 3:  # noqa: PLR2004
                    underscores[mine] += leading
                first = first << np.uint64(8) | letter
            letters[mine] = first
        return [
            underscores,
            lengths,
            letters,
            found["source"].astype(np.int64) << 32 | found["name"],
        ]

    def _ends(self, found: NDArray[Any]) -> NDArray[np.uint64]:
        """Where functions end, which are ascending by their addresses. Those without a size end
        where the next symbol, the next row of the unwind table, or the section does; and within a
        function that has a size they are only labels, which end where they begin."""
        starts, sizes = found["start"], found["bytes"]
        room = np.where(found["until"] > starts, found["until"] - starts, 0)
        ends = starts + np.minimum(sizes, np.maximum(room, 0))
        open_ = np.flatnonzero(sizes == 0)
        if not len(open_):
            return np.asarray(ends)
        until = np.maximum(found["until"], starts)
        until[:-1] = np.minimum(until[:-1], starts[1:])
        rows = self._unwind_starts()
        if len(rows):
            at = np.searchsorted(rows, starts[open_], side="right")
            after = np.where(at < len(rows), rows[np.minimum(at, len(rows) - 1)], until[open_])
            until[open_] = np.minimum(until[open_], after)
        reach = np.maximum.accumulate(ends)
        before = np.concatenate((np.zeros(1, np.uint64), reach[:-1]))
        inside = starts[open_] < before[open_]
        ends[open_] = np.where(inside, starts[open_], until[open_])
        return np.asarray(ends)

    def _unwind_starts(self) -> NDArray[np.uint64]:
        """The virtual addresses at which functions begin, ascending, by .eh_frame_hdr."""
        elf = self._elf
        with suppress(ElfError):
            for segment in elf.segments[elf.segments["type"] == _EH_FRAME_HEADER][:1]:
                size = min(int(segment["bytes"]), 16 << 20)
                data = read_exactly(elf.fd, segment["offset"], size)
                if data[:4] != _SORTED_TABLE or len(data) < _HEADER_BYTES:
                    break
                count = int.from_bytes(data[8:_HEADER_BYTES], "little")
                count = min(count, (len(data) - _HEADER_BYTES) // 8)
                pairs = np.frombuffer(data, np.int32, 2 * count, _HEADER_BYTES)[::2]
                return np.sort(pairs.astype(np.int64).astype(np.uint64) + segment["address"])
        return np.zeros(0, np.uint64)
