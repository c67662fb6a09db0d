"""Text that a process has moved into memory without a file, for huge pages: which file it is of."""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from coral.collectors.symbols.elf import ElfFile
from coral.collectors.symbols.files import MappedFile, MappedFiles, Mounts, memory_of
from coral.collectors.symbols.map_lines import Line, Neighbours

_PAGE_BYTES: Final = 4096
_COMPARED_PAGES: Final = 16
_LARGEST_OFFSET: Final = (1 << 62) - 1  # far below what pread(2) refuses


def original_of(
    line: Line, neighbours: Neighbours, files: MappedFiles, mounts: Mounts
) -> tuple[MappedFile, int] | None:
    """The file, and the offset in it, whose text was moved into the memory of LINE; None if that is
    something else. It lies between two mappings of the file, where the text was."""
    before, after = neighbours
    if before is None or after is None or before.seen.of_file != after.seen.of_file:
        return None
    file = files.get(before.seen, mounts)
    if file.elf is None:
        return None
    start, end = line.seen.start, line.seen.end
    for one in (before, after):
        bias = file.elf.bias(one.seen.start, one.seen.end, one.offset, one.executable)
        offset = None if bias is None else _code_offset(file.elf, start - bias)
        if offset is not None and _is_the_same(line.seen.tgid, start, end, file.elf, offset):
            return file, offset
    return None


def _code_offset(elf: ElfFile, address: int) -> int | None:
    """The offset in the file of the page of code at a virtual ADDRESS; None if none is there."""
    for offset, first, size in elf.few_contents[True]:
        skipped = first % _PAGE_BYTES
        if first - skipped <= address < first + size:
            found = offset - first + address
            return found if 0 <= found <= _LARGEST_OFFSET else None
    return None


def _is_the_same(tgid: int, start: int, end: int, elf: ElfFile, offset: int) -> bool:
    """Whether memory has the content of the file from OFFSET on: at most 16 pages, evenly spread,
    are compared, of which one may differ, by a debugger's breakpoint."""
    pages = (end - start) // _PAGE_BYTES
    chosen = np.unique(np.linspace(0, pages - 1, min(pages, _COMPARED_PAGES)).astype(np.int64))
    equal = compared = 0
    try:
        with memory_of(tgid) as memory:
            for page in chosen.tolist():
                of_file = os.pread(elf.fd, _PAGE_BYTES, offset + page * _PAGE_BYTES)
                if of_file:  # the last page of a mapping may be past the end of the file
                    compared += 1
                    in_memory = os.pread(memory, len(of_file), start + page * _PAGE_BYTES)
                    equal += in_memory == of_file
    except OSError:
        return False
    return equal > 0 and equal >= compared - 1
