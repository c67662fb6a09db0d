"""Symbol tables of all files, each made once and shared by all processes. Bounded in memory."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.elf import ElfError, read_exactly
from coral.collectors.symbols.debug import debug_file_of
from coral.collectors.symbols.elf import ElfFile
from coral.collectors.symbols.files import MappedFile
from coral.collectors.symbols.table import SymbolTable, TableBuilder

_MOST_BYTES: Final = 64 << 20
_MOST_TABLES: Final = 512
_DIGESTED: Final = (".symtab", ".dynsym", ".gnu_debuglink", ".gnu_debugdata")
_MOST_SHARED: Final = 2048
_MOST_COMPARED: Final = 4  # with one build id
_DIGEST_CHUNK_BYTES: Final = 4 << 20
# Of tables of symbols, names and debug information together, 0.3 s. A sparse file has any number of
# bytes and takes no room.
_LARGEST_DIGESTED_BYTES: Final = 256 << 20


class CacheStats(NamedTuple):
    """The tables in memory and the bytes that they take; how often one was asked for and was there
    (`hits`) or was not (`misses`), and how many were dropped because of the bounds."""

    tables: int
    memory_bytes: int
    hits: int
    misses: int
    evicted: int


@dataclass(slots=True)
class StoredTable:
    """A file's symbol table, and for each of its functions a number of the caller's, 0 at first
    (u32[n]). `elf` is the file, open until the table is dropped; None for one that cannot be."""

    table: SymbolTable
    marks: NDArray[np.uint32]
    elf: ElfFile | None
    fds: list[int] = field(default_factory=list)
    memory_bytes: int = 0
    build_id: bytes = b""
    digest: bytes = b""

    def close(self) -> None:
        """Closes the files that the names are read from."""
        while self.fds:
            os.close(self.fds.pop())


class SymbolStore:
    """Symbol tables by what their files contain, at most `most_bytes` and `most_tables`: then those
    that were not asked for for longest are dropped. Not safe to use from two threads at once.

    Files with the same build id share a table if the tables of symbols are equal in them too. The
    build id alone is not enough: a file is stripped, another one with the same id is not; and
    anybody can give a file the build id of another, whose names would then be wrong everywhere.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES, most_tables: int = _MOST_TABLES) -> None:
        self.most_bytes, self.most_tables = most_bytes, most_tables
        self._stored: OrderedDict[Hashable, StoredTable] = OrderedDict()
        self._shared: dict[Hashable, Hashable] = {}  # identities, by those of equal files
        self._bytes = self._hits = self._misses = self._evicted = 0

    @property
    def stats(self) -> CacheStats:
        """What the store has and has done so far."""
        return CacheStats(len(self._stored), self._bytes, self._hits, self._misses, self._evicted)

    def get(self, file: MappedFile, tgid: int) -> StoredTable | None:
        """The table of FILE, which the process TGID has mapped; None for one that is not open. A
        file without symbols has an empty table, and so has a damaged one. Never raises."""
        key = self._shared.get(file.identity, file.identity)
        if key in self._stored:
            self._hits += 1
            self._stored.move_to_end(key)
            return self._stored[key]
        if file.elf is None:
            return None
        self._misses += 1
        if shared := self._equal(file.elf, file.build_id):
            if len(self._shared) > _MOST_SHARED:
                self._shared.clear()
            self._shared[file.identity] = shared
            self._stored.move_to_end(shared)
            return self._stored[shared]
        stored = _load(file.elf, file.name, tgid)
        self._stored[file.identity] = stored
        self._bytes += stored.memory_bytes
        self._shrink()
        return stored

    def _equal(self, elf: ElfFile, build_id: bytes) -> Hashable:
        """The identity of a file with the same BUILD_ID and symbols as ELF, whose table is here;
        None without."""
        if not build_id:
            return None
        digest = b""
        same = [key for key, one in self._stored.items() if one.build_id == build_id and one.elf]
        for key in same[:_MOST_COMPARED]:
            stored = self._stored[key]
            digest = digest or _digest_of(elf)
            if not stored.digest and stored.elf:
                stored.digest = _digest_of(stored.elf)
            if digest and digest == stored.digest:
                return key
        return None

    def forget_marks(self) -> None:
        """Sets all marks back to 0."""
        for stored in self._stored.values():
            stored.marks[:] = 0

    def _shrink(self) -> None:
        while len(self._stored) > 1 and (
            self._bytes > self.most_bytes or len(self._stored) > self.most_tables
        ):
            _, dropped = self._stored.popitem(last=False)
            self._bytes -= dropped.memory_bytes
            self._evicted += 1
            dropped.close()

    def close(self) -> None:
        """Drops all tables. Safe to call twice."""
        while self._stored:
            self._stored.popitem()[1].close()
        self._bytes = 0


def _digest_of(elf: ElfFile) -> bytes:
    """Equal for files with the same segments and symbols; empty for a damaged one, or for more than
    256 MB of symbols. 60 ms for Node's 14 MB."""
    left = _LARGEST_DIGESTED_BYTES
    digest = hashlib.blake2b(digest_size=20)
    try:
        for name in _DIGESTED:
            header = elf.header_of(name)
            headers = [] if header is None else [header]
            if headers and 0 < header["link"] < len(elf.sections):
                headers.append(elf.sections[header["link"]])
            digest.update(f"{name} {len(headers)}:".encode())
            for one in headers:
                offset, size = int(one["offset"]), int(one["bytes"])
                left -= size
                if left < 0:
                    return b""
                digest.update(f"{one['address']},{size};".encode())
                for at in range(0, size, _DIGEST_CHUNK_BYTES):
                    chunk = min(_DIGEST_CHUNK_BYTES, size - at)
                    digest.update(read_exactly(elf.fd, offset + at, chunk))
        digest.update(elf.segments.tobytes())
    except (ElfError, OSError):
        return b""
    return digest.digest()


def _load(elf: ElfFile, path: str, tgid: int) -> StoredTable:
    """The symbols of ELF: its own, otherwise those of its debug information, and of both those that
    other files may use."""
    fds: list[int] = []
    extra = 0
    own: ElfFile | None = None
    table = SymbolTable.empty()
    try:
        fds.append(os.dup(elf.fd))
        own = ElfFile(fds[0])
        builder = TableBuilder(own)
        has_own = 0
        with suppress(ElfError):
            has_own = builder.add_section(own, ".symtab")
        if not has_own and (debug := debug_file_of(own, path, tgid)):
            fds.append(debug.elf.fd)
            extra = debug.memory_bytes
            with suppress(ElfError):
                builder.add_section(debug.elf, ".symtab", debug.origin)
        with suppress(ElfError):
            builder.add_section(own, ".dynsym")
        with suppress(ElfError):
            builder.add_stubs()
        with suppress(ElfError):
            table = builder.build()
    except (ElfError, OSError):
        pass
    marks = np.zeros(len(table), np.uint32)
    memory = table.nbytes + marks.nbytes + extra
    build_id = own.build_id if own else b""
    return StoredTable(table, marks, own, fds, memory, build_id)
