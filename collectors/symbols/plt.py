"""Stubs through which code calls functions of other files (the procedure linkage table). They have
no symbols; each is named after the function whose address it loads.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.elf import SYMBOL, ElfError
from coral.collectors.symbols.elf import EM_AARCH64, EM_X86_64, ElfFile

_SECTIONS: Final = (".plt", ".plt.sec", ".plt.got", ".iplt")
_RELOCATIONS: Final = (".rela.plt", ".rela.dyn", ".rela.iplt")
_RELOCATION: Final = np.dtype([("where", "<u8"), ("info", "<u8"), ("addend", "<i8")])
_INDIRECT: Final = {EM_X86_64: 37, EM_AARCH64: 1032}  # R_X86_64_IRELATIVE, R_AARCH64_IRELATIVE
_STUB_BYTES: Final = 16
_SHORT_STUB_BYTES: Final = 8  # of .plt.got without endbr64
_MOST_STUBS: Final = 1 << 16
_LARGEST_TABLE_BYTES: Final = 32 << 20  # Chromium's relocations have 8 MB
_ADRP_X16: Final = 0x9000_0010
_LDR_X17_X16: Final = 0xF940_0211
_BTI_BYTES: Final = 4


class Stubs(NamedTuple):
    """Stubs: their virtual addresses and sizes (u64[n]), and after which functions they are named:
    where its name is in .dynstr (u32[n]) or, if that is 0, the function's address (u64[n])."""

    starts: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    names: NDArray[np.uint32]
    targets: NDArray[np.uint64]


def stubs_of(elf: ElfFile) -> Stubs:
    """The stubs of x86-64 and arm64. Raises `ElfError`, and OSError."""
    found = [_stubs_in(elf, name) for name in _SECTIONS]
    places = np.concatenate([place for _, _, place in found])
    starts = np.concatenate([start for start, _, _ in found])
    sizes = np.concatenate([size for _, size, _ in found])
    tables = [_table(elf, name, _RELOCATION) for name in _RELOCATIONS]
    slots = np.concatenate(tables)
    symbols = _table(elf, ".dynsym", SYMBOL)
    if not len(slots) or not len(places):
        nothing = np.zeros(0, np.uint64)
        return Stubs(nothing, nothing, nothing.astype(np.uint32), nothing)
    slots = slots[np.argsort(slots["where"], kind="stable")]
    at = np.minimum(np.searchsorted(slots["where"], places), len(slots) - 1)
    number = (slots["info"][at] >> np.uint64(32)).astype(np.int64)
    names = np.zeros(len(at), np.uint32)
    if len(symbols):
        inside = number < len(symbols)
        names = np.where(inside, symbols["name"][np.where(inside, number, 0)], 0).astype(np.uint32)
    is_indirect = slots["info"][at] & np.uint64(0xFFFF_FFFF) == _INDIRECT.get(elf.machine, 0)
    targets = np.where(is_indirect, slots["addend"][at], 0).astype(np.uint64)
    good = (slots["where"][at] == places) & ((names > 0) | (targets > 0))
    return Stubs(starts[good], sizes[good], names[good], targets[good])


def _table(elf: ElfFile, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The entries of the section NAME. Raises `ElfError`, also for more than 32 MB."""
    header = elf.header_of(name)
    if header is not None and header["bytes"] > _LARGEST_TABLE_BYTES:
        raise ElfError(f"{header['bytes']} bytes of {name}")
    return np.frombuffer(_whole(elf.section(name), dtype.itemsize), dtype)


def _whole(data: bytes | None, size: int) -> bytes:
    data = data or b""
    return data[: len(data) - len(data) % size]


def _stubs_in(
    elf: ElfFile, name: str
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """The stubs in the section NAME: their addresses, their sizes, and the addresses of the places
    in memory from which they take that of the function."""
    nothing = np.zeros(0, np.uint64)
    header, code = elf.header_of(name), elf.section(name)
    if header is None or not code:
        return nothing, nothing, nothing
    code, base = code[: _MOST_STUBS * _STUB_BYTES], int(header["address"])
    if elf.machine == EM_X86_64:
        size = _SHORT_STUB_BYTES if header["entry_bytes"] == _SHORT_STUB_BYTES else _STUB_BYTES
        into, places = _jumps(code, base)
    elif elf.machine == EM_AARCH64:
        size = _STUB_BYTES
        into, places = _loads(code, base)
    else:
        return nothing, nothing, nothing
    starts = np.uint64(base) + (into - into % np.uint64(size))
    if elf.machine == EM_AARCH64:
        # The first stub is of 32 bytes, the others of 16 or, with BTI or PAC, 24.
        starts = np.uint64(base) + into
        steps = np.diff(starts, append=np.uint64((base + len(code)) % (1 << 64)))
        return starts, np.minimum(steps, np.uint64(24)), places
    return starts, np.full(len(starts), size, np.uint64), places


def _jumps(code: bytes, base: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Where CODE of x86-64 jumps to an address in memory, as offsets, and where that is: `jmp
    *place(%rip)`, ff 25 and 32 bits relative to the next instruction."""
    data = np.frombuffer(code, np.uint8)
    at = np.flatnonzero((data[:-5] == 0xFF) & (data[1:-4] == 0x25))  # noqa: PLR2004
    parts = [data[at + n].astype(np.uint32) << np.uint32(8 * (n - 2)) for n in range(2, 6)]
    relative = np.bitwise_or.reduce(parts).view(np.int32).astype(np.int64) if len(at) else at
    places = (np.int64(base & (1 << 63) - 1) + at + 6 + relative).astype(np.uint64)
    return at.astype(np.uint64), places


def _loads(code: bytes, base: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """As `_jumps` for arm64: `adrp x16, page; ldr x17, [x16, #offset]`."""
    words = np.frombuffer(_whole(code, 4), np.uint32).astype(np.int64)
    page, load = words[:-1], words[1:]
    at = np.flatnonzero((page & 0x9F00_001F == _ADRP_X16) & (load & 0xFFC0_03FF == _LDR_X17_X16))
    page, load = page[at], load[at]
    pages = (page >> 5 & 0x7FFFF) << 2 | page >> 29 & 3
    pages = np.where(pages >= 1 << 20, pages - (1 << 21), pages)
    pc = np.int64(base & (1 << 63) - 1) + 4 * at
    places = (pc & ~0xFFF) + (pages << 12) + ((load >> 10 & 0xFFF) << 3)
    return (4 * at).astype(np.uint64), places.astype(np.uint64)
