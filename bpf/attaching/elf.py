"""Reads the tables of ELF files, and finds functions in them to attach uprobes to.

Files may belong to hostile containers. So they are read with pread(2), never mapped (truncating a
mapped file would end the agent with SIGBUS), everything read is bounded, and damage of any kind is
an `ElfError`. Format: elf(5).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_MAGIC_64_LITTLE: Final = b"\x7fELF\x02\x01"
HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
PT_LOAD: Final = 1
PF_X: Final = 1
_SYMBOL_TABLES: Final = (2, 11)  # SHT_SYMTAB, SHT_DYNSYM
_FUNCTION: Final = 2
_LARGEST_TABLE_BYTES: Final = 256 << 20

SEGMENT: Final = np.dtype("<u4, <u4, <u8, <u8, <u8, <u8, <u8, <u8")
SEGMENT.names = ("type", "flags", "offset", "address", "physical", "bytes", "memory", "align")
"""A program header, Elf64_Phdr of elf(5): `bytes` in the file, `memory` bytes in memory."""
SECTION: Final = np.dtype("<u4, <u4, <u8, <u8, <u8, <u8, <u4, <u4, <u8, <u8")
SECTION.names = (
    *("name", "type", "flags", "address", "offset", "bytes"),
    *("link", "info", "align", "entry_bytes"),
)
"""A section header, Elf64_Shdr of elf(5)."""
SYMBOL: Final = np.dtype("<u4, u1, u1, <u2, <u8, <u8")
SYMBOL.names = ("name", "info", "other", "section", "address", "bytes")
"""An entry of a table of symbols, Elf64_Sym of elf(5)."""


class ElfError(Exception):
    """A file that is no 64-bit, little-endian ELF file, or is damaged."""


def function_offsets(fd: int, names: Collection[str]) -> dict[str, list[int]]:
    """The offsets in the file of the functions called NAMES, which the file defines itself; a name
    that it does not define is left out. Versions of symbols (`@@`) are not part of their names.

    Local functions may share a name: offsets are ascending, and usually one. 80 ms for 150,000
    symbols. Raises `ElfError`, and OSError if FD cannot be read.
    """
    fields = read_header(fd)
    segments = read_table(fd, fields[5], fields[10] * SEGMENT.itemsize, SEGMENT)
    sections = read_table(fd, fields[6], fields[12] * SECTION.itemsize, SECTION)
    code = segments[(segments["type"] == PT_LOAD) & (segments["flags"] & PF_X != 0)]
    found: dict[str, set[int]] = {}
    for section in sections[np.isin(sections["type"], _SYMBOL_TABLES)]:
        if section["link"] >= len(sections):
            raise ElfError("a table of symbols without names")
        symbols = read_table(fd, section["offset"], section["bytes"], SYMBOL)
        strings = sections[section["link"]]
        text = read_exactly(fd, strings["offset"], strings["bytes"])
        for name in names:
            named = symbols[np.isin(symbols["name"], list(_occurrences(text, name)))]
            functions = (named["info"] & 0xF == _FUNCTION) & (named["section"] != 0)
            for address in named["address"][functions]:
                inside = code[address - code["address"] < code["bytes"]]  # unsigned: from 0 on
                for segment in inside[:1]:
                    offset = int(address) - int(segment["address"]) + int(segment["offset"])
                    found.setdefault(name, set()).add(offset)
    return {name: sorted(offsets) for name, offsets in found.items()}


def _occurrences(text: bytes, name: str) -> Iterator[int]:
    """Where in a table of strings a symbol's name may begin: linkers let a name share the end of a
    longer one."""
    wanted = name.encode() + b"\0"
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1)


def read_header(fd: int) -> tuple[Any, ...]:
    """The fields of the header of the file FD, in the order of elf(5), `e_ident` as bytes. Raises
    `ElfError`, and OSError if FD cannot be read."""
    header = read_exactly(fd, 0, HEADER.size)
    if header[: len(_MAGIC_64_LITTLE)] != _MAGIC_64_LITTLE:
        raise ElfError("not a 64-bit, little-endian ELF file")
    return HEADER.unpack(header)


def read_table(fd: int, offset: int, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The entries, of DTYPE, that are in SIZE bytes from OFFSET of the file FD; a last one that is
    incomplete is left out. Raises `ElfError`, and OSError if FD cannot be read."""
    size = int(size)
    return np.frombuffer(read_exactly(fd, offset, size - size % dtype.itemsize), dtype)


def read_exactly(fd: int, offset: int, size: int) -> bytes:
    """SIZE bytes from OFFSET of the file FD. Raises `ElfError` if they are not in the file or are
    more than 256 MB, and OSError if FD cannot be read."""
    offset, size = int(offset), int(size)
    if size > _LARGEST_TABLE_BYTES:
        raise ElfError(f"a table of {size} bytes")
    if offset + size > os.fstat(fd).st_size:
        raise ElfError(f"{size} bytes at {offset} are not in the file")
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise ElfError(f"{size} bytes at {offset} cannot be read")
    return data
