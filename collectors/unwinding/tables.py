"""The unwind tables of ELF files: found, compiled, and kept in memory and on disk.

They are kept by a hash of the section that they were made from, not by build id: a file of a
container may claim any build id, and must not change how others are unwound.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.elf import ElfError, read_exactly
from coral.bpf.libbpf import release_memory
from coral.collectors.symbols.elf import EM_AARCH64, EM_X86_64, ElfFile
from coral.collectors.unwinding.coroutines import context_start, ending_at
from coral.collectors.unwinding.eh_frame import compile_section
from coral.collectors.unwinding.entries import LARGEST_SECTION_BYTES
from coral.collectors.unwinding.rules import (
    ARM64,
    FIRST_REGISTER,
    X86_64,
    Machine,
    Rows,
    Saved,
    saved,
)

MACHINES: Final = {EM_X86_64: X86_64, EM_AARCH64: ARM64}

_PT_GNU_EH_FRAME: Final = 0x6474E550
_PC_RELATIVE_I4: Final = 0x1B  # DW_EH_PE_pcrel | DW_EH_PE_sdata4
# Registers that calls preserve are followed for CFAs by one of them. Those occur in the dynamic
# linker, libc, and assembly; other tables would have a third more rows for nothing.
_LARGEST_WHOLE_BYTES: Final = 256 << 10

_LARGE_BYTES: Final = 1 << 20

_FORMAT: Final = b"CoralUW1"
_HEADER: Final = struct.Struct("<8s6Q")  # format, rows, bytes of an index, rules, columns, counts
_DIGEST_BYTES: Final = 32
Indexes = NDArray[np.uint16] | NDArray[np.uint32]
_INDEX_BYTES: Final = (2, 4)


def eh_frame(elf: ElfFile) -> tuple[bytes, int, bool] | None:
    """The content of ELF's unwind table, its virtual address, and whether more may come behind it;
    None without. Raises `ElfError` and OSError."""
    header = elf.header_of(".eh_frame")
    content = None if header is None else elf.section(".eh_frame")
    if content:
        return content, int(header["address"]), False
    for segment in elf.segments[elf.segments["type"] == _PT_GNU_EH_FRAME][:1]:
        head = read_exactly(elf.fd, segment["offset"], 8)
        if head[0] != 1 or head[1] != _PC_RELATIVE_I4:
            return None
        (into,) = struct.unpack_from("<i", head, 4)
        address = int(segment["address"]) + 4 + into
        for load in elf.loads:
            left = int(load["address"]) + int(load["bytes"]) - address
            if address >= load["address"] and left > 0:
                offset = int(load["offset"]) + int(load["bytes"]) - left
                size = min(left, LARGEST_SECTION_BYTES)
                return read_exactly(elf.fd, offset, size), address, True
    return None


def compiled(section: bytes, address: int, machine: Machine, *, has_end: bool = False) -> Rows:
    """As `compile_section`. Of large tables, the rules of registers other than the frame pointer
    and the return address are left out, as unknown."""
    if len(section) <= _LARGEST_WHOLE_BYTES:
        return compile_section(section, address, machine, has_end=has_end)
    fewer = replace(machine, tracked=(machine.frame_pointer, machine.return_address))
    rows = compile_section(section, address, fewer, has_end=has_end)
    rules = np.full(
        (len(rows.rules), FIRST_REGISTER + len(machine.tracked)), saved(Saved.UNKNOWN), np.int64
    )
    rules[:, :FIRST_REGISTER] = rows.rules[:, :FIRST_REGISTER]
    for nth, register in enumerate(fewer.tracked):
        column = FIRST_REGISTER + machine.tracked.index(register)
        rules[:, column] = rows.rules[:, FIRST_REGISTER + nth]
    return replace(rows, rules=rules)


class Tables:
    """Compiled tables, by content. At most MEMORY_BYTES of them are in memory, beside those that
    others still refer to, and DISK_BYTES in DIRECTORY, which only this agent may write to; None for
    no files. Not safe to use from two threads at once.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        memory_bytes: int = 64 << 20,
        disk_bytes: int = 256 << 20,
    ) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._kept: OrderedDict[bytes, Rows] = OrderedDict()
        self.compiled = 0  # tables that were in neither
        self.read = 0  # tables that came from disk
        self.rebuilt = 0  # files of the cache that were damaged

    @property
    def nbytes(self) -> int:
        """Bytes of the tables in memory."""
        return sum(rows.nbytes for rows in self._kept.values())

    @property
    def rows(self) -> int:
        """Rows of the tables in memory."""
        return sum(len(rows.start) for rows in self._kept.values())

    def of(self, elf: ElfFile) -> Rows | None:
        """The table of ELF; None without, or where the file is damaged, or of another machine."""
        machine = MACHINES.get(elf.machine)
        try:
            found = None if machine is None else eh_frame(elf)
            outermost = context_start(elf) if found else None
        except (ElfError, OSError):
            return None
        if found is None or machine is None:
            return None
        section, address, has_end = found
        hashed = hashlib.blake2b(section, digest_size=_DIGEST_BYTES)
        told = f"{address} {has_end:d} {machine.name} {outermost}"
        hashed.update(told.encode())
        key = hashed.digest()
        rows = self._kept.pop(key, None) or self._read(key, machine)
        if rows is None:
            rows = compiled(section, address, machine, has_end=has_end)
            rows = rows if outermost is None else ending_at(rows, outermost)
            self.compiled += 1
            if len(section) > _LARGE_BYTES:
                release_memory()  # ten times as much was used on the way
            self._write(key, rows)
        self._kept[key] = rows
        while len(self._kept) > 1 and self.nbytes > self._memory_bytes:
            self._kept.popitem(last=False)
        return rows

    def _read(self, key: bytes, machine: Machine) -> Rows | None:
        if self._directory is None:
            return None
        path = self._directory / key.hex()
        try:
            content = path.read_bytes()
        except OSError:
            return None
        rows = unpacked(content, FIRST_REGISTER + len(machine.tracked))
        if rows is None:
            self.rebuilt += 1
            with suppress(OSError):
                path.unlink()
            return None
        self.read += 1
        with suppress(OSError):
            os.utime(path)  # the oldest go first
        return rows

    def _write(self, key: bytes, rows: Rows) -> None:
        if self._directory is None:
            return
        content = packed(rows)
        if len(content) > self._disk_bytes:
            return
        path = self._directory / key.hex()
        unfinished = path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._make_room(self._directory, len(content))
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
            unfinished.rename(path)
            return
        with suppress(OSError):
            unfinished.unlink()

    def _make_room(self, directory: Path, size: int) -> None:
        files = sorted(
            (status.st_mtime, status.st_size, entry.path)
            for entry in os.scandir(directory)
            if entry.is_file(follow_symlinks=False)
            and (status := entry.stat(follow_symlinks=False))
        )
        total = size + sum(of_file for _, of_file, _ in files)
        for _, of_file, path in files:
            if total <= self._disk_bytes:
                break
            Path(path).unlink()
            total -= of_file


def packed(rows: Rows) -> bytes:
    """ROWS as a file, with a digest at the end."""
    header = _HEADER.pack(
        _FORMAT,
        len(rows.start),
        rows.rule.itemsize,
        *rows.rules.shape,
        rows.entries,
        rows.damaged,
    )
    content = b"".join([header, rows.start.tobytes(), rows.rules.tobytes(), rows.rule.tobytes()])
    return content + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def unpacked(content: bytes, columns: int) -> Rows | None:
    """The rows in CONTENT, as `packed` wrote them for rules of COLUMNS; None if it is damaged."""
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if len(body) < _HEADER.size:
        return None
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    form, count, index_bytes, rules, width, entries, damaged = _HEADER.unpack_from(body)
    if form != _FORMAT or width != columns or index_bytes not in _INDEX_BYTES:
        return None
    if len(body) != _HEADER.size + count * (8 + index_bytes) + rules * width * 8:
        return None
    start = np.frombuffer(body, np.uint64, count, _HEADER.size)
    at = _HEADER.size + start.nbytes
    table = np.frombuffer(body, np.int64, rules * width, at).reshape(rules, width)
    if index_bytes == np.uint16().itemsize:
        rule: Indexes = np.frombuffer(body, np.uint16, count, at + table.nbytes)
    else:
        rule = np.frombuffer(body, np.uint32, count, at + table.nbytes)
    if not count or start[0] != 0 or (start[1:] <= start[:-1]).any() or rule.max() >= rules:
        return None
    return Rows(start, rule, table, entries, damaged)
