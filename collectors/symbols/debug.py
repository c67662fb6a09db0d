"""Where the symbols of a stripped file are: in a compressed ELF file within it, or in one beside it
that a package of debug information has installed, in the process's root or in the agent's.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from coral.bpf.attaching.elf import ElfError
from coral.bpf.attaching.uprobes import ProcessFile
from coral.collectors.symbols.elf import ElfFile, open_bytes

_DEBUG: Final = "/usr/lib/debug"
_LARGEST_EMBEDDED_BYTES: Final = 32 << 20
_LARGEST_LINKED_BYTES: Final = 256 << 20  # whose checksum is computed, 0.2 s
_CHUNK_BYTES: Final = 1 << 20
_CRC_BYTES: Final = 4
_LINK_ALIGNMENT: Final = 4


class DebugFile(NamedTuple):
    """A file with symbols of another: its descriptor (`elf.fd`) is whoever's asked for it. `origin`
    says for people where it is from, `memory_bytes` how much memory it takes."""

    elf: ElfFile
    origin: str
    memory_bytes: int = 0


def debug_file_of(elf: ElfFile, path: str, tgid: int) -> DebugFile | None:
    """The first file with symbols of ELF, which the process TGID sees at PATH; None without. Never
    raises: what is damaged, or belongs to another file, is passed over."""
    for root in (tgid, os.getpid()):
        for candidate, crc in _candidates(elf, path):
            try:
                # Within the root's file system: a mount could be one that never answers.
                file = ProcessFile(root, candidate, within_mount=root == tgid)
            except OSError:
                continue
            try:
                found = ElfFile(file.fd)
                if _belongs(found, elf, crc) and os.fstat(elf.fd).st_ino != file.inode:
                    return DebugFile(found, candidate)
            except (ElfError, OSError):
                pass
            file.close()
    return _embedded(elf)


def _candidates(elf: ElfFile, path: str) -> Iterator[tuple[str, int | None]]:
    """Paths, with the checksum that the file must have if it has no build id."""
    if identity := elf.build_id.hex():
        yield f"{_DEBUG}/.build-id/{identity[:2]}/{identity[2:]}.debug", None
    try:
        link = elf.section(".gnu_debuglink") or b""
    except (ElfError, OSError):
        return
    name = link.partition(b"\0")[0]
    at = (len(name) + _LINK_ALIGNMENT) // _LINK_ALIGNMENT * _LINK_ALIGNMENT
    crc = link[at : at + _CRC_BYTES]
    if not name or b"/" in name or name in (b".", b"..") or len(crc) != _CRC_BYTES:
        return
    directory = PurePosixPath(path).parent
    for place in (directory, directory / ".debug", PurePosixPath(f"{_DEBUG}{directory}")):
        yield f"{place}/{os.fsdecode(name)}", int.from_bytes(crc, "little")


def _belongs(found: ElfFile, elf: ElfFile, crc: int | None) -> bool:
    if found.header_of(".symtab") is None:
        return False
    if elf.build_id:
        return found.build_id == elf.build_id
    return crc is not None and _checksum(found.fd) == crc


def _checksum(fd: int) -> int | None:
    """The CRC-32 of a file, as .gnu_debuglink has it; None for more than 256 MB."""
    if os.fstat(fd).st_size > _LARGEST_LINKED_BYTES:
        return None
    crc = at = 0
    while chunk := os.pread(fd, _CHUNK_BYTES, at):
        crc = zlib.crc32(chunk, crc)
        at += len(chunk)
    return crc


def _embedded(elf: ElfFile) -> DebugFile | None:
    """What is compressed in .gnu_debugdata (MiniDebugInfo of Fedora), copied to memory."""
    try:
        data = elf.section(".gnu_debugdata")
        if not data:
            return None
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LARGEST_EMBEDDED_BYTES * 2)
        content = decoder.decompress(data, _LARGEST_EMBEDDED_BYTES)
        fd = open_bytes(content, "gnu_debugdata")
    except (ElfError, OSError, lzma.LZMAError, EOFError):
        return None
    try:
        return DebugFile(ElfFile(fd), ".gnu_debugdata", len(content))
    except (ElfError, OSError):
        os.close(fd)
        return None
