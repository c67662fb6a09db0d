"""The entries of `.eh_frame`: common ones (CIEs), and those of functions (FDEs) that refer to them.

Layout: Linux Standard Base, core part, section 10.6.1; encodings of addresses: section 10.5.1.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import leb128
from coral.collectors.unwinding.instructions import MOST_BYTES
from coral.collectors.unwinding.rules import Machine

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

# Larger sections than any that we know of: Chromium's has 20 MB.
LARGEST_SECTION_BYTES: Final = 32 << 20
_MOST_ENTRIES: Final = 1 << 20
# Addresses above are no file's; so that they, and a file's number above them, fit in 64 bits.
ADDRESS_BITS: Final = 48

_MOST_COMMON_ENTRIES: Final = 1 << 17
_LENGTH: Final = struct.Struct("<I").unpack_from
_LONG_LENGTH: Final = struct.Struct("<Q").unpack_from
_IS_LONG: Final = 0xFFFFFFFF
# DW_EH_PE: the format in the lower four bits, what it is relative to in the next three.
_FORMATS: Final = {
    0x0: "<u8",
    0x2: "<u2",
    0x3: "<u4",
    0x4: "<u8",
    0xA: "<i2",
    0xB: "<i4",
    0xC: "<i8",
}
_PC_RELATIVE: Final = 0x10
_VERSIONS: Final = (1, 3)
_LARGEST_FACTOR: Final = 256
_MOST_BITS: Final = 63


@dataclass(frozen=True, slots=True)
class Common:
    """What a common entry (CIE) says for the functions' entries (FDEs) that refer to it."""

    code_alignment: int
    data_alignment: int
    encoding: int  # of addresses
    has_data: bool  # its FDEs have augmentation data
    is_signal: bool
    begin: int  # of its instructions
    end: int


def entries(section: bytes, size: int, *, has_end: bool) -> tuple[Ints, Ints, Ints]:
    """Where all entries, CIEs and FDEs, begin, where their contents begin, and where they end."""
    heads, begins, ends = array("q"), array("q"), array("q")
    at = 0
    while at + 8 <= size and len(heads) < _MOST_ENTRIES:
        head = at
        (length,) = _LENGTH(section, at)
        at += 4
        if length == 0 and has_end:
            break
        if length == _IS_LONG:
            if at + 8 > size:
                break
            (length,) = _LONG_LENGTH(section, at)
            at += 8
        if length > size - at:
            break
        if length >= 4:  # noqa: PLR2004
            heads.append(head)
            begins.append(at)
            ends.append(at + length)
        at += length
    return np.array(heads, np.int64), np.array(begins, np.int64), np.array(ends, np.int64)


def commons(section: bytes, at: Ints, end: Ints, machine: Machine) -> tuple[list[Common], Ints]:
    """The common entries that are sound, and which of those at AT they are."""
    commons, which = [], []
    places = zip(at[:_MOST_COMMON_ENTRIES].tolist(), end.tolist(), strict=False)
    for nth, (first, last) in enumerate(places):
        common = _common(section[first:last], first, machine)
        if common is not None:
            commons.append(common)
            which.append(nth)
    return commons, np.array(which, np.int64)


def _common(entry: bytes, first: int, machine: Machine) -> Common | None:
    """The common entry whose contents are ENTRY, FIRST bytes into the section; None where it is
    damaged or of an unknown kind."""
    if len(entry) > MOST_BYTES:
        return None
    try:
        version = entry[4]
        closing = entry.index(b"\0", 5)
        augmentation = entry[5:closing].decode("ascii")
        code_alignment, at = _number(entry, closing + 1)
        data_alignment, at = _number(entry, at, is_signed=True)
        column, at = (entry[at], at + 1) if version == 1 else _number(entry, at)
        encoding, end = _augmented(entry, at, augmentation)
    except (IndexError, ValueError):
        return None
    if version not in _VERSIONS or column != machine.return_address or end > len(entry):
        return None
    if not 0 < code_alignment < _LARGEST_FACTOR or abs(data_alignment) > _LARGEST_FACTOR:
        return None
    return Common(
        code_alignment,
        data_alignment,
        encoding,
        augmentation.startswith("z"),
        "S" in augmentation,
        first + end,
        first + len(entry),
    )


def _augmented(entry: bytes, at: int, augmentation: str) -> tuple[int, int]:
    """The encoding of addresses, and where the instructions begin. Raises ValueError for an unknown
    AUGMENTATION whose data cannot be passed over."""
    if not augmentation:
        return 0, at
    if not augmentation.startswith("z"):
        raise ValueError(augmentation)
    size, at = _number(entry, at)
    end, encoding = at + size, 0
    for letter in augmentation[1:]:
        if letter == "R":
            encoding, at = entry[at], at + 1
        elif letter == "L":
            at += 1
        elif letter == "P":
            at += 1 + _pointer_bytes(entry[at])
        elif letter not in "SBG":
            break
    return encoding, end


def _pointer_bytes(encoding: int) -> int:
    return np.dtype(_FORMATS[encoding & 0xF]).itemsize if encoding & 0xF in _FORMATS else 4


def _number(data: bytes, at: int, *, is_signed: bool = False) -> tuple[int, int]:
    """A LEB128 number, and where it ends. Raises IndexError at the end of DATA, and ValueError for
    more than 63 bits."""
    value = bits = 0
    while bits < _MOST_BITS:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << bits
        bits += 7
        if byte < 0x80:  # noqa: PLR2004
            return value - (1 << bits) if is_signed and byte & 0x40 else value, at
    raise ValueError("a number of more than 63 bits")


def field(padded: Bytes, at: Ints, dtype: str) -> NDArray[np.generic]:
    """The numbers of type DTYPE at the offsets AT, (k,): the padding allows for the last ones."""
    size = np.dtype(dtype).itemsize
    found = padded[at[:, np.newaxis] + np.arange(size)]
    return np.ascontiguousarray(found).view(dtype).reshape(len(at))


def ranges(
    padded: Bytes, at: Ints, end: Ints, place: Ints, *, commons: list[Common], address: int
) -> tuple[Ints, Ints, Ints, NDArray[np.bool_]]:
    """Of functions' entries: first address, address after the last, where the instructions begin,
    and which of the entries are sound."""
    encodings = np.array([common.encoding for common in commons], np.int64)[place]
    has_data = np.array([common.has_data for common in commons], np.bool_)[place]
    start, length = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
    begin = np.zeros(len(at), np.int64)
    sound = np.zeros(len(at), np.bool_)
    for encoding in np.unique(encodings).tolist():
        dtype, base = _FORMATS.get(encoding & 0xF), encoding & 0xF0
        if dtype is None or base not in (0, _PC_RELATIVE):
            continue
        size = np.dtype(dtype).itemsize
        chosen = np.flatnonzero((encodings == encoding) & (at + 4 + 2 * size <= end))
        number = at[chosen] + 4
        value = field(padded, number, dtype).astype(np.int64)
        start[chosen] = value + (address + number if base == _PC_RELATIVE else 0)
        length[chosen] = field(padded, number + size, dtype.replace("i", "u")).astype(np.int64)
        begin[chosen] = number + 2 * size
        sound[chosen] = True
    sizes = np.flatnonzero(has_data & sound)
    skip = leb128.unsigned(padded, begin[sizes])
    sound[sizes] &= (skip >= 0) & (skip < LARGEST_SECTION_BYTES)
    after = leb128.after(padded, begin[sizes])
    begin[sizes] = after + np.where(sound[sizes], skip, 0)
    limit = 1 << ADDRESS_BITS
    sound &= (start >= 0) & (start < limit) & (length >= 0) & (length < limit) & (begin <= end)
    stop = start + length
    sound &= (stop < limit) & (end - begin <= MOST_BYTES)
    return start, stop, begin, sound
