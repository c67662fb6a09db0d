"""Runs the call frame instructions of all functions of a file at once.

The instructions of all programs are first found in lock-step (only their lengths are needed for
that), and are then one long array in which a register's rule at some instruction is that of the
last instruction before it that sets it: `maximum.accumulate` over indexes. A restored state refers
to the remembered one the same way. Instructions: DWARF 5, section 6.4.2, and the GNU ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import leb128
from coral.collectors.unwinding.expressions import cfa_of, saved_by
from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    Cfa,
    Machine,
    Saved,
    cfa,
    saved,
    saved_at_cfa,
)

Ints = NDArray[np.int64]

# Opcodes. Those above 0x3f have an operand in their lower six bits.
_ADVANCE: Final = 0x40
_OFFSET: Final = 0x80
_RESTORE: Final = 0xC0
_ADVANCE1, _ADVANCE2, _ADVANCE4, _ADVANCE8 = 0x02, 0x03, 0x04, 0x1D
_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED, _SAME_VALUE, _REGISTER = (
    0x05,
    0x06,
    0x07,
    0x08,
    0x09,
)
_REMEMBER_STATE, _RESTORE_STATE = 0x0A, 0x0B
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET, _DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
_EXPRESSION, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = 0x14, 0x15, 0x16
_NEGATE_RA_STATE, _ARGS_SIZE, _NEGATIVE_OFFSET_EXTENDED = 0x2D, 0x2E, 0x2F

# An operand's form by opcode; what is not here ends its program.
_FIXED: Final = {0: 1, _REMEMBER_STATE: 1, _RESTORE_STATE: 1, _NEGATE_RA_STATE: 1} | {
    _ADVANCE1: 2, _ADVANCE2: 3, _ADVANCE4: 5, _ADVANCE8: 9,
}  # fmt: skip
_ONE_NUMBER: Final = (
    _RESTORE_EXTENDED, _UNDEFINED, _SAME_VALUE, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET,
    _DEF_CFA_OFFSET_SF, _ARGS_SIZE, *range(_OFFSET, _OFFSET + 64),
)  # fmt: skip
_TWO_NUMBERS: Final = (
    _OFFSET_EXTENDED, _REGISTER, _DEF_CFA, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _VAL_OFFSET,
    _VAL_OFFSET_SF, _NEGATIVE_OFFSET_EXTENDED,
)  # fmt: skip
_NUMBER_AND_BLOCK: Final = (_EXPRESSION, _VAL_EXPRESSION)
_IS_FIXED, _IS_ONE, _IS_TWO, _IS_BLOCK, _IS_NUMBER_BLOCK = 1, 2, 3, 4, 5

# The longest program: a step is one instruction of every program, and steps take time.
_MOST_BYTES: Final = 1 << 16
_LARGEST_OFFSET: Final = (1 << 31) - 1
_RESTORED: Final = -(1 << 62)  # as a register's rule: that of the common entry


def _forms() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    form, length = np.zeros(256, np.uint8), np.zeros(256, np.int32)
    for opcode, size in _FIXED.items():
        form[opcode], length[opcode] = _IS_FIXED, size
    form[_ADVANCE : _ADVANCE + 64] = form[_RESTORE : _RESTORE + 64] = _IS_FIXED
    length[_ADVANCE : _ADVANCE + 64] = length[_RESTORE : _RESTORE + 64] = 1
    form[list(_ONE_NUMBER)] = _IS_ONE
    form[list(_TWO_NUMBERS)] = _IS_TWO
    form[_DEF_CFA_EXPRESSION] = _IS_BLOCK
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


@dataclass(frozen=True, slots=True)
class Ran:
    """The rows of N programs."""

    program: Ints  # (m,): ascending
    address: Ints  # (m,): ascending within a program
    rules: Ints  # (m, columns)
    damaged: NDArray[np.bool_]  # (n,): the program's rows are not to be trusted


@dataclass(frozen=True, slots=True)
class _Stream:
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
        length[at] = np.where(data[block] < 0x80, block + 1 + data[block] - at, 0)
    length[size:] = 0
    return length


def run(code: Code, programs: Programs, machine: Machine) -> Ran:
    """Runs PROGRAMS of the section CODE. Never raises for damaged programs: they are marked."""
    stream, damaged = _instructions(code, programs)
    advance, reaches = _advances(code.data, stream, programs)
    cumulated = np.cumsum(advance)
    first = np.flatnonzero(stream.opcode < 0)
    base = cumulated[first]
    rows = np.flatnonzero((stream.opcode < 0) | (advance > 0))
    # A row's rule is that of the last instruction before the next row.
    last = np.append(rows[1:], len(stream.at))[: len(rows)] - 1
    program = stream.program[rows]
    address = cumulated[rows] - base[program] + programs.start[program]
    damaged |= ~reaches

    states = _States(stream, damaged)
    rules = programs.initial[program]
    values = _values(code, stream, programs, damaged)
    for column, (sets, value) in _columns(stream, values, machine).items():
        setter = states.setter(sets, last)
        found = value[setter]
        keeps = (stream.opcode[setter] < 0) | (found == _RESTORED)
        rules[:, column] = np.where(keeps, rules[:, column], found)
    return Ran(program, address, rules, damaged)


def _instructions(code: Code, programs: Programs) -> tuple[_Stream, NDArray[np.bool_]]:
    data, length = code.data, code.length
    damaged = (programs.end - programs.begin > _MOST_BYTES) | (programs.begin > programs.end)
    who = np.flatnonzero(~damaged)
    at, end = programs.begin[who], programs.end[who]
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
    opcode = np.where(opcode >= _ADVANCE, opcode & 0xC0, opcode)
    opcode[marks] = -1
    return _Stream(found, np.cumsum(marks) - 1, opcode, operand), damaged


def _advances(
    data: NDArray[np.uint8], stream: _Stream, programs: Programs
) -> tuple[Ints, NDArray[np.bool_]]:
    """By how many bytes of code each instruction advances, (t,), and whether each program's sum can
    be an address, (n,)."""
    advance = np.where(stream.opcode == _ADVANCE, stream.operand, 0)
    for opcode, size in ((_ADVANCE1, 1), (_ADVANCE2, 2), (_ADVANCE4, 4), (_ADVANCE8, 8)):
        index = np.flatnonzero(stream.opcode == opcode)
        for nth in range(min(size, 6)):  # addresses have 48 bits
            advance[index] |= data[stream.at[index] + 1 + nth].astype(np.int64) << (8 * nth)
    advance *= programs.code_alignment[stream.program]
    total = np.bincount(stream.program, advance, len(programs.begin))
    reaches = total < float(1 << 48)
    advance[~reaches[stream.program]] = 0
    return advance, reaches


class _States:
    """Which instruction set something last, as seen from others, across restored states."""

    def __init__(self, stream: _Stream, damaged: NDArray[np.bool_]) -> None:
        self._index = np.arange(len(stream.at), dtype=np.int32)
        self._is_mark = stream.opcode < 0
        self._restores = np.flatnonzero(stream.opcode == _RESTORE_STATE)
        self._slot = np.zeros(len(stream.at), np.int32)
        self._slot[self._restores] = np.arange(len(self._restores))
        self._is_restore = np.zeros(len(stream.at), np.bool_)
        self._is_restore[self._restores] = True
        self._remembered = self._match(stream, damaged)

    def _match(self, stream: _Stream, damaged: NDArray[np.bool_]) -> Ints:
        """The instruction that remembered what each restoring one restores, (r,)."""
        remembers = stream.opcode == _REMEMBER_STATE
        events = np.flatnonzero(remembers | self._is_restore)
        remembering = remembers[events]
        program = stream.program[events]
        depth = np.cumsum(np.where(remembering, 1, -1))
        begins = np.diff(program, prepend=-1) > 0
        before = np.where(remembering, depth - 1, depth + 1)[begins]
        depth -= before[np.cumsum(begins) - 1]
        level = np.where(remembering, depth, depth + 1)
        # Those of one level of one program take turns: remember, restore.
        order = np.lexsort((events, level, program))
        previous = np.roll(order, 1)
        fits = remembering[previous] & ~remembering[order] & (level[order] >= 1)
        fits &= (program[previous] == program[order]) & (level[previous] == level[order])
        source = np.full(len(events), -1, np.int64)
        source[order] = np.where(fits, events[previous], -1)
        source = source[~remembering]
        unmatched = source < 0
        damaged[stream.program[self._restores[unmatched]]] = True
        mark = np.flatnonzero(self._is_mark)[stream.program[self._restores]]
        return np.where(unmatched, mark, source)

    def setter(self, sets: NDArray[np.bool_], seen_from: Ints) -> Ints:
        """The last of the instructions SETS, (t,), or the mark of the beginning, as seen from each of
        SEEN_FROM, (k,)."""
        stops = sets | self._is_mark | self._is_restore
        last = np.maximum.accumulate(np.where(stops, self._index, np.int32(0)))
        origin = last[self._remembered]
        while len(again := np.flatnonzero(self._is_restore[origin])):
            # All chains halve at once: the origin of an origin is known as far as this one's.
            origin[again] = origin[self._slot[origin[again]]]
        found = last[seen_from].astype(np.int64)
        again = np.flatnonzero(self._is_restore[found])
        found[again] = origin[self._slot[found[again]]]
        return found


@dataclass(frozen=True, slots=True)
class _Values:
    """What each instruction sets, (t,) each."""

    register: Ints  # the register whose rule it sets; -1
    rule: Ints  # that rule
    sets_cfa: NDArray[np.bool_]
    cfa: Ints
    sets_cfa_offset: NDArray[np.bool_]
    cfa_offset: Ints


def _values(code: Code, stream: _Stream, programs: Programs, damaged: NDArray[np.bool_]) -> _Values:
    data, ends = code.data, code.number_end
    total = len(stream.at)
    register, rule = np.full(total, -1, np.int64), np.zeros(total, np.int64)
    sets_cfa, sets_cfa_offset = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    new_cfa, cfa_offset = np.zeros(total, np.int64), np.zeros(total, np.int64)
    factor = programs.data_alignment[stream.program]

    def those(*opcodes: int) -> Ints:
        found = stream.opcode == opcodes[0]
        for opcode in opcodes[1:]:
            found |= stream.opcode == opcode
        return np.flatnonzero(found)

    def bounded(index: Ints, value: Ints) -> Ints:
        damaged[stream.program[index[np.abs(value) > _LARGEST_OFFSET]]] = True
        return np.clip(value, -_LARGEST_OFFSET, _LARGEST_OFFSET)

    def factored(index: Ints, value: Ints) -> Ints:
        return bounded(index, bounded(index, value) * factor[index])

    def second(index: Ints) -> Ints:
        return ends[stream.at[index] + 1].astype(np.int64)

    index = those(_OFFSET)
    register[index] = stream.operand[index]
    offset = factored(index, leb128.unsigned(data, stream.at[index] + 1))
    rule[index] = saved_at_cfa(offset)
    index = those(_RESTORE)
    register[index], rule[index] = stream.operand[index], _RESTORED

    named = those(
        _OFFSET_EXTENDED, _OFFSET_EXTENDED_SF, _RESTORE_EXTENDED, _UNDEFINED, _SAME_VALUE, _REGISTER,
        _EXPRESSION, _VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION, _NEGATIVE_OFFSET_EXTENDED,
    )  # fmt: skip
    register[named] = leb128.unsigned(data, stream.at[named] + 1)
    rule[named] = saved(Saved.UNKNOWN)
    rule[those(_RESTORE_EXTENDED)] = _RESTORED
    rule[those(_UNDEFINED)] = saved(Saved.UNDEFINED)
    rule[those(_SAME_VALUE)] = saved(Saved.SAME)
    for opcode, decode, sign in (
        (_OFFSET_EXTENDED, leb128.unsigned, 1),
        (_OFFSET_EXTENDED_SF, leb128.signed, 1),
        (_NEGATIVE_OFFSET_EXTENDED, leb128.unsigned, -1),
        (_VAL_OFFSET, leb128.unsigned, 1),
        (_VAL_OFFSET_SF, leb128.signed, 1),
    ):
        index = those(opcode)
        rule[index] = saved_at_cfa(sign * factored(index, decode(data, second(index))))
        if opcode in (_VAL_OFFSET, _VAL_OFFSET_SF):
            rule[index] += int(Saved.IS_CFA) - int(Saved.AT_CFA)
    index = those(_REGISTER)
    other = leb128.unsigned(data, second(index))
    rule[index] = np.where(
        other < 32, saved(Saved.IN_REGISTER) | (other & 31) << 4, saved(Saved.UNKNOWN)
    )
    raw = data.tobytes() if len(those(_EXPRESSION, _DEF_CFA_EXPRESSION)) else b""
    known: dict[bytes, int] = {}
    index = those(_EXPRESSION)
    for at, begin in zip(index.tolist(), second(index).tolist(), strict=True):
        block = raw[begin + 1 : begin + 1 + raw[begin]]
        if block not in known:
            known[block] = saved_by(block)
        rule[at] = known[block]

    index = those(_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_REGISTER)
    sets_cfa[index] = True
    new_cfa[index] = leb128.unsigned(data, stream.at[index] + 1)
    new_cfa[index[new_cfa[index] >= 32]] = cfa(Cfa.UNKNOWN)
    index = those(_DEF_CFA)
    cfa_offset[index] = bounded(index, leb128.unsigned(data, second(index)))
    index = those(_DEF_CFA_SF)
    cfa_offset[index] = factored(index, leb128.signed(data, second(index)))
    index = those(_DEF_CFA_OFFSET)
    cfa_offset[index] = bounded(index, leb128.unsigned(data, stream.at[index] + 1))
    index = those(_DEF_CFA_OFFSET_SF)
    cfa_offset[index] = factored(index, leb128.signed(data, stream.at[index] + 1))
    sets_cfa_offset[those(_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_OFFSET, _DEF_CFA_OFFSET_SF)] = True
    index = those(_DEF_CFA_EXPRESSION)
    sets_cfa[index] = sets_cfa_offset[index] = True
    found: dict[bytes, tuple[int, int]] = {}
    for at, begin in zip(index.tolist(), (stream.at[index] + 1).tolist(), strict=True):
        block = raw[begin + 1 : begin + 1 + raw[begin]]
        if block not in found:
            found[block] = cfa_of(block)
        new_cfa[at], cfa_offset[at] = found[block]
    return _Values(register, rule, sets_cfa, new_cfa, sets_cfa_offset, cfa_offset)


def _columns(
    stream: _Stream, values: _Values, machine: Machine
) -> dict[int, tuple[NDArray[np.bool_], Ints]]:
    """Which instructions set each column of a rule, and to what."""
    columns = {
        CFA: (values.sets_cfa, values.cfa),
        CFA_OFFSET: (values.sets_cfa_offset, values.cfa_offset),
    }
    for nth, register in enumerate(machine.tracked):
        columns[FIRST_REGISTER + nth] = (values.register == register, values.rule)
    return columns
