"""The seal of a compiled object: a checksum after its last byte, where ELF allows any data.

libbpf trusts an object. From a damaged one it may load programs that count wrong, or it may crash,
and the agent with it: with random bytes changed, one object in a hundred does. So the build seals
its objects, and the seal is checked before libbpf reads them. It protects from accidents only: a
person who can write the object can also write its seal.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

_MAGIC: Final = b"coral-crc32:"
_SEAL: Final = struct.Struct(f"<{len(_MAGIC)}sI")
# struct elf64_hdr: the offset of the section table, the size of an entry, and their number. clang
# writes the table last, so that it is missing from a truncated object.
_ELF: Final = struct.Struct("<4s36xQ10xHH2x")
_ELF_MAGIC: Final = b"\x7fELF"


class DamagedError(ValueError):
    """The object is not what the build made."""


def sealed(elf: bytes) -> bytes:
    """An object with its seal. Safe to call twice."""
    return opened(elf) + _SEAL.pack(_MAGIC, zlib.crc32(opened(elf)))


def opened(data: bytes) -> bytes:
    """An object without its seal. Raises `DamagedError` if the seal is broken. An object without a
    seal, compiled by hand, has to be complete ELF."""
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
