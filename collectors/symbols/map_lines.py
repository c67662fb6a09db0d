"""The lines of /proc/PID/maps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from coral.collectors.symbols.files import Sighting

_LINE: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ..(.). ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+) *(.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of /proc/PID/maps."""

    seen: Sighting
    executable: bool
    offset: int


Neighbours = tuple[Line | None, Line | None]
"""The nearest lines before and after another one that map files."""


def lines_of(tgid: int, text: bytes, most: int) -> Iterator[Line]:
    """The mappings of code, MOST of them, and those of files."""
    left = most
    for match in _LINE.finditer(text):
        start, end, execute, offset, device, inode, path = match.groups()
        left -= execute == b"x"
        if left < 0:
            return
        if execute == b"x" or inode != b"0":
            yield Line(
                Sighting(
                    tgid,
                    int(start, 16),
                    int(end, 16),
                    device.decode(),
                    int(inode),
                    os.fsdecode(path),
                ),
                executable=execute == b"x",
                offset=int(offset, 16),
            )


def nearest_files(lines: Sequence[Line]) -> list[Line | None]:
    """For each of LINES, the last one before it that maps a file."""
    found: list[Line | None] = []
    last = None
    for line in lines:
        found.append(last)
        if line.seen.inode:
            last = line
    return found
