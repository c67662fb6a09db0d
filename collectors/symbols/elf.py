"""One ELF file: its headers, its sections, and which byte of it has which virtual address.

Like `coral.bpf.attaching.elf`, on which this is built: files may belong to hostile containers, so
they are read with pread(2), everything read is bounded, and damage of any kind is an `ElfError`.
"""

from __future__ import annotations

import os
import struct
import zlib
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.elf import (
    PF_X,
    PT_LOAD,
    SECTION,
    SEGMENT,
    ElfError,
    read_exactly,
    read_header,
    read_table,
)

ET_EXEC: Final = 2
ET_DYN: Final = 3
EM_X86_64: Final = 62
EM_AARCH64: Final = 183
SHF_EXECINSTR: Final = 4
NOWHERE: Final = (1 << 64) - 1
"""The address of an offset that no segment loads, and the offset of an address that is not in the
file."""

_PT_NOTE: Final = 4
_SHT_NOTE: Final = 7
_SHT_NOBITS: Final = 8
_SHF_COMPRESSED: Final = 0x800
_COMPRESSION_HEADER_BYTES: Final = 24
_ZLIB: Final = 1
_XINDEX: Final = 0xFFFF  # SHN_XINDEX and PN_XNUM: the number is in the first section header
_MOST_SEGMENTS: Final = 4096
_MOST_COMPARED: Final = 64
_MOST_SECTIONS: Final = 1 << 18
_LARGEST_SECTION_BYTES: Final = 64 << 20
_LARGEST_NOTES_BYTES: Final = 64 << 10
_MOST_NOTES: Final = 64
_BUILD_ID_BYTES: Final = 64  # at most; 20 are usual
_NT_GNU_BUILD_ID: Final = 3
_NOTE: Final = struct.Struct("<III")  # bytes of the name, bytes of the content, type
_PAGE_BYTES: Final = 4096  # the smallest; mappings begin at multiples of it


class ElfFile:
    """An ELF file of 64 bits, little-endian, that FD is open for. FD stays the caller's, must stay
    open, and its position is not moved. Raises `ElfError`, and OSError if FD cannot be read.

    `type` and `machine` are `ET_...` and `EM_...`. `segments` are its program headers and
    `sections` its section headers (none in a file without), as `SEGMENT` and `SECTION` of
    `coral.bpf.attaching.elf`; `loads` are the segments that are loaded.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        header = read_header(fd)
        self.type, self.machine, self.entry = int(header[1]), int(header[2]), int(header[4])
        segments_at, sections_at = header[5], header[6]
        segment_count, section_count, names_in = header[10], header[12], header[13]
        first = None
        if sections_at and (_XINDEX in (segment_count, names_in) or not section_count):
            (first,) = read_table(fd, sections_at, SECTION.itemsize, SECTION)
            segment_count = int(first["info"]) if segment_count == _XINDEX else segment_count
            names_in = int(first["link"]) if names_in == _XINDEX else names_in
            section_count = section_count or int(first["bytes"])
        if not sections_at:
            section_count = 0
        if segment_count > _MOST_SEGMENTS or section_count > _MOST_SECTIONS:
            raise ElfError(f"{segment_count} segments and {section_count} sections")
        for count, size, dtype in (
            (segment_count, header[9], SEGMENT),
            (section_count, header[11], SECTION),
        ):
            if count and size != dtype.itemsize:
                raise ElfError(f"headers of {size} bytes")
        self.segments = read_table(fd, segments_at, segment_count * SEGMENT.itemsize, SEGMENT)
        self.sections = read_table(fd, sections_at, section_count * SECTION.itemsize, SECTION)
        self.loads = self.segments[self.segments["type"] == PT_LOAD]
        self._names_in = names_in

    @cached_property
    def _by_name(self) -> dict[bytes, int]:
        """The number of each section, by its name; of several, the first."""
        if not self._names_in < len(self.sections):
            return {}
        strings = self.sections[self._names_in]
        if strings["bytes"] > _LARGEST_SECTION_BYTES:
            raise ElfError(f"{strings['bytes']} bytes of names of sections")
        text = read_exactly(self.fd, strings["offset"], strings["bytes"])
        found: dict[bytes, int] = {}
        for index, at in enumerate(self.sections["name"].tolist()):
            found.setdefault(text[at : at + 256].partition(b"\0")[0], index)
        return found

    def header_of(self, name: str) -> Any:  # noqa: ANN401  an entry of a structured array
        """The header of the section NAME, a `SECTION` as numpy.void; None if there is none. Raises
        `ElfError`, and OSError."""
        index = self._by_name.get(name.encode())
        return None if index is None else self.sections[index]

    def section(self, name: str) -> bytes | None:
        """The content of the section NAME, decompressed where it is compressed; None if the file
        has none, or it is empty in the file, as in files of debug information. Raises `ElfError`,
        also for more than 64 MB, and OSError."""
        header = self.header_of(name)
        if header is None or header["type"] == _SHT_NOBITS:
            return None
        return self.content_of(header)

    def content_of(self, header: Any) -> bytes:  # noqa: ANN401  an entry of a structured array
        """The content of the section with a HEADER, as `section` gives it."""
        if header["bytes"] > _LARGEST_SECTION_BYTES:
            raise ElfError(f"a section of {header['bytes']} bytes")
        data = read_exactly(self.fd, header["offset"], header["bytes"])
        return _decompressed(data) if header["flags"] & _SHF_COMPRESSED else data

    @cached_property
    def build_id(self) -> bytes:
        """The build id that the linker wrote (NT_GNU_BUILD_ID); empty without. Raises OSError."""
        notes = [self.sections[self.sections["type"] == _SHT_NOTE]]
        notes.append(self.segments[self.segments["type"] == _PT_NOTE])
        for table in notes:
            for header in table[:_MOST_NOTES]:
                try:
                    size = min(int(header["bytes"]), _LARGEST_NOTES_BYTES)
                    found = build_id_in(read_exactly(self.fd, header["offset"], size))
                except ElfError:
                    continue
                if found:
                    return found
        return b""

    @cached_property
    def _contents(self) -> list[tuple[np.uint64, np.uint64, np.uint64, bool]]:
        """Of loaded segments with content: offset, address and size, and whether it is code. Those
        of code come last: of segments that share bytes of the file, they count."""
        loads = self.loads[self.loads["bytes"] > 0]
        loads = loads[np.argsort(loads["flags"] & PF_X, kind="stable")]
        columns = (loads["offset"], loads["address"], loads["bytes"], loads["flags"] & PF_X != 0)
        return list(zip(*columns, strict=True))

    @cached_property
    def few_contents(self) -> dict[bool, list[tuple[int, int, int]]]:
        """Of loaded segments with content, of code (True) and of others: offset, address and size.
        At most 64 of each: a file has a few, and each mapping of it is compared with all."""
        found: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        for first, address, size, is_code in self._contents:
            if len(found[bool(is_code)]) < _MOST_COMPARED:
                found[bool(is_code)].append((int(first), int(address), int(size)))
        return found

    def addresses(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The virtual addresses of bytes at OFFSETS (u64[n]) in the file, each by the segment in
        which it lies; NOWHERE for those in none."""
        found = np.full(len(offsets), NOWHERE, np.uint64)
        for first, address, size, _ in self._contents:
            into = offsets - first  # unsigned: those before the segment are huge
            np.copyto(found, into + address, where=into < size)
        return found

    def offsets(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The offsets in the file of virtual ADDRESSES (u64[n]); NOWHERE for those that no segment
        loads from the file."""
        found = np.full(len(addresses), NOWHERE, np.uint64)
        for first, address, size, _ in self._contents:
            into = addresses - address
            np.copyto(found, into + first, where=into < size)
        return found

    def bias(self, start: int, end: int, file_offset: int, executable: bool = True) -> int | None:
        """What to add to virtual addresses of the file for those in a process that has mapped it to
        START until END from FILE_OFFSET on, EXECUTABLE or not, modulo 2^64; None if no such segment
        lies there. Segments may share pages of the file.

        A mapping of several segments, which no usual loader makes, has the bias of the one of which
        it has most.
        """
        most, bias = 0, None
        for first, address, size in self.few_contents[executable]:
            last = min(first + size, file_offset + end - start)
            shared = last - max(first - first % _PAGE_BYTES, file_offset)
            if shared > most:
                most = shared
                bias = (start - file_offset + first - address) % (1 << 64)
        return bias


def build_id_in(notes: bytes) -> bytes:
    """The build id among NOTES, as in a section .note or in /sys/kernel/notes; empty without.
    Whatever else they contain is skipped."""
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, size, kind = (
            int.from_bytes(notes[at + n : at + n + 4], "little") for n in (0, 4, 8)
        )
        name = notes[at + _NOTE.size :][:name_bytes]
        start = at + _NOTE.size + (name_bytes + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < size <= _BUILD_ID_BYTES:
            found = notes[start : start + size]
            return found if len(found) == size else b""
        at = start + (size + 3 & ~3)
    return b""


def _decompressed(data: bytes) -> bytes:
    """The content of a section with SHF_COMPRESSED (Elf64_Chdr of elf(5))."""
    if int.from_bytes(data[:4], "little") != _ZLIB:
        raise ElfError("a section that is not compressed by zlib")
    size = int.from_bytes(data[8:16], "little")
    if size > _LARGEST_SECTION_BYTES:
        raise ElfError(f"a compressed section of {size} bytes")
    try:
        found = zlib.decompressobj().decompress(data[_COMPRESSION_HEADER_BYTES:], size + 1)
    except zlib.error as error:
        raise ElfError(f"a compressed section: {error}") from error
    if len(found) != size:
        raise ElfError("a compressed section of another size than it says")
    return found


def open_bytes(content: bytes, name: str) -> int:
    """A descriptor of a file in memory with CONTENT, for ELF files that are in none: the vdso, and
    those within others. NAME is for /proc/PID/fd. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.close(fd)
        raise
    return fd
