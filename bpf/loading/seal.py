"""The seal of a compiled object: a checksum behind its last byte, where ELF allows anything.

libbpf reads an object as its compiler wrote it. Of one that was damaged since it may load what
counts wrong, or crash, and the agent with it: of random bytes changed, one object in a hundred
does. So what the build made is sealed, and looked at before libbpf sees it. The seal is against
accidents; whoever may write the object may write another seal.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

_MAGIC: Final = b"coral-crc32:"
_SEAL: Final = struct.Struct(f"<{len(_MAGIC)}sI")
# struct elf64_hdr: where the section table is, how long an entry is, and how many there are. It is
# the last thing in what clang writes, so that it is missing from a truncated object.
_ELF: Final = struct.Struct("<4s36xQ10xHH2x")
_ELF_MAGIC: Final = b"\x7fELF"


class DamagedError(ValueError):
    """It is not as the build made it."""


def sealed(elf: bytes) -> bytes:
    """An object with its seal. Safe to call twice."""
    return opened(elf) + _SEAL.pack(_MAGIC, zlib.crc32(opened(elf)))


def opened(data: bytes) -> bytes:
    """An object without its seal. Raises `DamagedError` where the seal is broken. One that was
    never sealed, being compiled by hand, has to be ELF to its end."""
    elf, last = data[: -_SEAL.size], data[-_SEAL.size :]
    if len(last) == _SEAL.size:
        magic, checksum = _SEAL.unpack(last)
        if magic == _MAGIC:
            if zlib.crc32(elf) != checksum:
                raise DamagedError("its checksum is not that of the build")
            return elf
    if data[: len(_ELF_MAGIC)] != _ELF_MAGIC or len(data) < _ELF.size:
        raise DamagedError("it is no ELF object")
    _, table, entry_bytes, entries = _ELF.unpack_from(data)
    if table + entry_bytes * entries > len(data):
        raise DamagedError("it is truncated")
    return data
