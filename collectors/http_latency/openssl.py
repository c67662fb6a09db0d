"""Where OpenSSL lies: the files that processes execute, opened as they see them, and the functions
that these define."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from coral.bpf.attaching.elf import ElfError, function_offsets
from coral.bpf.attaching.uprobes import ProcessFile

_EXECUTED: Final = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) ..x. ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([1-9][0-9]*) +(/.*)$",
    re.MULTILINE,
)
# Where a program that is yet to be executed will find libssl.
_LIBRARIES: Final = ("lib/*/libssl.so*", "usr/lib/*/libssl.so*", "usr/lib*/libssl.so*")
LIBRARY: Final = "/libssl"
DELETED: Final = " (deleted)"


class Mapped(NamedTuple):
    """Executed code of a process, of a file that may have been replaced since."""

    tgid: int
    device: int
    inode: int
    path: str


def executed(tgid: int) -> Iterator[tuple[Mapped, str]]:
    """The files that a process has mapped to execute, and where; none if it has ended. Raises
    PermissionError."""
    try:
        with open(f"/proc/{tgid}/maps", "rb") as maps:  # noqa: PTH123  quicker
            text = maps.read()
    except PermissionError:
        raise
    except OSError:
        return
    for where, _, device, inode, path in _EXECUTED.findall(text):
        major, minor = (int(part, 16) for part in device.split(b":"))
        yield (
            Mapped(tgid, os.makedev(major, minor), int(inode), os.fsdecode(path)),
            where.decode(),
        )


def libraries(tgid: int) -> set[str]:
    """The paths of libssl, as the process sees them, in the usual places."""
    root = Path(f"/proc/{tgid}/root")
    with suppress(OSError):
        return {f"/{path.relative_to(root)}" for name in _LIBRARIES for path in root.glob(name)}
    return set()


def opened(code: Mapped, where: str) -> ProcessFile:
    """The file of CODE. Raises OSError: it cannot be known where a replaced one lies now."""
    if where:
        with suppress(OSError):  # of which only privileged processes may look at others
            return ProcessFile.mapped(code.tgid, where)
    if code.path.endswith(DELETED):
        raise FileNotFoundError(code.path)
    return ProcessFile(code.tgid, code.path)


def functions(fd: int, names: Collection[str], needed: Collection[str]) -> dict[str, list[int]]:
    """The functions among NAMES that a file defines, with their offsets; none unless it has those
    NEEDED."""
    try:
        found = function_offsets(fd, names)
    except ElfError:
        return {}
    return found if all(name in found for name in needed) else {}
