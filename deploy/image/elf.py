"""Which shared libraries an ELF file loads by name (its DT_NEEDED entries)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

# struct elf64_hdr: magic and class, then where the program headers are, their size and number.
_HEADER: Final = struct.Struct("<4sBB26xQ14xHH")
_PROGRAM: Final = struct.Struct(
    "<I4xQQ8xQ16x"
)  # elf64_phdr: type, offset, address, bytes in the file
_ENTRY: Final = struct.Struct("<qQ")  # Elf64_Dyn
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS = 1, 5
_CLASS_64: Final = 2
_LITTLE_ENDIAN: Final = 1


def needed(path: Path) -> list[str]:
    """The names of the libraries that the file at PATH needs; none, if it is no 64-bit ELF file."""
    data = path.read_bytes()
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF" + bytes((_CLASS_64, _LITTLE_ENDIAN)):
        return []
    *_, table, size, count = _HEADER.unpack_from(data)
    segments = [_PROGRAM.unpack_from(data, table + size * i) for i in range(count)]
    entries = [
        _ENTRY.unpack_from(data, at)
        for kind, offset, _, length in segments
        if kind == _DYNAMIC
        for at in range(offset, offset + length, _ENTRY.size)
    ]
    strings = next((value for tag, value in entries if tag == _STRINGS), 0)
    # The address of the strings becomes an offset by the segment that is loaded there.
    base = next(
        (o - a for kind, o, a, n in segments if kind == _LOAD and a <= strings < a + n), 0
    )  # fmt: skip
    return [
        data[base + strings + value : data.index(b"\0", base + strings + value)].decode()
        for tag, value in entries
        if tag == _NEEDED
    ]
