"""Compiles `.eh_frame` to sorted rows, in numpy.

The section is what the compiler says about each function's stack frame (Linux Standard Base, core
part, section 10.6; DWARF 5, section 6.4). It may come from a hostile file: a damaged entry is left
out and counted, and nothing is raised. Node's 56,000 entries take 0.2 s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import leb128
from coral.collectors.unwinding.instructions import Code, Programs, decoded
from coral.collectors.unwinding.programs import Ran, run
from coral.collectors.unwinding.rules import (
    FLAGS,
    Machine,
    Rows,
    Rule,
    empty,
    no_rule,
)

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

# Larger sections than any that we know of: Chromium's has 20 MB.
LARGEST_SECTION_BYTES: Final = 128 << 20
_MOST_COMMON_ENTRIES: Final = 1 << 17
# Addresses above are no file's; so that they, and a file's number above them, fit in 64 bits.
ADDRESS_BITS: Final = 48

_LENGTH: Final = struct.Struct("<I").unpack_from
_LONG_LENGTH: Final = struct.Struct("<Q").unpack_from
# Fewer bytes between functions are padding, in which nothing runs.
_SMALLEST_GAP: Final = 16
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


@dataclass(frozen=True, slots=True)
class _Common:
    """What a common entry (CIE) says for the functions' entries (FDEs) that refer to it."""

    code_alignment: int
    data_alignment: int
    encoding: int  # of addresses
    has_data: bool  # its FDEs have augmentation data
    is_signal: bool
    begin: int  # of its instructions
    end: int


def compile_section(
    section: bytes, address: int, machine: Machine, *, has_end: bool = False
) -> Rows:
    """The rows of `.eh_frame`, which is loaded at the virtual ADDRESS of its file. With HAS_END, a
    terminator ends it, and other data may follow; otherwise terminators are passed over."""
    size = min(len(section), LARGEST_SECTION_BYTES)
    padded = np.zeros(size + leb128.PADDING, np.uint8)
    padded[:size] = np.frombuffer(section, np.uint8, size)
    head, at, end = _entries(section, size, has_end=has_end)
    identity = _field(padded, at, "<u4").astype(np.int64)
    is_common = identity == 0
    commons, which = _commons(section, at[is_common], end[is_common], machine)
    indexes = head[is_common][which]
    at, end, parent = at[~is_common], end[~is_common], (at - identity)[~is_common]
    entries = len(at)
    if not commons or not entries:
        return empty(machine, entries=entries, damaged=entries)
    code = decoded(padded)
    initial, sound = _initial(code, commons, machine)

    place = np.minimum(np.searchsorted(indexes, parent), len(indexes) - 1)
    fits = (indexes[place] == parent) & sound[place]
    at, end, place = at[fits], end[fits], place[fits]
    start, stop, begin, fits = _ranges(padded, at, end, place, commons=commons, address=address)
    place, start, stop, begin, end = place[fits], start[fits], stop[fits], begin[fits], end[fits]
    if not len(place):
        return empty(machine, entries=entries, damaged=entries)

    step = np.array([common.code_alignment for common in commons], np.int64)
    unit = np.array([common.data_alignment for common in commons], np.int64)
    ran = run(
        code,
        Programs(begin, end, start, step[place], unit[place], initial[place]),
        machine,
    )
    return _sorted_rows(ran, start, stop, entries, machine)


def _entries(section: bytes, size: int, *, has_end: bool) -> tuple[Ints, Ints, Ints]:
    """Where all entries, CIEs and FDEs, begin, where their contents begin, and where they end."""
    heads, begins, ends = [], [], []
    at = 0
    while at + 8 <= size:
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


def _commons(section: bytes, at: Ints, end: Ints, machine: Machine) -> tuple[list[_Common], Ints]:
    """The common entries that are sound, and which of those at AT they are."""
    commons, which = [], []
    places = zip(at[:_MOST_COMMON_ENTRIES].tolist(), end.tolist(), strict=False)
    for nth, (first, last) in enumerate(places):
        common = _common(section[first:last], first, machine)
        if common is not None:
            commons.append(common)
            which.append(nth)
    return commons, np.array(which, np.int64)


def _common(entry: bytes, first: int, machine: Machine) -> _Common | None:
    """The common entry whose contents are ENTRY, FIRST bytes into the section; None where it is
    damaged or of an unknown kind."""
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
    return _Common(
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
    value = bits = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << bits
        bits += 7
        if byte < 0x80:  # noqa: PLR2004
            return value - (1 << bits) if is_signed and byte & 0x40 else value, at


def _initial(
    code: Code, commons: list[_Common], machine: Machine
) -> tuple[Ints, NDArray[np.bool_]]:
    """The rule that each common entry's instructions make, (n, columns), and which are sound."""
    count = len(commons)
    base = no_rule(machine)
    programs = Programs(
        np.array([common.begin for common in commons], np.int64),
        np.array([common.end for common in commons], np.int64),
        np.zeros(count, np.int64),
        np.array([common.code_alignment for common in commons], np.int64),
        np.array([common.data_alignment for common in commons], np.int64),
        np.repeat(base[np.newaxis], count, axis=0),
    )
    ran = run(code, programs, machine)
    first = np.searchsorted(ran.program, np.arange(count))
    rules = ran.rules[first]
    rules[:, FLAGS] = [int(Rule.SIGNAL) if common.is_signal else 0 for common in commons]
    return rules, ~ran.damaged


def _field(padded: Bytes, at: Ints, dtype: str) -> NDArray[np.generic]:
    """The numbers of type DTYPE at the offsets AT, (k,): the padding allows for the last ones."""
    size = np.dtype(dtype).itemsize
    found = padded[at[:, np.newaxis] + np.arange(size)]
    return np.ascontiguousarray(found).view(dtype).reshape(len(at))


def _ranges(
    padded: Bytes, at: Ints, end: Ints, place: Ints, *, commons: list[_Common], address: int
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
        field = at[chosen] + 4
        value = _field(padded, field, dtype).astype(np.int64)
        start[chosen] = value + (address + field if base == _PC_RELATIVE else 0)
        length[chosen] = _field(padded, field + size, dtype.replace("i", "u")).astype(np.int64)
        begin[chosen] = field + 2 * size
        sound[chosen] = True
    sizes = np.flatnonzero(has_data & sound)
    skip = leb128.unsigned(padded, begin[sizes])
    sound[sizes] &= (skip >= 0) & (skip < LARGEST_SECTION_BYTES)
    after = leb128.after(padded, begin[sizes])
    begin[sizes] = after + np.where(sound[sizes], skip, 0)
    limit = 1 << ADDRESS_BITS
    sound &= (start >= 0) & (start < limit) & (length >= 0) & (length < limit) & (begin <= end)
    stop = start + length
    return start, stop, begin, sound & (stop < limit)


def _sorted_rows(ran: Ran, start: Ints, stop: Ints, entries: int, machine: Machine) -> Rows:
    """The rows of all functions by address. Where functions overlap, the one that begins later has
    the rest."""
    # A function of no bytes is none; of several that begin at one address the longest is kept.
    order = np.lexsort((-stop, start))
    order = order[(~ran.damaged & (stop > start))[order]]
    if not len(order):
        return empty(machine, entries=entries, damaged=entries)
    order = order[np.append(True, np.diff(start[order]) > 0)]
    damaged = entries - len(start) + int(ran.damaged.sum())
    limit = np.full(len(start), -1, np.int64)
    limit[order] = np.minimum(stop[order], np.append(start[order][1:], np.int64(1) << ADDRESS_BITS))
    kept = ran.address < limit[ran.program]
    address, rules = ran.address[kept], ran.rules[kept]

    # A linear hash of a rule stands for it: two rules with one hash are no accident, but somebody's
    # own file.
    weights = np.random.default_rng(0).integers(1, 2**62, rules.shape[1], np.int64) * 2 + 1
    digest = (rules * weights).sum(axis=1)
    none = no_rule(machine)
    # Addresses that no function covers: from the file's first one, and from a function's end that
    # is not another's start.
    gaps = stop[order][np.append(start[order][1:] - stop[order][:-1] >= _SMALLEST_GAP, True)]
    gaps = np.append(np.int64(0), gaps) if start[order[0]] > 0 else gaps
    address = np.concatenate([address, gaps])
    digest = np.concatenate([digest, np.full(len(gaps), (none * weights).sum())])
    origin = np.append(np.arange(len(rules)), np.full(len(gaps), -1))
    by_address = np.argsort(address, kind="stable")
    digest = digest[by_address]
    changes = np.append(True, digest[1:] != digest[:-1])
    by_address, digest = by_address[changes], digest[changes]
    _, first, rule = np.unique(digest, return_index=True, return_inverse=True)
    chosen = origin[by_address[first]]
    distinct = np.where((chosen >= 0)[:, np.newaxis], rules[chosen], none)
    place, distinct = _with_none_first(distinct, none)
    start_of_row = address[by_address].astype(np.uint64)
    start_of_row[0] = 0
    if len(distinct) <= np.iinfo(np.uint16).max:
        return Rows(start_of_row, place[rule].astype(np.uint16), distinct, entries, damaged)
    return Rows(start_of_row, place[rule].astype(np.uint32), distinct, entries, damaged)


def _with_none_first(distinct: Ints, none: Ints) -> tuple[Ints, Ints]:
    """Where each of DISTINCT rules is in a table that begins with the rule NONE, and that table."""
    is_none = (distinct == none).all(axis=1)
    order = np.argsort(~is_none, kind="stable")
    table = distinct[order]
    if not is_none.any():
        table = np.concatenate([none[np.newaxis], table])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) + (len(table) - len(order))
    return place, table
