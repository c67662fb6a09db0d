"""Call frame instructions: where they are in a section, and by how much they advance.

They are found in lock-step, one of every program at a step, which needs their lengths alone.
Instructions: DWARF 5, section 6.4.2, and the GNU ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import leb128

Ints = NDArray[np.int64]

# Opcodes. Those above 0x3f have an operand in their lower six bits.
ADVANCE: Final = 0x40
OFFSET: Final = 0x80
RESTORE: Final = 0xC0
ADVANCE1, ADVANCE2, ADVANCE4, ADVANCE8 = 0x02, 0x03, 0x04, 0x1D
OFFSET_EXTENDED, RESTORE_EXTENDED, UNDEFINED, SAME_VALUE, REGISTER = (
    0x05,
    0x06,
    0x07,
    0x08,
    0x09,
)
REMEMBER_STATE, RESTORE_STATE = 0x0A, 0x0B
DEF_CFA, DEF_CFA_REGISTER, DEF_CFA_OFFSET, DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
EXPRESSION, OFFSET_EXTENDED_SF, DEF_CFA_SF, DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
VAL_OFFSET, VAL_OFFSET_SF, VAL_EXPRESSION = 0x14, 0x15, 0x16
NEGATE_RA_STATE, ARGS_SIZE, NEGATIVE_OFFSET_EXTENDED = 0x2D, 0x2E, 0x2F

# An operand's form by opcode; what is not here ends its program.
_FIXED: Final = {0: 1, REMEMBER_STATE: 1, RESTORE_STATE: 1, NEGATE_RA_STATE: 1} | {
    ADVANCE1: 2, ADVANCE2: 3, ADVANCE4: 5, ADVANCE8: 9,
}  # fmt: skip
_ONE_NUMBER: Final = (
    RESTORE_EXTENDED, UNDEFINED, SAME_VALUE, DEF_CFA_REGISTER, DEF_CFA_OFFSET,
    DEF_CFA_OFFSET_SF, ARGS_SIZE, *range(OFFSET, OFFSET + 64),
)  # fmt: skip
_TWO_NUMBERS: Final = (
    OFFSET_EXTENDED, REGISTER, DEF_CFA, OFFSET_EXTENDED_SF, DEF_CFA_SF, VAL_OFFSET,
    VAL_OFFSET_SF, NEGATIVE_OFFSET_EXTENDED,
)  # fmt: skip
_NUMBER_AND_BLOCK: Final = (EXPRESSION, VAL_EXPRESSION)
_IS_FIXED, _IS_ONE, _IS_TWO, _IS_BLOCK, _IS_NUMBER_BLOCK = 1, 2, 3, 4, 5

# The longest program: a step is one instruction of every program, and steps take time.
MOST_BYTES: Final = 1 << 14


def _forms() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    form, length = np.zeros(256, np.uint8), np.zeros(256, np.int32)
    for opcode, size in _FIXED.items():
        form[opcode], length[opcode] = _IS_FIXED, size
    form[ADVANCE : ADVANCE + 64] = form[RESTORE : RESTORE + 64] = _IS_FIXED
    length[ADVANCE : ADVANCE + 64] = length[RESTORE : RESTORE + 64] = 1
    form[list(_ONE_NUMBER)] = _IS_ONE
    form[list(_TWO_NUMBERS)] = _IS_TWO
    form[DEF_CFA_EXPRESSION] = _IS_BLOCK
    form[list(_NUMBER_AND_BLOCK)] = _IS_NUMBER_BLOCK
    return form, length


_FORM, _LENGTH = _forms()


@dataclass(frozen=True, slots=True)
class Programs:
    """N programs: where each lies in the section, and with what it begins."""

    begin: Ints  # (n,): offsets in the section, ascending; programs do not overlap
    end: Ints  # (n,)
    start: Ints  # (n,): address of the first instruction that the program is about
    code_alignment: Ints  # (n,): factor of advances
    data_alignment: Ints  # (n,): factor of offsets
    initial: Ints  # (n, columns): the rule before the first instruction

    def take(self, which: NDArray[np.bool_] | slice) -> Programs:
        """Those programs that WHICH selects."""
        return Programs(
            self.begin[which],
            self.end[which],
            self.start[which],
            self.code_alignment[which],
            self.data_alignment[which],
            self.initial[which],
        )

    def moved(self, by: int) -> Programs:
        """The programs where they are in a part of the section, BY bytes from here."""
        return replace(self, begin=self.begin + by, end=self.end + by)


@dataclass(frozen=True, slots=True)
class Stream:
    """The instructions of all programs, each program's after a mark of its beginning."""

    at: Ints  # (t,): offset in the section
    program: Ints  # (t,)
    opcode: NDArray[np.int64]  # (t,): of marks -1; operands in the lower bits are cut off
    operand: NDArray[np.int64]  # (t,): the lower six bits


@dataclass(frozen=True, slots=True)
class Code:
    """A section, (n,), and of each of its bytes what instruction or number begins there."""

    data: NDArray[np.uint8]  # the last leb128.PADDING bytes are zeros behind the section
    number_end: NDArray[np.int32]  # where a LEB128 number that begins here ends
    length: NDArray[np.int32]  # bytes of an instruction that begins here; 0 for none


def decoded(data: NDArray[np.uint8]) -> Code:
    """The section DATA, (bytes + leb128.PADDING,), as `run` needs it."""
    ends = leb128.ends(data)
    return Code(data, ends, _instruction_lengths(data, ends))


def _instruction_lengths(data: NDArray[np.uint8], ends: NDArray[np.int32]) -> NDArray[np.int32]:
    size = len(data) - leb128.PADDING
    form = _FORM[data]
    form[size:] = 0
    length = _LENGTH[data]
    at = np.flatnonzero(form == _IS_ONE)
    length[at] = ends[at + 1] - at
    at = np.flatnonzero(form == _IS_TWO)
    length[at] = ends[np.minimum(ends[at + 1], size)] - at
    for block_form in (_IS_BLOCK, _IS_NUMBER_BLOCK):
        at = np.flatnonzero(form == block_form)
        block = at + 1 if block_form == _IS_BLOCK else np.minimum(ends[at + 1], size)
        # Longer blocks than 127 bytes are no form of expression that is understood.
        length[at] = np.where(data[block] < leb128.CONTINUES, block + 1 + data[block] - at, 0)
    length[size:] = 0
    return length


def instructions(code: Code, programs: Programs) -> tuple[Stream, NDArray[np.bool_]]:
    """The instructions of PROGRAMS, and which programs, (n,), are damaged."""
    data, length = code.data, code.length
    damaged = np.zeros(len(programs.begin), np.bool_)
    who, at, end = np.arange(len(damaged)), programs.begin, programs.end
    places = [programs.begin - 1]
    while len(at):
        size = length[at]
        stops = (at >= end) | (size == 0)
        if stops.any():
            damaged[who[(at > end) | ((at < end) & (size == 0))]] = True
            goes_on = ~stops
            at, end, who, size = at[goes_on], end[goes_on], who[goes_on], size[goes_on]
        places.append(at)
        at = at + size
    is_instruction = np.zeros(len(data), np.bool_)
    is_instruction[np.concatenate(places)] = True
    # What the padding of programs is filled with does nothing.
    is_instruction &= data != 0
    is_instruction[programs.begin - 1] = True
    found = np.flatnonzero(is_instruction)
    is_mark = np.zeros(len(data), np.bool_)
    is_mark[programs.begin - 1] = True
    marks = is_mark[found]
    opcode = data[found].astype(np.int64)
    operand = opcode & 0x3F
    opcode = np.where(opcode >= ADVANCE, opcode & 0xC0, opcode)
    opcode[marks] = -1
    return Stream(found, np.cumsum(marks) - 1, opcode, operand), damaged


def advances(
    data: NDArray[np.uint8], stream: Stream, programs: Programs
) -> tuple[Ints, NDArray[np.bool_]]:
    """By how many bytes of code each instruction advances, (t,), and whether each program's sum can
    be an address, (n,)."""
    advance = np.where(stream.opcode == ADVANCE, stream.operand, 0)
    for opcode, size in ((ADVANCE1, 1), (ADVANCE2, 2), (ADVANCE4, 4), (ADVANCE8, 8)):
        index = np.flatnonzero(stream.opcode == opcode)
        for nth in range(min(size, 6)):  # addresses have 48 bits
            advance[index] |= data[stream.at[index] + 1 + nth].astype(np.int64) << (8 * nth)
    advance *= programs.code_alignment[stream.program]
    total = np.bincount(stream.program, advance, len(programs.begin))
    reaches = total < float(1 << 48)
    advance[~reaches[stream.program]] = 0
    return advance, reaches
