"""ELF files for tests: compiled here, opened as the agent opens them, and what binutils say of
them."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from coral.collectors.symbols.elf import ElfFile
from coral.collectors.symbols.files import FileKind, MappedFile
from coral.collectors.symbols.store import StoredTable, SymbolStore
from coral.collectors.symbols.table import SymbolTable, TableBuilder

# Number, address, size, type, binding, visibility with remarks, section, name.
_FUNCTION: Final = re.compile(
    r"\s*\d+: ([0-9a-f]+)\s+(?:0x)?[0-9a-f]+ (?:FUNC|IFUNC)\s+\S+\s+\S+\s+"
    r"(?:\[.*?\]\s+)?\d+ (.+)"
)


@contextmanager
def opened(path: Path) -> Iterator[ElfFile]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield ElfFile(fd)
    finally:
        os.close(fd)


@contextmanager
def table_of(path: Path) -> Iterator[SymbolTable]:
    """The table of a file's own symbols."""
    with opened(path) as elf:
        builder = TableBuilder(elf)
        builder.add_section(elf, ".symtab")
        builder.add_section(elf, ".dynsym")
        builder.add_stubs()
        yield builder.build()


@contextmanager
def stored(path: Path) -> Iterator[StoredTable]:
    """The table of a file as the agent has it, with what is in its debug information; that of no
    file if it is none."""
    store = SymbolStore()
    file = MappedFile(FileKind.FILE, str(path), "", key=str(path))
    file.take(os.open(path, os.O_RDONLY))
    try:
        yield store.get(file, os.getpid()) or StoredTable(
            SymbolTable.empty(), np.zeros(0, np.uint32), None
        )
    finally:
        store.close()
        file.close("done")


def names_at(table: SymbolTable, addresses: list[int]) -> list[str]:
    """The names at ADDRESSES; empty for none."""
    numbers = table.find(np.array(addresses, np.uint64)).tolist()
    return [table.name(number).decode() if number >= 0 else "" for number in numbers]


def functions_of(path: Path, *options: str) -> dict[int, set[str]]:
    """The functions of a file by their addresses, with all their names, as readelf has them."""
    text = subprocess.check_output(["readelf", "-sW", *options, path], text=True)
    found: dict[int, set[str]] = defaultdict(set)
    for line in text.splitlines():
        match = _FUNCTION.match(line)
        if match:
            name = re.sub(r"@.*| \[.*", "", match[2])
            found[int(match[1], 16)].add(name)
    return found
